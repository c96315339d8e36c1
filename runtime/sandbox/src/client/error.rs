//! What can go wrong for a client, by operation.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use caisson_wire::agent::Failure;

use crate::cgroup::CgroupError;
use crate::disk::StateError;
use crate::id::{ContainerId, IdError};
use crate::proto::{Refusal, Status};

/// A container that cannot be looked up.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// There is none with that id.
    #[error("container {0} does not exist")]
    NotFound(ContainerId),
    /// Its state cannot be read.
    #[error("cannot look up container {id}")]
    State {
        /// Which container.
        id: ContainerId,
        /// The cause.
        #[source]
        source: StateError,
    },
}

/// A supervisor that did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It is not there, or left without an answer.
    #[error("the sandbox's supervisor is gone{}", said(log))]
    Gone {
        /// The end of its log.
        log: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It did not answer in time.
    #[error("the sandbox's supervisor did not answer within {} ms", .0.as_millis())]
    Silent(Duration),
    /// What it said is no answer.
    #[error("the sandbox's supervisor sent no answer of ours; is another version of caisson running?")]
    Protocol,
    /// A signal came before the answer.
    #[error("interrupted by signal {0}")]
    Interrupted(i32),
    /// It refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

impl CallError {
    /// What the guest's agent said, if it was the agent that refused.
    pub fn guest(&self) -> Option<&Failure> {
        match self {
            Self::Refused(Refusal::Guest(failure)) => Some(failure),
            _ => None,
        }
    }
}

/// A hook that failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It cannot be run.
    #[error("cannot run the {phase} hook {}", path.display())]
    Spawn {
        /// Which list it is in.
        phase: &'static str,
        /// Its program.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It returned an error.
    #[error("the {phase} hook {} failed with {how}{}", path.display(), said(stderr))]
    Failed {
        /// Which list it is in.
        phase: &'static str,
        /// Its program.
        path: PathBuf,
        /// "exit code 1", "signal 9".
        how: String,
        /// The end of what it wrote to standard error.
        stderr: String,
    },
    /// It took longer than its configuration allows.
    #[error("the {phase} hook {} did not end within {} s and was killed", path.display(), after.as_secs())]
    Deadline {
        /// Which list it is in.
        phase: &'static str,
        /// Its program.
        path: PathBuf,
        /// Its timeout.
        after: Duration,
    },
}

fn said(last: &str) -> String {
    match last.trim() {
        "" => String::new(),
        text => format!(": {text}"),
    }
}

/// A container that was not created. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The id is none.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The id is taken.
    #[error("container {0} exists already; delete it first, or choose another id")]
    Exists(ContainerId),
    /// The sandbox to join cannot be found.
    #[error("cannot join the sandbox of container {id}")]
    Join {
        /// Whose sandbox.
        id: ContainerId,
        /// The cause.
        #[source]
        source: LookupError,
    },
    /// Its state cannot be written.
    #[error("cannot record the new container")]
    State(#[from] StateError),
    /// Its standard streams or terminal cannot be set up.
    #[error("cannot {verb}")]
    Stdio {
        /// What was being done: "connect to the console socket".
        verb: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// One of our processes cannot be started.
    #[error("cannot start the {what} process")]
    Spawn {
        /// "supervisor", "stand-in".
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The network namespace cannot be entered.
    #[error("cannot open network namespace {}", path.display())]
    Netns {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A hook failed.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// The supervisor did not create it.
    #[error("cannot create container {id}")]
    Call {
        /// Which container.
        id: ContainerId,
        /// The cause.
        #[source]
        source: CallError,
    },
}

/// A container that was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It cannot be looked up.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// It is in another state.
    #[error("cannot start container {id}: it is {is}; only a created container can be started")]
    Status {
        /// Which container.
        id: ContainerId,
        /// What it is.
        is: Status,
    },
    /// The supervisor did not start it.
    #[error("cannot start container {id}")]
    Call {
        /// Which container.
        id: ContainerId,
        /// The cause.
        #[source]
        source: CallError,
    },
}

/// A process that was not run.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The container cannot be looked up.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// It is in another state.
    #[error("cannot run a process in container {id}: it is {is}; it must be running")]
    Status {
        /// Which container.
        id: ContainerId,
        /// What it is.
        is: Status,
    },
    /// The exec id is none.
    #[error(transparent)]
    Id(#[from] IdError),
    /// Its standard streams or terminal cannot be set up.
    #[error("cannot {verb}")]
    Stdio {
        /// What was being done.
        verb: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The stand-in process cannot be started.
    #[error("cannot start the stand-in process")]
    Spawn(#[source] io::Error),
    /// The supervisor did not run it.
    #[error("cannot run a process in container {id}")]
    Call {
        /// Which container.
        id: ContainerId,
        /// The cause.
        #[source]
        source: CallError,
    },
}

/// A container that was not controlled or measured.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// It cannot be looked up.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// It is in another state.
    #[error("cannot {verb} container {id}: it is {is}")]
    Status {
        /// What was to be done.
        verb: &'static str,
        /// Which container.
        id: ContainerId,
        /// What it is.
        is: Status,
    },
    /// The supervisor did not do it.
    #[error("cannot {verb} container {id}")]
    Call {
        /// What was to be done.
        verb: &'static str,
        /// Which container.
        id: ContainerId,
        /// The cause.
        #[source]
        source: CallError,
    },
}

/// A container that was not deleted, or not whole.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// It cannot be looked up.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// It still runs.
    #[error("cannot delete container {id}: it is {is}; kill it first, or use --force")]
    Status {
        /// Which container.
        id: ContainerId,
        /// What it is.
        is: Status,
    },
    /// A process of it does not end.
    #[error("cannot delete container {id}: process {pid} did not end after it was killed")]
    Process {
        /// Which container.
        id: ContainerId,
        /// Which process.
        pid: i32,
    },
    /// Its files cannot be removed.
    #[error("cannot delete container {id}")]
    State {
        /// Which container.
        id: ContainerId,
        /// The cause.
        #[source]
        source: StateError,
    },
    /// Its cgroup cannot be removed.
    #[error("cannot delete the cgroup of container {id}")]
    Cgroup {
        /// Which container.
        id: ContainerId,
        /// The cause.
        #[source]
        source: CgroupError,
    },
}

/// Gives what the guest's agent said, if it was the agent that refused: stage and error number.
pub trait GuestFailure {
    /// The agent's failure.
    fn guest(&self) -> Option<&Failure>;
}

macro_rules! guest_failure {
    ($($error:ty),*) => {$(
        impl GuestFailure for $error {
            fn guest(&self) -> Option<&Failure> {
                match self {
                    Self::Call { source, .. } => source.guest(),
                    _ => None,
                }
            }
        }
    )*};
}

guest_failure!(CreateError, StartError, ExecError, ControlError);
