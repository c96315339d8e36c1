//! What a sandbox is at one moment, what can happen to it, and what follows from that.
//!
//! Values only. [`step`](super::step::step) is the one function that turns an event into the next state and its
//! effects; [`Drive`](super::drive::Drive) makes the effects happen and never changes the state itself.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::time::Duration;

use caisson_wire::agent::{self, ExitStatus, FromAgent, Stats, Target};
use caisson_wire::vmm::{self, FromVmm, ToVmm};

use crate::plan::{ContainerPlan, SandboxPlan};
use crate::process::ProcessId;
use crate::proto::{
    Answer, FromStandIn, MachineFailure, Refusal, Request, Status, Stream, ToStandIn, Wanted,
};

/// A request whose answer somebody waits for.
pub(crate) type Token = u64;

/// A sandbox.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) phase: Phase,
    pub(crate) containers: BTreeMap<String, Container>,
    /// What runs the guest, once the vmm process said so.
    pub(crate) machine: Option<String>,
    /// What ended the sandbox, if it was not asked to.
    pub(crate) failure: Option<MachineFailure>,
    /// What the agent is told first.
    pub(super) setup: agent::Setup,
    /// Requests to the agent without an answer.
    pub(super) calls: BTreeMap<u64, Call>,
    /// Requests to the agent whose answer nobody waits for any more.
    pub(super) late: HashSet<u64>,
    /// Requests to the vmm process without an answer.
    pub(super) orders: BTreeMap<u64, (Token, Box<Stats>)>,
    /// Stream ports that the guest may connect to, each once.
    pub(super) ports: BTreeMap<u32, (Target, Stream)>,
    pub(super) last_id: u64,
    pub(super) last_port: u32,
    pub(crate) call_deadline: Duration,
    /// Why the agent's stream has ended, until it is known whether the machine has.
    pub(super) agent_lost: Option<String>,
    /// The last bytes the guest printed.
    pub(super) console: VecDeque<u8>,
    /// The last bytes the vmm process wrote to its standard error.
    pub(super) said: VecDeque<u8>,
}

/// Where a sandbox is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Nothing was asked yet.
    #[default]
    Idle,
    /// The vmm process and what it needs are being prepared.
    Launching,
    /// The machine was launched; the agent has not dialled in.
    Booting,
    /// The agent takes requests.
    Ready,
    /// The agent flushes file systems and powers off.
    Flushing,
    /// The vmm process was told to end.
    Stopping,
    /// The machine is no more.
    Ended,
}

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) plan: ContainerPlan,
    pub(crate) status: Status,
    pub(crate) exit: Option<ExitStatus>,
    pub(crate) failure: Option<String>,
    /// Whether the guest's kernel has killed a process of it for want of memory.
    pub(super) out_of_memory: bool,
    pub(super) wanted: Wanted,
    /// Who waits for it to be created, or to be started if that was asked for at once.
    pub(super) creating: Option<Token>,
    pub(super) start: bool,
    /// Who waits for its end.
    pub(super) waiters: Vec<Token>,
    pub(super) watchers: Vec<Token>,
    /// Who waits for it to be forgotten.
    pub(super) deleting: Option<Token>,
    pub(super) init: Process,
    pub(super) execs: BTreeMap<String, Process>,
}

/// A process in the guest, and its stand-in.
#[derive(Debug)]
pub(crate) struct Process {
    /// `None` if whoever asked stands in itself.
    pub(crate) stand_in: Option<ProcessId>,
    /// Whether the stand-in's socket is open.
    pub(super) attached: bool,
    pub(super) exit: Option<ExitStatus>,
}

/// A request to the agent.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) what: What,
    /// Who waits for the answer.
    pub(super) token: Option<Token>,
}

/// What a request to the agent is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    Setup,
    Create(String),
    Start(String),
    Exec(Target),
    Signal { target: Target, kill: bool },
    Resize,
    Pause(String),
    Resume(String),
    Update,
    Processes,
    Stats,
    Delete(String),
    Shutdown,
}

/// Something that happened.
#[derive(Debug)]
pub(crate) enum Event {
    Request(Token, Request),
    /// Whoever waits for this answer has gone.
    Dropped(Token),
    /// The vmm process was started, or not; with what the network gives the guest.
    Launched(Result<Network, MachineFailure>),
    /// A further container's files are in the shared directory, or not.
    Prepared(String, Result<(), Refusal>),
    Vmm(FromVmm),
    /// The vmm process has gone without a word, or spoken nonsense.
    VmmGone(String),
    Agent(FromAgent),
    /// The agent's stream has ended, or carried nonsense.
    AgentGone(String),
    StandIn(Target, FromStandIn),
    StandInGone(Target),
    /// The guest printed.
    Console(Vec<u8>),
    /// The vmm process wrote to its standard error.
    VmmSaid(Vec<u8>),
    Deadline(Timer),
    /// The supervisor itself was asked to end.
    Terminated,
}

/// The guest's part of the sandbox's network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Network {
    pub(crate) interfaces: Vec<agent::Interface>,
    pub(crate) routes: Vec<agent::Route>,
    pub(crate) neighbours: Vec<agent::Neighbour>,
}

/// Something to do.
#[derive(Debug, PartialEq)]
pub(crate) enum Effect {
    /// Write the state down.
    Persist,
    Answer(Token, Answer),
    /// Serve the stand-in whose socket came with this request.
    Adopt(Token, Target),
    ToStandIn(Target, ToStandIn),
    /// Close a stand-in's socket.
    Release(Target),
    /// Start the vmm process; the outcome is an event.
    Launch(Box<SandboxPlan>),
    /// Put a further container's files into the shared directory; the outcome is an event.
    Prepare(String),
    /// Take a container's files out of it.
    Unprepare(ContainerFiles),
    ToVmm(ToVmm),
    ToAgent(agent::Request),
    /// What becomes of the stream that came with the event.
    Stream(StreamUse),
    Arm(Timer, Duration),
    Disarm(Timer),
    KillVmm,
    /// Leave.
    Finish,
}

/// The files of a container that is no more: targets of its binds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ContainerFiles(pub(crate) Vec<String>);

/// What becomes of a stream that the guest has opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StreamUse {
    Agent,
    StandIn(Target, Stream),
    Drop,
}

/// What a deadline is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Timer {
    /// The agent dials in.
    Boot,
    /// The agent answers.
    Call(u64),
    /// The vmm process answers.
    Order(u64),
    /// The last streams of a process that has ended are opened.
    Streams(Target),
    /// The vmm process says why the agent's stream has ended.
    LastWords,
    /// A container that is deleted has ended.
    Delete(String),
    /// The stand-ins of ended processes have written everything.
    Drain,
    /// The guest has powered off.
    Flush,
    /// The vmm process has ended.
    Stop,
}

impl Container {
    pub(super) fn process(&mut self, exec: Option<&str>) -> Option<&mut Process> {
        match exec {
            None => Some(&mut self.init),
            Some(exec) => self.execs.get_mut(exec),
        }
    }

    pub(super) fn files(&self) -> ContainerFiles {
        ContainerFiles(self.plan.binds.iter().map(|bind| bind.target.clone()).collect())
    }

    /// Whether some stand-in of it still has output to write, or a process to stand for.
    pub(super) fn is_attached(&self) -> bool {
        self.init.attached || self.execs.values().any(|process| process.attached)
    }
}

impl State {
    /// Stand-ins of every process.
    pub(crate) fn stand_ins(&self) -> Vec<ProcessId> {
        let all = self
            .containers
            .values()
            .flat_map(|container| std::iter::once(&container.init).chain(container.execs.values()));
        all.filter_map(|process| process.stand_in).collect()
    }

    pub(super) fn process(&mut self, target: &Target) -> Option<&mut Process> {
        self.containers
            .get_mut(&target.container)?
            .process(target.exec.as_deref())
    }

    pub(super) fn console_tail(&self) -> String {
        let bytes: Vec<u8> = self.console.iter().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The next id for a request, to the agent or to the vmm process.
    pub(super) fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }
}

/// How a machine's end reads in a message.
pub(super) fn how_it_ended(end: &vmm::End) -> String {
    match end {
        vmm::End::PowerOff => "it powered off".to_owned(),
        vmm::End::Reset => "it restarted".to_owned(),
        vmm::End::Stopped => "it was stopped".to_owned(),
        vmm::End::Refused { stage, cause } => format!("cannot {stage}: {cause}"),
        vmm::End::Crashed(why) => why.clone(),
    }
}
