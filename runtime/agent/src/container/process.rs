//! A process of a container, from the agent's side.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio as CommandStdio};
use std::time::{Duration, Instant};

use caisson_wire::agent::{ExitStatus, Failure, Stage, Stdio, WindowSize};
use caisson_wire::{Receiver, RecvError, Sender, channel};
use oci_spec::runtime::LinuxIdMapping;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::Context;
use super::cgroup::Cgroup;
use super::child;
use super::limits;
use super::message::{Job, Order, Report};
use super::namespaces::Namespaces;
use super::terminal;
use crate::failure::{At, failure, failure_with};
use crate::streams::{self, Dial};
use crate::sys;

/// The host's ends of a process's streams, connected.
#[derive(Debug)]
pub(crate) enum Streams {
    /// Standard input, output and error; those that are absent are the null device.
    Pipes([Option<OwnedFd>; 3]),
    /// Both directions of a terminal.
    Terminal {
        /// The connection.
        host: OwnedFd,
        /// First size.
        size: WindowSize,
    },
}

impl Streams {
    /// Connects to the host's ports.
    ///
    /// # Errors
    /// Fails if nobody accepts there.
    pub(crate) fn connect(dial: &dyn Dial, stdio: &Stdio) -> Result<Self, Failure> {
        let connect = |port: u32| {
            dial.dial(port).at(Stage::Stdio, || {
                format!("cannot connect to the stream port {port}")
            })
        };
        if let Some(terminal) = &stdio.terminal {
            return Ok(Self::Terminal {
                host: connect(terminal.port)?,
                size: terminal.size,
            });
        }
        let maybe = |port: Option<u32>| port.map(connect).transpose();
        Ok(Self::Pipes([
            maybe(stdio.stdin)?,
            maybe(stdio.stdout)?,
            maybe(stdio.stderr)?,
        ]))
    }

    pub(crate) fn are_pipes(&self) -> bool {
        matches!(self, Self::Pipes(_))
    }

    pub(crate) fn size(&self) -> WindowSize {
        match self {
            Self::Pipes(_) => WindowSize::default(),
            Self::Terminal { size, .. } => *size,
        }
    }
}

/// A process to start.
pub(crate) struct Launch<'a> {
    pub(crate) context: &'a Context,
    pub(crate) cgroup: &'a Cgroup,
    pub(crate) job: Job,
    /// Of the namespaces in `job.join`.
    pub(crate) descriptors: Vec<OwnedFd>,
    pub(crate) streams: Streams,
    /// Longest time until it is set up.
    pub(crate) limit: Duration,
    /// Called when it has ended, if it came to be ready.
    pub(crate) ended: Box<dyn FnOnce(ExitStatus) + Send>,
}

impl Launch<'_> {
    /// Starts the process and waits until it is ready to become its program.
    ///
    /// # Errors
    /// Fails with the stage that was reached; the process is gone then, or about to go.
    pub(crate) fn run(self) -> Result<(Process, Namespaces), Failure> {
        let deadline = Instant::now() + self.limit;
        let (ours, theirs) = UnixStream::pair().at(Stage::Control, || "cannot create a socket pair")?;
        let (orders, reports) =
            channel(ours.into(), child::LIMIT).at(Stage::Control, || "cannot create a channel")?;
        let helper = Command::new(&self.context.program)
            .arg(child::WORD)
            .env_clear()
            .stdin(OwnedFd::from(theirs))
            .stdout(CommandStdio::null())
            .stderr(CommandStdio::null())
            .spawn()
            .at(Stage::Control, || "cannot start a process")?;
        self.context.reaper.started();
        let helper = helper.id();
        self.cgroup.add(helper)?;

        let (uids, gids) = (self.job.uids.clone(), self.job.gids.clone());
        let limited = self.job.process.clone();
        let (streams, given) = open_streams(self.streams)?;
        let sent: Vec<BorrowedFd<'_>> = given.iter().chain(&self.descriptors).map(AsFd::as_fd).collect();
        orders
            .send_with(&Order::Job(Box::new(self.job)), &sent)
            .map_err(|err| failure(Stage::Control, err.to_string()))?;
        drop(sent);
        drop(given);

        let mut dialogue = Dialogue { reports, deadline };
        let mut newborn = None;
        loop {
            match dialogue.next()? {
                Some((Report::MapIds, _)) => {
                    map_ids(helper, "uid_map", &uids)?;
                    map_ids(helper, "gid_map", &gids)?;
                    orders
                        .send(&Order::Mapped)
                        .map_err(|err| failure(Stage::Namespaces, err.to_string()))?;
                }
                Some((Report::Forked { pid }, mut descriptors)) => {
                    let descriptor = descriptors
                        .pop()
                        .ok_or_else(|| failure(Stage::Control, "a process came without its descriptor"))?;
                    newborn = Some(Newborn {
                        pid,
                        descriptor: Some(descriptor),
                    });
                }
                Some((Report::LimitMe, _)) => {
                    let pid = newborn.as_ref().map_or(0, |newborn| newborn.pid);
                    limits::apply(pid, &limited)?;
                    orders
                        .send(&Order::Limited)
                        .map_err(|err| failure(Stage::Limits, err.to_string()))?;
                }
                Some((Report::Ready { kinds }, mut descriptors)) => {
                    let terminal = descriptors.split_off(kinds.len().min(descriptors.len())).pop();
                    let early = || failure(Stage::Control, "a process was ready before it was there");
                    let newborn = newborn.as_mut().ok_or_else(early)?;
                    streams.attach(terminal.as_ref())?;
                    let pid = newborn.pid;
                    let descriptor = newborn.descriptor.take().ok_or_else(early)?;
                    self.context.reaper.watch(pid, self.ended);
                    let process = Process {
                        pid,
                        descriptor,
                        orders,
                        dialogue,
                        terminal,
                    };
                    // It waits for us, so nothing but a signal ends it before it is watched.
                    if process.has_ended() {
                        self.context.reaper.forget(pid);
                        return Err(killed());
                    }
                    return Ok((process, Namespaces::new(kinds, descriptors)));
                }
                Some((Report::Failed(failed), _)) => return Err(failed),
                None => return Err(killed()),
            }
        }
    }
}

fn killed() -> Failure {
    failure(
        Stage::Control,
        "the process was killed while it was set up; its memory limit may be too low",
    )
}

/// A process that is killed unless it comes to be ready.
struct Newborn {
    pid: i32,
    descriptor: Option<OwnedFd>,
}

impl Drop for Newborn {
    fn drop(&mut self) {
        if let Some(descriptor) = &self.descriptor {
            drop(sys::pidfd_send_signal(descriptor.as_fd(), libc::SIGKILL));
        }
    }
}

/// What the process says, up to a deadline.
#[derive(Debug)]
struct Dialogue {
    reports: Receiver,
    deadline: Instant,
}

impl Dialogue {
    /// The next report; nothing once the process has closed its end.
    fn next(&mut self) -> Result<Option<(Report, Vec<OwnedFd>)>, Failure> {
        let late = || {
            failure_with(
                Stage::Control,
                Errno::TIMEDOUT,
                "the process took too long to set up",
            )
        };
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late());
        }
        self.reports
            .set_timeout(Some(left))
            .at(Stage::Control, || "cannot limit the wait for a process")?;
        match self.reports.recv() {
            Ok(report) => Ok(Some(report)),
            Err(RecvError::Closed | RecvError::Truncated) => Ok(None),
            Err(RecvError::Socket(err)) if err.kind() == io::ErrorKind::WouldBlock => Err(late()),
            Err(err) => Err(failure(Stage::Control, err.to_string())),
        }
    }
}

/// A process that is set up.
#[derive(Debug)]
pub(crate) struct Process {
    pid: i32,
    descriptor: OwnedFd,
    orders: Sender,
    dialogue: Dialogue,
    terminal: Option<OwnedFd>,
}

impl Process {
    /// Its pid in the guest's first PID namespace.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Lets it become its program, and waits until it has.
    ///
    /// # Errors
    /// Fails if it has ended, or reports why it could not; then it has ended or will at once.
    pub(crate) fn go(&mut self, limit: Duration) -> Result<(), Failure> {
        if self.has_ended() {
            return Err(failure_with(Stage::Request, Errno::SRCH, "the process has ended"));
        }
        self.orders
            .send(&Order::Go)
            .map_err(|err| failure(Stage::Control, err.to_string()))?;
        self.dialogue.deadline = Instant::now() + limit;
        match self.dialogue.next() {
            // `execve` closed its end; if it was killed instead, its end will say so.
            Ok(None) => Ok(()),
            Ok(Some((Report::Failed(failed), _))) => Err(failed),
            Ok(Some(_)) => Err(failure(Stage::Control, "the process said something out of turn")),
            Err(failed) => {
                drop(self.signal(libc::SIGKILL));
                Err(failed)
            }
        }
    }

    /// Whether it is a zombie or gone.
    pub(crate) fn has_ended(&self) -> bool {
        // A pid descriptor is readable from the process's end on (pidfd_open(2)).
        let mut polled = [PollFd::new(&self.descriptor, PollFlags::IN)];
        rustix::event::poll(&mut polled, Some(&Timespec::default())).is_ok_and(|count| count > 0)
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// As pidfd_send_signal(2).
    pub(crate) fn signal(&self, signal: i32) -> io::Result<()> {
        sys::pidfd_send_signal(self.descriptor.as_fd(), signal)
    }

    /// Changes the size of its terminal.
    ///
    /// # Errors
    /// Fails if it has none.
    pub(crate) fn resize(&self, size: WindowSize) -> Result<(), Failure> {
        let terminal = self
            .terminal
            .as_ref()
            .ok_or_else(|| failure_with(Stage::Control, Errno::NOTTY, "the process has no terminal"))?;
        terminal::resize(terminal.as_fd(), size).at(Stage::Control, || "cannot resize the terminal")
    }
}

/// The host's ends, with what they are copied from and to.
enum Ends {
    /// Host end and our end of the pipe, and which of the two is read.
    Pipes(Vec<(OwnedFd, OwnedFd, Direction)>),
    Terminal(OwnedFd),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    In,
    Out,
}

/// Makes the pipes, and returns our ends and the process's, the latter in the order of their numbers.
fn open_streams(streams: Streams) -> Result<(Ends, Vec<OwnedFd>), Failure> {
    let hosts = match streams {
        Streams::Terminal { host, .. } => return Ok((Ends::Terminal(host), Vec::new())),
        Streams::Pipes(hosts) => hosts,
    };
    let cannot = || "cannot create the standard streams";
    let mut ends = Vec::new();
    let mut given = Vec::new();
    for (host, direction) in hosts
        .into_iter()
        .zip([Direction::In, Direction::Out, Direction::Out])
    {
        let Some(host) = host else {
            let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
            given.push(null.at(Stage::Stdio, cannot)?);
            continue;
        };
        let (read, write) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).at(Stage::Stdio, cannot)?;
        let (ours, theirs) = match direction {
            Direction::In => (write, read),
            Direction::Out => (read, write),
        };
        ends.push((host, ours, direction));
        given.push(theirs);
    }
    Ok((Ends::Pipes(ends), given))
}

impl Ends {
    /// Starts the copying.
    fn attach(self, terminal: Option<&OwnedFd>) -> Result<(), Failure> {
        let cannot = || "cannot copy the standard streams";
        match self {
            Self::Pipes(ends) => {
                for (host, ours, direction) in ends {
                    match direction {
                        Direction::In => streams::copy(host, ours),
                        Direction::Out => streams::copy(ours, host),
                    }
                    .at(Stage::Stdio, cannot)?;
                }
            }
            Self::Terminal(host) => {
                let terminal =
                    terminal.ok_or_else(|| failure(Stage::Stdio, "the process came without its terminal"))?;
                let copy = |fd: &OwnedFd| fd.try_clone().at(Stage::Stdio, cannot);
                streams::copy(copy(&host)?, copy(terminal)?).at(Stage::Stdio, cannot)?;
                streams::copy(copy(terminal)?, host).at(Stage::Stdio, cannot)?;
            }
        }
        Ok(())
    }
}

/// Writes a mapping of a process's new user namespace, all lines at once, as the kernel wants it.
fn map_ids(pid: u32, file: &str, mappings: &[LinuxIdMapping]) -> Result<(), Failure> {
    let lines: String = mappings
        .iter()
        .map(|map| format!("{} {} {}\n", map.container_id(), map.host_id(), map.size()))
        .collect();
    fs::write(format!("/proc/{pid}/{file}"), lines).at(Stage::Namespaces, || {
        format!("cannot set the {file} of the user namespace")
    })
}
