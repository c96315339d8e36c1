//! The Machine contract.
//!
//! A machine is built from one [`Launch`](caisson_wire::vmm::Launch) message with descriptors and no paths. Which
//! machine it is, ours over a hypervisor or a QEMU child, is the builder's business.

mod contract;

pub use contract::{Build, BuildError, Console, Descriptors, Machine, NoPorts, Setup};
