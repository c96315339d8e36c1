//! The ACPI tables: what a distribution kernel needs for several processors, PCI and power off, and no more.
//!
//! The machine is hardware-reduced (ACPI 6.5, 4.1): no power-management timer, no SCI, no fixed events, so that
//! the guest probes none of the devices that this machine does not have. Interrupts of PCI functions are
//! message-signalled; there is no routing table for wires.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package,
    ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink as _};

use crate::layout::{
    COM1, COM1_IRQ, ECAM, IOAPIC, LAPIC, Layout, RESET, RESET_VALUE, SLEEP_CONTROL, SLEEP_STATUS,
    SLEEP_TYPE_OFF, WINDOW32,
};

/// Where the tables begin, with the root pointer: the area that a guest without any hint would search
/// (ACPI 6.5, 5.2.5.1).
pub const TABLES: u64 = 0xE_0000;
/// Where they end at the latest.
pub const TABLES_END: u64 = 0x10_0000;
/// Most processors that the tables can name: APIC identifiers are bytes, and 255 means all.
pub const MOST_VCPUS: u32 = 254;

const OEM: [u8; 6] = *b"CAISSN";
const TABLE: [u8; 8] = *b"CAISSON ";
const REVISION: u32 = 1;
/// Length of a table's header (ACPI 6.5, 5.2.6).
const HEADER_LEN: u32 = 36;
/// `IAPC_BOOT_ARCH` (ACPI 6.5, 5.2.9.3): no VGA (bit 2), no ASPM (bit 4), no CMOS clock (bit 5).
const BOOT_ARCH: u16 = 1 << 2 | 1 << 4 | 1 << 5;

/// All tables as the bytes at [`TABLES`], the root pointer first.
///
/// Processors beyond [`MOST_VCPUS`] are not described.
pub fn tables(layout: &Layout, vcpus: u32) -> Vec<u8> {
    let mut placed = Placed {
        bytes: bytes_of(&Rsdp::new(OEM, 0)),
    };
    let dsdt = placed.add(&bytes_of_sdt(&dsdt(layout)));
    let listed = [
        placed.add(&bytes_of(&fadt(dsdt))),
        placed.add(&bytes_of(&madt(vcpus))),
        placed.add(&bytes_of(&mcfg())),
    ];
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    for table in listed {
        xsdt.add_entry(table);
    }
    let xsdt = placed.add(&bytes_of(&xsdt));
    let root = bytes_of(&Rsdp::new(OEM, xsdt));
    let tables = placed.bytes.split_off(root.len());
    root.into_iter().chain(tables).collect()
}

/// Tables one after another, each aligned to 16 bytes.
struct Placed {
    bytes: Vec<u8>,
}

impl Placed {
    /// Appends `table` and gives its address.
    fn add(&mut self, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let at = TABLES + self.bytes.len() as u64;
        self.bytes.vec(table);
        at
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn bytes_of_sdt(table: &Sdt) -> Vec<u8> {
    table.as_slice().to_vec()
}

/// Fixed description: how to power off and to reset (ACPI 6.5, 5.2.9).
fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let port = |port: u16| GAS::new(Space::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL);
    fadt.sleep_status_reg = port(SLEEP_STATUS);
    fadt.finalize()
}

/// Processors and the IOAPIC (ACPI 6.5, 5.2.12). Processor `n` has APIC identifier `n`.
fn madt(vcpus: u32) -> MADT {
    let lapic = u32::try_from(LAPIC).expect("below 4 GiB by definition");
    let ioapic = u32::try_from(IOAPIC).expect("below 4 GiB by definition");
    let mut madt = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(lapic));
    for id in (0..vcpus.min(MOST_VCPUS)).filter_map(|id| u8::try_from(id).ok()) {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, ioapic, 0));
    madt
}

/// Where configuration space is mapped (PCI Firmware Specification 3.3, 4.1.2).
fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(ECAM.start, 0, 0, 0);
    mcfg
}

/// The devices that cannot be discovered: the PCI host bridge with its windows, and the serial port.
fn dsdt(layout: &Layout) -> Sdt {
    let low = |at: u64| u32::try_from(at).expect("below 4 GiB by definition");
    let windows = (
        AddressSpace::new_bus_number(0u16, 0u16),
        AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            low(WINDOW32.start),
            low(WINDOW32.end - 1),
            None,
        ),
        AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            layout.window64.start,
            layout.window64.end - 1,
            None,
        ),
    );
    let pci = Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &0u8),
            &Name::new("_BBN".into(), &0u8),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &windows.0,
                    &IO::new(0xCF8, 0xCF8, 1, 8),
                    &windows.1,
                    &windows.2,
                ]),
            ),
        ],
    )
    .to_bytes();
    // Linux uses the memory-mapped configuration space only if some device claims it.
    let board = Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Memory32Fixed::new(
                    true,
                    low(ECAM.start),
                    low(ECAM.end - ECAM.start),
                )]),
            ),
        ],
    )
    .to_bytes();
    let serial = Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, COM1_IRQ),
                    &IO::new(COM1, COM1, 1, 8),
                ]),
            ),
        ],
    )
    .to_bytes();
    let devices = [pci, board, serial].concat();
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_LEN, 6, OEM, TABLE, REVISION);
    dsdt.append_slice(&Scope::raw("_SB_".into(), devices));
    dsdt.append_slice(
        &Name::new(
            "_S5_".into(),
            &Package::new(vec![&SLEEP_TYPE_OFF, &0u8, &0u8, &0u8]),
        )
        .to_bytes(),
    );
    dsdt
}

/// AML as bytes.
trait ToBytes: Aml + Sized {
    fn to_bytes(&self) -> Vec<u8> {
        bytes_of(self)
    }
}

impl<T: Aml> ToBytes for T {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::MIB;

    fn at(tables: &[u8], address: u64) -> &[u8] {
        let table = &tables[usize::try_from(address - TABLES).unwrap()..];
        let length = u32::from_le_bytes(table[4..8].try_into().unwrap());
        &table[..length as usize]
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_reached_and_sums_to_zero() {
        let tables = tables(&Layout::new(4096 * MIB).unwrap(), 32);
        assert!(TABLES + tables.len() as u64 <= TABLES_END);
        assert_eq!(&tables[..8], b"RSD PTR ");
        assert_eq!((sum(&tables[..20]), sum(&tables[..36])), (0, 0));
        let xsdt = at(&tables, u64_at(&tables, 24));
        assert_eq!((&xsdt[..4], sum(xsdt)), (b"XSDT".as_slice(), 0));
        let names: Vec<_> = xsdt[36..]
            .chunks(8)
            .map(|entry| at(&tables, u64_at(entry, 0)))
            .inspect(|table| assert_eq!(sum(table), 0))
            .map(|table| &table[..4])
            .collect();
        assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
        let fadt = at(&tables, u64_at(xsdt, 36));
        // X_DSDT, ACPI 6.5, table 5.9.
        let dsdt = at(&tables, u64_at(fadt, 140));
        assert_eq!((&dsdt[..4], sum(dsdt)), (b"DSDT".as_slice(), 0));
    }

    #[test]
    fn each_processor_is_named_once() {
        let layout = Layout::new(64 * MIB).unwrap();
        let one = tables(&layout, 1).len();
        let madt = |vcpus| bytes_of(&madt(vcpus)).len();
        assert_eq!(madt(32) - madt(1), 31 * 8);
        assert_eq!(madt(100_000), madt(MOST_VCPUS));
        assert!(TABLES + (one + 8 * 254) as u64 <= TABLES_END);
    }
}
