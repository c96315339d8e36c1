//! A thread that serves the queues of one device.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use caisson_hal::os::Event;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{ActiveQueue, DriverFault, Memory, Queue, Signal};
use crate::thread::{Role, Threads};

/// What a device does with its queues, on its worker's thread.
pub trait QueueHandler: Send + 'static {
    /// The driver has made buffers of queue `index` available (or may have: wake-ups can be spurious).
    ///
    /// # Errors
    /// Fails if the driver broke the rules; the worker then rests until the device is reset.
    fn queue(
        &mut self,
        index: usize,
        queues: &mut [Option<ActiveQueue>],
        memory: &Memory,
    ) -> Result<(), DriverFault>;
    /// Descriptors to wait for besides the kicks, asked for before each wait.
    fn sources(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        Vec::new()
    }
    /// Some of [`QueueHandler::sources`] are ready: their places in that list and what is ready.
    ///
    /// # Errors
    /// As [`QueueHandler::queue`].
    fn ready(
        &mut self,
        _ready: &[(usize, PollFlags)],
        _queues: &mut [Option<ActiveQueue>],
        _memory: &Memory,
    ) -> Result<(), DriverFault> {
        Ok(())
    }
    /// Longest time until [`QueueHandler::ready`] is to be called, ready or not.
    fn patience(&self) -> Option<Duration> {
        None
    }
}

/// The running thread.
#[derive(Debug)]
pub struct Worker<H> {
    stop: Event,
    thread: JoinHandle<(H, Vec<Option<ActiveQueue>>)>,
}

impl<H: QueueHandler> Worker<H> {
    /// Starts serving `queues` with `handler`. Every queue is looked at once, kick or no kick.
    ///
    /// # Errors
    /// Fails if the process is out of descriptors or threads.
    pub fn spawn(
        threads: &Threads,
        role: Role,
        name: &'static str,
        handler: H,
        queues: Vec<Option<ActiveQueue>>,
        memory: Memory,
        broken: Arc<dyn Signal>,
    ) -> io::Result<Self> {
        let stop = Event::new()?;
        let stopped = stop.try_clone()?;
        let thread = threads.spawn(role, name, move || {
            serve(handler, queues, &memory, &stopped, &*broken)
        })?;
        Ok(Self { stop, thread })
    }

    /// Ends the thread; the handler and the queues come back as they are.
    pub fn stop(self) -> (H, Vec<Queue>) {
        self.stop.signal();
        let (handler, queues) = self.thread.join().expect("workers end, they do not panic");
        (
            handler,
            queues.into_iter().flatten().map(|active| active.queue).collect(),
        )
    }
}

fn serve<H: QueueHandler>(
    mut handler: H,
    mut queues: Vec<Option<ActiveQueue>>,
    memory: &Memory,
    stop: &Event,
    broken: &dyn Signal,
) -> (H, Vec<Option<ActiveQueue>>) {
    let mut outcome = (0..queues.len()).try_for_each(|index| match queues.get(index) {
        Some(Some(_)) => handler.queue(index, &mut queues, memory),
        _ => Ok(()),
    });
    loop {
        if let Err(fault) = outcome {
            tracing::warn!(%fault, "driver broke its device");
            broken.signal();
            wait_for(stop);
            return (handler, queues);
        }
        let Some((kicked, ready)) = wait(&handler, &queues, stop) else {
            return (handler, queues);
        };
        outcome = kicked
            .into_iter()
            .try_for_each(|index| handler.queue(index, &mut queues, memory));
        if outcome.is_ok() && (!ready.is_empty() || handler.patience().is_some()) {
            outcome = handler.ready(&ready, &mut queues, memory);
        }
    }
}

type Woken = (Vec<usize>, Vec<(usize, PollFlags)>);

/// Waits for kicks, the handler's own sources or its patience; `None` is the order to stop.
fn wait<H: QueueHandler>(handler: &H, queues: &[Option<ActiveQueue>], stop: &Event) -> Option<Woken> {
    let kicks: Vec<(usize, &Event)> = queues
        .iter()
        .enumerate()
        .filter_map(|(index, queue)| Some((index, &queue.as_ref()?.kick)))
        .collect();
    let sources = handler.sources();
    let mut fds = vec![PollFd::new(stop, PollFlags::IN)];
    fds.extend(kicks.iter().map(|(_, kick)| PollFd::new(*kick, PollFlags::IN)));
    fds.extend(
        sources
            .iter()
            .map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)),
    );
    let limit = handler
        .patience()
        .map(|patience| Timespec::try_from(patience).unwrap_or_default());
    if poll(&mut fds, limit.as_ref()).is_err() {
        return Some(Woken::default()); // a signal; look again
    }
    let mut events = fds.iter().map(PollFd::revents);
    if events.next().is_none_or(|stop| !stop.is_empty()) {
        return None;
    }
    let kicked = kicks
        .iter()
        .zip(events.by_ref())
        .filter(|(_, ready)| !ready.is_empty());
    let kicked = kicked
        .map(|((index, kick), _)| (kick.clear(), *index).1)
        .collect();
    let ready = events
        .enumerate()
        .filter(|(_, ready)| !ready.is_empty())
        .collect();
    Some((kicked, ready))
}

fn wait_for(stop: &Event) {
    while poll(&mut [PollFd::new(&stop.as_fd(), PollFlags::IN)], None).is_err() {}
}
