//! Where things are in the guest's physical address space.

use caisson_arch::GuestAddress;

/// First byte above the RAM below 4 GiB: 3 GiB. Everything between here and 4 GiB is for devices.
pub const LOW_RAM_END: GuestAddress = GuestAddress(0xc000_0000);
/// Where RAM goes on when it does not fit below [`LOW_RAM_END`].
pub const HIGH_RAM_START: GuestAddress = GuestAddress(0x1_0000_0000);
/// PCI Express configuration space (ECAM) of the only segment: one bus, 1 MiB.
pub const ECAM: GuestAddress = GuestAddress(0xe800_0000);
/// Size of the ECAM window: one bus of 32 devices, 8 functions, 4 KiB each.
pub const ECAM_SIZE: u64 = 0x10_0000;
/// Window for 32-bit memory BARs.
pub const PCI_MMIO: GuestAddress = GuestAddress(0xd000_0000);
/// Size of [`PCI_MMIO`]: 256 MiB.
pub const PCI_MMIO_SIZE: u64 = 0x1000_0000;
