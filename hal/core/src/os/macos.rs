//! Events on macOS: a pipe that holds at most one byte.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::pipe;

/// An object that one side signals and another waits for; signals coalesce.
#[derive(Debug, Clone)]
pub struct Event(Arc<Ends>);

#[derive(Debug)]
struct Ends {
    read: OwnedFd,
    write: OwnedFd,
}

impl Event {
    /// Creates an event that is not signalled.
    ///
    /// # Errors
    /// Fails if the process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        let (read, write) = pipe()?;
        for end in [&read, &write] {
            fcntl_setfd(end, FdFlags::CLOEXEC)?;
            rustix::io::ioctl_fionbio(end, true)?;
        }
        Ok(Self(Arc::new(Ends { read, write })))
    }

    /// Signals the event. Signalling twice before a wait counts once.
    pub fn signal(&self) {
        // A full pipe is a signalled event.
        let _ = rustix::io::write(&self.0.write, &[1]);
    }

    /// Clears the event and says whether it was signalled.
    pub fn clear(&self) -> bool {
        let mut was = false;
        while rustix::io::read(&self.0.read, &mut [0; 512]).is_ok_and(|n| n > 0) {
            was = true;
        }
        was
    }

    /// A second handle of the same event.
    ///
    /// # Errors
    /// None on this system; the signature is that of every system.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(self.clone())
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.read.as_fd()
    }
}

impl AsRawFd for Event {
    fn as_raw_fd(&self) -> RawFd {
        self.0.read.as_raw_fd()
    }
}
