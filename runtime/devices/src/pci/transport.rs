//! The common configuration of a virtio device (virtio 1.2, section 4.1.4.3) and the device's life behind it.

use std::io;
use std::sync::Arc;

use caisson_hal::os::Event;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::function::COMMON_SIZE;
use super::msix::fill;
use super::notifications::{Broken, ConfigChanged, NO_VECTOR, Notifications, Used};
use super::state::{RingState, TransportState};
use crate::thread::Threads;
use crate::virtio::{ActivateError, Activation, ActiveQueue, Memory, Queue, QueueT, Signal, VirtioDevice};

/// A device and what its driver has said so far.
#[derive(Debug)]
pub(super) struct Transport {
    device: Box<dyn VirtioDevice>,
    notifications: Arc<Notifications>,
    memory: Memory,
    threads: Threads,
    /// Largest size of each queue.
    sizes: Vec<u16>,
    rings: Vec<RingState>,
    status: u8,
    features: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    work: Work,
}

/// Whether the device has its queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Idle,
    Active,
    /// It had them, and is to have them again.
    Paused,
}

impl Transport {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        notifications: Arc<Notifications>,
        memory: Memory,
        threads: Threads,
    ) -> Self {
        let sizes = device.queue_sizes();
        Self {
            rings: sizes.iter().map(|size| fresh(*size)).collect(),
            device,
            notifications,
            memory,
            threads,
            sizes,
            status: 0,
            features: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            work: Work::Idle,
        }
    }

    pub(super) fn is_active(&self) -> bool {
        self.work == Work::Active
    }

    pub(super) fn load_device(&self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    /// A driver may write configuration once it has said that it is there.
    pub(super) fn store_device(&mut self, offset: u64, data: &[u8]) {
        if self.has(DRIVER) {
            self.device.write_config(offset, data);
        }
    }

    pub(super) fn load_common(&self, offset: u64, data: &mut [u8]) {
        if offset >= COMMON_SIZE {
            return data.fill(0);
        }
        let ring = self.rings.get(usize::from(self.queue_select));
        let ring = ring.copied().unwrap_or(fresh(0));
        let offered = self.offered();
        let select = |word: u32, bits: u64| match word {
            0 => low(bits),
            1 => low(bits >> 32),
            _ => 0,
        };
        let vector = |index| self.notifications.vector(index).to_le_bytes();
        let mut image = Vec::with_capacity(64);
        image.extend(self.device_feature_select.to_le_bytes());
        image.extend(select(self.device_feature_select, offered).to_le_bytes());
        image.extend(self.driver_feature_select.to_le_bytes());
        image.extend(select(self.driver_feature_select, self.features).to_le_bytes());
        image.extend(vector(self.notifications.config_index()));
        image.extend(u16::try_from(self.rings.len()).unwrap_or(u16::MAX).to_le_bytes());
        image.extend([self.status(), self.notifications.generation()]);
        image.extend(self.queue_select.to_le_bytes());
        image.extend(ring.size.to_le_bytes());
        image.extend(self.queue_vector().to_le_bytes());
        image.extend(u16::from(ring.enabled).to_le_bytes());
        image.extend(self.queue_select.to_le_bytes()); // queue_notify_off
        image.extend(ring.descriptors.to_le_bytes());
        image.extend(ring.available.to_le_bytes());
        image.extend(ring.used.to_le_bytes());
        // queue_notify_data and queue_reset: neither feature is offered.
        fill(data, offset, image.into_iter());
    }

    /// A store to one field with the field's own width (64-bit fields also by halves); nothing else has an effect.
    pub(super) fn store_common(&mut self, offset: u64, data: &[u8], kicks: &[Event]) {
        let mut bytes = [0; 8];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u64::from_le_bytes(bytes);
        let word = low(value);
        let [half, ..] = [word & 0xffff].map(|half| u16::try_from(half).unwrap_or(0));
        match (offset, data.len()) {
            (0x00, 4) => self.device_feature_select = word,
            (0x08, 4) => self.driver_feature_select = word,
            (0x0c, 4) => self.accept_features(word),
            (0x10, 2) => {
                let index = self.notifications.config_index();
                self.notifications.set_vector(index, half);
            }
            (0x14, 1) => self.set_status(bytes.first().copied().unwrap_or(0), kicks),
            (0x16, 2) => self.queue_select = half,
            (0x1a, 2) => {
                let index = usize::from(self.queue_select);
                if index < self.rings.len() {
                    self.notifications.set_vector(index, half);
                }
            }
            _ => self.set_up_queue(offset, data.len(), value),
        }
    }

    /// Fields of a queue that are frozen once it is enabled.
    fn set_up_queue(&mut self, offset: u64, len: usize, value: u64) {
        let frozen = self.has(DRIVER_OK) || self.work != Work::Idle;
        let Some(ring) = self.rings.get_mut(usize::from(self.queue_select)) else {
            return;
        };
        if frozen || ring.enabled {
            return;
        }
        match (offset, len) {
            (0x18, 2) => ring.size = u16::try_from(value).unwrap_or(0),
            (0x1c, 2) => ring.enabled = value == 1,
            (0x20..0x28, 4 | 8) => store_address(&mut ring.descriptors, offset - 0x20, len, value),
            (0x28..0x30, 4 | 8) => store_address(&mut ring.available, offset - 0x28, len, value),
            (0x30..0x38, 4 | 8) => store_address(&mut ring.used, offset - 0x30, len, value),
            _ => {}
        }
    }

    /// Everything as it was at first (virtio 1.2, section 2.4).
    pub(super) fn reset(&mut self) {
        self.device.deactivate();
        self.work = Work::Idle;
        self.status = 0;
        self.features = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.queue_select = 0;
        self.rings = self.sizes.iter().map(|size| fresh(*size)).collect();
        self.notifications.reset();
    }

    /// Takes the queues from the device and notes where it stands in them.
    pub(super) fn pause(&mut self) {
        if self.work == Work::Active {
            let queues = self.device.deactivate();
            let enabled = self.rings.iter_mut().filter(|ring| ring.enabled);
            for (ring, queue) in enabled.zip(queues) {
                (ring.next_available, ring.next_used) = (queue.next_avail(), queue.next_used());
            }
            self.work = Work::Paused;
        }
    }

    pub(super) fn resume(&mut self, kicks: &[Event]) -> Result<(), ActivateError> {
        if self.work != Work::Paused {
            return Ok(());
        }
        self.work = Work::Idle;
        self.activate(kicks).inspect_err(|_| self.fail())
    }

    /// `None` while the device runs.
    pub(super) fn save(&self) -> Option<TransportState> {
        let rings = self.rings.iter().enumerate().map(|(index, ring)| RingState {
            vector: self.notifications.vector(index),
            ..*ring
        });
        (self.work != Work::Active).then(|| TransportState {
            kind: self.device.kind() as u16,
            status: self.status,
            features: self.features,
            feature_select: [self.device_feature_select, self.driver_feature_select],
            queue_select: self.queue_select,
            queues: rings.collect(),
            config_vector: self.notifications.vector(self.notifications.config_index()),
            isr: self.notifications.isr(),
            generation: self.notifications.generation(),
            broken: self.notifications.broken(),
            device: self.device.save(),
        })
    }

    pub(super) fn restore(&mut self, state: &TransportState) -> Result<(), String> {
        if self.work != Work::Idle || self.status != 0 {
            return Err("the device is in use".into());
        }
        if state.kind != self.device.kind() as u16 {
            return Err(format!("it is of a device of type {}", state.kind));
        }
        if state.queues.len() != self.rings.len() {
            return Err(format!("it has {} queues", state.queues.len()));
        }
        if state.features & !self.offered() != 0 {
            return Err(format!("its features {:#x} are not offered", state.features));
        }
        self.device.restore(&state.device)?;
        self.rings.clone_from(&state.queues);
        self.status = state.status;
        self.features = state.features;
        [self.device_feature_select, self.driver_feature_select] = state.feature_select;
        self.queue_select = state.queue_select;
        for (index, ring) in state.queues.iter().enumerate() {
            self.notifications.set_vector(index, ring.vector);
        }
        let index = self.notifications.config_index();
        self.notifications.set_vector(index, state.config_vector);
        self.notifications
            .restore(state.isr, state.generation, state.broken);
        if self.has(DRIVER_OK) {
            self.work = Work::Paused;
        }
        Ok(())
    }

    fn offered(&self) -> u64 {
        self.device.features() | VERSION_1
    }

    fn has(&self, bit: u8) -> bool {
        self.status & bit != 0
    }

    fn status(&self) -> u8 {
        let broken = self.notifications.broken();
        self.status | if broken { NEEDS_RESET } else { 0 }
    }

    fn queue_vector(&self) -> u16 {
        let index = usize::from(self.queue_select);
        if index < self.rings.len() {
            self.notifications.vector(index)
        } else {
            NO_VECTOR
        }
    }

    fn accept_features(&mut self, word: u32) {
        if self.has(FEATURES_OK) {
            return; // frozen
        }
        let word = u64::from(word);
        let half = u64::from(u32::MAX);
        match self.driver_feature_select {
            0 => self.features = (self.features & !half) | word,
            1 => self.features = (self.features & half) | word << 32,
            // There is no such feature; accepting one of them is a mistake that must be seen.
            _ if word != 0 => self.features |= !self.offered(),
            _ => {}
        }
    }

    /// The driver's next step (virtio 1.2, section 3.1.1). Bits only ever get set; zero is a reset.
    fn set_status(&mut self, value: u8, kicks: &[Event]) {
        if value == 0 {
            return self.reset();
        }
        let new = value & !self.status & (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED);
        self.status |= new & (ACKNOWLEDGE | DRIVER | FAILED);
        if new & FEATURES_OK != 0 {
            let sound = self.features & !self.offered() == 0 && self.features & VERSION_1 != 0;
            if sound && self.has(DRIVER) {
                self.status |= FEATURES_OK;
            }
        }
        if new & DRIVER_OK != 0 && self.has(FEATURES_OK) && !self.has(FAILED) {
            self.status |= DRIVER_OK;
            if let Err(error) = self.activate(kicks) {
                tracing::warn!(device = error.device, source = %error.source, "device did not start");
                self.fail();
            }
        }
    }

    /// Checks the queues, freezes them and gives them to the device.
    fn activate(&mut self, kicks: &[Event]) -> Result<(), ActivateError> {
        let failed = |source| ActivateError {
            device: "virtio",
            source,
        };
        let rings = self.rings.iter().zip(&self.sizes).zip(kicks).enumerate();
        let mut queues = Vec::new();
        for (index, ((ring, max), kick)) in rings {
            let queue = if ring.enabled {
                Some(ActiveQueue {
                    queue: self.queue(ring, *max).map_err(failed)?,
                    kick: kick.try_clone().map_err(failed)?,
                    interrupt: Arc::new(Used(self.notifications.clone(), index)),
                })
            } else {
                None
            };
            queues.push(queue);
        }
        self.device.activate(Activation {
            memory: self.memory.clone(),
            features: self.features,
            queues,
            config_changed: Arc::new(ConfigChanged(self.notifications.clone())),
            broken: Arc::new(Broken(self.notifications.clone())),
            threads: self.threads.clone(),
        })?;
        self.work = Work::Active;
        Ok(())
    }

    fn queue(&self, ring: &RingState, max: u16) -> io::Result<Queue> {
        let event_index = self.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let queue = Queue::try_from(ring.queue(max, event_index)).map_err(io::Error::other)?;
        if !queue.is_valid(&self.memory) {
            return Err(io::Error::other("a virtqueue lies outside of memory"));
        }
        Ok(queue)
    }

    fn fail(&self) {
        Broken(self.notifications.clone()).signal();
    }
}

fn fresh(size: u16) -> RingState {
    RingState {
        size,
        enabled: false,
        vector: NO_VECTOR,
        descriptors: 0,
        available: 0,
        used: 0,
        next_available: 0,
        next_used: 0,
    }
}

fn low(value: u64) -> u32 {
    u32::try_from(value & u64::from(u32::MAX)).unwrap_or(0)
}

/// Stores to a 64-bit field or one of its halves.
fn store_address(field: &mut u64, offset: u64, len: usize, value: u64) {
    let half = u64::from(u32::MAX);
    match (offset, len) {
        (0, 8) => *field = value,
        (0, 4) => *field = (*field & !half) | (value & half),
        (4, 4) => *field = (*field & half) | (value & half) << 32,
        _ => {}
    }
}

// Device status (virtio 1.2, section 2.1).
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;
const FAILED: u8 = 128;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
