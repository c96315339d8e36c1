//! Creating a container: claim the id, start its processes, run its hooks, ask the supervisor.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::{Child, Stdio};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::connection::{Connection, Patience};
use super::foreground::Foreground;
use super::hooks::{self, HookState};
use super::stdio::Streams;
use super::{CreateError, CreateOrder, Created, Force, MARGIN, MOST_CALLS, Place, Runtime, StdioChoice};
use crate::disk::{ContainerRecord, Directory};
use crate::id::ContainerId;
use crate::plan::{ContainerPlan, NetworkNamespace, SandboxPlan};
use crate::process::ProcessId;
use crate::proto::{CreateRequest, Request, Status};
use crate::stand_in::TerminalGuard;
use crate::sys::{self, Netns, Signals, Start};

impl Runtime {
    /// Creates a container, in a sandbox of its own or in another's, and leaves its process waiting for
    /// [`Runtime::start`].
    ///
    /// # Errors
    /// Fails if the id is taken, a hook fails, or the guest does not boot or refuses; nothing is left then.
    pub fn create(&self, order: CreateOrder) -> Result<Created, CreateError> {
        let (child, _) = self.create_and(order, Then::Wait)?;
        Ok(Created {
            pid: pid_of(&child).map_err(spawn("stand-in"))?,
        })
    }

    /// Creates a container and starts it in one flight, to be waited for.
    ///
    /// # Errors
    /// As [`Runtime::create`] and [`Runtime::start`]; nothing is left then.
    pub fn run(&self, order: CreateOrder) -> Result<Foreground, CreateError> {
        let ours = order.container.terminal && order.stdio == StdioChoice::Inherit;
        let terminal = ours.then(TerminalGuard::save);
        let (child, signals) = self.create_and(order, Then::Start)?;
        Foreground::of_child(child, signals, terminal).map_err(spawn("stand-in"))
    }

    fn create_and(&self, order: CreateOrder, then: Then) -> Result<(Child, Signals), CreateError> {
        let id = ContainerId::try_from(order.container.id.as_str())?;
        let sandbox = match &order.place {
            Place::New(_) => id.clone(),
            Place::Join(other) => {
                let joined = self.record(other).map_err(|source| CreateError::Join {
                    id: other.clone(),
                    source,
                })?;
                joined.sandbox
            }
        };
        let signals = Signals::take().map_err(spawn("stand-in"))?;
        let directory = Directory::of(&self.root, &id);
        directory.claim().map_err(|err| match err.kind() {
            Some(io::ErrorKind::AlreadyExists) => CreateError::Exists(id.clone()),
            _ => err.into(),
        })?;
        let mut undo = Undo {
            runtime: self,
            id: &id,
            children: Vec::new(),
            poststop: None,
            done: false,
        };
        let mut record = new_record(&id, &sandbox, &order.container)?;
        directory.write_container(&record)?;

        let limit = match &order.place {
            Place::New(plan) => deadline(plan),
            Place::Join(_) => self.answer_limit(&sandbox),
        };
        let mut connection = match &order.place {
            Place::New(_) => {
                let (child, connection) = self.start_supervisor(&id, &directory)?;
                undo.children.push(child);
                connection
            }
            Place::Join(_) => Connection::open(&Directory::of(&self.root, &sandbox)).map_err(call(&id))?,
        };
        let streams = Streams::prepare(&order.stdio, order.container.terminal).map_err(stdio)?;
        let (child, socket) = self.start_stand_in(&id, &streams, &order.container.netns)?;
        let stand_in = pid_of(&child).and_then(ProcessId::of);
        undo.children.push(child);
        let stand_in = stand_in.map_err(spawn("stand-in"))?;
        record.stand_in = Some(stand_in);
        directory.write_container(&record)?;

        let state = hook_state(&record, Status::Creating, Some(stand_in.pid));
        if !record.hooks.prestart.is_empty() || !record.hooks.create_runtime.is_empty() {
            undo.poststop = Some(record.clone());
        }
        hooks::run("prestart", &record.hooks.prestart, &state)?;
        hooks::run("createRuntime", &record.hooks.create_runtime, &state)?;

        let request = Request::Create(Box::new(CreateRequest {
            sandbox: match order.place {
                Place::New(plan) => Some(plan),
                Place::Join(_) => None,
            },
            container: order.container,
            wanted: streams.wanted,
            start: then == Then::Start,
            stand_in,
        }));
        let patience = Patience {
            limit: Some(limit),
            signals: Some(&signals),
        };
        connection
            .ask(&request, &[socket.as_fd()], patience)
            .map_err(call(&id))?;
        if then == Then::Start {
            hooks::run_all(
                "poststart",
                &record.hooks.poststart,
                &hook_state(&record, Status::Running, Some(stand_in.pid)),
            );
        }
        undo.done = true;
        let child = undo.children.pop().expect("the stand-in was started last");
        drop(undo);
        Ok((child, signals))
    }

    fn start_supervisor(
        &self,
        id: &ContainerId,
        directory: &Directory,
    ) -> Result<(Child, Connection), CreateError> {
        let start = || -> io::Result<(Child, Connection)> {
            let (ours, theirs) = pair()?;
            let log = OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o600)
                .open(directory.log())?;
            let child = sys::start(Start {
                program: &self.program,
                arguments: &[
                    OsStr::new("supervise"),
                    self.root.as_os_str(),
                    OsStr::new(id.as_str()),
                ],
                stdin: Stdio::null(),
                stdout: Stdio::null(),
                stderr: log.into(),
                socket: theirs,
                netns: Netns::Same,
                terminal: false,
                block_signals: false,
            })?;
            Ok((child, Connection::over(ours, directory)?))
        };
        start().map_err(spawn("supervisor"))
    }

    /// Starts a container's stand-in; gives the supervisor's end of its socket.
    fn start_stand_in(
        &self,
        id: &ContainerId,
        streams: &Streams,
        netns: &NetworkNamespace,
    ) -> Result<(Child, OwnedFd), CreateError> {
        let path = match netns {
            NetworkNamespace::Path(path) => {
                Some(std::fs::File::open(path).map_err(|source| CreateError::Netns {
                    path: path.clone(),
                    source,
                })?)
            }
            NetworkNamespace::Caller | NetworkNamespace::New => None,
        };
        let netns = match (&path, netns) {
            (Some(file), _) => Netns::Of(file.as_fd()),
            (None, NetworkNamespace::New) => Netns::New,
            (None, _) => Netns::Same,
        };
        self.spawn_stand_in(id.as_str(), streams, netns)
            .map_err(spawn("stand-in"))
    }

    /// Starts a stand-in named `name`; gives the supervisor's end of its socket.
    pub(super) fn spawn_stand_in(
        &self,
        name: &str,
        streams: &Streams,
        netns: Netns<'_>,
    ) -> io::Result<(Child, OwnedFd)> {
        let (ours, theirs) = pair()?;
        let [stdin, stdout, stderr] = streams.open()?;
        let mode = match streams.wanted.terminal {
            Some(_) => crate::stand_in::TERMINAL,
            None => crate::stand_in::PIPES,
        };
        let child = sys::start(Start {
            program: &self.program,
            arguments: &[OsStr::new("stand-in"), OsStr::new(name), OsStr::new(mode)],
            stdin,
            stdout,
            stderr,
            socket: theirs,
            netns,
            terminal: streams.own_terminal(),
            block_signals: true,
        })?;
        Ok((child, ours))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    Wait,
    Start,
}

/// Takes back a container whose creation did not come to its end.
struct Undo<'a> {
    runtime: &'a Runtime,
    id: &'a ContainerId,
    /// The supervisor, if it was started for this, and the stand-in.
    children: Vec<Child>,
    /// Set once hooks have run that `poststop` may have to undo.
    poststop: Option<ContainerRecord>,
    done: bool,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        for child in &mut self.children {
            // Ours and not reaped; if it has ended already, that is what is wanted.
            let _ = child.kill();
            let _ = child.wait();
        }
        if let Err(err) = self.runtime.remove(self.id, Force::Yes) {
            tracing::error!(container = %self.id, error = %err, "could not take a failed creation back");
        }
        if let Some(record) = &self.poststop {
            let state = hook_state(record, Status::Stopped, None);
            hooks::run_all("poststop", &record.hooks.poststop, &state);
        }
    }
}

/// The document that a container's hooks get.
pub(super) fn hook_state(record: &ContainerRecord, status: Status, pid: Option<i32>) -> HookState<'_> {
    HookState {
        oci_version: &record.oci_version,
        id: record.id.as_str(),
        status,
        pid,
        bundle: &record.bundle,
        annotations: &record.annotations,
    }
}

pub(super) fn pid_of(child: &Child) -> io::Result<i32> {
    i32::try_from(child.id()).map_err(io::Error::other)
}

fn new_record(
    id: &ContainerId,
    sandbox: &ContainerId,
    plan: &ContainerPlan,
) -> Result<ContainerRecord, CreateError> {
    let created = time::OffsetDateTime::now_utc()
        .format(&time::format_description::well_known::Rfc3339)
        .unwrap_or_default(); // fails only for years beyond 9999
    Ok(ContainerRecord {
        id: id.clone(),
        sandbox: sandbox.clone(),
        bundle: plan.bundle.clone(),
        oci_version: plan.oci_version.clone(),
        annotations: plan.annotations.clone(),
        created,
        owner: rustix::process::getuid().as_raw(),
        status: Status::Creating,
        creator: Some(ProcessId::own().map_err(spawn("stand-in"))?),
        stand_in: None,
        exit: None,
        failure: None,
        hooks: plan.hooks.clone(),
    })
}

/// Boot, set-up, create and start each have their own deadline below this one.
fn deadline(plan: &SandboxPlan) -> Duration {
    plan.boot_deadline
        .saturating_add(plan.call_deadline.saturating_mul(MOST_CALLS))
        .saturating_add(MARGIN)
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

fn spawn(what: &'static str) -> impl Fn(io::Error) -> CreateError {
    move |source| CreateError::Spawn { what, source }
}

fn stdio((verb, source): super::stdio::Failed) -> CreateError {
    CreateError::Stdio { verb, source }
}

fn call(id: &ContainerId) -> impl Fn(super::CallError) -> CreateError {
    move |source| CreateError::Call {
        id: id.clone(),
        source,
    }
}
