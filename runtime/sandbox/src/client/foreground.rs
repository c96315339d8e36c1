//! Waiting for a process in the foreground: its streams are the caller's, and the caller's signals are its.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::process::Child;

use caisson_wire::agent::ExitStatus;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::create::pid_of;
use crate::stand_in::{Relay, TerminalGuard};
use crate::sys::{self, Signals};

/// A process that runs in the foreground. Until it is waited for, every signal to the calling thread is kept.
#[derive(Debug)]
pub struct Foreground {
    pid: i32,
    by: By,
    signals: Signals,
    /// Restores the caller's terminal afterwards, in case the stand-in cannot do it any more.
    terminal: Option<TerminalGuard>,
}

#[derive(Debug)]
enum By {
    /// A stand-in, our child.
    Child { child: Child, pidfd: OwnedFd },
    /// This process.
    Us { socket: OwnedFd },
}

impl Foreground {
    pub(super) fn of_child(
        child: Child,
        signals: Signals,
        terminal: Option<TerminalGuard>,
    ) -> io::Result<Self> {
        let pid = pid_of(&child)?;
        let raw = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidData)?;
        let pidfd = pidfd_open(raw, PidfdFlags::empty())?;
        Ok(Self {
            pid,
            by: By::Child { child, pidfd },
            signals,
            terminal,
        })
    }

    pub(super) fn in_process(socket: OwnedFd, signals: Signals, terminal: Option<TerminalGuard>) -> Self {
        Self {
            // A pid is positive and fits.
            pid: rustix::process::getpid().as_raw_nonzero().get(),
            by: By::Us { socket },
            signals,
            terminal,
        }
    }

    /// The host process that stands for it: the one to write into a pid file.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits until the process has ended and its output is written; hands it every signal meanwhile.
    ///
    /// # Errors
    /// Fails if its stand-in cannot be waited for, or is itself gone without a status.
    pub fn wait(self) -> io::Result<ExitStatus> {
        match self.by {
            By::Child { child, pidfd } => wait_for(child, &pidfd, &self.signals),
            By::Us { socket } => {
                if let Some(terminal) = &self.terminal {
                    terminal.make_raw();
                }
                let relay = Relay::new(socket)?;
                relay.run(&self.signals).ok_or_else(|| {
                    io::Error::new(
                        io::ErrorKind::BrokenPipe,
                        "the sandbox ended before the process did",
                    )
                })
            }
        }
    }
}

fn wait_for(mut child: Child, pidfd: &OwnedFd, signals: &Signals) -> io::Result<ExitStatus> {
    loop {
        let mut sources = [
            PollFd::new(pidfd, PollFlags::IN),
            PollFd::new(signals, PollFlags::IN),
        ];
        match poll(&mut sources, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(err) => return Err(err.into()),
        }
        let ended = sources.first().is_some_and(|source| !source.revents().is_empty());
        if ended {
            let status = child.wait()?;
            return Ok(match (status.code(), status.signal()) {
                (Some(code), _) => ExitStatus::Code(u8::try_from(code & 0xff).unwrap_or(u8::MAX)),
                (None, signal) => ExitStatus::Signal(signal.unwrap_or(libc::SIGKILL)),
            });
        }
        while let Some(signal) = signals.next() {
            // Its own children are this process's business; everything else is meant for the container.
            if signal != libc::SIGCHLD {
                // Fails only if the stand-in has just ended, which the next round sees.
                let _ = sys::send_signal(pidfd.as_fd(), signal);
            }
        }
    }
}
