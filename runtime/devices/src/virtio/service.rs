//! A handler that is either at rest in its device or at work on a worker's thread.

use super::{ActivateError, Activation, Queue, QueueHandler, Worker};
use crate::thread::Role;

/// Where the handler of a device is.
#[derive(Debug)]
pub(crate) enum Service<H> {
    /// Without queues.
    Resting(Box<H>),
    /// With them.
    Running(Worker<H>),
    /// Only if a worker could not be started.
    Lost,
}

impl<H: QueueHandler> Service<H> {
    pub(crate) fn new(handler: H) -> Self {
        Self::Resting(Box::new(handler))
    }

    /// Starts the worker; `prepare` has the handler first.
    pub(crate) fn start(
        &mut self,
        device: &'static str,
        role: Role,
        activation: Activation,
        prepare: impl FnOnce(&mut H),
    ) -> Result<(), ActivateError> {
        let Self::Resting(mut handler) = std::mem::replace(self, Self::Lost) else {
            return Err(ActivateError {
                device,
                source: std::io::ErrorKind::ResourceBusy.into(),
            });
        };
        prepare(&mut handler);
        let worker = Worker::spawn(
            &activation.threads,
            role,
            device,
            *handler,
            activation.queues,
            activation.memory,
            activation.broken,
        )
        .map_err(|source| ActivateError { device, source })?;
        *self = Self::Running(worker);
        Ok(())
    }

    /// Ends the worker; the queues come back as they are.
    pub(crate) fn stop(&mut self) -> Vec<Queue> {
        match std::mem::replace(self, Self::Lost) {
            Self::Running(worker) => {
                let (handler, queues) = worker.stop();
                *self = Self::new(handler);
                queues
            }
            other => {
                *self = other;
                Vec::new()
            }
        }
    }
}

/// The bits of `features` as a mask.
pub(crate) fn mask<const N: usize>(features: [u32; N]) -> u64 {
    features.into_iter().fold(0, |bits, bit| bits | 1 << bit)
}

/// Reads `config` as device configuration space: beyond its end there are zeros.
pub(crate) fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    data.fill(0);
    for (to, from) in data.iter_mut().zip(config.iter().skip(offset)) {
        *to = *from;
    }
}
