//! Messages between a client, the supervisor and the stand-ins.
//!
//! All three come from one build and run as one user; the supervisor checks that with the socket's peer
//! credentials. Requests on one connection are answered in order.

use std::time::Duration;

use caisson_wire::agent::{ExitStatus, Failure, ProcessInfo, Stats, WindowSize};
use caisson_wire::vmm::Usage;
use oci_spec::runtime::{LinuxResources, Process};
use serde::{Deserialize, Serialize};

use crate::plan::{ContainerPlan, SandboxPlan};
use crate::process::ProcessId;

/// Largest message between our own processes, in bytes: a plan with its spec, like `TO_GUEST_LIMIT`.
pub(crate) const LIMIT: usize = 8 << 20;
/// Name of the control socket in the sandbox's directory.
pub(crate) const SOCKET: &str = "control.sock";

/// Where a container is in its life (runtime-spec, runtime.md, "State"; `paused` is runc's).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// `create` has not answered yet.
    Creating,
    /// Set up; its process waits for `start`.
    Created,
    /// Its process runs.
    Running,
    /// Its processes are frozen.
    Paused,
    /// Its process has ended.
    Stopped,
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// Which of a process's streams somebody wants; the others are `/dev/null` in the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Wanted {
    pub(crate) stdin: bool,
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
    /// A terminal instead of the three, and its first size.
    pub(crate) terminal: Option<WindowSize>,
}

/// One stream of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) enum Stream {
    Stdin,
    Stdout,
    Stderr,
    Terminal,
}

/// What a client asks of a supervisor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Create a container; descriptor 0 is the supervisor's end of the stand-in's socket.
    Create(Box<CreateRequest>),
    Start {
        container: String,
    },
    /// Run one more process; descriptor 0 as for `Create`.
    Exec(Box<ExecRequest>),
    Signal {
        container: String,
        signal: i32,
        all: bool,
    },
    Pause {
        container: String,
    },
    Resume {
        container: String,
    },
    Update {
        container: String,
        resources: Box<LinuxResources>,
    },
    Processes {
        container: String,
    },
    Stats {
        container: String,
    },
    /// Answered when the container has stopped.
    Wait {
        container: String,
    },
    /// Answered with [`Reply::OutOfMemory`] each time, and [`Reply::Exited`] at the end.
    Watch {
        container: String,
    },
    /// Forget a container; with `force` its processes are killed first.
    Delete {
        container: String,
        force: bool,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct CreateRequest {
    /// The sandbox to boot; `None` creates the container in the one that runs.
    pub(crate) sandbox: Option<Box<SandboxPlan>>,
    pub(crate) container: ContainerPlan,
    pub(crate) wanted: Wanted,
    /// Start it as well, and answer when it runs.
    pub(crate) start: bool,
    pub(crate) stand_in: ProcessId,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ExecRequest {
    pub(crate) container: String,
    pub(crate) exec: String,
    pub(crate) process: Process,
    pub(crate) wanted: Wanted,
    /// The process that was started to stand in; `None` if the caller does it itself, which is not ours to kill.
    pub(crate) stand_in: Option<ProcessId>,
}

/// What the supervisor answers.
pub(crate) type Answer = Result<Reply, Refusal>;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Reply {
    Done,
    Processes(Vec<ProcessInfo>),
    Stats(Box<Measured>),
    OutOfMemory,
    Exited(ExitStatus),
    /// The container is forgotten; whether the sandbox ends with it.
    Deleted {
        last: bool,
    },
}

/// What a container and its machine use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measured {
    /// The container, as its cgroup in the guest counts.
    pub container: Stats,
    /// The machine, as the host sees it, where the vmm process answered.
    pub machine: Option<Usage>,
}

/// Why the supervisor did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The container is not in a state in which that can be done.
    #[error("the container is {is}; this needs one that is {needs}")]
    State {
        /// What it is.
        is: Status,
        /// What it would have to be.
        needs: String,
    },
    /// No such container here.
    #[error("the sandbox has no container {0}")]
    Unknown(String),
    /// The id is taken in this sandbox.
    #[error("{0} exists already; choose another id or delete it first")]
    Exists(String),
    /// The guest refused; stage and error number are kept.
    #[error("the guest could not {0}")]
    Guest(Failure),
    /// The machine could not be started or has ended.
    #[error(transparent)]
    Machine(MachineFailure),
    /// The guest did not answer.
    #[error("the guest did not {what} within {} ms", after.as_millis())]
    Silent {
        /// What it was asked, as a verb phrase.
        what: String,
        /// How long it was given.
        after: Duration,
    },
    /// The host could not prepare what the container needs.
    #[error("cannot {stage}: {cause}")]
    Host {
        /// What was being done, as a verb phrase.
        stage: String,
        /// The chain of causes.
        cause: String,
    },
    /// The sandbox is coming to its end.
    #[error("the sandbox is shutting down")]
    Ending,
    /// The request makes no sense here.
    #[error("the request is not understood: {0}")]
    Request(String),
}

/// A machine that did not start, or did not go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("cannot {stage}: {cause}{}", tail(console))]
pub struct MachineFailure {
    /// The stage reached, as a verb phrase: "boot the guest".
    pub stage: String,
    /// The chain of causes, and what to do where the user can act.
    pub cause: String,
    /// The tail of the guest's console; empty if it printed nothing.
    pub console: String,
}

/// Lines of the guest's console that a message repeats.
const TAIL_LINES: usize = 12;

fn tail(console: &str) -> String {
    let lines: Vec<&str> = console.lines().filter(|line| !line.trim().is_empty()).collect();
    match lines.get(lines.len().saturating_sub(TAIL_LINES)..) {
        None | Some([]) => String::new(),
        Some(last) => format!("; the guest's console ends with:\n{}", last.join("\n")),
    }
}

/// What a stand-in tells the supervisor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FromStandIn {
    /// It got this signal; the process it stands for shall have it.
    Signal(i32),
    /// Its terminal changed.
    Resize(WindowSize),
}

/// What the supervisor tells a stand-in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ToStandIn {
    /// A stream of the process; its descriptor comes with the message.
    Stream(Stream),
    /// The process has ended; leave like it when the streams have run dry.
    Exited(ExitStatus),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_failure_names_stage_and_cause_and_ends_with_the_console() {
        let mut failure = MachineFailure {
            stage: "boot the guest".to_owned(),
            cause: "it powered off".to_owned(),
            console: String::new(),
        };
        assert_eq!(failure.to_string(), "cannot boot the guest: it powered off");
        failure.console = (0..100).map(|n| format!("line {n}\n\n")).collect();
        let text = failure.to_string();
        assert!(text.ends_with("line 98\nline 99"), "{text}");
        assert_eq!(text.lines().count(), 1 + TAIL_LINES);
    }
}
