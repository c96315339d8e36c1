//! What is saved of a paused guest, the same for every backend.
//!
//! Loading these values into a real vCPU is a backend's business; see `hal/`.

use serde::{Deserialize, Serialize};

use crate::regs::{GeneralRegs, SpecialRegs};

/// Version of [`VcpuState`] that this build writes and reads.
pub const VCPU_VERSION: u32 = 1;
/// Version of [`VmState`] that this build writes and reads.
pub const VM_VERSION: u32 = 1;

/// Everything needed to resume one vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// [`VCPU_VERSION`] of the build that wrote it.
    pub version: u32,
    /// General registers.
    pub general: GeneralRegs,
    /// Segments and control registers.
    pub special: SpecialRegs,
    /// The XSAVE area in its standard, non-compacted format (Intel SDM volume 1, section "XSAVE Area").
    pub xsave: Vec<u8>,
    /// XCR0, where the processor has it.
    pub xcr0: Option<u64>,
    /// Model-specific registers, as (index, value), in the order in which they must be written.
    pub msrs: Vec<(u32, u64)>,
    /// The local APIC's registers, one for each 16-byte step of its page, from 0x000 to 0x3f0.
    pub local_apic: Vec<u32>,
    /// The local APIC's base register, IA32_APIC_BASE.
    pub apic_base: u64,
    /// What is pending.
    pub events: Events,
    /// Whether it runs, halts or waits for a start.
    pub activity: Activity,
    /// DR0 to DR3.
    pub breakpoints: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// Rate of the time-stamp counter in kHz; zero if the backend does not know it.
    pub tsc_khz: u32,
}

/// Interrupts and exceptions that the vCPU is in the middle of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// An exception that is to be delivered.
    pub exception: Option<Exception>,
    /// Whether [`Events::exception`] was begun, rather than only raised.
    pub exception_injected: bool,
    /// An interrupt whose delivery was begun, and whether it is a software interrupt.
    pub interrupt: Option<(u8, bool)>,
    /// Interrupts blocked for one instruction: bit 0 by `mov ss`, bit 1 by `sti`.
    pub shadow: u8,
    /// A non-maskable interrupt whose delivery was begun.
    pub nmi_injected: bool,
    /// Non-maskable interrupts that wait.
    pub nmi_pending: u8,
    /// Whether non-maskable interrupts are blocked until `iret`.
    pub nmi_masked: bool,
    /// The vector of a start-up interrupt that was received.
    pub sipi_vector: u32,
    /// System-management mode: bit 0 in it, bit 1 an SMI waits, bit 2 inside an NMI, bit 3 an INIT is latched.
    pub smm: u8,
}

/// An exception with its operands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exception {
    /// Vector.
    pub vector: u8,
    /// Error code, for the vectors that have one.
    pub error_code: Option<u32>,
    /// What goes into CR2 or DR6 at delivery, where it has not gone there yet.
    pub payload: Option<u64>,
}

/// What a vCPU is doing (Intel SDM volume 3, section "Multiple-Processor (MP) Initialization").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    /// Executes instructions.
    #[default]
    Runs,
    /// Waits in `hlt` for an interrupt.
    Halted,
    /// An application processor before its INIT.
    AwaitsInit,
    /// After INIT, before the start-up interrupt.
    AwaitsSipi,
    /// Received the start-up interrupt and has not begun.
    GotSipi,
}

/// Everything that the hypervisor holds for the VM as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// [`VM_VERSION`] of the build that wrote it.
    pub version: u32,
    /// The first 8259.
    pub pic_first: Pic,
    /// The second 8259, cascaded to line 2 of the first.
    pub pic_second: Pic,
    /// The IOAPIC.
    pub ioapic: Ioapic,
    /// The 8254 timer.
    pub pit: Pit,
    /// The paravirtual clock in nanoseconds since the guest started.
    pub clock: u64,
}

/// An 8259 interrupt controller (Intel 8259A data sheet).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the data sheet's own names")]
pub struct Pic {
    pub last_irr: u8,
    pub irr: u8,
    pub imr: u8,
    pub isr: u8,
    pub priority_add: u8,
    pub irq_base: u8,
    pub read_reg_select: u8,
    pub poll: u8,
    pub special_mask: u8,
    pub init_state: u8,
    pub auto_eoi: u8,
    pub rotate_on_auto_eoi: u8,
    pub special_fully_nested_mode: u8,
    pub init4: u8,
    pub elcr: u8,
    pub elcr_mask: u8,
}

/// An IOAPIC (Intel 82093AA data sheet, section 3.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ioapic {
    /// Address of the register window.
    pub base: u64,
    /// Index register.
    pub select: u32,
    /// Identification register.
    pub id: u32,
    /// Lines that request an interrupt.
    pub irr: u32,
    /// The redirection table.
    pub redirection: [u64; 24],
}

/// An 8254 timer (Intel 8254 data sheet).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pit {
    /// Its three counters.
    pub channels: [PitChannel; 3],
    /// Whether something else, such as the HPET, has taken channel 0's place.
    pub legacy_disabled: bool,
}

/// One counter of an 8254. When it was loaded is not saved: a restored counter starts over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the data sheet's own names")]
pub struct PitChannel {
    pub count: u32,
    pub latched_count: u16,
    pub count_latched: u8,
    pub status_latched: u8,
    pub status: u8,
    pub read_state: u8,
    pub write_state: u8,
    pub write_latch: u8,
    pub rw_mode: u8,
    pub mode: u8,
    pub bcd: u8,
    pub gate: u8,
}
