//! Events on Linux: `eventfd(2)`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::{EventfdFlags, eventfd};

/// A counter in the kernel that one side signals and another waits for; signals coalesce.
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// Creates an event that is not signalled.
    ///
    /// # Errors
    /// Fails if the process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Wraps a descriptor that another process handed over, such as a vhost-user kick.
    ///
    /// The descriptor must be an eventfd; on anything else [`Event::signal`] and [`Event::clear`] do no harm
    /// but may report nothing.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Signals the event. Signalling twice before a wait counts once.
    pub fn signal(&self) {
        // The only failure is EAGAIN at a count of 2^64 - 2, at which the event is signalled anyway.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Clears the event and says whether it was signalled.
    pub fn clear(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok_and(|n| n == 8)
    }

    /// A second handle of the same event.
    ///
    /// # Errors
    /// Fails if the process is out of descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Event {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
