//! What the supervisor is told.

use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use caisson_devices::vsock::HostPorts;
use caisson_wire::vmm::{End, Ended, FromVmm};
use caisson_wire::{SendError, Sender};

use super::Connections;

/// How long the supervisor may take nothing before it counts as gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// The supervisor's ear. Nothing follows the report of the end.
#[derive(Clone, Debug)]
pub(super) struct Reports(Arc<Mutex<Option<Sender>>>);

impl Reports {
    pub(super) fn new(sender: Sender) -> io::Result<Self> {
        sender.set_timeout(PATIENCE)?;
        Ok(Self(Arc::new(Mutex::new(Some(sender)))))
    }

    /// Reports something. The process ends if there is nobody to tell.
    pub(super) fn tell(&self, message: &FromVmm) {
        self.send(|sender| sender.send(message));
    }

    fn connected(&self, port: u32, stream: &UnixStream) {
        let message = FromVmm::GuestConnected { port };
        self.send(|sender| sender.send_with(&message, &[stream.as_fd()]));
    }

    fn send(&self, send: impl FnOnce(&Sender) -> Result<(), SendError>) {
        let sender = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = &*sender
            && let Err(err) = send(sender)
        {
            tracing::error!(error = %super::chain(&err), "the supervisor does not listen");
            std::process::exit(1);
        }
    }

    /// The last report.
    pub(super) fn ended(&self, how: End, console: String) {
        let sender = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(sender) = sender
            && let Err(err) = sender.send(&FromVmm::Ended(Ended { how, console }))
        {
            tracing::error!(error = %super::chain(&err), "the supervisor did not hear of the end");
        }
    }
}

/// Queues the guest's connections for the supervisor.
#[derive(Debug)]
pub(super) struct Ports(SyncSender<(u32, UnixStream)>);

impl Ports {
    pub(super) fn new(queue: SyncSender<(u32, UnixStream)>) -> Self {
        Self(queue)
    }
}

impl HostPorts for Ports {
    fn accept(&self, port: u32, stream: UnixStream) -> bool {
        self.0.try_send((port, stream)).is_ok()
    }
}

/// Reports connections for as long as the machine makes some.
pub(super) fn connections(queue: &Connections, reports: &Reports) {
    for (port, stream) in queue {
        reports.connected(port, &stream);
    }
}
