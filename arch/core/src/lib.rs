//! Guest architectures as types.
//!
//! Everything here and in `arch/*` is plain data and pure functions: no files, threads or clocks, nothing
//! from a hypervisor, so every architecture builds and is tested on every host.
//! How a backend loads these values into a real vCPU is not here; see `hal/`.
#![forbid(unsafe_code)]

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use vm_memory::GuestAddress;

/// One guest instruction-set architecture.
pub trait Arch: Clone + Copy + Debug + PartialEq + Send + Sync + Sized + 'static {
    /// Name used in messages and image paths, as `uname -m` prints it.
    const NAME: &'static str;
    /// Entry state a boot protocol sets before the first instruction.
    type BootRegs: Clone + Debug + PartialEq + Send + 'static;
    /// Everything needed to resume one vCPU; versioned, the same for every backend.
    type VcpuState: Clone + Debug + PartialEq + Send + Sync + Serialize + DeserializeOwned + 'static;
    /// Everything the hypervisor holds for the VM as a whole: interrupt controller, clock; versioned.
    type VmState: Clone + Debug + PartialEq + Send + Sync + Serialize + DeserializeOwned + 'static;
    /// Interrupt controller layout chosen by the machine model.
    type IrqLayout: Clone + Debug + PartialEq + Send + Sync + 'static;
    /// What the guest may know about its processor, beyond what the host has.
    type CpuPolicy: Clone + Debug + PartialEq + Send + Sync + 'static;
    /// Request from the guest to start another vCPU, where the hypervisor leaves that to us.
    type CpuOn: Clone + Debug + PartialEq + Send + 'static;
}
