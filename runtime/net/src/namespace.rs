//! Network namespaces, and visits to them.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::NetError;

/// An open network namespace; it lives on while this is there.
#[derive(Clone, Debug)]
pub(crate) struct Namespace(Arc<File>);

impl Namespace {
    /// Opens the namespace at `path`, which must not be the calling thread's.
    pub(crate) fn open(path: &Path) -> Result<Self, NetError> {
        let failed = |source| NetError::Open {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let identity = |file: &File| -> io::Result<(u64, u64)> {
            let data = file.metadata()?;
            Ok((data.dev(), data.ino()))
        };
        let own = File::open("/proc/thread-self/ns/net").map_err(failed)?;
        if identity(&file).map_err(failed)? == identity(&own).map_err(failed)? {
            return Err(NetError::Own(path.to_owned()));
        }
        Ok(Self(Arc::new(file)))
    }

    /// Runs `work` inside, on a thread of its own.
    pub(crate) fn visit<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetError> {
        let visit = || {
            move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|err| NetError::Enter(err.into()))?;
            Ok(work())
        };
        std::thread::scope(|scope| {
            let visitor = std::thread::Builder::new()
                .name("netns".to_owned())
                .spawn_scoped(scope, visit)
                .map_err(NetError::Enter)?;
            match visitor.join() {
                Ok(outcome) => outcome,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }
}
