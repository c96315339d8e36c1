//! Threads of the vmm process and what each is for.

use std::fmt;
use std::io;
use std::sync::Arc;
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
pub struct Threads(Arc<dyn Fn(Role) + Send + Sync>);

impl Threads {
    /// `enter` runs on each new thread before anything else.
    pub fn new(enter: impl Fn(Role) + Send + Sync + 'static) -> Self {
        Self(Arc::new(enter))
    }

    /// Threads without any set-up, for tests and tools.
    pub fn plain() -> Self {
        Self::new(|_| {})
    }

    /// Starts a thread named `name` (15 bytes are visible in the system).
    ///
    /// # Errors
    /// Fails if the system refuses another thread.
    pub fn spawn<T: Send + 'static>(
        &self,
        role: Role,
        name: impl Into<String>,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<JoinHandle<T>> {
        let enter = self.0.clone();
        std::thread::Builder::new()
            .name(name.into())
            .stack_size(STACK)
            .spawn(move || {
                enter(role);
                body()
            })
    }
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Threads")
    }
}

/// Stack of a worker: 256 KiB. The deepest path is a file operation, under 32 KiB.
const STACK: usize = 256 * 1024;
