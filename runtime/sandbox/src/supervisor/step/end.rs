//! The ways a sandbox ends: done, told to, failed.

use std::time::Duration;

use caisson_wire::agent::{self, ExitStatus};
use caisson_wire::vmm::ToVmm;

use super::super::state::{Effect, Network, Phase, State, Timer, What};
use super::requests::init_of;
use super::{KILL, Patient, answer};
use crate::proto::{MachineFailure, Refusal, Reply, Status};

/// How long stand-ins may take to write what they have; they have deadlines of their own below this.
pub(super) const DRAIN_LIMIT: Duration = Duration::from_secs(40);
/// How long the guest may take to flush its file systems and power off.
const FLUSH_LIMIT: Duration = Duration::from_secs(10);
/// How long the vmm process may take to end; then it is killed.
const STOP_LIMIT: Duration = Duration::from_millis(300);
/// How long a container may take to die when it is deleted.
pub(super) const DELETE_LIMIT: Duration = Duration::from_millis(500);

impl State {
    pub(super) fn launched(&mut self, outcome: Result<Network, MachineFailure>, out: &mut Vec<Effect>) {
        match outcome {
            Ok(network) => {
                self.setup.interfaces.extend(network.interfaces);
                self.setup.routes.extend(network.routes);
                self.setup.neighbours.extend(network.neighbours);
                if self.phase == Phase::Launching {
                    self.phase = Phase::Booting;
                }
                out.push(Effect::Persist);
            }
            Err(failure) => self.fail_with(failure, out),
        }
    }

    pub(super) fn boot_deadline(&mut self, out: &mut Vec<Effect>) {
        if matches!(self.phase, Phase::Launching | Phase::Booting) {
            let cause =
                "it did not dial in before the boot deadline; raise it, or give the guest more memory or \
                         processors"
                    .to_owned();
            self.fail("boot the guest", cause, out);
        }
    }

    pub(super) fn delete_deadline(&mut self, id: &str, out: &mut Vec<Effect>) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let token = container.deleting.take();
        if self.containers.len() == 1 {
            answer(token, Ok(Reply::Deleted { last: true }), out);
            self.stop(out);
        } else {
            let refusal = Refusal::Silent {
                what: "kill the container".to_owned(),
                after: DELETE_LIMIT,
            };
            answer(token, Err(refusal), out);
        }
    }

    /// Told to end, without haste for what runs.
    pub(super) fn terminated(&mut self, out: &mut Vec<Effect>) {
        match self.phase {
            Phase::Idle => self.finish(out),
            Phase::Ready => self.flush(out),
            Phase::Launching | Phase::Booting => self.stop(out),
            Phase::Flushing | Phase::Stopping | Phase::Ended => {}
        }
    }

    /// Has the guest write everything down and power off.
    pub(super) fn flush(&mut self, out: &mut Vec<Effect>) {
        if self.phase != Phase::Ready {
            return;
        }
        self.phase = Phase::Flushing;
        out.push(Effect::Disarm(Timer::Drain));
        self.call(What::Shutdown, agent::Call::Shutdown, None, out);
        out.push(Effect::Arm(Timer::Flush, FLUSH_LIMIT));
    }

    /// Has the vmm process end the guest where it is.
    pub(super) fn stop(&mut self, out: &mut Vec<Effect>) {
        if matches!(self.phase, Phase::Stopping | Phase::Ended) {
            return;
        }
        self.phase = Phase::Stopping;
        out.push(Effect::ToVmm(ToVmm::Shutdown));
        out.push(Effect::Arm(Timer::Stop, STOP_LIMIT));
    }

    pub(super) fn vmm_gone(&mut self, why: &str, out: &mut Vec<Effect>) {
        match self.phase {
            Phase::Flushing | Phase::Stopping => self.finish(out),
            _ => {
                let said: Vec<u8> = self.said.iter().copied().collect();
                let cause = match String::from_utf8_lossy(&said).trim() {
                    "" => why.to_owned(),
                    said => format!("{why}: {said}"),
                };
                self.fail_machine(cause, out);
            }
        }
    }

    /// The machine ended when it should not have.
    pub(super) fn fail_machine(&mut self, cause: String, out: &mut Vec<Effect>) {
        let stage = match self.phase {
            Phase::Idle | Phase::Launching => "start the machine",
            Phase::Booting => "boot the guest",
            _ => "keep the guest running",
        };
        self.fail(stage, cause, out);
    }

    pub(super) fn fail(&mut self, stage: &str, cause: String, out: &mut Vec<Effect>) {
        let failure = MachineFailure {
            stage: stage.to_owned(),
            cause,
            console: self.console_tail(),
        };
        self.fail_with(failure, out);
    }

    fn fail_with(&mut self, failure: MachineFailure, out: &mut Vec<Effect>) {
        self.failure.get_or_insert(failure);
        self.finish(out);
    }

    /// The end: everything that still runs was killed with the machine.
    pub(super) fn finish(&mut self, out: &mut Vec<Effect>) {
        if self.phase == Phase::Ended {
            return;
        }
        self.phase = Phase::Ended;
        let refusal = self.failure.clone().map_or(Refusal::Ending, Refusal::Machine);
        let status = ExitStatus::Signal(KILL);
        for container in self.containers.values_mut() {
            answer(container.creating.take(), Err(refusal.clone()), out);
            answer(container.deleting.take(), Ok(Reply::Deleted { last: true }), out);
            if container.status != Status::Stopped {
                container.status = Status::Stopped;
                container.exit.get_or_insert(status);
                container.failure = self.failure.as_ref().map(ToString::to_string);
            }
            let exit = container.exit.unwrap_or(status);
            for token in container.waiters.drain(..).chain(container.watchers.drain(..)) {
                out.push(Effect::Answer(token, Ok(Reply::Exited(exit))));
            }
            container.init.exit.get_or_insert(exit);
            for process in container.execs.values_mut() {
                process.exit.get_or_insert(status);
            }
        }
        for call in std::mem::take(&mut self.calls).into_values() {
            let done = matches!(call.what, What::Signal { kill: true, .. });
            let outcome = if done {
                Ok(Reply::Done)
            } else {
                Err(refusal.clone())
            };
            answer(call.token, outcome, out);
        }
        for (token, _) in std::mem::take(&mut self.orders).into_values() {
            out.push(Effect::Answer(token, Err(refusal.clone())));
        }
        out.push(Effect::Persist);
        out.push(Effect::KillVmm);
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        for id in ids {
            let execs = self
                .containers
                .get(&id)
                .map(|c| c.execs.keys().cloned().collect::<Vec<_>>());
            self.tell_exit(&init_of(&id), Patient::No, out);
            for exec in execs.unwrap_or_default() {
                let target = agent::Target {
                    container: id.clone(),
                    exec: Some(exec),
                };
                self.tell_exit(&target, Patient::No, out);
            }
        }
        out.push(Effect::Finish);
    }
}
