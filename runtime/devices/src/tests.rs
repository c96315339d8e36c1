//! The small devices behind the bus.

use std::fs::File;
use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

use crate::balloon::Balloon;
use crate::console::Console;
use crate::pci::driver::{Driver, MEMORY, Random};
use crate::rng::Rng;
use crate::virtio::Memory;

#[test]
fn entropy_fills_what_it_is_given_up_to_its_limit() {
    let mut driver = Driver::new(Box::new(Rng::new()));
    driver.start();
    for (room, want) in [(1, 1), (100, 100), (8192, 4096)] {
        driver.submit(0, &[], &[room]);
        assert_eq!(driver.used(0), want);
    }
    driver.submit(0, &[b"nothing to fill"], &[]);
    assert_eq!(driver.used(0), 0);
}

#[test]
fn the_console_prints_what_the_guest_writes_in_order() {
    let (out, printed) = mpsc::channel();
    let mut driver = Driver::new(Box::new(Console::new(move |text: &[u8]| {
        let _ = out.send(text.to_vec());
    })));
    driver.start();
    let long = vec![b'x'; 10_000];
    for text in [&b"first "[..], b"second ", &long] {
        driver.submit(1, &[text], &[]);
        driver.used(1);
    }
    let mut all = Vec::new();
    while all.len() < 10_013 {
        all.extend(printed.recv_timeout(Duration::from_secs(5)).unwrap());
    }
    assert!(all.starts_with(b"first second xxx"));
}

/// Memory backed by a memfd, as the machine's own is.
fn shared() -> (Memory, File) {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, MEMORY).unwrap();
    let offset = FileOffset::new(file.try_clone().unwrap(), 0);
    let region = MmapRegion::from_file(offset, MEMORY as usize).unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    (Memory::from_regions(vec![region]).unwrap(), file)
}

fn balloon(memory: Memory) -> Driver {
    let mut driver = Driver::with(Box::new(Balloon::new()), memory);
    driver.start();
    driver
}

const AT: u64 = 8 << 20;

#[test]
fn reported_pages_go_back_to_the_host() {
    let (memory, file) = shared();
    let mut driver = balloon(memory);
    driver
        .memory
        .write_slice(&vec![1; 4 << 20], GuestAddress(AT))
        .unwrap();
    let before = fstat(&file).unwrap().st_blocks;
    driver.submit_raw(2, &[(AT, 1 << 20, 2), (AT + (2 << 20), 1 << 20, 2)]);
    driver.used(2);
    assert_eq!(before - fstat(&file).unwrap().st_blocks, 2 * (1 << 20) / 512);
    assert_eq!(driver.bytes(AT, 1), [0]);
    assert_eq!(driver.bytes(AT + (1 << 20), 1), [1]);
}

#[test]
fn pages_of_anonymous_memory_go_back_too_and_only_whole_ones() {
    let mut driver = balloon(crate::pci::driver::memory());
    driver
        .memory
        .write_slice(&vec![1; 0x4000], GuestAddress(AT))
        .unwrap();
    driver.submit_raw(2, &[(AT + 1, 0x3000, 2)]);
    driver.used(2);
    for (page, want) in [(0, 1), (1, 0), (2, 0), (3, 1)] {
        assert_eq!(driver.bytes(AT + page * 0x1000, 1), [want], "{page}");
    }
}

#[test]
fn inflating_gives_up_the_pages_it_names_and_nothing_else() {
    let (memory, file) = shared();
    let mut driver = balloon(memory);
    driver
        .memory
        .write_slice(&vec![1; 1 << 20], GuestAddress(AT))
        .unwrap();
    let before = fstat(&file).unwrap().st_blocks;
    let first = u32::try_from(AT / 4096).unwrap();
    let pages: Vec<u8> = [first + 2, first, first + 1, u32::MAX, 0x10_0000]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect();
    driver.submit(0, &[&pages], &[]);
    driver.used(0);
    let freed = before - fstat(&file).unwrap().st_blocks;
    // The driver's own array has taken a page meanwhile.
    assert_eq!(freed, 2 * 4096 / 512);
    driver.submit(1, &[&pages], &[]);
    assert_eq!(driver.used(1), 0);
}

#[test]
fn a_new_target_reaches_the_driver_and_what_it_gave_up_the_host() {
    let balloon = Balloon::new();
    let control = balloon.control();
    let mut driver = Driver::new(Box::new(balloon));
    driver.start();
    let generation = driver.load(driver.parts[1] + 0x15, 1);
    control.set_target(100);
    let message = driver.messages.recv_timeout(Duration::from_secs(5)).unwrap();
    assert_eq!(message.data, 0x43); // the configuration vector
    assert_eq!(driver.load(driver.parts[1] + 0x15, 1), generation + 1);
    assert_eq!(driver.load(driver.parts[4], 4), 100);
    driver.store(driver.parts[4] + 4, 4, 77);
    assert_eq!(control.actual(), 77);
    driver.store(driver.parts[4], 4, 5); // read-only
    assert_eq!(driver.load(driver.parts[4], 4), 100);
}

#[test]
fn random_chains_are_survived_by_every_small_device() {
    for seed in 1..=4 {
        let mut random = Random::new(seed);
        let mut drivers = [
            Driver::new(Box::new(Rng::new())),
            Driver::new(Box::new(Console::new(|_| {}))),
            Driver::new(Box::new(Balloon::new())),
        ];
        let queues = [1, 2, 3];
        drivers.iter_mut().for_each(Driver::start);
        for _ in 0..400 {
            let which = random.below(3) as usize;
            let queue = random.below(queues[which]) as usize;
            let parts: Vec<_> = (0..1 + random.below(5))
                .map(|_| {
                    let at = (random.any() % (2 * MEMORY)) & !random.below(4096);
                    let at = at.max(0x10_0000);
                    (at, random.any() as usize & 0xffff, random.below(8) as u16)
                })
                .collect();
            drivers[which].submit_raw(queue, &parts);
            if random.below(16) == 0 {
                drivers[which].start();
            }
        }
    }
}
