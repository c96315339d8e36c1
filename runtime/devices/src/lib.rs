//! Virtio devices, their PCI transport and their vhost-user service; the serial port.
//!
//! A device holds queues, interrupts and events; which hypervisor carries them is not visible here.
//! The same device runs behind [`pci`] on our own machine and behind vhost-user under QEMU.
//!
//! **Invariant:** nothing a guest writes to a register, a queue or a buffer can panic, block without bound
//! or make this process grow without bound.

pub mod fs;
pub mod net;
pub mod pci;
pub mod serial;
pub mod thread;
pub mod vhost_user;
pub mod virtio;
pub mod vsock;
