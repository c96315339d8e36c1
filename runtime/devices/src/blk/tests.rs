//! The disk behind the bus, with real files.

use std::io::Write;
use std::os::unix::fs::MetadataExt;

use super::*;
use crate::pci::driver::{Driver, Random};

const IMAGE: usize = 256 * 1024;

fn image() -> File {
    let mut image = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..IMAGE).map(|at| ((at / 512) as u8).wrapping_add(1)).collect();
    image.write_all(&bytes).unwrap();
    image
}

fn disk(read_only: bool) -> (Driver, File) {
    let image = image();
    let blk = Blk::new(BlkConfig {
        image: image.try_clone().unwrap(),
        read_only,
        serial: "rootfs".into(),
    });
    let mut driver = Driver::new(Box::new(blk.unwrap()));
    driver.start();
    (driver, image)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let header = Header {
        kind: kind.into(),
        reserved: 0.into(),
        sector: sector.into(),
    };
    header.as_bytes().to_vec()
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let range = Range {
        sector: sector.into(),
        sectors: sectors.into(),
        flags: flags.into(),
    };
    range.as_bytes().to_vec()
}

/// One request; its status and what came back.
fn ask(driver: &mut Driver, kind: u32, sector: u64, data: &[u8], room: usize) -> (u8, Vec<u8>) {
    let at = driver.submit(0, &[&header(kind, sector), data], &[room, 1]);
    driver.used(0);
    (driver.bytes(at[1], 1)[0], driver.bytes(at[0], room))
}

const OK: u8 = 0;
const IO: u8 = 1;
const UNSUPPORTED: u8 = 2;

#[test]
fn the_configuration_tells_size_and_limits() {
    let (driver, _) = disk(false);
    let device = driver.parts[4];
    assert_eq!(driver.load(device, 8), 512);
    assert_eq!(driver.load(device + 8, 4), u64::from(SEGMENT));
    assert_eq!(driver.load(device + 12, 4), 254);
    assert_eq!(driver.load(device + 20, 4), 512);
    assert_eq!(driver.load(device + 0xff0, 8), 0);
    assert_eq!(size_of::<Config>(), 60);
}

#[test]
fn sectors_are_read_written_and_flushed() {
    let (mut driver, image) = disk(false);
    let (status, data) = ask(&mut driver, VIRTIO_BLK_T_IN, 3, &[], 1024);
    assert_eq!((status, data[0], data[512]), (OK, 4, 5));
    assert_eq!(ask(&mut driver, VIRTIO_BLK_T_OUT, 510, &[0xaa; 1024], 0).0, OK);
    assert_eq!(ask(&mut driver, VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, OK);
    let mut end = [0; 1024];
    image.read_exact_at(&mut end, 510 * 512).unwrap();
    assert_eq!(end, [0xaa; 1024]);
    let (status, serial) = ask(&mut driver, VIRTIO_BLK_T_GET_ID, 0, &[], 20);
    assert_eq!((status, &serial[..7]), (OK, &b"rootfs\0"[..]));
}

#[test]
fn a_header_and_data_in_many_pieces_are_one_request() {
    let (mut driver, image) = disk(false);
    let header = header(VIRTIO_BLK_T_OUT, 1);
    let (a, b) = header.split_at(5);
    let at = driver.submit(0, &[a, b, &[7; 100], &[8; 412]], &[1]);
    assert_eq!(driver.used(0), 1);
    assert_eq!(driver.bytes(at[0], 1), [OK]);
    let mut sector = [0; 512];
    image.read_exact_at(&mut sector, 512).unwrap();
    assert_eq!((sector[99], sector[100], sector[511]), (7, 8, 8));
}

#[test]
fn what_is_not_wholly_on_the_disk_fails_and_changes_nothing() {
    let (mut driver, image) = disk(false);
    for (sector, len) in [
        (511, 1024),
        (512, 512),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (0, 100),
    ] {
        assert_eq!(ask(&mut driver, VIRTIO_BLK_T_OUT, sector, &vec![0; len], 0).0, IO);
        assert_eq!(ask(&mut driver, VIRTIO_BLK_T_IN, sector, &[], len).0, IO);
    }
    assert_eq!(image.metadata().unwrap().len(), IMAGE as u64);
    assert_eq!(ask(&mut driver, 99, 0, &[], 0).0, UNSUPPORTED);
}

#[test]
fn a_read_only_disk_takes_no_change_although_its_descriptor_would() {
    let (mut driver, image) = disk(true);
    assert_ne!(driver.offered() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(driver.offered() & 1 << VIRTIO_BLK_F_DISCARD, 0);
    assert_eq!(ask(&mut driver, VIRTIO_BLK_T_OUT, 0, &[0; 512], 0).0, IO);
    assert_eq!(
        ask(&mut driver, VIRTIO_BLK_T_DISCARD, 0, &range(0, 8, 0), 0).0,
        IO
    );
    assert_eq!(
        ask(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(0, 8, 0), 0).0,
        IO
    );
    assert_eq!(ask(&mut driver, VIRTIO_BLK_T_IN, 0, &[], 512), (OK, vec![1; 512]));
    let mut first = [0; 1];
    image.read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [1]);
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros_and_space_comes_back() {
    let (mut driver, image) = disk(false);
    assert_ne!(driver.offered() & 1 << VIRTIO_BLK_F_DISCARD, 0);
    let before = image.metadata().unwrap().blocks();
    assert_eq!(
        ask(&mut driver, VIRTIO_BLK_T_DISCARD, 0, &range(0, 256, 0), 0).0,
        OK
    );
    assert!(image.metadata().unwrap().blocks() < before);
    for flags in [0, 1] {
        let zero = range(300 + u64::from(flags), 1, flags);
        assert_eq!(ask(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, 0, &zero, 0).0, OK);
    }
    assert_eq!(
        ask(&mut driver, VIRTIO_BLK_T_IN, 300, &[], 1024),
        (OK, vec![0; 1024])
    );
    for (kind, bad, want) in [
        (VIRTIO_BLK_T_DISCARD, range(0, 1, 1), UNSUPPORTED),
        (VIRTIO_BLK_T_WRITE_ZEROES, range(0, 1, 2), UNSUPPORTED),
        (VIRTIO_BLK_T_DISCARD, range(511, 2, 0), IO),
        (VIRTIO_BLK_T_DISCARD, range(u64::MAX, u32::MAX, 0), IO),
        (VIRTIO_BLK_T_DISCARD, range(0, 1, 0).repeat(17), IO),
    ] {
        assert_eq!(ask(&mut driver, kind, 0, &bad, 0).0, want, "{bad:?}");
    }
}

#[test]
fn an_image_that_shrank_gives_errors_and_no_panic() {
    let (mut driver, image) = disk(false);
    image.set_len(512).unwrap();
    assert_eq!(ask(&mut driver, VIRTIO_BLK_T_IN, 1, &[], 512).0, IO);
    assert_eq!(ask(&mut driver, VIRTIO_BLK_T_IN, 0, &[], 512).0, OK);
}

#[test]
fn malformed_chains_make_the_device_need_a_reset_after_which_it_works() {
    let whole = header(VIRTIO_BLK_T_IN, 0);
    let chains: [&[(u64, usize, u16)]; 5] = [
        &[(0x10_0000, 16, 0)],                      // no status
        &[(0x10_0000, 8, 0), (0x10_1000, 1, 2)],    // half a header
        &[(0x10_1000, 512, 2), (0x10_0000, 16, 0)], // the wrong way round
        &[(1 << 40, 16, 0), (0x10_1000, 1, 2)],     // header outside of memory
        &[(0x10_0000, 16, 0), (1 << 40, 512, 2), (0x10_1000, 1, 2)],
    ];
    for chain in chains {
        let (mut driver, _image) = disk(false);
        driver
            .memory
            .write_slice(&whole, vm_memory::GuestAddress(0x10_0000))
            .unwrap();
        driver.submit_raw(0, chain);
        driver.await_broken();
        driver.start();
        assert_eq!(ask(&mut driver, VIRTIO_BLK_T_IN, 0, &[], 512).0, OK);
    }
}

#[test]
fn a_request_larger_than_the_limits_fails_without_being_moved() {
    let (mut driver, _image) = disk(false);
    let at = 0x10_0000;
    driver
        .memory
        .write_slice(&header(VIRTIO_BLK_T_IN, 0), vm_memory::GuestAddress(at))
        .unwrap();
    let mut chain = vec![(at, 16, 0)];
    chain.extend([(at + 0x1000, 8 << 20, 2); 4]);
    chain.push((at + 0x100, 1, 2));
    driver.submit_raw(0, &chain);
    driver.used(0);
    assert_eq!(driver.bytes(at + 0x100, 1), [IO]);
}

#[test]
fn random_chains_are_survived() {
    for seed in 1..=4 {
        let mut random = Random::new(seed);
        let (mut driver, _image) = disk(false);
        for _ in 0..400 {
            for place in 0..4u64 {
                let kind = random.below(15) as u32;
                let sector = random.any() % (1 << random.below(60));
                let at = vm_memory::GuestAddress(0x10_0000 + place * 16);
                driver.memory.write_slice(&header(kind, sector), at).unwrap();
            }
            let parts: Vec<_> = (0..1 + random.below(5))
                .map(|_| {
                    let at = 0x10_0000 + random.below(64) + random.below(40) / 39 * random.any();
                    let len = [0, 1, 16, 512, 4096, 1 << 20][random.below(6) as usize];
                    (
                        at,
                        len,
                        [0, 2, 2, 4, random.any() as u16][random.below(5) as usize],
                    )
                })
                .collect();
            driver.submit_raw(0, &parts);
            if random.below(16) == 0 {
                driver.start();
            }
        }
        driver.start();
        assert_eq!(ask(&mut driver, VIRTIO_BLK_T_IN, 0, &[], 512).0, OK);
    }
}
