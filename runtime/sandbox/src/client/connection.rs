//! A client's connection to a supervisor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use caisson_wire::{Receiver, RecvError, Sender, channel};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt};

use super::error::CallError;
use crate::disk::Directory;
use crate::proto::{Answer, LIMIT, Reply, Request, SOCKET};
use crate::sys::Signals;

/// Longest time to wait until a supervisor takes a connection or a request.
const SEND_LIMIT: Duration = Duration::from_secs(2);
/// Lines of a supervisor's log that a message repeats.
const LOG_LINES: usize = 3;
/// Signals that make a client give up: SIGHUP, SIGINT, SIGQUIT, SIGTERM.
const INTERRUPTS: [i32; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];

/// A connection to one supervisor.
#[derive(Debug)]
pub(crate) struct Connection {
    sender: Sender,
    receiver: Receiver,
    log: PathBuf,
}

/// How long to wait for an answer, and what else to listen to meanwhile.
#[derive(Debug)]
pub(crate) struct Patience<'a> {
    /// `None` waits for as long as the supervisor lives.
    pub(crate) limit: Option<Duration>,
    /// Gives up when one of these says so.
    pub(crate) signals: Option<&'a Signals>,
}

impl From<Duration> for Patience<'_> {
    fn from(limit: Duration) -> Self {
        Self {
            limit: Some(limit),
            signals: None,
        }
    }
}

impl Connection {
    /// Connects to the supervisor of the sandbox in `directory`.
    pub(crate) fn open(directory: &Directory) -> Result<Self, CallError> {
        let gone = |source| CallError::Gone {
            log: log_tail(&directory.log()),
            source,
        };
        let socket = dial(directory.path()).map_err(gone)?;
        Self::over(socket, directory).map_err(gone)
    }

    /// Talks over a socket that the supervisor was started with.
    pub(crate) fn over(socket: OwnedFd, directory: &Directory) -> io::Result<Self> {
        let (sender, receiver) = channel(socket, LIMIT)?;
        sender.set_timeout(SEND_LIMIT)?;
        Ok(Self {
            sender,
            receiver,
            log: directory.log(),
        })
    }

    /// Asks one thing and waits for its answer.
    pub(crate) fn ask<'a>(
        &mut self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
        patience: impl Into<Patience<'a>>,
    ) -> Result<Reply, CallError> {
        self.send(request, descriptors)?;
        self.next(&patience.into())
    }

    pub(crate) fn send(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<(), CallError> {
        self.sender
            .send_with(request, descriptors)
            .map_err(|err| self.gone(io::Error::other(err)))
    }

    /// Waits for the next answer.
    pub(crate) fn next(&mut self, patience: &Patience<'_>) -> Result<Reply, CallError> {
        self.await_bytes(patience)?;
        // Answers are small and sent whole, so what has begun arrives; a bound all the same.
        self.receiver
            .set_timeout(Some(SEND_LIMIT))
            .map_err(|err| self.gone(err))?;
        match self.receiver.recv::<Answer>() {
            Ok((answer, _)) => Ok(answer?),
            Err(RecvError::Closed | RecvError::Truncated) => {
                Err(self.gone(io::ErrorKind::ConnectionReset.into()))
            }
            Err(RecvError::Socket(err)) if err.kind() == io::ErrorKind::WouldBlock => {
                Err(CallError::Silent(SEND_LIMIT))
            }
            Err(RecvError::Socket(err)) => Err(self.gone(err)),
            Err(RecvError::Decode(_)) => Err(CallError::Protocol),
        }
    }

    fn await_bytes(&self, patience: &Patience<'_>) -> Result<(), CallError> {
        let until = patience.limit.map(|limit| Instant::now() + limit);
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if let (Some(Duration::ZERO), Some(limit)) = (left, patience.limit) {
                return Err(CallError::Silent(limit));
            }
            let timeout = left.map(|left| Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            });
            let mut sources = vec![PollFd::new(&self.receiver, PollFlags::IN)];
            if let Some(signals) = patience.signals {
                sources.push(PollFd::new(signals, PollFlags::IN));
            }
            match poll(&mut sources, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(err) => return Err(self.gone(err.into())),
            }
            if sources.first().is_some_and(|source| !source.revents().is_empty()) {
                return Ok(());
            }
            while let Some(signal) = patience.signals.and_then(Signals::next) {
                if INTERRUPTS.contains(&signal) {
                    return Err(CallError::Interrupted(signal));
                }
            }
        }
    }

    fn gone(&self, source: io::Error) -> CallError {
        CallError::Gone {
            log: log_tail(&self.log),
            source,
        }
    }
}

/// The last lines of a supervisor's log: it may be removed before anybody can look.
fn log_tail(path: &Path) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let last = lines
        .get(lines.len().saturating_sub(LOG_LINES)..)
        .unwrap_or_default();
    last.join("; ")
}

fn dial(directory: &Path) -> io::Result<OwnedFd> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(SEND_LIMIT))?;
    with_address(directory, |address| Ok(connect(&socket, address)?))?;
    Ok(socket)
}

/// Names the control socket in `directory`, whatever the length of its path: `sun_path` holds 108 bytes
/// (unix(7)), so the directory is reached through its open descriptor.
pub(crate) fn with_address<T>(
    directory: &Path,
    use_address: impl FnOnce(&SocketAddrUnix) -> io::Result<T>,
) -> io::Result<T> {
    use std::os::fd::AsRawFd as _;
    if let Ok(address) = SocketAddrUnix::new(directory.join(SOCKET)) {
        return use_address(&address);
    }
    let open = rustix::fs::open(
        directory,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let short = format!("/proc/self/fd/{}/{SOCKET}", open.as_fd().as_raw_fd());
    use_address(&SocketAddrUnix::new(short)?)
}
