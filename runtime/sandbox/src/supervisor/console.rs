//! What the guest prints and what the vmm process says: text from where nothing is trusted, in bounded files.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use tokio::io::Interest;

use crate::disk::{Directory, older};

/// Bytes after which the file is put aside; with the one before, twice that is kept.
const MOST: u64 = 256 * 1024;
/// Bytes read at a time: a quarter of what a pipe holds (pipe(7)).
const CHUNK: usize = 16 * 1024;

/// The file, and the one before it.
#[derive(Debug)]
pub(crate) struct BoundedLog {
    path: PathBuf,
    old: PathBuf,
    file: Option<File>,
    len: u64,
}

impl BoundedLog {
    pub(crate) fn new(directory: &Directory, name: &str) -> Self {
        Self {
            path: directory.path().join(name),
            old: directory.path().join(older(name)),
            file: None,
            len: 0,
        }
    }

    /// Adds to the file. A disk that is full must not end a sandbox: what cannot be written is lost.
    fn write(&mut self, bytes: &[u8]) {
        if let Err(err) = self.try_write(bytes) {
            tracing::debug!(error = %err, "could not write a bounded log");
            self.file = None;
        }
    }

    fn try_write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.len >= MOST {
            self.file = None;
            std::fs::rename(&self.path, &self.old)?;
        }
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                let file = OpenOptions::new()
                    .append(true)
                    .create(true)
                    .mode(0o600)
                    .open(&self.path)?;
                self.len = file.metadata()?.len();
                none.insert(file)
            }
        };
        file.write_all(bytes)?;
        self.len += bytes.len() as u64;
        Ok(())
    }
}

/// A pipe for the vmm process to write to, and our end of it.
pub(crate) fn pipe(theirs: Blocking) -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, other) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    rustix::io::ioctl_fionbio(&other, theirs == Blocking::No)?;
    Ok((other, ours))
}

/// Whether the vmm process waits when its end is full.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blocking {
    Yes,
    No,
}

/// Reads until the end, keeps it in a log, and hands on what came.
pub(crate) async fn follow(pipe: OwnedFd, mut log: BoundedLog, mut tell: impl AsyncFnMut(Vec<u8>)) {
    let Ok(pipe) = crate::sys::watch(pipe, Interest::READABLE) else {
        return;
    };
    let mut bytes = vec![0; CHUNK];
    loop {
        let read = pipe
            .async_io(Interest::READABLE, |pipe| Ok(rustix::io::read(pipe, &mut bytes)?))
            .await;
        let Some(got) = read
            .ok()
            .and_then(|count| bytes.get(..count))
            .filter(|got| !got.is_empty())
        else {
            return;
        };
        log.write(got);
        tell(got.to_vec()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::CONSOLE;

    #[test]
    fn the_log_keeps_the_newest_and_never_grows_beyond_two_files() {
        let root = tempfile::tempdir().unwrap();
        let directory = Directory::of(root.path(), &"c".try_into().unwrap());
        directory.claim().unwrap();
        let mut log = BoundedLog::new(&directory, CONSOLE);
        let chunk = vec![b'x'; CHUNK];
        for _ in 0..100 {
            log.write(&chunk);
        }
        log.write(b"the end");
        let read = |name: &str| std::fs::read(directory.path().join(name)).unwrap();
        assert!(read(CONSOLE).ends_with(b"the end"));
        let most = usize::try_from(MOST).unwrap() + CHUNK;
        assert!(read(CONSOLE).len() <= most && read(&older(CONSOLE)).len() <= most);
        directory.remove().unwrap();
    }
}
