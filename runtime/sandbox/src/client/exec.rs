//! One more process in a container.

use std::os::fd::AsFd;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::connection::{Connection, Patience};
use super::create::pid_of;
use super::foreground::Foreground;
use super::stdio::Streams;
use super::{CallError, ExecError, ExecOrder, Runtime, StdioChoice};
use crate::disk::Directory;
use crate::id::ContainerId;
use crate::process::ProcessId;
use crate::proto::{ExecRequest, Refusal, Request, Status};
use crate::stand_in::TerminalGuard;
use crate::sys::{Netns, Signals};

/// A process that runs in a container.
#[derive(Debug)]
pub enum Executed {
    /// It has a stand-in of its own, a child of the caller, which leaves with its status.
    Detached {
        /// The stand-in's pid.
        pid: i32,
    },
    /// The caller stands in for it.
    Attached(Box<Foreground>),
}

impl Runtime {
    /// Runs one more process in a container.
    ///
    /// # Errors
    /// Fails if the container does not run, or the guest cannot start the process.
    pub fn exec(&self, id: &ContainerId, order: ExecOrder) -> Result<Executed, ExecError> {
        let record = self.record(id)?;
        match record.probe(self.root()) {
            Status::Running | Status::Created => {}
            is => return Err(ExecError::Status { id: id.clone(), is }),
        }
        let exec = match order.exec {
            Some(exec) => ContainerId::try_from(exec)?.to_string(),
            None => made_up_id(),
        };
        let terminal = order.process.terminal().unwrap_or(false);
        let streams = Streams::prepare(&order.stdio, terminal)
            .map_err(|(verb, source)| ExecError::Stdio { verb, source })?;
        let call = |source| ExecError::Call {
            id: id.clone(),
            source,
        };
        let ours = terminal && order.stdio == StdioChoice::Inherit && !order.detach;
        let terminal = ours.then(TerminalGuard::save);
        let signals = Signals::take().map_err(ExecError::Spawn)?;
        let directory = Directory::of(self.root(), &record.sandbox);
        let mut connection = Connection::open(&directory).map_err(call)?;

        // The stand-in waits for the streams, so it may be there before the process.
        let (mut child, ours, theirs) = if order.detach || streams.own_terminal() {
            let netns = record
                .stand_in
                .and_then(|process| std::fs::File::open(format!("/proc/{}/ns/net", process.pid)).ok());
            let netns = netns.as_ref().map_or(Netns::Same, |file| Netns::Of(file.as_fd()));
            let (child, theirs) = self
                .spawn_stand_in(id.as_str(), &streams, netns)
                .map_err(ExecError::Spawn)?;
            (Some(child), None, theirs)
        } else {
            let (ours, theirs) = socketpair(
                AddressFamily::UNIX,
                SocketType::STREAM,
                SocketFlags::CLOEXEC,
                None,
            )
            .map_err(|err| ExecError::Spawn(err.into()))?;
            (None, Some(ours), theirs)
        };
        let stand_in = child.as_ref().map(|child| pid_of(child).and_then(ProcessId::of));
        let request = Request::Exec(Box::new(ExecRequest {
            container: id.to_string(),
            exec,
            process: order.process,
            wanted: streams.wanted,
            stand_in: stand_in.transpose().map_err(ExecError::Spawn)?,
        }));
        let patience = Patience {
            limit: Some(self.answer_limit(&record.sandbox)),
            signals: Some(&signals),
        };
        let answer = connection.ask(&request, &[theirs.as_fd()], patience);
        drop(theirs);
        if let Err(source) = answer {
            if let Some(child) = &mut child {
                // Ours and not reaped; if it has ended already, that is what is wanted.
                let _ = child.kill();
                let _ = child.wait();
            }
            return Err(match source {
                CallError::Refused(Refusal::State { is, .. }) => ExecError::Status { id: id.clone(), is },
                source => call(source),
            });
        }
        match (child, ours) {
            (Some(child), _) if order.detach => Ok(Executed::Detached {
                pid: pid_of(&child).map_err(ExecError::Spawn)?,
            }),
            (Some(child), _) => Foreground::of_child(child, signals, terminal)
                .map(|process| Executed::Attached(Box::new(process)))
                .map_err(ExecError::Spawn),
            (None, Some(socket)) => Ok(Executed::Attached(Box::new(Foreground::in_process(
                socket, signals, terminal,
            )))),
            (None, None) => Err(call(CallError::Protocol)),
        }
    }
}

/// Unique on this host for as long as it is up: a pid and the time.
fn made_up_id() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("exec-{}-{}", std::process::id(), now.as_nanos())
}
