//! Threads of the vmm process and what each is for.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// What a thread does; each role has its own system-call filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Runs a vCPU.
    Vcpu,
    /// Moves blocks.
    Block,
    /// Moves packets.
    Net,
    /// Multiplexes vsock connections.
    Vsock,
    /// Serves files.
    Files,
    /// Everything small: console, entropy, balloon, interrupt pump.
    Small,
}

/// Starts the process's threads; the process decides what each must do first (its system-call filter).
#[derive(Clone)]
pub struct Threads {
    enter: Arc<dyn Fn(Role) + Send + Sync>,
    starter: Option<Arc<Requests>>,
}

/// What is asked of the thread that starts the others.
struct Requests {
    open: AtomicBool,
    queue: Mutex<Sender<Request>>,
}

type Request = Box<dyn FnOnce() + Send>;

impl Threads {
    /// `enter` runs on each new thread before anything else.
    pub fn new(enter: impl Fn(Role) + Send + Sync + 'static) -> Self {
        Self {
            enter: Arc::new(enter),
            starter: None,
        }
    }

    /// As [`Threads::new`], but every thread is started by the one that runs the [`Starter`], whoever asks:
    /// a thread inherits its starter's system-call filter, and a device's worker may need calls that the
    /// vCPU which activates the device may not make. Until the starter runs, no thread can be started.
    pub fn through_starter(enter: impl Fn(Role) + Send + Sync + 'static) -> (Self, Starter) {
        let (queue, requests) = channel();
        let asked = Arc::new(Requests {
            open: AtomicBool::new(false),
            queue: Mutex::new(queue),
        });
        let threads = Self {
            enter: Arc::new(enter),
            starter: Some(Arc::clone(&asked)),
        };
        (threads, Starter { asked, requests })
    }

    /// Threads without any set-up, for tests and tools.
    pub fn plain() -> Self {
        Self::new(|_| {})
    }

    /// Starts a thread named `name` (15 bytes are visible in the system).
    ///
    /// # Errors
    /// Fails if the system refuses another thread, or the process starts none yet.
    pub fn spawn<T: Send + 'static>(
        &self,
        role: Role,
        name: impl Into<String>,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<JoinHandle<T>> {
        let (enter, name) = (Arc::clone(&self.enter), name.into());
        let start = move || {
            std::thread::Builder::new()
                .name(name)
                .stack_size(STACK)
                .spawn(move || {
                    enter(role);
                    body()
                })
        };
        let Some(starter) = &self.starter else {
            return start();
        };
        if !starter.open.load(Ordering::Acquire) {
            return Err(io::Error::other(
                "threads start only once the process is confined",
            ));
        }
        let (answer, started) = channel();
        let request: Request = Box::new(move || {
            // Whoever asked waits for the answer.
            let _ = answer.send(start());
        });
        let gone = || io::Error::other("the thread that starts the others has ended");
        let queue = starter.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.send(request).map_err(|_| gone())?;
        drop(queue);
        started.recv().map_err(|_| gone())?
    }
}

/// Starts threads for others, on the thread that [runs](Starter::run) it.
pub struct Starter {
    asked: Arc<Requests>,
    requests: Receiver<Request>,
}

impl Starter {
    /// Allows threads from now on; requests wait for [`Starter::run`].
    pub fn open(&self) {
        self.asked.open.store(true, Ordering::Release);
    }

    /// Starts what is asked for, for the rest of the process's life.
    pub fn run(self) {
        // It holds a sender of its own queue, so the queue does not end.
        for request in &self.requests {
            request();
        }
    }
}

impl fmt::Debug for Starter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Starter")
    }
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Threads")
    }
}

/// Stack of a worker: 256 KiB. The deepest path is a file operation, under 32 KiB.
const STACK: usize = 256 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_start_on_the_starter_and_not_before_it_is_open() {
        thread_local!(static STARTED_HERE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) });
        let (threads, starter) = Threads::through_starter(|_| STARTED_HERE.set(true));
        assert!(threads.spawn(Role::Block, "early", || ()).is_err());
        starter.open();
        std::thread::spawn(move || starter.run());
        let entered = threads.spawn(Role::Block, "late", || STARTED_HERE.get()).unwrap();
        assert!(entered.join().unwrap());
        assert!(!STARTED_HERE.get());
    }
}
