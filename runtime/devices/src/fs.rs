//! Files of the host for the guest (virtio 1.2, section 5.11).
//!
//! One directory and what is below it, mounts included, through a FUSE server of our own ([`server`]). Names are
//! resolved one at a time and follow nothing, so no link leads out; special files are never opened. Permissions are
//! the guest kernel's to check, as on a disk of its own; what the *mounts* forbid (read-only) the host enforces.
//! Everything runs on one thread but what takes long (`fsync`, `fallocate`, copies), which others do meanwhile.
//! Locks, pipes and sockets are the guest's own. DAX windows and notifications are not here.

mod abi;
mod buffers;
mod nodes;
mod ops_io;
mod ops_names;
mod server;
mod traffic;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::process::{Resource, getrlimit};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::thread::Role;
use crate::virtio::{ActivateError, Activation, Kind, Memory, Queue, Signal, VirtioDevice, Worker};
use server::Server;
use traffic::Traffic;

/// What a file device serves.
#[derive(Debug)]
pub struct FsConfig {
    /// What the guest mounts it by, at most 36 bytes.
    pub tag: String,
    /// The directory. Mounts may come and go below it.
    pub root: OwnedFd,
    /// `/proc/self/fd` of the serving process ([`own_descriptors`]), opened before that becomes impossible.
    pub descriptors: OwnedFd,
    /// Bounds of what the guest can make this process hold.
    pub limits: Limits,
}

/// Bounds of what a guest can make the file server hold; beyond them it is told `ENFILE`.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Descriptors of files that the guest knows but has not opened. Fewer make it slower, not poorer.
    pub open_nodes: usize,
    /// Files that the guest knows at a time.
    pub nodes: usize,
    /// Files that the guest has open at a time.
    pub handles: usize,
}

impl Limits {
    /// What fits this process's limit of descriptors: half for files known, a quarter for files open.
    pub fn of_process() -> Self {
        let most = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20);
        let most = usize::try_from(most).unwrap_or(usize::MAX).clamp(64, 1 << 16);
        Self {
            open_nodes: most / 2,
            nodes: 1 << 18,
            handles: most / 4,
        }
    }
}

/// Opens `/proc/self/fd`, by which the server reads files that it holds without having opened them.
///
/// # Errors
/// Fails if `/proc` is not there.
pub fn own_descriptors() -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat(CWD, c"/proc/self/fd", flags, Mode::empty())?)
}

/// The shared file system device.
#[derive(Debug)]
pub struct Fs {
    tag: [u8; TAG],
    state: State,
}

/// The session outlives the worker, so that a pause does not end it; a driver that starts over says `FUSE_INIT`.
#[derive(Debug)]
enum State {
    Resting(Box<Traffic>),
    Running(Running),
    /// Only if a worker could not be started.
    Lost,
}

#[derive(Debug)]
struct Running {
    worker: Worker<Traffic>,
    memory: Memory,
    /// The interrupt of each queue that is in use, in their order.
    interrupts: Vec<Arc<dyn Signal>>,
    /// Which queues these are.
    indices: Vec<usize>,
}

impl Fs {
    /// A device that serves `config`.
    ///
    /// The process should have a file mode mask of 0 and ignore `SIGXFSZ`.
    ///
    /// # Errors
    /// Fails if the tag is empty or too long, or the root cannot be looked at.
    pub fn new(config: FsConfig) -> io::Result<Self> {
        let bytes = config.tag.as_bytes();
        let mut tag = [0; TAG];
        let place = tag.get_mut(..bytes.len()).filter(|place| !place.is_empty());
        let place =
            place.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a tag has 1 to 36 bytes"))?;
        place.copy_from_slice(bytes);
        let server = Server::new(config.root, config.descriptors, config.limits)?;
        let state = State::Resting(Box::new(Traffic::new(server)?));
        Ok(Self { tag, state })
    }
}

impl VirtioDevice for Fs {
    fn kind(&self) -> Kind {
        Kind::Fs
    }

    /// High-priority queue and one request queue. 512 descriptors carry a request of 256 pages.
    fn queue_sizes(&self) -> Vec<u16> {
        vec![512, 512]
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
        ]
        .into_iter()
        .fold(0, |bits, bit| bits | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let requests = REQUEST_QUEUES.to_le_bytes();
        let config = self.tag.iter().chain(&requests);
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (to, from) in data.iter_mut().zip(config.skip(offset)) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let failed = |source| ActivateError { device: "fs", source };
        let State::Resting(mut traffic) = std::mem::replace(&mut self.state, State::Lost) else {
            return Err(failed(io::ErrorKind::ResourceBusy.into()));
        };
        traffic.start(&activation.threads).map_err(failed)?;
        let (mut interrupts, mut indices) = (Vec::new(), Vec::new());
        for (index, queue) in activation.queues.iter().enumerate() {
            if let Some(queue) = queue {
                interrupts.push(queue.interrupt.clone());
                indices.push(index);
            }
        }
        let memory = activation.memory.clone();
        let worker = Worker::spawn(
            &activation.threads,
            Role::Files,
            "files",
            *traffic,
            activation.queues,
            activation.memory,
            activation.broken,
        )
        .map_err(failed)?;
        self.state = State::Running(Running {
            worker,
            memory,
            interrupts,
            indices,
        });
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        match std::mem::replace(&mut self.state, State::Lost) {
            State::Running(running) => {
                let (mut traffic, mut queues) = running.worker.stop();
                traffic.settle(
                    &mut queues,
                    &running.indices,
                    &running.interrupts,
                    &running.memory,
                );
                self.state = State::Resting(Box::new(traffic));
                queues
            }
            other => {
                self.state = other;
                Vec::new()
            }
        }
    }
}

/// Length of the tag in configuration space (virtio 1.2, section 5.11.4).
const TAG: usize = 36;
const REQUEST_QUEUES: u32 = 1;

#[cfg(test)]
#[path = "fs/tests.rs"]
mod tests;
