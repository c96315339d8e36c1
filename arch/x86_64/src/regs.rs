//! Registers, by the names of the architecture and in no hypervisor's layout.

use serde::{Deserialize, Serialize};

/// The entry state that a boot protocol asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BootRegs {
    /// General registers.
    pub general: GeneralRegs,
    /// Segments and control registers.
    pub special: SpecialRegs,
}

/// General-purpose registers, instruction pointer and flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the architecture's own names")]
pub struct GeneralRegs {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, inclusive, after the granularity bit was applied.
    pub limit: u32,
    /// The access-rights word as VMX has it: bits 0-7 are byte 5 of the descriptor, bits 12-15 the upper half of
    /// byte 6, bit 16 marks the segment unusable (Intel SDM volume 3, section "Guest Register State").
    pub access: u32,
}

/// A descriptor-table register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Base address.
    pub base: u64,
    /// Limit in bytes, inclusive.
    pub limit: u16,
}

/// Segments, descriptor tables and control registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the architecture's own names")]
pub struct SpecialRegs {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldt: Segment,
    pub gdt: Table,
    pub idt: Table,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
}
