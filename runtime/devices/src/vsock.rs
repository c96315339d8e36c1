//! Sockets between guest and host (virtio 1.2, section 5.10), in user space.
//!
//! The guest dials out to CID 2; the host end of each connection is an ordinary unix stream.
//! Credit is kept both ways, so one slow end holds up its own connection only. What a guest can make this
//! device hold is bounded: [`CONNECTIONS`] times the window of a connection, and [`RESETS`] answers.
//! Connections that the host opens are not here: nothing in Caisson polls a guest.

mod connection;
mod packet;
mod traffic;

use std::fmt::Debug;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use serde_json::json;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::thread::Role;
use crate::virtio::{ActivateError, Activation, Kind, Queue, VirtioDevice, Worker};
use traffic::Traffic;
pub use traffic::{CONNECTIONS, RESETS};

/// The host's side of the guest's connections.
pub trait HostPorts: Send + Sync + Debug {
    /// The guest connects to `port` of the host; `stream` is the connection's host end.
    ///
    /// Must not block. Returning `false` refuses the connection: the guest gets a reset.
    fn accept(&self, port: u32, stream: UnixStream) -> bool;
}

/// Context id of the guest where there is one guest to a process: the first that is not reserved.
pub const GUEST_CID: u64 = 3;

/// `VIRTIO_VSOCK_F_STREAM` (virtio 1.2, section 5.10.3).
const F_STREAM: u32 = 0;

/// The socket device.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u64,
    state: State,
}

/// Connections outlive the worker, so that a pause does not cut them.
#[derive(Debug)]
enum State {
    Resting(Box<Traffic>),
    Running(Worker<Traffic>),
    /// Only if a worker could not be started.
    Lost,
}

impl Vsock {
    /// A device whose guest has `guest_cid` and whose connections go to `ports`.
    pub fn new(guest_cid: u64, ports: Arc<dyn HostPorts>) -> Self {
        Self {
            guest_cid,
            state: State::Resting(Box::new(Traffic::new(guest_cid, ports))),
        }
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> Kind {
        Kind::Vsock
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![256, 256, 16]
    }

    fn features(&self) -> u64 {
        [
            F_STREAM,
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
        ]
        .into_iter()
        .fold(0, |bits, bit| bits | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.guest_cid.to_le_bytes();
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (to, from) in data.iter_mut().zip(config.iter().skip(offset)) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let State::Resting(traffic) = std::mem::replace(&mut self.state, State::Lost) else {
            return Err(ActivateError {
                device: "vsock",
                source: std::io::ErrorKind::ResourceBusy.into(),
            });
        };
        let worker = Worker::spawn(
            &activation.threads,
            Role::Vsock,
            "vsock",
            *traffic,
            activation.queues,
            activation.memory,
            activation.broken,
        )
        .map_err(|source| ActivateError {
            device: "vsock",
            source,
        })?;
        self.state = State::Running(worker);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        match std::mem::replace(&mut self.state, State::Lost) {
            State::Running(worker) => {
                let (traffic, queues) = worker.stop();
                self.state = State::Resting(Box::new(traffic));
                queues
            }
            other => {
                self.state = other;
                Vec::new()
            }
        }
    }

    fn save(&self) -> serde_json::Value {
        json!({ "version": 1, "guest_cid": self.guest_cid })
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), String> {
        if state["version"] != 1 {
            return Err("the state is not one of this vsock device's".into());
        }
        let State::Resting(traffic) = &mut self.state else {
            return Err("the vsock device is running".into());
        };
        self.guest_cid = state["guest_cid"]
            .as_u64()
            .ok_or("the vsock state has no guest_cid")?;
        traffic.forget(self.guest_cid);
        Ok(())
    }
}
