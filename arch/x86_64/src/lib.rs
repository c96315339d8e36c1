//! x86_64 guests as pure code.
#![forbid(unsafe_code)]

use caisson_arch::Arch;

pub mod layout;
mod regs;

pub use regs::{BootRegs, CpuPolicy, IrqLayout, Sipi, VcpuState, VmState};

/// 64-bit x86 guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum X86_64 {}

impl Arch for X86_64 {
    const NAME: &'static str = "x86_64";
    type BootRegs = BootRegs;
    type VcpuState = VcpuState;
    type VmState = VmState;
    type IrqLayout = IrqLayout;
    type CpuPolicy = CpuPolicy;
    type CpuOn = Sipi;
}
