//! The Machine contract, and the confined process that serves a machine.
//!
//! A machine is built from one [`Launch`](caisson_wire::vmm::Launch) message with descriptors and no paths. Which
//! machine it is, ours over a hypervisor or a QEMU child, is the builder's business.

pub mod confine;
mod contract;
pub mod process;

pub use contract::{Build, BuildError, Console, Descriptors, Machine, NoPorts, Setup};
