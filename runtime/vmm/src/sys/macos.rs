//! macOS.
#![expect(unsafe_code, reason = "mincore has no safe call")]

use std::io;
use std::time::Duration;

use caisson_hal::Region;

/// Core dumps are off by default here, and there is no advice for it.
pub(crate) fn keep_out_of_dumps(_region: &Region) -> io::Result<()> {
    Ok(())
}

/// How many bytes of `region` are backed by pages.
pub(crate) fn resident(region: &Region) -> io::Result<u64> {
    let page = rustix::param::page_size();
    let pages = region.size().div_ceil(page);
    let mut map = vec![0i8; pages];
    // SAFETY: the range is exactly the mapping, and `map` has a byte for each of its pages.
    let done = unsafe { libc::mincore(region.as_ptr().cast(), region.size(), map.as_mut_ptr()) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(map.iter().filter(|page| **page & 1 == 1).count() as u64 * page as u64)
}

/// The processor time of one thread; not told here.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock;

impl Clock {
    /// Of the calling thread.
    pub(crate) fn of_this_thread() -> Option<Self> {
        None
    }

    /// What it has used.
    pub(crate) fn read(self) -> Duration {
        Duration::ZERO
    }
}
