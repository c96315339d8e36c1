//! What a virtio device is, whichever transport carries it.

pub(crate) mod buffers;
pub(crate) mod service;
mod worker;

use std::fmt::Debug;
use std::sync::Arc;

use caisson_hal::os::Event;
pub use virtio_queue::{Queue, QueueOwnedT, QueueT};
pub use vm_memory::GuestAddress;

use crate::thread::Threads;
pub use worker::{QueueHandler, Worker};

/// The guest's memory, as a device sees it. Cheap to clone.
pub type Memory = vm_memory::GuestMemoryMmap<()>;

/// Device types of virtio 1.2, section 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Entropy = 4,
    /// Memory balloon.
    Balloon = 5,
    /// Socket device.
    Vsock = 19,
    /// Shared file system.
    Fs = 26,
}

/// One virtio device, between its transport and its worker threads.
pub trait VirtioDevice: Send + Debug {
    /// Its type.
    fn kind(&self) -> Kind;
    /// Largest size of each queue, a power of two. The length is the number of queues.
    fn queue_sizes(&self) -> Vec<u16>;
    /// Feature bits it offers, its own and `VIRTIO_F_*`, but for those that the transport adds.
    fn features(&self) -> u64;
    /// Reads device configuration space; bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes device configuration space; what is read-only stays.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// Starts work on queues that the transport has checked and frozen.
    ///
    /// # Errors
    /// Fails if a thread or descriptor cannot be had; the transport then marks the device as broken.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// Stops all work and gives the queues back in their current state; empty if it was not active.
    ///
    /// Returns within a second whatever the guest has put into the queues.
    fn deactivate(&mut self) -> Vec<Queue>;
    /// The device's own state beyond its queues, while deactivated.
    fn save(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
    /// The inverse of [`VirtioDevice::save`].
    ///
    /// # Errors
    /// Fails with a sentence if the state is not one of this device's.
    fn restore(&mut self, _state: &serde_json::Value) -> Result<(), String> {
        Ok(())
    }
}

/// What a device gets to work with.
#[derive(Debug)]
pub struct Activation {
    /// The guest's memory.
    pub memory: Memory,
    /// Feature bits both sides agreed on.
    pub features: u64,
    /// The queues the driver enabled, by index; `None` for one it left disabled.
    pub queues: Vec<Option<ActiveQueue>>,
    /// Tells the driver that configuration space has changed.
    pub config_changed: Arc<dyn Signal>,
    /// Tells the transport that the driver has broken the rules (`DEVICE_NEEDS_RESET`).
    pub broken: Arc<dyn Signal>,
    /// Starts worker threads.
    pub threads: Threads,
}

/// One enabled queue.
#[derive(Debug)]
pub struct ActiveQueue {
    /// The split virtqueue.
    pub queue: Queue,
    /// Signalled when the driver has made buffers available.
    pub kick: Event,
    /// Tells the driver that buffers were used.
    pub interrupt: Arc<dyn Signal>,
}

/// Something that can be told without arguments: an interrupt, an eventfd.
pub trait Signal: Send + Sync + Debug {
    /// Tells it.
    fn signal(&self);
}

/// A device that could not start.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the {device} device")]
pub struct ActivateError {
    /// Which device.
    pub device: &'static str,
    /// The cause.
    #[source]
    pub source: std::io::Error,
}

/// The driver broke the rules of its queue; the device stops until it is reset.
#[derive(Debug, thiserror::Error)]
pub enum DriverFault {
    /// A ring or descriptor that virtio does not allow.
    #[error("invalid virtqueue: {0}")]
    Queue(#[from] virtio_queue::Error),
    /// Buffers that the device type does not allow.
    #[error("invalid request: {0}")]
    Request(&'static str),
    /// A buffer outside the guest's memory.
    #[error("invalid buffer: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}
