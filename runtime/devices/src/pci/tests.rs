//! The bus and the transport, against a driver that keeps the rules and against one that does not.

use super::driver::{Driver, EVENT_IDX, MEMORY, Random, VERSION_1, WINDOW, WINDOW_HIGH};
use super::*;
use crate::balloon::Balloon;
use crate::console::Console;
use crate::rng::Rng;

fn rng() -> Driver {
    Driver::new(Box::new(Rng::new()))
}

#[test]
fn the_bus_has_a_host_bridge_and_what_is_absent_reads_as_all_ones() {
    let driver = rng();
    let read = |offset| {
        let mut bytes = [0; 4];
        driver.root.config_load(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    assert_eq!(read(0x08) >> 16, 0x0600);
    assert_eq!(read(0x8000), 0x1044_1af4);
    assert_eq!(read(0x8008) & 0xff, 1);
    for absent in [0x1_0000, 0x9000, 1 << 20, 1 << 40, u64::MAX - 3] {
        assert_eq!(read(absent), u32::MAX, "{absent:#x}");
    }
}

#[test]
fn a_driver_that_does_what_linux_does_gets_its_buffer_filled_and_one_interrupt() {
    let mut driver = rng();
    assert_eq!(driver.offered() & (VERSION_1 | EVENT_IDX), VERSION_1 | EVENT_IDX);
    driver.start();
    assert_eq!(driver.status(), 15);
    let at = driver.submit(0, &[], &[64])[0];
    assert_eq!(driver.used(0), 64);
    assert_ne!(driver.bytes(at, 64), [0; 64]);
}

#[test]
fn sizing_a_bar_gives_its_size_and_leaves_it_where_it_was() {
    let driver = rng();
    assert_eq!(driver.bar, WINDOW);
    driver.set_config(0x10, 4, 0xffff_ffff);
    driver.set_config(0x14, 4, 0xffff_ffff);
    let size = driver.config(0x10, 4) & !0xf | driver.config(0x14, 4) << 32;
    assert_eq!((!size).wrapping_add(1), 0x8000);
    assert!(!driver.root.load(GuestAddress(WINDOW), &mut [0; 4]));
    driver.set_config(0x10, 4, WINDOW);
    driver.set_config(0x14, 4, 0);
    assert!(driver.root.load(GuestAddress(WINDOW), &mut [0; 4]));
}

#[test]
fn a_bar_and_its_doorbells_go_where_the_guest_moves_them() {
    let mut driver = rng();
    assert!(driver.bells.0.lock().unwrap().is_empty());
    driver.start();
    assert_eq!(*driver.bells.0.lock().unwrap(), [WINDOW + driver.parts[2]]);
    driver.set_config(0x04, 2, 0);
    assert!(driver.bells.0.lock().unwrap().is_empty());
    let moved = WINDOW_HIGH + 0x1_0000;
    driver.set_config(0x10, 4, moved & 0xffff_ffff);
    driver.set_config(0x14, 4, moved >> 32);
    driver.set_config(0x04, 2, 6);
    assert!(!driver.root.load(GuestAddress(WINDOW), &mut [0; 4]));
    driver.bar = moved;
    assert_eq!(*driver.bells.0.lock().unwrap(), [moved + driver.parts[2]]);
    driver.submit(0, &[], &[16]);
    assert_eq!(driver.used(0), 16);
    driver.set_config(0x14, 4, 0xffff_0000); // outside of both windows: nobody there
    assert!(!driver.root.load(GuestAddress(moved), &mut [0; 4]));
}

#[test]
fn features_that_were_not_offered_or_a_missing_version_1_are_refused() {
    let driver = rng();
    for (features, good) in [
        (VERSION_1, true),
        (VERSION_1 | EVENT_IDX, true),
        (EVENT_IDX, false),
        (VERSION_1 | 1 << 63, false),
        (0, false),
    ] {
        driver.set_status(0);
        driver.set_status(3);
        driver.accept(features);
        driver.set_status(11);
        assert_eq!(driver.status() & 8 != 0, good, "{features:#x}");
    }
}

#[test]
fn a_queue_that_is_misaligned_or_outside_of_memory_makes_the_device_need_a_reset() {
    for (field, value) in [
        (0x20, 8),
        (0x28, 1),
        (0x30, 2),
        (0x20, MEMORY),
        (0x30, MEMORY - 16),
        (0x20, !15),
    ] {
        let driver = rng();
        let common = driver.parts[1];
        driver.set_status(3);
        driver.accept(VERSION_1);
        driver.set_status(11);
        for (field, value) in [(0x20, 0x1000), (0x28, 0x2000), (0x30, 0x3000), (field, value)] {
            driver.store(common + field, 8, value);
        }
        driver.store(common + 0x1c, 2, 1);
        driver.set_status(15);
        assert_eq!(driver.status() & 0x40, 0x40, "{field:#x} {value:#x}");
        driver.set_status(0);
        assert_eq!(driver.status(), 0);
    }
}

#[test]
fn a_queue_is_frozen_once_it_is_enabled() {
    let mut driver = rng();
    driver.start();
    let common = driver.parts[1];
    let before = driver.load(common + 0x20, 8);
    driver.store(common + 0x20, 8, 0x7000);
    driver.store(common + 0x18, 2, 4);
    driver.store(common + 0x1c, 2, 0);
    assert_eq!(driver.load(common + 0x20, 8), before);
    assert_eq!(driver.load(common + 0x18, 2), u64::from(driver::SIZE));
    assert_eq!(driver.load(common + 0x1c, 2), 1);
}

#[test]
fn a_masked_vector_is_pending_until_it_is_unmasked() {
    for function_mask in [false, true] {
        let mut driver = rng();
        driver.start();
        let control = driver.table() + 12;
        let mask = |driver: &Driver, on: u64| {
            if function_mask {
                driver.set_config(driver.msix + 2, 2, 0x8000 | on << 14);
            } else {
                driver.store(control, 4, on);
            }
        };
        mask(&driver, 1);
        driver.submit(0, &[], &[16]);
        let pending = driver.config(driver.msix + 8, 4);
        driver.await_used(0);
        driver.root.pause(); // ends the worker: what it had to say has been said
        assert_eq!(driver.load(pending, 8), 1);
        assert!(driver.messages.try_recv().is_err());
        mask(&driver, 0);
        let message = driver.messages.try_recv().unwrap();
        assert_eq!((message.address.0, message.data), (0xfee0_0000, 0x40));
        assert_eq!(message.device, Some(8));
        assert_eq!(driver.load(pending, 8), 0);
    }
}

#[test]
fn without_msi_x_the_isr_says_what_happened_once() {
    let mut driver = rng();
    driver.start();
    driver.set_config(driver.msix + 2, 2, 0);
    driver.submit(0, &[], &[16]);
    driver.await_used(0);
    driver.root.pause();
    assert_eq!(driver.load(driver.parts[3], 1), 1);
    assert_eq!(driver.load(driver.parts[3], 1), 0);
}

#[test]
fn registers_can_be_reached_through_configuration_space_alone() {
    let driver = rng();
    let access = (0x40..0x100)
        .step_by(4)
        .find(|at| driver.config(*at, 1) == 9 && driver.config(at + 3, 1) == 5)
        .unwrap();
    driver.set_config(access + 8, 4, driver.parts[1] + 0x14);
    driver.set_config(access + 12, 4, 1);
    driver.set_config(access + 16, 1, 3);
    assert_eq!(driver.status(), 3);
    assert_eq!(driver.config(access + 16, 1), 3);
}

#[test]
fn a_paused_device_goes_on_where_it_stood() {
    let mut driver = rng();
    driver.start();
    for round in 0..40 {
        driver.root.pause();
        driver.submit(0, &[], &[16]);
        driver.root.resume().unwrap();
        assert_eq!(driver.used(0), 16, "{round}");
    }
}

#[test]
fn saved_state_goes_on_in_a_new_root_and_a_running_device_has_none() {
    let mut old = rng();
    old.start();
    old.submit(0, &[], &[16]);
    old.used(0);
    assert!(matches!(old.root.save(), Err(PciError::Running(_))));
    old.root.pause();
    let text = serde_json::to_string(&old.root.save().unwrap()).unwrap();
    let new = Driver::with(Box::new(Rng::new()), old.memory.clone());
    new.root.restore(&serde_json::from_str(&text).unwrap()).unwrap();
    new.root.resume().unwrap();
    (old.root, old.messages) = (new.root, new.messages);
    old.submit(0, &[], &[32]);
    assert_eq!(old.used(0), 32);
    let other = Driver::new(Box::new(Console::new(|_| {})));
    let state = serde_json::from_str(&text).unwrap();
    assert!(matches!(other.root.restore(&state), Err(PciError::State { .. })));
}

#[test]
fn a_device_that_is_pulled_is_gone_and_its_slot_and_bar_are_free_again() {
    let mut driver = rng();
    driver.start();
    driver.root.remove(driver.slot).unwrap();
    assert!(driver.bells.0.lock().unwrap().is_empty());
    assert_eq!(driver.config(0, 4), 0xffff_ffff);
    assert!(!driver.root.load(GuestAddress(WINDOW), &mut [0; 4]));
    assert!(matches!(
        driver.root.remove(driver.slot),
        Err(PciError::Absent(_))
    ));
    for _ in 0..31 {
        driver.root.add(Box::new(Rng::new())).unwrap();
    }
    assert!(matches!(
        driver.root.add(Box::new(Rng::new())),
        Err(PciError::Slots)
    ));
}

#[test]
fn random_accesses_to_configuration_space_and_bar_are_survived() {
    for seed in 1..=8 {
        let mut random = Random::new(seed);
        let driver = Driver::new(Box::new(Balloon::new()));
        driver.root.add(Box::new(Console::new(|_| {}))).unwrap();
        let lens = [1, 2, 4, 8, 3, 0, 16, 64];
        for _ in 0..4000 {
            let len = lens[random.below(8) as usize];
            let bytes: Vec<u8> = (0..len).map(|_| random.any() as u8).collect();
            let offset = random.below(0x2_0000);
            match random.below(6) {
                0 => driver.root.config_store(0x8000 | random.below(0x100), &bytes),
                1 => driver.root.config_store(offset, &bytes),
                2 => driver.root.config_load(offset, &mut vec![0; len]),
                3 => drop(driver.root.load(GuestAddress(WINDOW + offset), &mut vec![0; len])),
                4 => drop(driver.root.store(GuestAddress(WINDOW + offset), &bytes)),
                _ => {
                    // Common configuration, in the right width and with likely values.
                    let (field, len, value) = [
                        (0x14, 1, random.below(16)),
                        (0x14, 1, 0),
                        (0x08, 4, random.below(3)),
                        (0x0c, 4, if random.below(2) == 0 { 1 } else { random.any() }),
                        (0x16, 2, random.below(4)),
                        (0x18, 2, 1 << random.below(8)),
                        (0x1a, 2, random.below(6)),
                        (0x1c, 2, 1),
                        (0x20, 8, random.below(MEMORY) & !15),
                        (0x28, 8, random.below(MEMORY) & !1),
                        (0x30, 8, random.below(MEMORY + 64) & !3),
                    ][random.below(11) as usize];
                    let at = GuestAddress(WINDOW + field);
                    driver.root.store(at, &value.to_le_bytes()[..len]);
                }
            }
            if random.below(64) == 0 {
                driver.set_config(0x10, 8, WINDOW);
                driver.set_config(0x04, 2, 6);
            }
        }
    }
}
