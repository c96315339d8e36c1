//! What every front end calls: the container life cycle, from outside the supervisor.
//!
//! Each call is one process's business with the files under the runtime's root and, where a sandbox runs, with
//! its supervisor's control socket. Calls block, each with a deadline. Nothing here prints, and nothing is
//! kept between calls: whatever a killed caller leaves behind, [`Runtime::delete`] removes from the files alone.
//!
//! Processes started here (supervisor and stand-in) are children of the caller and go to whoever inherits
//! them; a caller that stays must reap them, as a subreaper does.

mod connection;
mod create;
mod delete;
mod error;
mod exec;
mod foreground;
mod hooks;
mod stdio;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use caisson_wire::agent::{ExitStatus, ProcessInfo};
use oci_spec::runtime::{LinuxResources, Process};

pub use self::error::{
    CallError, ControlError, CreateError, DeleteError, ExecError, GuestFailure, HookError, LookupError,
    StartError,
};
pub use self::exec::Executed;
pub use self::foreground::Foreground;
pub(crate) use connection::with_address;
use connection::{Connection, Patience};

use crate::disk::{ContainerRecord, Directory};
use crate::id::ContainerId;
use crate::plan::{ContainerPlan, SandboxPlan};
use crate::proto::{Measured, Refusal, Reply, Request, Status};

/// How long a supervisor has to answer beyond what the sandbox's plan allows for the guest: the plan's own
/// deadlines come first and carry the better message.
const MARGIN: Duration = Duration::from_secs(10);
/// Requests to the guest that one request of a client may lead to, one after the other.
const MOST_CALLS: u32 = 3;

/// All containers below one root directory.
#[derive(Clone, Debug)]
pub struct Runtime {
    root: PathBuf,
    program: PathBuf,
}

/// A container to create.
#[derive(Clone, Debug)]
pub struct CreateOrder {
    /// In which sandbox.
    pub place: Place,
    /// The container.
    pub container: ContainerPlan,
    /// Its process's streams.
    pub stdio: StdioChoice,
}

/// In which sandbox a container is created.
#[derive(Clone, Debug)]
pub enum Place {
    /// In a new one, which bears the container's id.
    New(Box<SandboxPlan>),
    /// In that of a container that exists.
    Join(ContainerId),
}

/// Where the streams of a process come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StdioChoice {
    /// The caller's own standard streams; a terminal process gets the caller's terminal.
    Inherit,
    /// A new terminal, whose master is sent to this unix socket (`--console-socket`).
    ConsoleSocket(PathBuf),
}

/// A container that was created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Created {
    /// The stand-in: a host process that lives as long as the container's, takes its signals and leaves with its
    /// status. It is a child of the caller.
    pub pid: i32,
}

/// A process to run in a container.
#[derive(Clone, Debug)]
pub struct ExecOrder {
    /// Its id; `None` makes one up.
    pub exec: Option<String>,
    /// What to run, and as whom.
    pub process: Process,
    /// Its streams.
    pub stdio: StdioChoice,
    /// Whether the caller leaves it to itself.
    pub detach: bool,
}

/// To which processes of a container a signal goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Its own process.
    Init,
    /// Every one.
    All,
}

/// Whether a container is deleted that still runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Force {
    /// Only one that does not.
    No,
    /// Any; it is killed first. One that does not exist is no error.
    Yes,
}

/// What is known of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerState {
    /// Its id.
    pub id: ContainerId,
    /// `ociVersion` of its configuration.
    pub oci_version: String,
    /// Where it is in its life.
    pub status: Status,
    /// The stand-in's pid; 0 if there is none.
    pub pid: i32,
    /// Its bundle directory.
    pub bundle: PathBuf,
    /// When it was created, RFC 3339.
    pub created: String,
    /// User id of who created it.
    pub owner: u32,
    /// Annotations as given.
    pub annotations: BTreeMap<String, String>,
    /// The container whose sandbox it lives in; its own id if that is its own.
    pub sandbox: ContainerId,
    /// How its process ended, if it has.
    pub exit: Option<ExitStatus>,
    /// What ended the container, if it was not its own process.
    pub failure: Option<String>,
    /// What runs the guest: "kvm", "qemu".
    pub machine: Option<String>,
}

/// Something that happened to a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The guest's kernel killed a process of it for want of memory.
    OutOfMemory,
    /// Its process has ended; the last event.
    Exited(ExitStatus),
}

/// The events of one container.
#[derive(Debug)]
pub struct Watch {
    id: ContainerId,
    connection: Connection,
}

impl Runtime {
    /// All containers below `root`, which need not exist yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        let root = root.into();
        Self {
            // Our processes have other working directories.
            root: std::path::absolute(&root).unwrap_or(root),
            program: PathBuf::from("/proc/self/exe"),
        }
    }

    /// The root directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Starts a created container's process, and runs its `poststart` hooks.
    ///
    /// # Errors
    /// Fails if the container is not one that was created and not started, or the guest cannot start it.
    pub fn start(&self, id: &ContainerId) -> Result<(), StartError> {
        let record = self.record(id)?;
        match record.probe(&self.root) {
            Status::Created => {}
            is => return Err(StartError::Status { id: id.clone(), is }),
        }
        let request = Request::Start {
            container: id.to_string(),
        };
        self.ask(&record, &request).map_err(|source| StartError::Call {
            id: id.clone(),
            source,
        })?;
        let pid = record.stand_in.map(|process| process.pid);
        hooks::run_all(
            "poststart",
            &record.hooks.poststart,
            &create::hook_state(&record, Status::Running, pid),
        );
        Ok(())
    }

    /// Tells what is known of a container, whether or not anything of it is alive.
    ///
    /// # Errors
    /// Fails if there is no such container or its state cannot be read.
    pub fn state(&self, id: &ContainerId) -> Result<ContainerState, LookupError> {
        Ok(self.describe(self.record(id)?))
    }

    /// Tells what is known of every container, ordered by id. One that is being deleted is left out.
    ///
    /// # Errors
    /// Fails if the root directory or a container's state cannot be read.
    pub fn list(&self) -> Result<Vec<ContainerState>, crate::StateError> {
        let read = |source| crate::StateError::File {
            verb: "list",
            path: self.root.clone(),
            source,
        };
        let entries = match std::fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(err) => return Err(read(err)),
        };
        let mut states = Vec::new();
        for entry in entries {
            let name = entry.map_err(read)?.file_name();
            let Some(id) = name.to_str().and_then(|name| ContainerId::try_from(name).ok()) else {
                continue;
            };
            match self.record(&id) {
                Ok(record) => states.push(self.describe(record)),
                Err(LookupError::NotFound(_)) => {}
                Err(LookupError::State { source, .. }) => {
                    // One damaged file must not hide the others.
                    tracing::warn!(container = %id, error = %source, "could not read a container's state");
                }
            }
        }
        states.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(states)
    }

    /// Sends a signal to a container.
    ///
    /// # Errors
    /// Fails if the container has no process, or the guest refuses.
    pub fn kill(&self, id: &ContainerId, signal: i32, reach: Reach) -> Result<(), ControlError> {
        let request = Request::Signal {
            container: id.to_string(),
            signal,
            all: reach == Reach::All,
        };
        self.control("signal", id, &request).map(|_| ())
    }

    /// Freezes every process of a container.
    ///
    /// # Errors
    /// Fails if the container does not run, or the guest refuses.
    pub fn pause(&self, id: &ContainerId) -> Result<(), ControlError> {
        let container = id.to_string();
        self.control("pause", id, &Request::Pause { container })
            .map(|_| ())
    }

    /// The inverse of [`Runtime::pause`].
    ///
    /// # Errors
    /// Fails if the container is not paused, or the guest refuses.
    pub fn resume(&self, id: &ContainerId) -> Result<(), ControlError> {
        let container = id.to_string();
        self.control("resume", id, &Request::Resume { container })
            .map(|_| ())
    }

    /// Changes a container's limits; what is not set stays.
    ///
    /// # Errors
    /// Fails if the container is stopped, or the guest refuses.
    pub fn update(&self, id: &ContainerId, resources: LinuxResources) -> Result<(), ControlError> {
        let request = Request::Update {
            container: id.to_string(),
            resources: Box::new(resources),
        };
        self.control("update", id, &request).map(|_| ())
    }

    /// Lists a container's processes, with their pids in the guest.
    ///
    /// # Errors
    /// Fails if the container is stopped, or the guest refuses.
    pub fn processes(&self, id: &ContainerId) -> Result<Vec<ProcessInfo>, ControlError> {
        let container = id.to_string();
        match self.control("list the processes of", id, &Request::Processes { container })? {
            Reply::Processes(rows) => Ok(rows),
            _ => Err(protocol("list the processes of", id)),
        }
    }

    /// Measures a container.
    ///
    /// # Errors
    /// Fails if the container is stopped, or the guest refuses.
    pub fn stats(&self, id: &ContainerId) -> Result<Measured, ControlError> {
        let container = id.to_string();
        match self.control("measure", id, &Request::Stats { container })? {
            Reply::Stats(measured) => Ok(*measured),
            _ => Err(protocol("measure", id)),
        }
    }

    /// Waits until a container's process has ended, for as long as that takes.
    ///
    /// # Errors
    /// Fails if there is no such container, or nobody knows how it ended.
    pub fn wait(&self, id: &ContainerId) -> Result<ExitStatus, ControlError> {
        let record = self.record(id)?;
        let request = Request::Wait {
            container: id.to_string(),
        };
        let outcome = self.connect(&record).and_then(|mut connection| {
            connection.ask(
                &request,
                &[],
                Patience {
                    limit: None,
                    signals: None,
                },
            )
        });
        match outcome {
            Ok(Reply::Exited(status)) => Ok(status),
            Ok(_) => Err(protocol("wait for", id)),
            // The supervisor leaves after its last container has ended; the answer is on disk by then.
            Err(source) => match self.record(id)?.exit {
                Some(status) => Ok(status),
                None => Err(call("wait for", id, source)),
            },
        }
    }

    /// Opens the stream of a container's events.
    ///
    /// # Errors
    /// Fails if the container is stopped.
    pub fn watch(&self, id: &ContainerId) -> Result<Watch, ControlError> {
        let record = self.live("watch", id)?;
        let container = id.to_string();
        let connection = self
            .connect(&record)
            .and_then(|connection| {
                connection.send(&Request::Watch { container }, &[])?;
                Ok(connection)
            })
            .map_err(|source| call("watch", id, source))?;
        Ok(Watch {
            id: id.clone(),
            connection,
        })
    }

    fn record(&self, id: &ContainerId) -> Result<ContainerRecord, LookupError> {
        Directory::of(&self.root, id)
            .read_container()
            .map_err(|source| match source.kind() {
                Some(std::io::ErrorKind::NotFound) => LookupError::NotFound(id.clone()),
                _ => LookupError::State {
                    id: id.clone(),
                    source,
                },
            })
    }

    fn live(&self, verb: &'static str, id: &ContainerId) -> Result<ContainerRecord, ControlError> {
        let record = self.record(id)?;
        match record.probe(&self.root) {
            is @ (Status::Stopped | Status::Creating) => Err(ControlError::Status {
                verb,
                id: id.clone(),
                is,
            }),
            _ => Ok(record),
        }
    }

    fn control(
        &self,
        verb: &'static str,
        id: &ContainerId,
        request: &Request,
    ) -> Result<Reply, ControlError> {
        let record = self.live(verb, id)?;
        self.ask(&record, request).map_err(|source| match source {
            CallError::Refused(Refusal::State { is, .. }) => ControlError::Status {
                verb,
                id: id.clone(),
                is,
            },
            source => call(verb, id, source),
        })
    }

    fn connect(&self, record: &ContainerRecord) -> Result<Connection, CallError> {
        Connection::open(&Directory::of(&self.root, &record.sandbox))
    }

    fn ask(&self, record: &ContainerRecord, request: &Request) -> Result<Reply, CallError> {
        self.connect(record)?
            .ask(request, &[], self.answer_limit(&record.sandbox))
    }

    /// How long a supervisor may take to answer.
    fn answer_limit(&self, sandbox: &ContainerId) -> Duration {
        let known = Directory::of(&self.root, sandbox).read_sandbox();
        known
            .map_or(Duration::ZERO, |known| known.call_deadline)
            .saturating_mul(MOST_CALLS)
            .saturating_add(MARGIN)
    }

    fn describe(&self, record: ContainerRecord) -> ContainerState {
        let status = record.probe(&self.root);
        let sandbox = Directory::of(&self.root, &record.sandbox).read_sandbox().ok();
        let pid = match status {
            Status::Stopped => 0,
            _ => record
                .stand_in
                .filter(|process| process.is_alive())
                .map_or(0, |process| process.pid),
        };
        let failure = record.failure.or_else(|| sandbox.as_ref()?.failure.clone());
        ContainerState {
            id: record.id,
            oci_version: record.oci_version,
            status,
            pid,
            bundle: record.bundle,
            created: record.created,
            owner: record.owner,
            annotations: record.annotations,
            sandbox: record.sandbox,
            exit: record.exit,
            failure,
            machine: sandbox.and_then(|sandbox| sandbox.machine),
        }
    }
}

impl Watch {
    /// Waits for the next event; `None` if `limit` passes without one.
    ///
    /// # Errors
    /// Fails if the sandbox ends without a word.
    pub fn next(&mut self, limit: Duration) -> Result<Option<Event>, ControlError> {
        match self.connection.next(&Patience::from(limit)) {
            Ok(Reply::OutOfMemory) => Ok(Some(Event::OutOfMemory)),
            Ok(Reply::Exited(status)) => Ok(Some(Event::Exited(status))),
            Ok(_) => Err(protocol("watch", &self.id)),
            Err(CallError::Silent(_)) => Ok(None),
            Err(source) => Err(call("watch", &self.id, source)),
        }
    }
}

fn call(verb: &'static str, id: &ContainerId, source: CallError) -> ControlError {
    ControlError::Call {
        verb,
        id: id.clone(),
        source,
    }
}

fn protocol(verb: &'static str, id: &ContainerId) -> ControlError {
    call(verb, id, CallError::Protocol)
}
