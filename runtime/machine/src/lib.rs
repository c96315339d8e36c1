//! The Machine contract and the confined process that keeps it.
//!
//! `caisson vmm` gets one [`wire::vmm::Launch`](caisson_wire::vmm::Launch), has a [`Machine`] built from it,
//! gives up every right it does not need, and serves its control socket until the guest ends. Which machine
//! it is, ours over a hypervisor or a QEMU child, is the builder's business; see `runtime/vmm` and `runtime/qemu`.

mod contract;

pub use contract::{Build, BuildError, Console, Descriptors, Machine, NoPorts, Setup};
