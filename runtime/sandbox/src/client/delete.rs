//! Deleting a container: from the files alone if need be, and as often as one likes.

use std::time::{Duration, Instant};

use super::connection::Connection;
use super::create::hook_state;
use super::{DeleteError, Force, LookupError, Runtime, hooks};
use crate::disk::{ContainerRecord, Directory, SandboxRecord, StateError};
use crate::id::ContainerId;
use crate::proto::{Reply, Request, Status};

/// Longest time a supervisor may take to forget a container; then it is killed.
const ANSWER_LIMIT: Duration = Duration::from_millis(1000);
/// Longest time a supervisor may take to end with its guest's file systems flushed, where nobody is in a hurry.
const FLUSH_LIMIT: Duration = Duration::from_secs(12);
/// The same for `--force`: all of it has to end within two seconds.
const FORCED_LIMIT: Duration = Duration::from_millis(700);
/// Longest time a killed process may take to go.
const KILL_LIMIT: Duration = Duration::from_secs(2);

impl Runtime {
    /// Deletes a container, and its sandbox if it is the last one in it, and runs its `poststop` hooks.
    ///
    /// Works whichever of our processes are dead or hang, and after any of them was killed at any moment.
    ///
    /// # Errors
    /// Fails if the container runs and `force` does not say otherwise, if it does not exist (not with force), or
    /// if something of it cannot be removed; then it can be called again.
    pub fn delete(&self, id: &ContainerId, force: Force) -> Result<(), DeleteError> {
        let record = self.remove(id, force)?;
        if let Some(record) = record {
            let state = hook_state(&record, Status::Stopped, None);
            hooks::run_all("poststop", &record.hooks.poststop, &state);
        }
        Ok(())
    }

    /// Removes everything of a container; gives what was known of it.
    pub(super) fn remove(
        &self,
        id: &ContainerId,
        force: Force,
    ) -> Result<Option<ContainerRecord>, DeleteError> {
        let directory = Directory::of(self.root(), id);
        let record = match self.record(id) {
            Ok(record) => Some(record),
            Err(LookupError::NotFound(_)) if force == Force::Yes && !directory.exists() => return Ok(None),
            // A directory without a state is what a crash in `create`, or in an earlier `delete`, leaves.
            Err(LookupError::NotFound(_)) if directory.exists() && directory.read_sandbox().is_err() => None,
            Err(_) if force == Force::Yes => None,
            Err(err) => return Err(err.into()),
        };
        if let Some(record) = &record {
            let is = record.probe(self.root());
            // As runc does: what was never started is nobody's work to lose.
            let idle = matches!(is, Status::Stopped | Status::Created);
            if !idle && force == Force::No {
                return Err(DeleteError::Status { id: id.clone(), is });
            }
        }
        let sandbox = record
            .as_ref()
            .map_or_else(|| id.clone(), |record| record.sandbox.clone());
        let home = Directory::of(self.root(), &sandbox);
        if let Ok(known) = home.read_sandbox() {
            self.leave_sandbox(id, &home, &known, force)?;
        }
        if let Some(process) = record.as_ref().and_then(|record| record.stand_in) {
            process.kill();
            if !process.wait_gone(KILL_LIMIT) {
                return Err(DeleteError::Process {
                    id: id.clone(),
                    pid: process.pid,
                });
            }
        }

        let state = |source| DeleteError::State {
            id: id.clone(),
            source,
        };
        directory.forget_container().map_err(state)?;
        if sandbox != *id {
            directory.remove().map_err(state)?;
        }
        if !self.is_used(&sandbox).map_err(state)? {
            self.remove_sandbox(id, &home)?;
        }
        Ok(record)
    }

    /// Has the supervisor forget the container, or ends what is left of the sandbox.
    fn leave_sandbox(
        &self,
        id: &ContainerId,
        home: &Directory,
        known: &SandboxRecord,
        force: Force,
    ) -> Result<(), DeleteError> {
        let patience = match force {
            Force::No => FLUSH_LIMIT,
            Force::Yes => FORCED_LIMIT,
        };
        if known.supervisor.is_alive() {
            let request = Request::Delete {
                container: id.to_string(),
                // A container that was created and never started is killed without being asked for by force.
                force: true,
            };
            let began = Instant::now();
            let answer =
                Connection::open(home).and_then(|mut supervisor| supervisor.ask(&request, &[], ANSWER_LIMIT));
            match answer {
                Ok(Reply::Deleted { last: false }) => return Ok(()),
                Ok(_) => {
                    if known
                        .supervisor
                        .wait_gone(patience.saturating_sub(began.elapsed()))
                    {
                        return self.end_processes(id, home, known);
                    }
                    tracing::warn!(sandbox = %known.id, "the supervisor did not end in time and is killed");
                }
                Err(err) => {
                    tracing::debug!(sandbox = %known.id, error = %err, "the supervisor is of no help");
                }
            }
        }
        self.end_processes(id, home, known)
    }

    /// Kills every process of a sandbox, from what the files say.
    fn end_processes(
        &self,
        id: &ContainerId,
        home: &Directory,
        known: &SandboxRecord,
    ) -> Result<(), DeleteError> {
        known.supervisor.kill();
        known.supervisor.wait_gone(KILL_LIMIT);
        // Nobody writes the record any more, so what it says now is the last word.
        let known = home.read_sandbox().unwrap_or_else(|_| known.clone());
        let own = rustix::process::getpid().as_raw_nonzero().get();
        let processes = || {
            [known.supervisor]
                .into_iter()
                .chain(known.vmm)
                .chain(known.stand_ins.iter().copied())
                .filter(|process| process.pid != own)
        };
        for process in processes() {
            process.kill();
        }
        if let Some(cgroup) = &known.cgroup {
            cgroup.kill();
        }
        for process in processes() {
            if !process.wait_gone(KILL_LIMIT) {
                return Err(DeleteError::Process {
                    id: id.clone(),
                    pid: process.pid,
                });
            }
        }
        Ok(())
    }

    /// Whether some container still lives in a sandbox.
    fn is_used(&self, sandbox: &ContainerId) -> Result<bool, StateError> {
        Ok(self.list()?.iter().any(|state| state.sandbox == *sandbox))
    }

    fn remove_sandbox(&self, id: &ContainerId, home: &Directory) -> Result<(), DeleteError> {
        if let Ok(known) = home.read_sandbox() {
            self.end_processes(id, home, &known)?;
            if let Some(cgroup) = &known.cgroup {
                cgroup.remove().map_err(|source| DeleteError::Cgroup {
                    id: id.clone(),
                    source,
                })?;
            }
        }
        home.remove().map_err(|source| DeleteError::State {
            id: id.clone(),
            source,
        })
    }
}
