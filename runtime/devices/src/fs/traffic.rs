//! The queues: requests out of them, replies into them, and slow requests while others go on.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use caisson_hal::os::Event;
use rustix::event::PollFlags;
use rustix::io::Errno;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::buffers::Buffers;
use super::server::{Job, Outcome, Server, finish};
use crate::thread::{Role, Threads};
use crate::virtio::{ActiveQueue, DriverFault, Memory, Queue, QueueHandler, QueueOwnedT, QueueT, Signal};

/// Threads for slow requests.
const WAITERS: usize = 2;
/// Slow requests that wait for such a thread; with more, the queues wait as well.
const WAITING: usize = 64;
/// Requests served between two looks at what else there is to do.
const TURN: usize = 64;
/// Most threads that may still be busy with requests of earlier activations.
const STRAGGLERS: usize = 16;
/// How long a pause waits for slow requests before it cuts them short.
const PATIENCE: Duration = Duration::from_millis(500);
/// Most descriptors of one request: both queues together have no more.
const DESCRIPTORS: usize = 1024;

type Answer = (u64, Result<Vec<u8>, Errno>);

/// The session and what is under way.
#[derive(Debug)]
pub(super) struct Traffic {
    server: Server,
    /// Slow requests, by their ticket.
    pending: BTreeMap<u64, Pending>,
    next_ticket: u64,
    jobs: Option<SyncSender<(u64, BoxedJob)>>,
    done: (Sender<Answer>, Receiver<Answer>),
    bell: Arc<Event>,
}

#[derive(Debug)]
struct Pending {
    queue: usize,
    head: u16,
    unique: u64,
    room: Vec<Part>,
}

struct BoxedJob(Job);

impl std::fmt::Debug for BoxedJob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Job")
    }
}

/// A piece of guest memory.
type Part = (GuestAddress, usize);

impl Traffic {
    pub(super) fn new(server: Server) -> io::Result<Self> {
        Ok(Self {
            server,
            pending: BTreeMap::new(),
            next_ticket: 0,
            jobs: None,
            done: channel(),
            bell: Arc::new(Event::new()?),
        })
    }

    /// Starts the threads that slow requests wait on.
    pub(super) fn start(&mut self, threads: &Threads) -> io::Result<()> {
        if Arc::strong_count(&self.bell) > STRAGGLERS {
            return Err(io::ErrorKind::ResourceBusy.into()); // each of those threads holds the bell
        }
        let (jobs, queue) = sync_channel::<(u64, BoxedJob)>(WAITING);
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..WAITERS {
            let (queue, answers, bell) = (queue.clone(), self.done.0.clone(), self.bell.clone());
            threads.spawn(Role::Files, "files-slow", move || {
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok((ticket, job)) = next else {
                        return; // the device rests
                    };
                    if answers.send((ticket, (job.0)())).is_err() {
                        return;
                    }
                    bell.signal();
                }
            })?;
        }
        self.jobs = Some(jobs);
        Ok(())
    }

    /// Ends what is under way: what is not done in time is answered with `EINTR`.
    pub(super) fn settle(
        &mut self,
        queues: &mut [Queue],
        indices: &[usize],
        interrupts: &[Arc<dyn Signal>],
        memory: &Memory,
    ) {
        self.jobs = None;
        let deadline = Instant::now() + PATIENCE;
        while !self.pending.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            let answer = match self.done.1.recv_timeout(left) {
                Ok(answer) => answer,
                Err(_) => match self.pending.keys().next() {
                    Some(ticket) => (*ticket, Err(Errno::INTR)),
                    None => break,
                },
            };
            let Some(pending) = self.pending.remove(&answer.0) else {
                continue;
            };
            let place = indices.iter().position(|index| *index == pending.queue);
            let (Some(queue), Some(interrupt)) = (
                place.and_then(|place| queues.get_mut(place)),
                place.and_then(|place| interrupts.get(place)),
            ) else {
                continue;
            };
            let len = pending.answer(answer.1, memory).unwrap_or(0);
            if queue.add_used(memory, pending.head, len).is_ok() {
                interrupt.signal();
            }
        }
    }

    /// Serves one request; the length to give back, unless its answer comes later.
    fn request(
        &mut self,
        index: usize,
        head: u16,
        (input, output): (Vec<Part>, Vec<Part>),
        memory: &Memory,
    ) -> Result<Option<u32>, DriverFault> {
        let outcome = self
            .server
            .serve(buffers(&input, memory)?, buffers(&output, memory)?);
        let (unique, job) = match outcome {
            Outcome::Done(len) => return Ok(Some(len)),
            Outcome::Silent => return Ok(Some(0)),
            Outcome::Later(unique, job) => (unique, job),
        };
        let pending = Pending {
            queue: index,
            head,
            unique,
            room: output,
        };
        let Some(jobs) = &self.jobs else {
            return pending.answer(Err(Errno::INTR), memory).map(Some);
        };
        let ticket = self.next_ticket;
        self.next_ticket = self.next_ticket.wrapping_add(1);
        match jobs.try_send((ticket, BoxedJob(job))) {
            Ok(()) => {
                self.pending.insert(ticket, pending);
                Ok(None)
            }
            // Too many are waiting already: this one holds up the queue.
            Err(std::sync::mpsc::TrySendError::Full((_, job))) => pending.answer((job.0)(), memory).map(Some),
            Err(std::sync::mpsc::TrySendError::Disconnected(_)) => {
                pending.answer(Err(Errno::INTR), memory).map(Some)
            }
        }
    }
}

impl QueueHandler for Traffic {
    fn queue(
        &mut self,
        index: usize,
        queues: &mut [Option<ActiveQueue>],
        memory: &Memory,
    ) -> Result<(), DriverFault> {
        let Some(Some(active)) = queues.get_mut(index) else {
            return Ok(());
        };
        // So many at a time: an order to stop must not wait for a driver that never ends.
        for _ in 0..TURN {
            let Some(chain) = active.queue.iter(memory)?.next() else {
                if active.queue.enable_notification(memory)? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            let parts = (parts(chain.clone().readable()), parts(chain.writable()));
            if let Some(len) = self.request(index, head, parts, memory)? {
                active.queue.add_used(memory, head, len)?;
                if active.queue.needs_notification(memory)? {
                    active.interrupt.signal();
                }
            }
        }
        active.kick.signal(); // come back for the rest
        Ok(())
    }

    fn sources(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        vec![(self.bell.as_fd(), PollFlags::IN)]
    }

    fn ready(
        &mut self,
        _ready: &[(usize, PollFlags)],
        queues: &mut [Option<ActiveQueue>],
        memory: &Memory,
    ) -> Result<(), DriverFault> {
        self.bell.clear();
        while let Ok((ticket, answer)) = self.done.1.try_recv() {
            // One that a pause has cut short is not pending any more.
            let Some(pending) = self.pending.remove(&ticket) else {
                continue;
            };
            let Some(Some(active)) = queues.get_mut(pending.queue) else {
                continue;
            };
            let len = pending.answer(answer, memory)?;
            active.queue.add_used(memory, pending.head, len)?;
            if active.queue.needs_notification(memory)? {
                active.interrupt.signal();
            }
        }
        Ok(())
    }
}

impl Pending {
    fn answer(&self, answer: Result<Vec<u8>, Errno>, memory: &Memory) -> Result<u32, DriverFault> {
        let mut room = buffers(&self.room, memory)?;
        Ok(match finish(&mut room, self.unique, answer) {
            Outcome::Done(len) => len,
            _ => 0,
        })
    }
}

fn parts(descriptors: impl Iterator<Item = Descriptor>) -> Vec<Part> {
    descriptors
        .take(DESCRIPTORS)
        .map(|part| (part.addr(), usize::try_from(part.len()).unwrap_or(usize::MAX)))
        .filter(|(_, len)| *len > 0)
        .collect()
}

/// The memory of `parts`; an error if any of it is not the guest's.
fn buffers<'a>(parts: &[Part], memory: &'a Memory) -> Result<Buffers<'a>, DriverFault> {
    let mut slices: Vec<VolatileSlice<'a>> = Vec::with_capacity(parts.len());
    for (at, len) in parts {
        for slice in memory.get_slices(*at, *len) {
            slices.push(slice?);
        }
    }
    Ok(Buffers::new(slices))
}
