//! Host processes that outlive whoever noted them down.
//!
//! A pid alone may have been given to another process since; with its start time it names one process for as
//! long as the host is up. Signals go through a pidfd that is checked after it was opened.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// One host process, past or present.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its pid on the host.
    pub pid: i32,
    /// When it started, in clock ticks since boot: field 22 of `/proc/PID/stat` (proc(5)).
    pub start: u64,
}

impl ProcessId {
    /// The calling process.
    ///
    /// # Errors
    /// Fails if `/proc` is not there.
    pub fn own() -> io::Result<Self> {
        Self::of(rustix::process::getpid().as_raw_nonzero().get())
    }

    /// The process that has `pid` now.
    ///
    /// # Errors
    /// Fails if there is none.
    pub fn of(pid: i32) -> io::Result<Self> {
        let start = stat(pid)?.start;
        Ok(Self { pid, start })
    }

    /// Whether the process still runs; one that waits to be reaped does not.
    pub fn is_alive(self) -> bool {
        stat(self.pid).is_ok_and(|now| now.start == self.start && !matches!(now.state, b'Z' | b'X'))
    }

    /// A descriptor of the process, if it still exists.
    pub fn open(self) -> Option<OwnedFd> {
        let pidfd = pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::empty()).ok()?;
        self.is_alive().then_some(pidfd)
    }

    /// Kills the process; one that is gone is no error.
    pub fn kill(self) {
        if let Some(pidfd) = self.open() {
            // The only failure left is that it has just ended, which is what is wanted.
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
    }

    /// Waits until the process has ended; says whether it has.
    pub fn wait_gone(self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        while let Some(pidfd) = self.open() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            // A pidfd is readable once its process has ended (pidfd_open(2)).
            let _ = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout));
        }
        true
    }
}

struct Stat {
    state: u8,
    start: u64,
}

fn stat(pid: i32) -> io::Result<Stat> {
    parse(&std::fs::read(format!("/proc/{pid}/stat"))?)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unexpected form of /proc/PID/stat"))
}

/// The command name is in parentheses and may itself hold any byte, so fields count from the last one.
fn parse(text: &[u8]) -> Option<Stat> {
    let after = text.iter().rposition(|byte| *byte == b')')?;
    let fields = std::str::from_utf8(text.get(after + 1..)?).ok()?;
    let mut fields = fields.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    let start = fields.nth(18)?.parse().ok()?; // field 22; the state is field 3
    Some(Stat { state, start })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_a_name_made_to_mislead() {
        let line = b"7 (a) Z 1 (b) R 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20 21\n";
        let stat = parse(line).unwrap();
        assert_eq!((stat.state, stat.start), (b'R', 4242));
    }

    #[test]
    fn a_pid_with_another_start_time_is_another_process() {
        let own = ProcessId::own().unwrap();
        assert!(own.is_alive());
        assert!(
            !ProcessId {
                start: own.start + 1,
                ..own
            }
            .is_alive()
        );
    }

    #[test]
    fn a_process_that_waits_to_be_reaped_is_gone() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(!id.wait_gone(Duration::from_millis(1)));
        id.kill();
        assert!(id.wait_gone(Duration::from_secs(5)));
        child.wait().unwrap();
    }
}
