//! The machine that a QEMU child runs: for hosts without usable hardware virtualization, and for guests of
//! another architecture.
//!
//! It keeps the same contract as the machine over a hypervisor: the same devices of ours for sockets and
//! files, over vhost-user on sockets that are connected before either side runs; disks and network cards are
//! QEMU's own. **Invariant:** the child has no capability, an empty root but for the system's programs, and no
//! descriptor but those named on its command line; nothing outlives the machine.
//!
//! Emulation is for running, not an equal security promise.

mod arguments;
mod child;
mod machine;
mod monitor;
mod qmp;

pub use machine::build;
