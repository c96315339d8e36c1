//! The memory map.

use std::sync::Arc;

use caisson_arch_x86_64::X86_64;
use caisson_hal::{Access, Exit, GuestAddress, Hypervisor, Region, Vm};
use vm_memory::VolatileMemory as _;

use crate::bench::{Bench, DEVICE, FINISH, Log, RAM, Seen, byte_at, long};

/// Loads a byte at `rdi`, writes it to a port, and stores it one higher at the next address.
const COPY: &[&[u8]] = &[
    &[0x8a, 0x07],       // mov al, [rdi]
    &[0xe6, 0x10],       // out 0x10, al
    &[0xfe, 0xc0],       // inc al
    &[0x88, 0x47, 0x01], // mov [rdi + 1], al
    FINISH,
];

fn region(first: u8) -> Arc<Region> {
    let region = Region::new(0x1000).unwrap();
    region.get_slice(0, 1).unwrap().copy_from(&[first]);
    Arc::new(region)
}

pub(crate) fn read_only_memory_is_read_and_its_stores_exit<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let mut bench = Bench::new(hypervisor, 1, COPY);
    let rom = region(7);
    bench
        .vm
        .map(GuestAddress(DEVICE), rom.clone(), Access::ReadOnly)
        .unwrap();
    let mut io = Log::new();
    assert_eq!(bench.run(&long(), &mut io), Exit::PowerOff);
    assert_eq!(
        io.seen,
        [Seen::Out(0x10, vec![7]), Seen::Store(DEVICE + 1, vec![8])]
    );
    let mut bytes = [0_u8; 2];
    rom.get_slice(0, 2).unwrap().copy_to(&mut bytes);
    assert_eq!(bytes, [7, 0]);
}

pub(crate) fn unmapped_memory_exits<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let mut bench = Bench::new(hypervisor, 1, COPY);
    let at = GuestAddress(DEVICE);
    bench.vm.map(at, region(7), Access::Full).unwrap();
    bench.vm.unmap(at).unwrap();
    let mut io = Log::new();
    assert_eq!(bench.run(&long(), &mut io), Exit::PowerOff);
    let byte = byte_at(DEVICE);
    let want = [
        Seen::Load(DEVICE, 1),
        Seen::Out(0x10, vec![byte]),
        Seen::Store(DEVICE + 1, vec![byte.wrapping_add(1)]),
    ];
    assert_eq!(io.seen, want);
}

pub(crate) fn mappings_that_make_no_sense_are_refused<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let bench = Bench::new(hypervisor, 1, COPY);
    for at in [0x1000, RAM as u64 - 0x1000, DEVICE + 1, u64::MAX - 0xfff] {
        let mapped = bench.vm.map(GuestAddress(at), region(0), Access::Full);
        assert!(mapped.is_err(), "mapped at {at:#x}");
    }
    assert!(bench.vm.unmap(GuestAddress(DEVICE)).is_err());
    assert!(bench.vm.dirty_pages(GuestAddress(DEVICE)).is_err());
}

pub(crate) fn written_pages_are_in_the_dirty_log<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    if !hypervisor.accel().dirty_log {
        println!("skipped: {} has no dirty log", H::NAME);
        return;
    }
    let mut bench = Bench::new(hypervisor, 1, COPY);
    let zero = GuestAddress(0);
    assert_eq!(bench.vm.dirty_pages(zero).unwrap(), [u64::MAX]);
    bench.vm.dirty_pages(zero).unwrap();
    let mut regs = long();
    regs.general.rdi = 0x1_1fff; // the store goes to page 0x12
    assert_eq!(bench.run(&regs, &mut Log::new()), Exit::PowerOff);
    let dirty = bench.vm.dirty_pages(zero).unwrap();
    assert_eq!(dirty[0] >> 0x11 & 0b111, 0b010, "{dirty:x?}");
    assert_eq!(bench.vm.dirty_pages(zero).unwrap()[0] & 1 << 0x12, 0);
}
