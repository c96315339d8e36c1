//! Our own machine over any hypervisor.
//!
//! [`build`] makes a machine out of a plan and descriptors: RAM with a kernel in it, a PCI bus with virtio devices,
//! the few ports of a PC. Whatever needs opening or mapping happens there; starting it starts its threads and
//! lets the vCPUs go. What a machine is to the rest of the product is said in [`caisson_machine`].
//!
//! **Invariant:** no hypervisor is named here; the backend is a type parameter.
//! **Invariant:** nothing the guest does on its bus takes a lock across a wait.

mod assembly;
mod bus;
mod doorbells;
mod kernel;
mod memory;
mod sys;
mod vcpu;

pub use assembly::build;

#[cfg(test)]
mod tests;
