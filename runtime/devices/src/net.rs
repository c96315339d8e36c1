//! Network card (virtio 1.2, section 5.1) over a tap.
//!
//! One pair of queues. Checksums and segmentation are left to the host's network stack as far as the driver
//! agreed: a frame crosses this device once, however large. What a guest can make this device hold is one
//! frame and its own receive buffers. Frames are not inspected: the tap's other end decides what may pass.

mod frames;
mod tap;

use std::io;
use std::os::fd::OwnedFd;

use serde_json::json;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::thread::Role;
use crate::virtio::{ActivateError, Activation, Kind, Queue, QueueT, VirtioDevice, Worker};
use frames::Frames;
use tap::Offloads;

/// What a network card is made from.
#[derive(Debug)]
pub struct NetConfig {
    /// A tap without packet information, with a 12-byte `virtio_net_hdr`, non-blocking.
    pub tap: OwnedFd,
    /// Address of the card.
    pub mac: [u8; 6],
    /// Largest packet, without the Ethernet header.
    pub mtu: u16,
}

/// The network card.
#[derive(Debug)]
pub struct Net {
    mac: [u8; 6],
    mtu: u16,
    state: State,
}

#[derive(Debug)]
enum State {
    Resting(Box<Frames>),
    Running(Worker<Frames>),
    /// Only if a worker could not be started.
    Lost,
}

impl Net {
    /// A card whose frames go through the tap of `config`.
    pub fn new(config: NetConfig) -> Self {
        Self {
            mac: config.mac,
            mtu: config.mtu,
            state: State::Resting(Box::new(Frames::new(config.tap))),
        }
    }

    /// `struct virtio_net_config` (virtio 1.2, section 5.1.4): address, status, queue pairs, MTU.
    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        let fields = [
            &self.mac[..],
            &LINK_UP.to_le_bytes(),
            &1u16.to_le_bytes(),
            &self.mtu.to_le_bytes(),
        ];
        for (to, from) in config.iter_mut().zip(fields.concat()) {
            *to = from;
        }
        config
    }
}

/// `VIRTIO_NET_S_LINK_UP` (virtio 1.2, section 5.1.4); read only by drivers that do not look at the features.
const LINK_UP: u16 = 1;

impl VirtioDevice for Net {
    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![256, 256]
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
        ]
        .into_iter()
        .fold(0, |bits, bit| bits | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (to, from) in data.iter_mut().zip(self.config().iter().skip(offset)) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let failed = |source| ActivateError {
            device: "network",
            source,
        };
        let State::Resting(mut frames) = std::mem::replace(&mut self.state, State::Lost) else {
            return Err(failed(io::ErrorKind::ResourceBusy.into()));
        };
        let features = activation.features;
        if let Err(source) = tap::set_offloads(frames.tap(), offloads(features)) {
            self.state = State::Resting(frames);
            return Err(failed(source));
        }
        frames.begin(features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0);
        let worker = Worker::spawn(
            &activation.threads,
            Role::Net,
            "net",
            *frames,
            activation.queues,
            activation.memory,
            activation.broken,
        )
        .map_err(failed)?;
        self.state = State::Running(worker);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        match std::mem::replace(&mut self.state, State::Lost) {
            State::Running(worker) => {
                let (mut frames, mut queues) = worker.stop();
                // Buffers that were taken and not used go back: they are the first to be taken again.
                let taken = frames.end();
                if let Some(receive) = queues.first_mut() {
                    receive.set_next_avail(receive.next_avail().wrapping_sub(taken));
                }
                self.state = State::Resting(Box::new(frames));
                queues
            }
            other => {
                self.state = other;
                Vec::new()
            }
        }
    }

    fn save(&self) -> serde_json::Value {
        json!({ "version": 1, "mac": self.mac, "mtu": self.mtu })
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), String> {
        let parsed = || -> Option<([u8; 6], u16)> {
            let mac: Vec<u8> = serde_json::from_value(state.get("mac")?.clone()).ok()?;
            let mtu = u16::try_from(state.get("mtu")?.as_u64()?).ok()?;
            Some((mac.try_into().ok()?, mtu))
        };
        match (state.get("version").and_then(serde_json::Value::as_u64), parsed()) {
            (Some(1), Some((mac, mtu))) => {
                (self.mac, self.mtu) = (mac, mtu);
                Ok(())
            }
            _ => Err("the state is not one of this network device's".into()),
        }
    }
}

/// What the tap may leave for the driver to do.
fn offloads(features: u64) -> Offloads {
    let agreed = |bit: u32| features & 1 << bit != 0;
    let checksum = agreed(VIRTIO_NET_F_GUEST_CSUM);
    Offloads {
        checksum,
        // Segmentation needs the checksum (virtio 1.2, section 5.1.3.1).
        tcp4: checksum && agreed(VIRTIO_NET_F_GUEST_TSO4),
        tcp6: checksum && agreed(VIRTIO_NET_F_GUEST_TSO6),
        ecn: checksum && agreed(VIRTIO_NET_F_GUEST_ECN),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card() -> Net {
        Net::new(NetConfig {
            tap: rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap(),
            mac: [2, 0, 0, 0, 0, 7],
            mtu: 1400,
        })
    }

    #[test]
    fn the_driver_reads_address_and_mtu() {
        let mut config = [0xff; 16];
        card().read_config(0, &mut config);
        assert_eq!(config[..6], [2, 0, 0, 0, 0, 7]);
        assert_eq!(config[10..12], 1400u16.to_le_bytes());
        assert_eq!(config[12..], [0; 4]);
        let mut beyond = [0xff; 4];
        card().read_config(u64::MAX, &mut beyond);
        assert_eq!(beyond, [0; 4]);
    }

    #[test]
    fn state_is_restored_and_that_of_another_device_refused() {
        let state = Net {
            mac: [2, 1, 1, 1, 1, 1],
            ..card()
        }
        .save();
        let mut other = card();
        other.restore(&state).unwrap();
        assert_eq!(other.mac, [2, 1, 1, 1, 1, 1]);
        assert!(other.restore(&json!({ "version": 1, "guest_cid": 3 })).is_err());
    }

    #[test]
    fn segmentation_is_left_to_no_driver_that_does_not_do_checksums() {
        let offloads = offloads(1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6);
        assert!(!offloads.tcp4 && !offloads.tcp6 && !offloads.checksum);
    }
}
