//! Linux. Everything here still works when the process is confined: no file is opened.
#![expect(
    unsafe_code,
    reason = "mincore, madvise and per-thread clocks have no safe call"
)]

use std::io;
use std::time::Duration;

use caisson_hal::Region;

/// Keeps guest memory out of core dumps of this process.
pub(crate) fn keep_out_of_dumps(region: &Region) -> io::Result<()> {
    // SAFETY: the range is exactly the mapping that `region` owns, and the advice changes no contents.
    let done = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_DONTDUMP) };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// How many bytes of `region` are backed by pages.
pub(crate) fn resident(region: &Region) -> io::Result<u64> {
    let page = rustix::param::page_size();
    let mut map = vec![0u8; STEP];
    let mut pages = 0u64;
    for start in (0..region.size()).step_by(STEP * page) {
        let len = (region.size() - start).min(STEP * page);
        // SAFETY: `start` lies within the mapping, so the address is one of it.
        let at = unsafe { region.as_ptr().add(start) };
        // SAFETY: `at..at + len` lies within the mapping, and `map` has a byte for each of its pages.
        let done = unsafe { libc::mincore(at.cast(), len, map.as_mut_ptr()) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
        let here = map.iter().take(len.div_ceil(page)).filter(|page| **page & 1 == 1);
        pages += here.count() as u64;
    }
    Ok(pages * page as u64)
}

/// Pages asked for at once: 64 KiB of answers for 256 MiB of memory.
const STEP: usize = 64 * 1024;

/// The processor time of one thread, readable from all others.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(libc::clockid_t);

impl Clock {
    /// Of the calling thread.
    pub(crate) fn of_this_thread() -> Option<Self> {
        let mut id = 0;
        // SAFETY: takes nothing and fails never.
        let thread = unsafe { libc::pthread_self() };
        // SAFETY: `thread` is the calling thread, so it exists, and `id` is a valid place for the answer.
        let done = unsafe { libc::pthread_getcpuclockid(thread, &raw mut id) };
        (done == 0).then_some(Self(id))
    }

    /// What it has used; nothing once the thread is gone.
    pub(crate) fn read(self) -> Duration {
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: `time` is a valid place for the answer; an identifier of a thread that is gone is refused.
        let done = unsafe { libc::clock_gettime(self.0, &raw mut time) };
        match (done, u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec)) {
            (0, Ok(seconds), Ok(nanos)) => Duration::new(seconds, nanos),
            _ => Duration::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_counts_only_its_own_thread() {
        let clock = Clock::of_this_thread().unwrap();
        let before = clock.read();
        let busy = std::thread::spawn(move || {
            let own = Clock::of_this_thread().unwrap();
            while own.read() < Duration::from_millis(5) {}
        });
        busy.join().unwrap();
        assert!(clock.read() - before < Duration::from_millis(5));
    }
}
