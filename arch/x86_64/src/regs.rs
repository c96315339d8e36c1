//! Register state of a vCPU, independent of any hypervisor.

use caisson_arch::GuestAddress;
use serde::{Deserialize, Serialize};

/// Entry state of a vCPU that starts in 64-bit mode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootRegs {
    /// First instruction.
    pub rip: GuestAddress,
    /// Address of the zero page, for Linux (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").
    pub rsi: GuestAddress,
    /// Stack pointer.
    pub rsp: GuestAddress,
    /// Root of the page tables (CR3).
    pub page_table: GuestAddress,
    /// Where the global descriptor table lies.
    pub gdt: GuestAddress,
}

/// LAPICs and IOAPIC live in the hypervisor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IrqLayout {
    /// Number of IOAPIC pins.
    pub ioapic_pins: u32,
}

/// What the guest may know about its processor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuPolicy {}

/// Startup IPI observed by a backend without an in-kernel LAPIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sipi {
    /// Target APIC id.
    pub apic_id: u32,
    /// Start page number.
    pub vector: u8,
}

/// Everything needed to resume one vCPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// Version of this structure.
    pub version: u32,
}

/// Interrupt controllers and clock of the VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmState {
    /// Version of this structure.
    pub version: u32,
}
