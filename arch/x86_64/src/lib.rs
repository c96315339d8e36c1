//! The x86_64 guest.
#![forbid(unsafe_code)]

pub mod regs;

pub use regs::{BootRegs, GeneralRegs, Segment, SpecialRegs, Table};
