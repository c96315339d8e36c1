//! The x86_64 guest.
#![forbid(unsafe_code)]

pub mod acpi;
pub mod boot;
pub mod layout;
pub mod regs;

pub use regs::{BootRegs, GeneralRegs, Segment, SpecialRegs, Table};
