//! Notices that the kernel killed a process for want of memory.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use caisson_wire::agent::FromAgent;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use super::Events;
use super::cgroup::{Cgroup, read_start};

/// Watches one container's cgroup for as long as that exists. Clones share the count, so that every kill is
/// told of once.
#[derive(Clone, Debug)]
pub(crate) struct OomWatch(Arc<Watch>);

#[derive(Debug)]
struct Watch {
    container: String,
    /// Not kept alive by the watch: the cgroup's removal is what ends it.
    cgroup: Weak<Cgroup>,
    events: Events,
    told: AtomicU64,
}

impl OomWatch {
    /// Starts to watch, if the kernel counts such kills. The watch ends when the descriptor is closed.
    pub(crate) fn start(cgroup: &Arc<Cgroup>, container: &str, events: &Events) -> Option<(Self, OwnedFd)> {
        let file = cgroup.open("memory.events").ok()?;
        let (end, kept) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).ok()?;
        let watch = Self(Arc::new(Watch {
            container: container.to_owned(),
            cgroup: Arc::downgrade(cgroup),
            events: events.clone(),
            told: AtomicU64::new(0),
        }));
        let watching = watch.clone();
        crate::spawn("oom", move || drop(watching.follow(&file, &end))).ok()?;
        Some((watch, kept))
    }

    /// Looks now, and tells of what is new.
    pub(crate) fn look(&self) {
        let Some(cgroup) = self.0.cgroup.upgrade() else {
            return;
        };
        let kills = cgroup.oom_kills();
        if self.0.told.fetch_max(kills, Ordering::Relaxed) < kills {
            self.0.events.send(FromAgent::OutOfMemory {
                container: self.0.container.clone(),
            });
        }
    }

    fn follow(&self, file: &std::fs::File, end: &OwnedFd) -> io::Result<()> {
        loop {
            // Reading re-arms the poll, and fails once the cgroup is removed.
            read_start(file)?;
            self.look();
            let mut polled = [
                PollFd::new(file, PollFlags::PRI),
                PollFd::new(end, PollFlags::empty()), // hang-ups are always reported
            ];
            match rustix::event::poll(&mut polled, None) {
                Ok(_) if !polled[1].revents().is_empty() => return Ok(()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(err) => return Err(err.into()),
            }
        }
    }
}
