//! The guest's physical address space.
//!
//! RAM starts at zero and leaves a hole below 4 GiB for the PCI windows, configuration space and interrupt
//! controllers; what does not fit below continues at 4 GiB. Above RAM is a second window for 64-bit PCI addresses.
//!
//! **Invariant:** the ranges of one layout do not overlap.

use std::ops::Range;

/// 1 MiB: the granularity of memory, and where memory that is nothing but memory begins.
pub const MIB: u64 = 1 << 20;
/// 1 GiB.
const GIB: u64 = 1 << 30;

/// Where RAM below 4 GiB ends at the latest.
pub const LOW_END: u64 = 3 * GIB;
/// Where RAM goes on.
pub const HIGH_START: u64 = 4 * GIB;
/// PCI addresses for 32-bit base address registers.
pub const WINDOW32: Range<u64> = LOW_END..0xE000_0000;
/// PCI configuration space, memory-mapped (PCI Express 4.0, 7.2.2): bus 0 alone.
pub const ECAM: Range<u64> = 0xE000_0000..0xE010_0000;
/// Registers of the IOAPIC, at the address where every PC has them.
pub const IOAPIC: u64 = 0xFEC0_0000;
/// Registers of the local APIC after reset (Intel SDM volume 3, "Local APIC").
pub const LAPIC: u64 = 0xFEE0_0000;
/// Length of the window for 64-bit base address registers.
const WINDOW64_LEN: u64 = 8 * GIB;
/// Least memory a machine can have: below, no kernel of ours unpacks.
pub const SMALLEST: u64 = 32 * MIB;
/// Most memory a machine can have, so that every address fits 40 bits, which every host has.
pub const LARGEST: u64 = 512 * GIB;
/// Fewest address bits that a 64-bit processor has had.
const LEAST_PHYS_BITS: u8 = 36;

/// First port of the first serial port.
pub const COM1: u16 = 0x3F8;
/// Interrupt of the first serial port.
pub const COM1_IRQ: u32 = 4;
/// ACPI sleep control register (ACPI 6.5, 4.8.3.7), one byte.
pub const SLEEP_CONTROL: u16 = 0x600;
/// ACPI sleep status register (ACPI 6.5, 4.8.3.7), one byte.
pub const SLEEP_STATUS: u16 = 0x601;
/// ACPI reset register (ACPI 6.5, 4.8.3.6), one byte.
pub const RESET: u16 = 0x602;
/// What the guest writes there.
pub const RESET_VALUE: u8 = 1;
/// The sleep type that means "soft off", as `\_S5` says it.
pub const SLEEP_TYPE_OFF: u8 = 5;

/// Whether a write of `value` to the sleep control register asks for power off: the type is [`SLEEP_TYPE_OFF`]
/// in bits 2 to 4 and the enable bit, 5, is set.
pub fn is_power_off(value: u8) -> bool {
    value & 0b11_1100 == 0b10_0000 | SLEEP_TYPE_OFF << 2
}

/// Where everything is for one size of memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// RAM, one or two ranges, lowest first.
    pub ram: Vec<Range<u64>>,
    /// PCI addresses above RAM.
    pub window64: Range<u64>,
    /// Bits that every address of the layout fits into.
    pub phys_bits: u8,
}

impl Layout {
    /// Splits `memory` bytes around the hole.
    ///
    /// # Errors
    /// Fails if `memory` is no multiple of 1 MiB, too little or too much.
    pub fn new(memory: u64) -> Result<Self, LayoutError> {
        if !memory.is_multiple_of(MIB) {
            return Err(LayoutError::Granularity(memory));
        }
        if memory < SMALLEST {
            return Err(LayoutError::TooSmall(memory / MIB));
        }
        if memory > LARGEST {
            return Err(LayoutError::TooLarge(memory / MIB));
        }
        let low = memory.min(LOW_END);
        let high_end = HIGH_START + (memory - low);
        let mut ram: Vec<_> = std::iter::once(0..low).collect();
        if high_end > HIGH_START {
            ram.push(HIGH_START..high_end);
        }
        let start = high_end.next_multiple_of(GIB);
        let window64 = start..start + WINDOW64_LEN;
        let bits = u64::BITS - (window64.end - 1).leading_zeros();
        let phys_bits = u8::try_from(bits).unwrap_or(u8::MAX).max(LEAST_PHYS_BITS);
        Ok(Self {
            ram,
            window64,
            phys_bits,
        })
    }

    /// End of RAM below 4 GiB.
    pub fn low_end(&self) -> u64 {
        self.ram.first().map_or(0, |low| low.end)
    }
}

/// A size of memory that no machine can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// No multiple of 1 MiB.
    #[error("{0} bytes of memory are not a multiple of 1 MiB")]
    Granularity(u64),
    /// Less than [`SMALLEST`].
    #[error("{0} MiB of memory are too little to boot; give the machine at least 32 MiB")]
    TooSmall(u64),
    /// More than [`LARGEST`].
    #[error("{0} MiB of memory are too much; a machine can have 524288 MiB")]
    TooLarge(u64),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_split_around_the_hole() {
        for (memory, low, high, bits) in [
            (64 * MIB, 0..64 * MIB, None, 36),
            (3 * GIB, 0..3 * GIB, None, 36),
            (3 * GIB + MIB, 0..3 * GIB, Some(4 * GIB..4 * GIB + MIB), 36),
            (64 * GIB, 0..3 * GIB, Some(4 * GIB..65 * GIB), 37),
            (LARGEST, 0..3 * GIB, Some(4 * GIB..513 * GIB), 40),
        ] {
            let layout = Layout::new(memory).unwrap();
            assert_eq!(layout.ram, std::iter::once(low).chain(high).collect::<Vec<_>>());
            assert_eq!(layout.phys_bits, bits);
        }
    }

    #[test]
    fn nothing_overlaps() {
        for memory in [SMALLEST, 3 * GIB, 3 * GIB + MIB, 7 * GIB, LARGEST] {
            let layout = Layout::new(memory).unwrap();
            let mut all = layout.ram.clone();
            all.extend([WINDOW32, ECAM, IOAPIC..IOAPIC + 4096, LAPIC..LAPIC + 4096]);
            all.push(layout.window64.clone());
            all.sort_by_key(|range| range.start);
            assert!(
                all.iter().zip(&all[1..]).all(|(a, b)| a.end <= b.start),
                "{all:x?}"
            );
            assert_eq!(all.iter().filter(|range| range.is_empty()).count(), 0);
            assert_eq!(
                layout
                    .ram
                    .iter()
                    .map(|range| range.end - range.start)
                    .sum::<u64>(),
                memory
            );
        }
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert_eq!(Layout::new(MIB + 1), Err(LayoutError::Granularity(MIB + 1)));
        assert_eq!(Layout::new(MIB), Err(LayoutError::TooSmall(1)));
        assert_eq!(Layout::new(LARGEST + MIB), Err(LayoutError::TooLarge(524_289)));
    }

    #[test]
    fn only_the_sleep_type_of_power_off_powers_off() {
        assert!(is_power_off(0x34));
        assert!(!is_power_off(0x14), "not enabled");
        assert!(!is_power_off(0x2c), "another type");
    }
}
