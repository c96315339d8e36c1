//! What the agent says, checked against what it was asked.

use std::time::Duration;

use caisson_wire::agent::{self, ExitStatus, Failure, FromAgent, Reply as AgentReply, Target};
use caisson_wire::vmm::{Order, ToVmm};

use super::super::state::{Call, Effect, Phase, State, Timer, What};
use super::requests::init_of;
use super::{KILL, MOST_LATE, Patient, USAGE_LIMIT, answer};
use crate::proto::{Refusal, Reply, Status};

/// The code of a process that the guest could not start for a reason of its own; engines know 126 and 127.
const NOT_STARTED: ExitStatus = ExitStatus::Code(255);
/// What engines expect for a program that is not there, and for one that is no program (POSIX shell, 2.8.2).
const NOT_FOUND: ExitStatus = ExitStatus::Code(127);
const NOT_EXECUTABLE: ExitStatus = ExitStatus::Code(126);

/// How long the vmm process may take to say why the agent's stream has ended.
const LAST_WORDS_LIMIT: Duration = Duration::from_millis(250);
/// What is said of a container whose own process had to go.
const OUT_OF_MEMORY: &str =
    "its process was killed because the container ran out of memory; raise its memory limit";

impl State {
    pub(super) fn agent(&mut self, message: FromAgent, out: &mut Vec<Effect>) {
        match message {
            FromAgent::Answer { id, outcome } => self.agent_answer(id, outcome, out),
            FromAgent::Exited { target, status } => self.exited(&target, status, out),
            FromAgent::OutOfMemory { container } => {
                if let Some(container) = self.containers.get_mut(&container) {
                    container.out_of_memory = true;
                    for watcher in &container.watchers {
                        out.push(Effect::Answer(*watcher, Ok(Reply::OutOfMemory)));
                    }
                } else {
                    self.violation("reported on a container that it does not have", out);
                }
            }
        }
    }

    fn agent_answer(&mut self, id: u64, outcome: Result<AgentReply, Failure>, out: &mut Vec<Effect>) {
        if self.late.remove(&id) {
            return;
        }
        let Some(Call { what, token }) = self.calls.remove(&id) else {
            self.violation("answered what it was not asked", out);
            return;
        };
        out.push(Effect::Disarm(Timer::Call(id)));
        match outcome {
            Ok(reply) => self.agent_did(what, token, reply, out),
            Err(failure) => self.agent_failed(what, token, shortened(failure), out),
        }
    }

    fn agent_did(&mut self, what: What, token: Option<u64>, reply: AgentReply, out: &mut Vec<Effect>) {
        match (what, reply) {
            (What::Create(id), AgentReply::Process { .. }) => self.created(&id, out),
            (What::Start(id), AgentReply::Done | AgentReply::Process { .. }) => self.started(&id, token, out),
            (What::Exec(_), AgentReply::Process { .. }) => answer(token, Ok(Reply::Done), out),
            (What::Pause(id), AgentReply::Done) => {
                self.change_status(&id, Status::Running, Status::Paused, out);
                answer(token, Ok(Reply::Done), out);
            }
            (What::Resume(id), AgentReply::Done) => {
                self.change_status(&id, Status::Paused, Status::Running, out);
                answer(token, Ok(Reply::Done), out);
            }
            (What::Processes, AgentReply::Processes(rows)) => answer(token, Ok(Reply::Processes(rows)), out),
            (What::Stats, AgentReply::Stats(stats)) => {
                let Some(token) = token else { return };
                let id = self.next_id();
                self.orders.insert(id, (token, stats));
                out.push(Effect::ToVmm(ToVmm::Ask {
                    id,
                    order: Order::Usage,
                }));
                out.push(Effect::Arm(Timer::Order(id), USAGE_LIMIT));
            }
            (What::Setup, AgentReply::Done) => tracing::info!("the guest was set up"),
            (What::Resize | What::Delete(_), AgentReply::Done) => {}
            // The power goes next; the vmm process reports it.
            (What::Shutdown, AgentReply::Done) => {}
            (What::Signal { .. } | What::Update, AgentReply::Done) => answer(token, Ok(Reply::Done), out),
            (what, _) => {
                if let Some(token) = token {
                    let refusal = Refusal::Request("the guest's answer was of another kind".to_owned());
                    out.push(Effect::Answer(token, Err(refusal)));
                }
                self.violation(&format!("gave an answer of another kind to {what:?}"), out);
            }
        }
    }

    fn agent_failed(&mut self, what: What, token: Option<u64>, failure: Failure, out: &mut Vec<Effect>) {
        match what {
            What::Setup => self.fail("set the guest up", failure.to_string(), out),
            What::Create(id) => self.creation_failed(&id, Refusal::Guest(failure), out),
            What::Start(id) => self.not_started(&id, token, failure, out),
            What::Exec(target) => {
                answer(token, Err(Refusal::Guest(failure)), out);
                self.forget_exec(&target, out);
            }
            What::Shutdown => self.stop(out),
            // A process that has just ended, or a container that is gone: nothing to do, and nobody asked.
            What::Resize | What::Delete(_) => {}
            _ => answer(token, Err(Refusal::Guest(failure)), out),
        }
    }

    fn created(&mut self, id: &str, out: &mut Vec<Effect>) {
        let Some(container) = self.containers.get_mut(id) else {
            return; // given up meanwhile, and the agent told so
        };
        if container.status != Status::Creating {
            return; // it has ended already
        }
        tracing::info!(container = id, "the container was created");
        container.status = Status::Created;
        out.push(Effect::Persist);
        if !container.start {
            answer(container.creating.take(), Ok(Reply::Done), out);
        }
    }

    fn started(&mut self, id: &str, token: Option<u64>, out: &mut Vec<Effect>) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        // It may have run and ended before this answer.
        if matches!(container.status, Status::Created | Status::Creating) {
            tracing::info!(container = id, "the container's process was started");
            container.status = Status::Running;
            out.push(Effect::Persist);
        }
        let creating = container.creating.take();
        answer(token.or(creating), Ok(Reply::Done), out);
    }

    fn not_started(&mut self, id: &str, token: Option<u64>, failure: Failure, out: &mut Vec<Effect>) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        if container.creating.is_some() {
            self.creation_failed(id, Refusal::Guest(failure), out);
            return;
        }
        container.failure = Some(failure.to_string());
        let status = match (failure.stage, failure.errno) {
            (agent::Stage::Program, Some(libc::ENOENT)) => NOT_FOUND,
            (agent::Stage::Program, Some(libc::EACCES | libc::ENOEXEC | libc::EISDIR)) => NOT_EXECUTABLE,
            _ => NOT_STARTED,
        };
        // Answered before the end is seen, so that the caller learns why.
        answer(token, Err(Refusal::Guest(failure)), out);
        if container.exit.is_none() {
            self.exited(&init_of(id), status, out);
        }
    }

    fn exited(&mut self, target: &Target, status: ExitStatus, out: &mut Vec<Effect>) {
        let status = plausible(status);
        let Some(process) = self.process(target) else {
            // One that was given up may still be reported, behind the requests that end it.
            let forgotten = target.exec.is_some() || !self.calls.is_empty() || !self.late.is_empty();
            if !forgotten {
                self.violation("reported the end of a process that it does not have", out);
            }
            return;
        };
        if process.exit.is_some() {
            return;
        }
        process.exit = Some(status);
        self.tell_exit(target, Patient::Yes, out);
        self.forget_ended_exec(target);
        if target.exec.is_some() {
            return;
        }
        let Some(container) = self.containers.get_mut(&target.container) else {
            return;
        };
        container.status = Status::Stopped;
        container.exit = Some(status);
        if container.out_of_memory && status == ExitStatus::Signal(KILL) {
            container.failure = Some(OUT_OF_MEMORY.to_owned());
        }
        for waiter in container.waiters.drain(..).chain(container.watchers.drain(..)) {
            out.push(Effect::Answer(waiter, Ok(Reply::Exited(status))));
        }
        let deleting = container.deleting.take();
        // A process that ran and ended before its start was answered was started all the same.
        out.push(Effect::Persist);
        if deleting.is_some() {
            out.push(Effect::Disarm(Timer::Delete(target.container.clone())));
            self.remove(&target.container, deleting, out);
        } else {
            self.end_if_done(out);
        }
    }

    fn change_status(&mut self, id: &str, from: Status, to: Status, out: &mut Vec<Effect>) {
        if let Some(container) = self.containers.get_mut(id)
            && container.status == from
        {
            container.status = to;
            out.push(Effect::Persist);
        }
    }

    fn forget_exec(&mut self, target: &Target, out: &mut Vec<Effect>) {
        if let (Some(container), Some(exec)) = (self.containers.get_mut(&target.container), &target.exec) {
            container.execs.remove(exec);
        }
        self.ports.retain(|_, (of, _)| of != target);
        out.push(Effect::Release(target.clone()));
        out.push(Effect::Persist);
    }

    /// A request to the agent is late.
    pub(super) fn call_deadline(&mut self, id: u64, out: &mut Vec<Effect>) {
        let Some(Call { what, token }) = self.calls.remove(&id) else {
            return;
        };
        self.late.insert(id);
        let silent = |what: &str| Refusal::Silent {
            what: what.to_owned(),
            after: self.call_deadline,
        };
        match what {
            What::Setup => {
                let after = self.call_deadline.as_millis();
                self.fail(
                    "set the guest up",
                    format!("it did not answer within {after} ms"),
                    out,
                );
            }
            What::Create(id) => {
                let refusal = silent("create the container");
                self.creation_failed(&id, refusal, out);
            }
            What::Start(id) => {
                let refusal = silent("start the container");
                match self.containers.get(&id).is_some_and(|c| c.creating.is_some()) {
                    true => self.creation_failed(&id, refusal, out),
                    false => answer(token, Err(refusal), out),
                }
            }
            What::Exec(target) => {
                answer(token, Err(silent("run the process")), out);
                self.forget_exec(&target, out);
            }
            // A guest that does not carry out the last resort is ended from outside.
            What::Signal { kill: true, target } => {
                let is_init = target.exec.is_none();
                answer(token, Ok(Reply::Done), out);
                if is_init && self.phase == Phase::Ready {
                    self.stop(out);
                }
            }
            What::Shutdown => self.stop(out),
            What::Signal { .. } => answer(token, Err(silent("deliver the signal")), out),
            What::Resize | What::Delete(_) => {}
            What::Pause(_) => answer(token, Err(silent("pause the container")), out),
            What::Resume(_) => answer(token, Err(silent("resume the container")), out),
            What::Update => answer(token, Err(silent("update the container")), out),
            What::Processes => answer(token, Err(silent("list the processes")), out),
            What::Stats => answer(token, Err(silent("measure the container")), out),
        }
        if self.late.len() > MOST_LATE && self.phase == Phase::Ready {
            self.fail(
                "talk to the guest",
                "it answers no request any more".to_owned(),
                out,
            );
        }
    }

    pub(super) fn agent_gone(&mut self, why: &str, out: &mut Vec<Effect>) {
        match self.phase {
            // The machine ends next, or its deadline comes.
            Phase::Flushing | Phase::Stopping => {}
            // When the machine ends, this is seen first, and says the least.
            _ => {
                self.agent_lost.get_or_insert_with(|| why.to_owned());
                out.push(Effect::Arm(Timer::LastWords, LAST_WORDS_LIMIT));
            }
        }
    }

    /// The agent broke the protocol: it is not, or no longer, ours.
    fn violation(&mut self, what: &str, out: &mut Vec<Effect>) {
        self.fail("trust the guest", format!("its agent {what}"), out);
    }
}

/// A status a process can have: a signal is one of Linux's, 1 to 64.
fn plausible(status: ExitStatus) -> ExitStatus {
    match status {
        ExitStatus::Signal(signal) if !(1..=64).contains(&signal) => ExitStatus::Signal(libc::SIGKILL),
        status => status,
    }
}

/// A guest's message as one line of bounded length.
fn shortened(mut failure: Failure) -> Failure {
    const MOST: usize = 2048;
    failure
        .message
        .truncate(failure.message.floor_char_boundary(MOST));
    failure.message = failure
        .message
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    failure
}
