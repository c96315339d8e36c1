//! What the device tells its driver: used buffers, changed configuration, that it needs a reset.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use super::msix::Msix;
use crate::virtio::Signal;

/// `VIRTIO_MSI_NO_VECTOR` (virtio 1.2, section 4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;
/// ISR status: a queue interrupt (section 4.1.4.5).
const ISR_QUEUE: u8 = 1;
/// ISR status: a configuration change.
const ISR_CONFIG: u8 = 2;

/// Shared between the transport and the device's worker; takes no lock but the vector table's.
#[derive(Debug)]
pub(super) struct Notifications {
    pub(super) msix: Msix,
    /// The vector of each queue, then that of configuration changes.
    vectors: Vec<AtomicU16>,
    isr: AtomicU8,
    generation: AtomicU8,
    broken: AtomicBool,
}

impl Notifications {
    pub(super) fn new(msix: Msix, queues: usize) -> Arc<Self> {
        Arc::new(Self {
            msix,
            vectors: (0..=queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            broken: AtomicBool::new(false),
        })
    }

    /// As after a reset of the device. The vector table is the function's and stays.
    pub(super) fn reset(&self) {
        for vector in &self.vectors {
            vector.store(NO_VECTOR, Ordering::Relaxed);
        }
        self.isr.store(0, Ordering::Relaxed);
        self.broken.store(false, Ordering::Relaxed);
    }

    /// Vector of queue `index`.
    pub(super) fn vector(&self, index: usize) -> u16 {
        let vector = self.vectors.get(index);
        vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::Relaxed))
    }

    /// Takes what the driver chose; a vector that does not exist becomes [`NO_VECTOR`], which the driver reads back.
    pub(super) fn set_vector(&self, index: usize, vector: u16) {
        let known = usize::from(vector) < self.msix.len();
        if let Some(place) = self.vectors.get(index) {
            place.store(if known { vector } else { NO_VECTOR }, Ordering::Relaxed);
        }
    }

    /// Place of the configuration vector in [`Notifications::vector`].
    pub(super) fn config_index(&self) -> usize {
        self.vectors.len().saturating_sub(1)
    }

    /// Reads and clears the ISR status.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    pub(super) fn isr(&self) -> u8 {
        self.isr.load(Ordering::Acquire)
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    /// Whether the device needs a reset.
    pub(super) fn broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Puts saved values back.
    pub(super) fn restore(&self, isr: u8, generation: u8, broken: bool) {
        self.isr.store(isr, Ordering::Release);
        self.generation.store(generation, Ordering::Release);
        self.broken.store(broken, Ordering::Release);
    }

    fn interrupt(&self, index: usize, isr: u8) {
        if self.msix.enabled() {
            self.msix.raise(self.vector(index));
        } else {
            self.isr.fetch_or(isr, Ordering::AcqRel);
        }
    }
}

/// The driver is to look at used buffers of a queue.
#[derive(Debug)]
pub(super) struct Used(pub(super) Arc<Notifications>, pub(super) usize);

impl Signal for Used {
    fn signal(&self) {
        self.0.interrupt(self.1, ISR_QUEUE);
    }
}

/// The device's configuration has changed.
#[derive(Debug)]
pub(super) struct ConfigChanged(pub(super) Arc<Notifications>);

impl Signal for ConfigChanged {
    fn signal(&self) {
        self.0.generation.fetch_add(1, Ordering::AcqRel);
        self.0.interrupt(self.0.config_index(), ISR_CONFIG);
    }
}

/// The device needs a reset, and the driver is told so (virtio 1.2, section 2.1.2).
#[derive(Debug)]
pub(super) struct Broken(pub(super) Arc<Notifications>);

impl Signal for Broken {
    fn signal(&self) {
        self.0.broken.store(true, Ordering::Release);
        self.0.interrupt(self.0.config_index(), ISR_CONFIG);
    }
}
