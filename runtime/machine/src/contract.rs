//! What a machine is, whoever runs it.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use caisson_devices::thread::Threads;
use caisson_devices::vsock::HostPorts;
use caisson_wire::vmm::{CONSOLE_TAIL, End, Launch, Usage};

/// A built machine. Dropping it ends the guest and everything that serves it.
pub trait Machine: Send {
    /// Short name of what runs the guest: "kvm", "qemu".
    fn name(&self) -> &'static str;
    /// Starts the machine's threads and lets the guest run. The process is confined by now; nothing can be
    /// opened by path any more.
    ///
    /// # Errors
    /// Fails with the stage that failed.
    fn start(&mut self) -> Result<(), BuildError>;
    /// Takes every vCPU out of the guest and quiesces the devices; returns when that is so.
    ///
    /// # Errors
    /// Fails if a vCPU does not come out within two seconds.
    fn pause(&mut self) -> Result<(), BuildError>;
    /// The inverse of [`Machine::pause`].
    ///
    /// # Errors
    /// Fails if a device cannot start again.
    fn resume(&mut self) -> Result<(), BuildError>;
    /// Measures what the machine uses.
    fn usage(&self) -> Usage;
}

/// What a machine is built from.
#[derive(Debug)]
pub struct Setup {
    /// The plan.
    pub launch: Launch,
    /// The descriptors that [`caisson_wire::vmm::Fd`]s of the plan index; each is taken at most once.
    pub descriptors: Descriptors,
    /// Collects what the guest prints.
    pub console: Console,
    /// Where the guest's connections go.
    pub ports: Arc<dyn HostPorts>,
    /// Starts threads with their filters; refuses before [`Machine::start`].
    pub threads: Threads,
    /// Where the machine reports its end, at most once.
    pub ended: Sender<End>,
}

/// Builds a machine: opens, maps and spawns what it needs while the process may still do so.
///
/// **Rule: building starts no thread.** The process gives its privileges up after the build and before
/// [`Machine::start`]; a user namespace can be entered, and every thread be confined, only while there is one
/// thread. [`Setup::threads`] refuses to start any until then. Processes may be started: they are children,
/// and confine themselves.
pub type Build = fn(Setup) -> Result<Box<dyn Machine>, BuildError>;

/// The descriptors of a launch message.
#[derive(Debug, Default)]
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// Wraps them in the order in which they came.
    pub fn new(descriptors: Vec<OwnedFd>) -> Self {
        Self(descriptors.into_iter().map(Some).collect())
    }

    /// Takes the one that `fd` names.
    ///
    /// # Errors
    /// Fails if there is none, or it was taken already.
    pub fn take(&mut self, fd: caisson_wire::vmm::Fd, stage: &'static str) -> Result<OwnedFd, BuildError> {
        self.0
            .get_mut(fd.0 as usize)
            .and_then(Option::take)
            .ok_or_else(|| BuildError::new(stage, std::io::Error::from(std::io::ErrorKind::NotFound)))
    }
}

/// A machine that could not be built or controlled.
#[derive(Debug, thiserror::Error)]
#[error("cannot {stage}")]
pub struct BuildError {
    /// What was being done, as a verb phrase: "open the kernel".
    pub stage: &'static str,
    /// The cause.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

impl BuildError {
    /// An error of `stage` with its cause.
    pub fn new(stage: &'static str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self {
            stage,
            source: source.into(),
        }
    }
}

/// Collects what the guest prints: the tail for reports, and all of it for a file or pipe if there is one.
#[derive(Clone, Debug)]
pub struct Console(Arc<Mutex<Collected>>);

#[derive(Debug)]
struct Collected {
    tail: VecDeque<u8>,
    copy: Option<OwnedFd>,
}

impl Console {
    /// Collects the tail, and copies everything to `copy`, which must be non-blocking or a regular file.
    pub fn new(copy: Option<OwnedFd>) -> Self {
        Self(Arc::new(Mutex::new(Collected {
            tail: VecDeque::with_capacity(CONSOLE_TAIL),
            copy,
        })))
    }

    /// Adds what the guest printed. Never blocks: what a full copy does not take is missing from it, and a
    /// copy whose reader has gone is closed.
    pub fn write(&self, bytes: &[u8]) {
        let mut collected = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let keep = bytes.len().min(CONSOLE_TAIL);
        let excess = (collected.tail.len() + keep).saturating_sub(CONSOLE_TAIL);
        collected.tail.drain(..excess);
        collected.tail.extend(bytes.iter().skip(bytes.len() - keep));
        if let Some(copy) = &collected.copy
            && let Err(err) = rustix::io::write(copy, bytes)
            && !matches!(err, rustix::io::Errno::AGAIN | rustix::io::Errno::INTR)
        {
            collected.copy = None;
        }
    }

    /// The tail, with what is not UTF-8 replaced.
    pub fn tail(&self) -> String {
        let mut collected = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(collected.tail.make_contiguous()).into_owned()
    }
}

/// Where the guest's connections go when nobody is there: every one is refused.
#[derive(Debug)]
pub struct NoPorts;

impl HostPorts for NoPorts {
    fn accept(&self, _port: u32, _stream: UnixStream) -> bool {
        false
    }
}
