//! The console (virtio 1.2, section 5.3): what the guest prints, given to a sink. No input, one port.

use std::fmt::{self, Debug};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::thread::Role;
use crate::virtio::buffers::serve;
use crate::virtio::service::{Service, mask};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DriverFault, Kind, Memory, Queue, QueueHandler, VirtioDevice,
};

/// The console device.
#[derive(Debug)]
pub struct Console(Service<Printer>);

struct Printer(Box<Sink>);

type Sink = dyn Fn(&[u8]) + Send;

impl Console {
    /// A console that gives what it gets to `out`, which must not block.
    pub fn new(out: impl Fn(&[u8]) + Send + 'static) -> Self {
        Self(Service::new(Printer(Box::new(out))))
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> Kind {
        Kind::Console
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64, 64]
    }

    fn features(&self) -> u64 {
        mask([
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
        ])
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0); // neither size nor ports: their features are not offered
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.0.start("console", Role::Small, activation, |_| {})
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        self.0.stop()
    }
}

impl QueueHandler for Printer {
    fn queue(
        &mut self,
        index: usize,
        queues: &mut [Option<ActiveQueue>],
        memory: &Memory,
    ) -> Result<(), DriverFault> {
        let Some(Some(active)) = queues.get_mut(TRANSMIT).filter(|_| index == TRANSMIT) else {
            return Ok(());
        };
        serve(active, memory, |buffers| {
            let mut bytes = [0; 4096];
            let mut total = 0usize;
            while total < MOST {
                let len = buffers.read(memory, &mut bytes)?;
                let Some(text) = bytes.get(..len).filter(|text| !text.is_empty()) else {
                    break;
                };
                (self.0)(text);
                total = total.saturating_add(len);
            }
            Ok(total as u64)
        })
    }
}

impl Debug for Printer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Printer")
    }
}

/// The queue of port 0 from the driver (section 5.3.2).
const TRANSMIT: usize = 1;
/// Most bytes of one chain that are printed; the rest is dropped.
const MOST: usize = 1 << 20;
