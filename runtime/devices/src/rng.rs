//! Entropy (virtio 1.2, section 5.4), from the host kernel's generator.

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::thread::Role;
use crate::virtio::buffers::serve;
use crate::virtio::service::{Service, mask};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DriverFault, Kind, Memory, Queue, QueueHandler, VirtioDevice,
};

/// The entropy source.
#[derive(Debug)]
pub struct Rng(Service<Source>);

#[derive(Debug)]
struct Source;

impl Rng {
    /// A source with one queue.
    #[expect(clippy::new_without_default, reason = "as every other device is made")]
    pub fn new() -> Self {
        Self(Service::new(Source))
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> Kind {
        Kind::Entropy
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64]
    }

    fn features(&self) -> u64 {
        mask([
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
        ])
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.0.start("rng", Role::Small, activation, |_| {})
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        self.0.stop()
    }
}

impl QueueHandler for Source {
    fn queue(
        &mut self,
        index: usize,
        queues: &mut [Option<ActiveQueue>],
        memory: &Memory,
    ) -> Result<(), DriverFault> {
        let Some(Some(active)) = queues.get_mut(index) else {
            return Ok(());
        };
        serve(active, memory, |buffers| {
            let mut entropy = [0; MOST];
            // The generator has been ready since before this process; without it the request stays empty.
            let got = getrandom(&mut entropy, GetRandomFlags::empty()).unwrap_or(0);
            buffers.write(memory, entropy.get(..got).unwrap_or_default())?;
            Ok(got as u64)
        })
    }
}

/// Most bytes for a request, so that one guest does not occupy the generator.
const MOST: usize = 4096;
