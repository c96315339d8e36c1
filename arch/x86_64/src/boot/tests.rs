//! Kernels made by hand, good and bad.

use super::*;

fn layout(mib: u64) -> Layout {
    Layout::new(mib * MIB).unwrap()
}

fn parse<'a>(file: &'a [u8], layout: &Layout) -> Result<BootImage<'a>, BootError> {
    BootImage::parse(&file[..file.len().min(HEAD)], file.len() as u64, layout)
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A bzImage whose kernel of 4 KiB wants `init_size` bytes at 16 MiB.
fn bzimage(init_size: u32) -> Vec<u8> {
    let mut image = vec![0; 0x400 + 4096];
    image[0x1F1] = 1; // setup_sects
    put(&mut image, 0x1F4, &(4096u32 / 16).to_le_bytes());
    image[0x201] = 0x66; // length of the header
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020Fu16.to_le_bytes());
    put(&mut image, 0x22C, &0x7FFF_FFFFu32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes());
    image[0x234] = 1; // relocatable
    put(&mut image, 0x236, &1u16.to_le_bytes());
    put(&mut image, 0x238, &2047u32.to_le_bytes());
    put(&mut image, 0x258, &0x100_0000u64.to_le_bytes());
    put(&mut image, 0x260, &init_size.to_le_bytes());
    image
}

/// An ELF file with one segment of 16 bytes, 4 KiB in memory, at 16 MiB.
fn vmlinux() -> Vec<u8> {
    let mut image = vec![0; 64 + 56 + 16];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &2u16.to_le_bytes()); // ET_EXEC
    put(&mut image, 18, &62u16.to_le_bytes()); // EM_X86_64
    put(&mut image, 20, &1u32.to_le_bytes());
    put(&mut image, 24, &0x100_0000u64.to_le_bytes()); // entry
    put(&mut image, 32, &64u64.to_le_bytes()); // phoff
    put(&mut image, 52, &64u16.to_le_bytes());
    put(&mut image, 54, &56u16.to_le_bytes());
    put(&mut image, 56, &1u16.to_le_bytes());
    put(&mut image, 64, &1u32.to_le_bytes()); // PT_LOAD
    put(&mut image, 72, &120u64.to_le_bytes()); // offset
    put(&mut image, 88, &0x100_0000u64.to_le_bytes()); // paddr
    put(&mut image, 96, &16u64.to_le_bytes()); // filesz
    put(&mut image, 104, &4096u64.to_le_bytes()); // memsz
    put(&mut image, 112, &4096u64.to_le_bytes());
    image
}

#[test]
fn a_vmlinux_is_loaded_at_its_physical_addresses() {
    let file = vmlinux();
    let image = parse(&file, &layout(64)).unwrap();
    assert_eq!((image.entry, image.end), (16 * MIB, 16 * MIB + 4096));
    assert_eq!(
        (image.segments[0].at, image.segments[0].bytes.clone()),
        (16 * MIB, 120..136)
    );
    assert_eq!(image.protocol, Protocol::Elf);
}

#[test]
fn a_bzimage_is_entered_at_its_64_bit_entry() {
    let file = bzimage(0x10_0000);
    let image = parse(&file, &layout(64)).unwrap();
    assert_eq!((image.entry, image.end), (16 * MIB + 0x200, 17 * MIB));
    assert_eq!(image.segments[0].bytes, 0x400..0x400 + 4096);
}

#[test]
fn a_bzimage_moves_down_where_memory_is_short() {
    let file = bzimage(60 << 20);
    let image = parse(&file, &layout(64)).unwrap();
    assert_eq!((image.segments[0].at, image.end), (2 * MIB, 62 * MIB));
    let refused = parse(&file, &layout(61)).unwrap_err();
    assert_eq!(refused, BootError::KernelTooLarge { needs: 62, has: 61 });
}

#[test]
fn what_is_no_kernel_is_named() {
    let mut aarch64_elf = vmlinux();
    put(&mut aarch64_elf, 18, &183u16.to_le_bytes());
    let mut aarch64 = vec![0; 4096];
    put(&mut aarch64, 56, b"ARM\x64");
    let mut old = bzimage(4096);
    put(&mut old, 0x206, &0x0201u16.to_le_bytes());
    let mut narrow = bzimage(4096);
    narrow[0x236] = 0;
    for (image, want) in [
        (vec![], BootError::NotAKernel),
        (b"#!/bin/sh".to_vec(), BootError::NotAKernel),
        (vec![0; 1 << 16], BootError::NotAKernel),
        (aarch64_elf, BootError::OtherArchitecture("aarch64")),
        (aarch64, BootError::OtherArchitecture("aarch64")),
        (
            old,
            BootError::No64BitEntry("its boot protocol is older than 2.12"),
        ),
        (narrow, BootError::No64BitEntry("it is a 32-bit kernel")),
    ] {
        assert_eq!(parse(&image, &layout(64)).unwrap_err(), want);
    }
}

#[test]
fn a_kernel_cut_anywhere_is_refused_and_nothing_panics() {
    for whole in [bzimage(4096), vmlinux()] {
        assert!(parse(&whole, &layout(64)).is_ok());
        // The last 16 bytes of a bzImage may be incomplete.
        for len in 0..=whole.len() - 16 {
            parse(&whole[..len], &layout(64)).unwrap_err();
        }
    }
}

#[test]
fn any_single_damaged_byte_of_a_header_is_survived() {
    for whole in [bzimage(4096), vmlinux()] {
        for at in 0..whole.len().min(0x300) {
            for value in [0, 1, 0x7F, 0x80, 0xFF] {
                let mut damaged = whole.clone();
                damaged[at] = value;
                if let Ok(image) = parse(&damaged, &layout(64)) {
                    assert!(image.end <= 64 * MIB);
                    let inside = |load: &Load| {
                        load.at >= MIB && load.at + load.bytes.end - load.bytes.start <= image.end
                    };
                    assert!(image.segments.iter().all(inside), "byte {at:#x} = {value:#x}");
                    let _ = image.place_initramfs(&layout(64), u64::MAX);
                }
            }
        }
    }
}

#[test]
fn the_initramfs_lies_as_high_as_the_kernel_reaches() {
    let file = bzimage(0x10_0000);
    let layout = layout(4096);
    let image = parse(&file, &layout).unwrap();
    let at = image.place_initramfs(&layout, 5000).unwrap();
    assert_eq!(at, 0x8000_0000 - 8192..0x8000_0000 - 8192 + 5000);
    let refused = image.place_initramfs(&layout, 0x8000_0000).unwrap_err();
    assert_eq!(
        refused,
        BootError::InitramfsTooLarge {
            needs: 2048,
            has: 2031
        }
    );
}

#[test]
fn the_zero_page_tells_memory_command_line_and_initramfs() {
    let file = bzimage(0x10_0000);
    let layout = layout(4096);
    let image = parse(&file, &layout).unwrap();
    let handover = Handover {
        cmdline: "quiet",
        initramfs: 0x500_0000..0x500_1234,
        vcpus: 2,
    };
    let written = image.handover(&layout, &handover).unwrap();
    let find = |at| &written.iter().find(|(address, _)| *address == at).unwrap().1;
    assert_eq!(find(CMDLINE), b"quiet\0");
    let page = find(ZERO_PAGE);
    let u32_at = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
    assert_eq!((u32_at(0x218), u32_at(0x21C)), (0x500_0000, 0x1234));
    assert_eq!(u64::from(u32_at(0x228)), CMDLINE);
    assert_eq!(u64_at(0x70), acpi::TABLES);
    assert_eq!(page[0x1E8], 5);
    let map: Vec<_> = (0..5)
        .map(|n| 0x2D0 + n * 20)
        .map(|at| (u64_at(at), u64_at(at + 8), u32_at(at + 16)))
        .collect();
    assert_eq!(map[2], (MIB, 3071 * MIB, RAM));
    assert_eq!(map[4], (4096 * MIB, 1024 * MIB, RAM));
}

#[test]
fn a_command_line_that_does_not_fit_is_refused() {
    let file = vmlinux();
    let layout = layout(64);
    let image = parse(&file, &layout).unwrap();
    for (cmdline, fine) in [
        ("x".repeat(2047), true),
        ("x".repeat(2048), false),
        ("a\0b".into(), false),
    ] {
        let handover = Handover {
            cmdline: &cmdline,
            initramfs: 0..0,
            vcpus: 1,
        };
        assert_eq!(image.handover(&layout, &handover).is_ok(), fine);
    }
}

#[test]
fn what_is_handed_over_does_not_overlap() {
    let file = vmlinux();
    let layout = layout(64);
    let image = parse(&file, &layout).unwrap();
    let cmdline = "x".repeat(2047);
    let handover = Handover {
        cmdline: &cmdline,
        initramfs: 0..0,
        vcpus: 254,
    };
    let mut written = image.handover(&layout, &handover).unwrap();
    written.sort_by_key(|(at, _)| *at);
    for (one, next) in written.iter().zip(&written[1..]) {
        assert!(
            one.0 + one.1.len() as u64 <= next.0,
            "{:#x} runs into {:#x}",
            one.0,
            next.0
        );
    }
    assert!(written.iter().all(|(at, bytes)| at + bytes.len() as u64 <= MIB));
}

#[test]
fn tables_map_what_they_say() {
    let tables = page_tables();
    let entry = |table: usize, index: usize| {
        let at = table * 4096 + index * 8;
        u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
    };
    assert_eq!(tables.len(), 6 * 4096);
    assert_eq!((entry(0, 0), entry(0, 1)), (PDPT | 3, 0));
    assert_eq!((entry(1, 3), entry(1, 4)), ((DIRECTORIES + 3 * 4096) | 3, 0));
    assert_eq!(entry(5, 511), 0xFFE0_0083);
    assert_eq!(gdt()[16..24], 0x00AF_9B00_0000_FFFFu64.to_le_bytes());
    assert_eq!(gdt()[24..32], 0x00CF_9300_0000_FFFFu64.to_le_bytes());
}
