//! The x86_64 guest.
//!
//! Registers, saved state and the CPUID policy, in the architecture's own terms and in no hypervisor's layout.
#![forbid(unsafe_code)]

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod layout;
pub mod regs;
pub mod state;

use caisson_arch::{Arch, GuestAddress};

pub use cpuid::CpuPolicy;
pub use regs::{BootRegs, GeneralRegs, Segment, SpecialRegs, Table};
pub use state::{VcpuState, VmState};

/// The x86_64 guest, as a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct X86_64;

impl Arch for X86_64 {
    const NAME: &'static str = "x86_64";
    type BootRegs = BootRegs;
    type VcpuState = VcpuState;
    type VmState = VmState;
    type IrqLayout = IrqLayout;
    type CpuPolicy = CpuPolicy;
    type CpuOn = CpuOn;
}

/// Where the interrupt controllers of a PC are: two 8259 at their fixed ports, one IOAPIC, and the local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqLayout {
    /// The IOAPIC's register window (82093AA data sheet, section 3.1).
    pub ioapic: GuestAddress,
    /// Lines of the IOAPIC.
    pub ioapic_lines: u32,
    /// The local APIC's register page (Intel SDM volume 3, section "Local APIC Status and Location").
    pub local_apic: GuestAddress,
}

impl Default for IrqLayout {
    fn default() -> Self {
        Self {
            ioapic: GuestAddress(0xfec0_0000),
            ioapic_lines: 24,
            local_apic: GuestAddress(0xfee0_0000),
        }
    }
}

/// A guest's request to start another vCPU, for backends that leave INIT and SIPI to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuOn {
    /// The target's APIC id.
    pub apic_id: u32,
    /// The SIPI vector: the target starts in real mode at this 4 KiB page.
    pub vector: u8,
}
