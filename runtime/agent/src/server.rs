//! Carries out the control plane's requests.
//!
//! The connection is read by one thread. What a request about a container needs is done by a thread of that
//! container, which exists as long as there is something to do: requests about one container are carried
//! out in order, and a slow one holds up nobody else. [`Call::Setup`] comes before all others.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use caisson_wire::agent::{Call, Create, Failure, FromAgent, Reply, Request, Stage};
use caisson_wire::{Receiver, RecvError, Sender};
use rustix::io::Errno;

use crate::container::{Container, Context, Joined};
use crate::failure::{failure, failure_with};
use crate::guest;

/// Serves one control plane.
#[derive(Clone, Debug)]
pub struct Server(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    context: Context,
    control: Sender,
    slots: Mutex<HashMap<String, Slot>>,
    /// Told when a container has nothing to do any more.
    idle: Condvar,
}

/// A container by its id, and what is to be done about it.
#[derive(Debug, Default)]
struct Slot {
    waiting: VecDeque<(u64, Call)>,
    /// Absent also while its thread has it.
    container: Option<Box<Container>>,
    busy: bool,
}

/// Why the server stopped.
#[derive(Debug)]
pub enum End {
    /// The control plane asked for it.
    Shutdown,
    /// The connection is lost.
    Lost(RecvError),
}

impl Server {
    /// A server that answers over `control`, where events go too.
    pub fn new(context: Context, control: Sender) -> Self {
        Self(Arc::new(Shared {
            context,
            control,
            slots: Mutex::default(),
            idle: Condvar::new(),
        }))
    }

    /// Reads requests until the control plane has gone or wants the guest off.
    pub fn serve(&self, requests: &mut Receiver) -> End {
        loop {
            match requests.recv::<Request>() {
                Ok((request, _)) => {
                    if self.take(request) {
                        return End::Shutdown;
                    }
                }
                Err(err) => return End::Lost(err),
            }
        }
    }

    /// Starts to carry a request out; true if it was the last.
    fn take(&self, Request { id, call }: Request) -> bool {
        match call {
            Call::Setup(setup) => {
                self.answer(id, guest::set_up(&setup).map(|()| Reply::Done));
                false
            }
            Call::Shutdown => {
                // No file of ours is open for writing; those of containers are the file systems' to flush.
                rustix::fs::sync();
                self.answer(id, Ok(Reply::Done));
                true
            }
            call => {
                self.enqueue(id, call);
                false
            }
        }
    }

    fn enqueue(&self, id: u64, call: Call) {
        let Some(name) = container_of(&call).map(str::to_owned) else {
            return;
        };
        let mut slots = self.slots();
        if slots.len() >= MOST_CONTAINERS && !slots.contains_key(&name) {
            drop(slots);
            let text = format!("there are {MOST_CONTAINERS} containers already");
            return self.answer(id, Err(failure(Stage::Request, text)));
        }
        let slot = slots.entry(name.clone()).or_default();
        if slot.waiting.len() >= MOST_WAITING {
            drop(slots);
            let text = format!("{MOST_WAITING} requests about {name:?} are waiting already");
            return self.answer(id, Err(failure(Stage::Request, text)));
        }
        slot.waiting.push_back((id, call));
        if slot.busy {
            return;
        }
        slot.busy = true;
        drop(slots);
        let (server, container) = (self.clone(), name.clone());
        if let Err(err) = crate::spawn("container", move || server.work(&container)) {
            let waiting = {
                let mut slots = self.slots();
                let slot = slots.entry(name).or_default();
                slot.busy = false;
                std::mem::take(&mut slot.waiting)
            };
            for (id, _) in waiting {
                self.answer(
                    id,
                    Err(failure(Stage::Request, format!("cannot start a thread: {err}"))),
                );
            }
        }
    }

    /// Carries out what waits about one container, and leaves when nothing does.
    fn work(&self, name: &str) {
        loop {
            let (id, call, mut container) = {
                let mut slots = self.slots();
                let Some(slot) = slots.get_mut(name) else { return };
                match slot.waiting.pop_front() {
                    Some((id, call)) => (id, call, slot.container.take()),
                    None => {
                        slot.busy = false;
                        if slot.container.is_none() {
                            slots.remove(name);
                        }
                        self.0.idle.notify_all();
                        return;
                    }
                }
            };
            let (outcome, release) = self.carry_out(call, &mut container);
            // Before the answer: who has it may ask for this container to be joined.
            if let Some(slot) = self.slots().get_mut(name) {
                slot.container = container;
            }
            self.answer(id, outcome);
            // After it: nobody is told of the end of a process that he does not know of.
            if let Some(pid) = release {
                Container::release(&self.0.context, pid);
            }
        }
    }

    /// Does one thing; also the process whose end may be reported after the answer.
    fn carry_out(
        &self,
        call: Call,
        slot: &mut Option<Box<Container>>,
    ) -> (Result<Reply, Failure>, Option<i32>) {
        let context = &self.0.context;
        let call = match (call, slot.as_deref_mut()) {
            (Call::Create(_), Some(_)) => {
                return (
                    Err(failure_with(Stage::Request, Errno::EXIST, "the container exists")),
                    None,
                );
            }
            (Call::Create(request), None) => {
                return match self.create(*request) {
                    Ok(container) => {
                        let pid = container.pid();
                        *slot = Some(Box::new(container));
                        (Ok(Reply::Process { pid }), Some(pid))
                    }
                    Err(failed) => (Err(failed), None),
                };
            }
            (Call::Delete { .. }, None) => return (Ok(Reply::Done), None),
            (call, _) => call,
        };
        let Some(container) = slot.as_deref_mut() else {
            return (
                Err(failure_with(
                    Stage::Request,
                    Errno::NOENT,
                    "there is no such container",
                )),
                None,
            );
        };
        let done = |result: Result<(), Failure>| (result.map(|()| Reply::Done), None);
        match call {
            Call::Start { .. } => {
                let result = container.start(context).map(|()| Reply::Done);
                (result, Some(container.pid()))
            }
            Call::Exec(request) => match container.exec(context, *request) {
                Ok(pid) => (Ok(Reply::Process { pid }), Some(pid)),
                Err(failed) => (Err(failed), None),
            },
            Call::Signal { target, signal, all } => {
                done(container.signal(target.exec.as_deref(), signal, all))
            }
            Call::Resize { target, size } => done(container.resize(target.exec.as_deref(), size)),
            Call::Pause { .. } => done(container.freeze(true)),
            Call::Resume { .. } => done(container.freeze(false)),
            Call::Update { resources, .. } => done(container.update(&resources)),
            Call::Processes { .. } => (Ok(Reply::Processes(container.processes())), None),
            Call::Stats { .. } => (Ok(Reply::Stats(Box::new(container.stats()))), None),
            Call::Delete { .. } => {
                let result = container.delete();
                if result.is_ok() {
                    *slot = None;
                }
                done(result)
            }
            Call::Setup(_) | Call::Create(_) | Call::Shutdown => (
                Err(failure(Stage::Request, "the request is about no container")),
                None,
            ),
        }
    }

    fn create(&self, request: Create) -> Result<Container, Failure> {
        let joined = self.joined(&request)?;
        Container::create(&self.0.context, request, &joined)
    }

    /// The namespaces of the containers that a request joins, once nothing is being done about those.
    fn joined(&self, request: &Create) -> Result<Joined, Failure> {
        let deadline = Instant::now() + JOIN_LIMIT;
        let mut joined = Joined::new();
        for name in request.join.values().filter(|name| **name != request.container) {
            let mut slots = self.slots();
            while slots.get(name).is_some_and(|slot| slot.busy) {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    let text = format!("cannot join the container {name:?}: it is busy");
                    return Err(failure_with(Stage::Namespaces, Errno::TIMEDOUT, text));
                }
                slots = self
                    .0
                    .idle
                    .wait_timeout(slots, left)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
            if let Some(container) = slots.get(name).and_then(|slot| slot.container.as_ref()) {
                joined.insert(name.clone(), container.namespaces());
            }
        }
        Ok(joined)
    }

    fn answer(&self, id: u64, outcome: Result<Reply, Failure>) {
        let outcome = outcome.map_err(bounded);
        // A control plane that takes no answers has gone, which the reading thread notices.
        drop(self.0.control.send(&FromAgent::Answer { id, outcome }));
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.0.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The container that a call is about.
fn container_of(call: &Call) -> Option<&str> {
    match call {
        Call::Setup(_) | Call::Shutdown => None,
        Call::Create(create) => Some(&create.container),
        Call::Exec(exec) => Some(&exec.container),
        Call::Signal { target, .. } | Call::Resize { target, .. } => Some(&target.container),
        Call::Start { container }
        | Call::Pause { container }
        | Call::Resume { container }
        | Call::Update { container, .. }
        | Call::Processes { container }
        | Call::Stats { container }
        | Call::Delete { container } => Some(container),
    }
}

/// A failure whose message fits any channel.
fn bounded(mut failed: Failure) -> Failure {
    if let Some((end, _)) = failed.message.char_indices().nth(LONGEST_MESSAGE) {
        failed.message.truncate(end);
    }
    failed
}

/// Most containers of a sandbox.
const MOST_CONTAINERS: usize = 1024;
/// Most requests about one container that wait.
const MOST_WAITING: usize = 256;
/// Longest message of a failure in characters.
const LONGEST_MESSAGE: usize = 4096;
/// Longest wait for a container that is joined.
const JOIN_LIMIT: Duration = Duration::from_secs(60);
