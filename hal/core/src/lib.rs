//! The hypervisor contract.
//!
//! A [`Hypervisor`] creates a [`Vm`] and one [`Seat`] a vCPU in one call; a seat becomes a [`Vcpu`] on the
//! thread that runs it. Loads, stores and port accesses are completed below this contract; what is left
//! are the six [`Exit`]s. No vendor type appears here, and none may appear in a backend's public signatures.
//!
//! **Invariant:** whenever [`Vcpu::run`] has returned, the vCPU's state is consistent and may be saved.
//! **Invariant:** [`Kicker::kick`] ends the current `run`, or else the next one, exactly once.
//!
//! The bus, the devices and the vCPU threads are not here; see `runtime/vmm`.

mod contract;
pub mod os;

pub use caisson_arch::{Arch, GuestAddress};
pub use contract::{
    Accel, Access, Exit, Failed, FastPaths, GuestIo, Hypervisor, Interrupts, Kicker, Line, Msi, PROBE_LIMIT,
    Region, Result, Seat, Vcpu, VcpuId, Verdict, Vm, VmSpec,
};
