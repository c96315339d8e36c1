//! The one function that decides: from a state and an event to the next state and what to do.
//!
//! Every byte from the vmm process and from the agent arrives here as an event and is believed only as far as
//! the state's own tables go: an answer nobody asked for, or a process nobody started, ends the sandbox with a
//! report. No event can make the state grow without bound.

mod agent_events;
mod end;
mod requests;

use std::collections::VecDeque;
use std::time::Duration;

use caisson_wire::agent::{self, Request as ToAgent, Target};
use caisson_wire::vmm::{Answer as VmmAnswer, CONSOLE_TAIL, End, FromVmm};

use super::state::{Call, Effect, Event, Phase, State, StreamUse, Timer, What};
use crate::proto::{Answer, FromStandIn, Measured, Reply, Status, Stream, ToStandIn};

/// Most bytes of the vmm process's standard error that a report carries.
const SAID_TAIL: usize = 2048;
/// How long the last streams of an ended process may take to be opened.
const STREAMS_LIMIT: Duration = Duration::from_secs(1);
/// How long the vmm process may take to measure itself.
const USAGE_LIMIT: Duration = Duration::from_millis(500);
/// Most requests to the agent that may be late at once; an agent with more is given up.
const MOST_LATE: usize = 64;
/// SIGKILL, which nothing in the guest may withstand.
pub(super) const KILL: i32 = libc::SIGKILL;

/// Signals that end what has not begun yet.
const ENDING: [i32; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];

/// The next state, and what to do.
pub(crate) fn step(mut state: State, event: Event) -> (State, Vec<Effect>) {
    let mut out = Vec::new();
    if state.phase == Phase::Ended {
        refuse_after_the_end(&event, &mut out);
        return (state, out);
    }
    match event {
        Event::Request(token, request) => state.request(token, request, &mut out),
        Event::Dropped(token) => state.dropped(token, &mut out),
        Event::Launched(outcome) => state.launched(outcome, &mut out),
        Event::Prepared(container, outcome) => state.prepared(&container, outcome, &mut out),
        Event::Vmm(message) => state.vmm(message, &mut out),
        Event::VmmGone(why) => state.vmm_gone(&why, &mut out),
        Event::Agent(message) => state.agent(message, &mut out),
        Event::AgentGone(why) => state.agent_gone(&why, &mut out),
        Event::StandIn(target, message) => state.stand_in(target, &message, &mut out),
        Event::StandInGone(target) => state.stand_in_gone(&target, &mut out),
        Event::Console(bytes) => keep_tail(&mut state.console, &bytes, CONSOLE_TAIL),
        Event::VmmSaid(bytes) => keep_tail(&mut state.said, &bytes, SAID_TAIL),
        Event::Deadline(timer) => state.deadline(timer, &mut out),
        Event::Terminated => state.terminated(&mut out),
    }
    (state, out)
}

fn refuse_after_the_end(event: &Event, out: &mut Vec<Effect>) {
    match event {
        Event::Request(token, _) => {
            out.push(Effect::Answer(*token, Err(crate::Refusal::Ending)));
        }
        Event::Vmm(FromVmm::GuestConnected { .. }) => out.push(Effect::Stream(StreamUse::Drop)),
        _ => {}
    }
}

impl State {
    /// Sends a request to the agent, with a deadline.
    fn call(
        &mut self,
        what: What,
        call: agent::Call,
        token: Option<super::state::Token>,
        out: &mut Vec<Effect>,
    ) {
        let id = self.next_id();
        self.calls.insert(id, Call { what, token });
        out.push(Effect::ToAgent(ToAgent { id, call }));
        out.push(Effect::Arm(Timer::Call(id), self.call_deadline));
    }

    fn vmm(&mut self, message: FromVmm, out: &mut Vec<Effect>) {
        match message {
            FromVmm::Started { .. } if self.machine.is_some() => {}
            FromVmm::Started { machine, built_us } => {
                tracing::info!(machine, built_us, "the machine was built");
                // The name is shown to people: what is not a short word is not taken.
                self.machine = Some(
                    machine
                        .chars()
                        .filter(char::is_ascii_alphanumeric)
                        .take(16)
                        .collect(),
                );
                out.push(Effect::Persist);
            }
            FromVmm::GuestConnected { port } => self.guest_connected(port, out),
            FromVmm::Answer { id, outcome } => {
                let Some((token, stats)) = self.orders.remove(&id) else {
                    // It may have come after its deadline.
                    if id > self.last_id {
                        self.vmm_gone("it answered what it was not asked", out);
                    }
                    return;
                };
                out.push(Effect::Disarm(Timer::Order(id)));
                let machine = match outcome {
                    Ok(VmmAnswer::Usage(usage)) => Some(usage),
                    Ok(VmmAnswer::Done) | Err(_) => None,
                };
                let measured = Measured {
                    container: *stats,
                    machine,
                };
                out.push(Effect::Answer(token, Ok(Reply::Stats(Box::new(measured)))));
            }
            FromVmm::Ended(mut ended) => {
                ended
                    .console
                    .truncate(ended.console.floor_char_boundary(CONSOLE_TAIL));
                if !ended.console.is_empty() {
                    self.console = ended.console.into_bytes().into();
                }
                match (self.phase, &ended.how) {
                    (Phase::Flushing, End::PowerOff | End::Reset | End::Stopped) | (Phase::Stopping, _) => {
                        self.finish(out);
                    }
                    (_, how) => {
                        let how = super::state::how_it_ended(how);
                        self.fail_machine(how, out);
                    }
                }
            }
        }
    }

    fn guest_connected(&mut self, port: u32, out: &mut Vec<Effect>) {
        if port == agent::CONTROL_PORT {
            if self.phase != Phase::Booting {
                // Whatever dials the control port a second time is not the agent that was set up.
                out.push(Effect::Stream(StreamUse::Drop));
                return;
            }
            tracing::info!("the guest's agent dialed in");
            out.push(Effect::Stream(StreamUse::Agent));
            out.push(Effect::Disarm(Timer::Boot));
            self.phase = Phase::Ready;
            let setup = Box::new(std::mem::take(&mut self.setup));
            self.call(What::Setup, agent::Call::Setup(setup), None, out);
            for container in self.containers.keys().cloned().collect::<Vec<_>>() {
                self.send_create(&container, out);
            }
            return;
        }
        let Some((target, stream)) = self.ports.remove(&port) else {
            out.push(Effect::Stream(StreamUse::Drop));
            return;
        };
        out.push(Effect::Stream(StreamUse::StandIn(target.clone(), stream)));
        self.tell_exit(&target, Patient::Yes, out);
    }

    fn stand_in(&mut self, target: Target, message: &FromStandIn, out: &mut Vec<Effect>) {
        if self.phase != Phase::Ready {
            let booting = matches!(self.phase, Phase::Launching | Phase::Booting);
            if booting && matches!(message, FromStandIn::Signal(signal) if ENDING.contains(signal)) {
                // Nobody is there yet to take it.
                self.terminated(out);
            }
            return;
        }
        if self.process(&target).is_none_or(|process| process.exit.is_some()) {
            return;
        }
        match *message {
            FromStandIn::Signal(signal) => self.signal(target, signal, false, None, out),
            FromStandIn::Resize(size) => {
                self.call(What::Resize, agent::Call::Resize { target, size }, None, out);
            }
        }
    }

    fn signal(
        &mut self,
        target: Target,
        signal: i32,
        all: bool,
        token: Option<super::state::Token>,
        out: &mut Vec<Effect>,
    ) {
        let what = What::Signal {
            target: target.clone(),
            kill: signal == KILL,
        };
        self.call(what, agent::Call::Signal { target, signal, all }, token, out);
    }

    fn stand_in_gone(&mut self, target: &Target, out: &mut Vec<Effect>) {
        let Some(process) = self.process(target) else {
            return;
        };
        if !std::mem::take(&mut process.attached) {
            return;
        }
        if process.exit.is_none() {
            // Without its stand-in nobody can see, wait for or control the process: it ends as well.
            match self.phase {
                Phase::Ready => self.signal(target.clone(), KILL, false, None, out),
                Phase::Launching | Phase::Booting => self.terminated(out),
                _ => {}
            }
        }
        self.forget_ended_exec(target);
        self.end_if_done(out);
    }

    /// Tells a stand-in that its process has ended, once every stream it may still get has come.
    fn tell_exit(&mut self, target: &Target, patient: Patient, out: &mut Vec<Effect>) {
        let outstanding = self
            .ports
            .values()
            .any(|(of, stream)| of == target && *stream != Stream::Stdin);
        let Some(status) = self.process(target).and_then(|process| process.exit) else {
            return;
        };
        if outstanding && patient == Patient::Yes {
            out.push(Effect::Arm(Timer::Streams(target.clone()), STREAMS_LIMIT));
            return;
        }
        out.push(Effect::Disarm(Timer::Streams(target.clone())));
        self.ports.retain(|_, (of, _)| of != target);
        out.push(Effect::ToStandIn(target.clone(), ToStandIn::Exited(status)));
    }

    fn forget_ended_exec(&mut self, target: &Target) {
        if let Some(exec) = &target.exec
            && let Some(container) = self.containers.get_mut(&target.container)
            && container
                .execs
                .get(exec)
                .is_some_and(|process| process.exit.is_some() && !process.attached)
        {
            container.execs.remove(exec);
        }
    }

    fn deadline(&mut self, timer: Timer, out: &mut Vec<Effect>) {
        match timer {
            Timer::Boot => self.boot_deadline(out),
            Timer::Call(id) => self.call_deadline(id, out),
            Timer::Order(id) => {
                if let Some((token, stats)) = self.orders.remove(&id) {
                    let measured = Measured {
                        container: *stats,
                        machine: None,
                    };
                    out.push(Effect::Answer(token, Ok(Reply::Stats(Box::new(measured)))));
                }
            }
            Timer::LastWords => {
                let why = self.agent_lost.take().unwrap_or_default();
                self.fail("talk to the guest", why, out);
            }
            Timer::Streams(target) => self.tell_exit(&target, Patient::No, out),
            Timer::Delete(container) => self.delete_deadline(&container, out),
            Timer::Drain => self.flush(out),
            Timer::Flush => self.stop(out),
            Timer::Stop => self.finish(out),
        }
    }

    /// Ends the sandbox if nothing in it runs and every stand-in has written what it had.
    fn end_if_done(&mut self, out: &mut Vec<Effect>) {
        if self.phase != Phase::Ready {
            return;
        }
        let stopped = |status| status == Status::Stopped;
        if !self
            .containers
            .values()
            .all(|container| stopped(container.status))
        {
            return;
        }
        if self.containers.values().any(super::state::Container::is_attached) {
            out.push(Effect::Arm(Timer::Drain, end::DRAIN_LIMIT));
            return;
        }
        self.flush(out);
    }
}

/// Whether to wait for streams that were announced and have not come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Patient {
    Yes,
    No,
}

fn keep_tail(tail: &mut VecDeque<u8>, bytes: &[u8], most: usize) {
    let keep = bytes.len().min(most);
    let excess = (tail.len() + keep).saturating_sub(most);
    tail.drain(..excess);
    tail.extend(bytes.iter().skip(bytes.len() - keep));
}

fn answer(token: Option<super::state::Token>, answer: Answer, out: &mut Vec<Effect>) {
    if let Some(token) = token {
        out.push(Effect::Answer(token, answer));
    }
}

#[cfg(test)]
mod tests;
