//! From the bytes of a kernel to a machine that is ready to run it.
//!
//! Only the head of the file is looked at; the rest is named by ranges, so that a kernel can go from its file
//! into guest memory without a copy in between.
//!
//! Two formats are understood: an ELF `vmlinux` and a bzImage, both entered at their 64-bit entry (Linux
//! `Documentation/arch/x86/boot.rst`, "64-bit Boot Protocol"). What is written where comes back as bytes; writing
//! it into guest memory is not done here.

use std::ops::Range;

use elf::abi::{EI_NIDENT, EM_AARCH64, EM_X86_64, ET_DYN, ET_EXEC, PT_LOAD};
use elf::endian::AnyEndian;
use elf::file::{Class, FileHeader, parse_ident};
use elf::segment::{Elf64_Phdr, SegmentTable};

use crate::acpi;
use crate::layout::{ECAM, Layout, MIB};
use crate::regs::{BootRegs, GeneralRegs, Segment, SpecialRegs, Table};

/// A kernel, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootImage<'a> {
    /// What goes where. The memory between and behind them must be zero, which new memory is.
    pub segments: Vec<Load>,
    /// Address of the first instruction.
    pub entry: u64,
    /// What is known of the boot protocol.
    pub protocol: Protocol<'a>,
    /// End of the memory that the kernel uses before it reads the memory map.
    pub end: u64,
}

/// A part of the kernel's file and its address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// Guest-physical address.
    pub at: u64,
    /// Which bytes of the file go there.
    pub bytes: Range<u64>,
}

/// Where a kernel's entry conditions come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol<'a> {
    /// An ELF `vmlinux`: it has no setup header, so a minimal one is made.
    Elf,
    /// A bzImage with its setup header.
    BzImage(SetupHeader<'a>),
}

/// The part of a bzImage that a boot loader hands on, from 0x1f1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetupHeader<'a> {
    bytes: &'a [u8],
    /// Highest address that the initial RAM file system may occupy.
    initrd_max: u32,
    /// Longest command line, without its terminating zero.
    cmdline_max: u32,
}

/// A kernel that cannot be booted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BootError {
    /// Neither format.
    #[error("this is no Linux kernel: neither an ELF vmlinux nor a bzImage")]
    NotAKernel,
    /// The right format, but damaged.
    #[error("the kernel is damaged or cut short: {0}")]
    Corrupt(&'static str),
    /// A kernel for another processor.
    #[error("the kernel is for {0}, this machine is x86_64")]
    OtherArchitecture(&'static str),
    /// A kernel without a 64-bit entry.
    #[error("the kernel cannot be entered in 64-bit mode: {0}")]
    No64BitEntry(&'static str),
    /// The kernel does not fit.
    #[error(
        "the kernel needs {needs} MiB of memory, the machine has {has} MiB below 4 GiB; give it more memory"
    )]
    KernelTooLarge {
        /// What it needs.
        needs: u64,
        /// What there is.
        has: u64,
    },
    /// The initial RAM file system does not fit.
    #[error(
        "the initramfs of {needs} MiB does not fit into {has} MiB beside the kernel; give the machine more memory"
    )]
    InitramfsTooLarge {
        /// Its size.
        needs: u64,
        /// What there is.
        has: u64,
    },
    /// The command line does not fit.
    #[error("the kernel command line has {len} bytes; this kernel takes {max}")]
    CommandLine {
        /// Its length.
        len: usize,
        /// What the kernel takes.
        max: u32,
    },
}

/// What is handed to a kernel beside its image.
#[derive(Clone, Debug)]
pub struct Handover<'a> {
    /// Command line.
    pub cmdline: &'a str,
    /// Where the initial RAM file system is, as [`BootImage::place_initramfs`] gave it.
    pub initramfs: Range<u64>,
    /// Number of processors.
    pub vcpus: u32,
}

/// How much of a kernel's file tells what it is.
pub const HEAD: usize = 64 * 1024;

const GDT: u64 = 0x500;
const ZERO_PAGE: u64 = 0x7000;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xA000;
/// Four page directories, one for each GiB.
const DIRECTORIES: u64 = 0xB000;
const CMDLINE: u64 = 0x2_0000;
/// Where ordinary memory below 1 MiB ends: what follows is the extended BIOS data area of a PC, and ROM.
const CONVENTIONAL_END: u64 = 0x9_FC00;
/// Longest command line that there is room for.
const CMDLINE_ROOM: u32 = 0x1_0000;
/// The longest that Linux takes on x86_64 (`COMMAND_LINE_SIZE`), without its zero.
const CMDLINE_MAX: u32 = 2047;
/// Default of `initrd_addr_max` for kernels without a header: as high as Linux says in its own.
const INITRD_MAX: u32 = 0x7FFF_FFFF;
const PAGE: u64 = 4096;
/// Size of a large page.
const LARGE_PAGE: u64 = 2 * MIB;

impl<'a> BootImage<'a> {
    /// Recognises and checks a kernel of `len` bytes by its first [`HEAD`], and decides where it goes.
    ///
    /// # Errors
    /// Fails if it is no kernel, damaged, for another architecture, or too large for the memory.
    pub fn parse(image: &'a [u8], len: u64, layout: &Layout) -> Result<Self, BootError> {
        if image.starts_with(b"\x7fELF") {
            return parse_elf(image, len, layout);
        }
        // Magic of the arm64 `Image`, at 56 (Documentation/arch/arm64/booting.rst).
        if image.get(56..60) == Some(b"ARM\x64".as_slice()) {
            return Err(BootError::OtherArchitecture("aarch64"));
        }
        // `HdrS`, at 0x202 (boot.rst, "The Real-Mode Kernel Header").
        if image.get(0x202..0x206) == Some(b"HdrS".as_slice()) {
            return parse_bzimage(image, len, layout);
        }
        Err(BootError::NotAKernel)
    }

    /// Finds room for `len` bytes of initial RAM file system, as high as the kernel can reach.
    ///
    /// # Errors
    /// Fails if it does not fit beside the kernel.
    pub fn place_initramfs(&self, layout: &Layout, len: u64) -> Result<Range<u64>, BootError> {
        let highest = match self.protocol {
            Protocol::Elf => INITRD_MAX,
            Protocol::BzImage(header) => header.initrd_max,
        };
        let top = layout.low_end().min(u64::from(highest) + 1);
        let floor = self.end.next_multiple_of(PAGE);
        let start = top.checked_sub(len).map(|start| start - start % PAGE);
        match start.filter(|start| *start >= floor) {
            Some(start) => Ok(start..start + len),
            None => Err(BootError::InitramfsTooLarge {
                needs: len.div_ceil(MIB),
                has: top.saturating_sub(floor) / MIB,
            }),
        }
    }

    /// Everything that goes into memory beside the image and the initial RAM file system: tables and parameters.
    ///
    /// # Errors
    /// Fails if the command line is too long for the kernel.
    pub fn handover(
        &self,
        layout: &Layout,
        handover: &Handover<'_>,
    ) -> Result<Vec<(u64, Vec<u8>)>, BootError> {
        let max = match self.protocol {
            Protocol::Elf => CMDLINE_MAX,
            Protocol::BzImage(header) => header.cmdline_max.min(CMDLINE_ROOM - 1),
        };
        let len = handover.cmdline.len();
        let fits = u32::try_from(len).is_ok_and(|len| len <= max);
        if !fits || handover.cmdline.contains('\0') {
            return Err(BootError::CommandLine { len, max });
        }
        let mut cmdline = handover.cmdline.as_bytes().to_vec();
        cmdline.push(0);
        Ok(vec![
            (GDT, gdt()),
            (ZERO_PAGE, self.zero_page(layout, handover)),
            (PML4, page_tables()),
            (CMDLINE, cmdline),
            (acpi::TABLES, acpi::tables(layout, handover.vcpus)),
        ])
    }

    /// The state in which the first processor enters the kernel.
    pub fn boot_regs(&self) -> BootRegs {
        let data = segment(0x18, DATA);
        BootRegs {
            general: GeneralRegs {
                rip: self.entry,
                rsi: ZERO_PAGE,
                rflags: 1 << 1, // always one
                ..Default::default()
            },
            special: SpecialRegs {
                cs: segment(0x10, CODE),
                ds: data,
                es: data,
                fs: data,
                gs: data,
                ss: data,
                tr: segment(0x20, TASK),
                ldt: Segment {
                    access: UNUSABLE,
                    ..Default::default()
                },
                gdt: Table {
                    base: GDT,
                    limit: GDT_LIMIT,
                },
                cr0: CR0_PE | CR0_ET | CR0_PG,
                cr3: PML4,
                cr4: CR4_PAE,
                efer: EFER_LME | EFER_LMA,
                ..Default::default()
            },
        }
    }

    /// `struct boot_params` (Documentation/arch/x86/zero-page.rst).
    fn zero_page(&self, layout: &Layout, handover: &Handover<'_>) -> Vec<u8> {
        let mut page = ZeroPage(vec![0; usize::try_from(PAGE).unwrap_or_default()]);
        match self.protocol {
            Protocol::BzImage(header) => page.put(SETUP_HEADER, header.bytes),
            Protocol::Elf => {
                page.put(0x1FE, &0xAA55u16.to_le_bytes()); // boot_flag
                page.put(0x202, b"HdrS");
                page.put(0x206, &0x020Fu16.to_le_bytes()); // version
                page.put(0x230, &0x0100_0000u32.to_le_bytes()); // kernel_alignment
                page.put(0x238, &CMDLINE_MAX.to_le_bytes()); // cmdline_size
            }
        }
        page.put(0x70, &acpi::TABLES.to_le_bytes()); // acpi_rsdp_addr
        page.put(0x210, &[0xFF]); // type_of_loader: none that is registered
        page.put(0x211, &[1]); // loadflags: LOADED_HIGH
        let initramfs = &handover.initramfs;
        let len = initramfs.end.saturating_sub(initramfs.start);
        // Both are below 4 GiB: `place_initramfs` sees to it.
        page.put(0x218, &low32(initramfs.start).to_le_bytes()); // ramdisk_image
        page.put(0x21C, &low32(len).to_le_bytes()); // ramdisk_size
        page.put(0x228, &low32(CMDLINE).to_le_bytes()); // cmd_line_ptr
        let map = memory_map(layout);
        page.put(0x1E8, &[u8::try_from(map.len()).unwrap_or_default()]); // e820_entries
        for (index, (range, kind)) in map.iter().enumerate() {
            let entry = 0x2D0 + index * 20; // e820_table
            page.put(entry, &range.start.to_le_bytes());
            page.put(entry + 8, &(range.end - range.start).to_le_bytes());
            page.put(entry + 16, &kind.to_le_bytes());
        }
        page.0
    }
}

/// Offset of the setup header, in the file and in the zero page.
const SETUP_HEADER: usize = 0x1F1;

/// A page that ignores what is written beyond its end.
struct ZeroPage(Vec<u8>);

impl ZeroPage {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.0.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }
}

/// Memory for the guest to use (`E820_TYPE_RAM`).
const RAM: u32 = 1;
/// Memory to keep off (`E820_TYPE_RESERVED`).
const RESERVED: u32 = 2;

fn memory_map(layout: &Layout) -> Vec<(Range<u64>, u32)> {
    let mut map = vec![
        (0..CONVENTIONAL_END, RAM),
        (CONVENTIONAL_END..MIB, RESERVED),
        (MIB..layout.low_end(), RAM),
        (ECAM, RESERVED),
    ];
    map.extend(layout.ram.iter().skip(1).map(|high| (high.clone(), RAM)));
    map
}

fn parse_elf<'a>(image: &'a [u8], len: u64, layout: &Layout) -> Result<BootImage<'a>, BootError> {
    let corrupt = |_| BootError::Corrupt("its ELF header");
    // The crate trusts the identification to be whole.
    let Some((ident, tail)) = image.split_at_checked(EI_NIDENT) else {
        return Err(BootError::Corrupt("its ELF header"));
    };
    let ident = parse_ident::<AnyEndian>(ident).map_err(corrupt)?;
    let file = FileHeader::parse_tail(ident, tail).map_err(corrupt)?;
    match file.e_machine {
        EM_X86_64 => {}
        EM_AARCH64 => return Err(BootError::OtherArchitecture("aarch64")),
        _ => return Err(BootError::OtherArchitecture("another architecture")),
    }
    if file.class != Class::ELF64 || !matches!(file.e_type, ET_EXEC | ET_DYN) {
        return Err(BootError::NotAKernel);
    }
    if usize::from(file.e_phentsize) != size_of::<Elf64_Phdr>() {
        return Err(BootError::Corrupt("its ELF header"));
    }
    let headers = usize::try_from(file.e_phoff)
        .ok()
        .and_then(|start| {
            Some(start..start.checked_add(usize::from(file.e_phnum) * size_of::<Elf64_Phdr>())?)
        })
        .and_then(|headers| image.get(headers))
        .ok_or(BootError::Corrupt("its program headers lie beyond its head"))?;
    let mut segments = Vec::new();
    let mut end = 0;
    for header in SegmentTable::new(file.endianness, file.class, headers) {
        if header.p_type != PT_LOAD || header.p_memsz == 0 {
            continue;
        }
        let bytes_end = header
            .p_offset
            .checked_add(header.p_filesz)
            .filter(|end| *end <= len);
        let Some(bytes_end) = bytes_end else {
            return Err(BootError::Corrupt("a segment lies beyond the end of the file"));
        };
        if header.p_memsz < header.p_filesz {
            return Err(BootError::Corrupt(
                "a segment is larger in the file than in memory",
            ));
        }
        let top = header
            .p_paddr
            .checked_add(header.p_memsz)
            .ok_or(BootError::Corrupt("a segment wraps around"))?;
        if header.p_paddr < MIB {
            return Err(BootError::Corrupt("a segment lies in the first MiB"));
        }
        end = end.max(top);
        segments.push(Load {
            at: header.p_paddr,
            bytes: header.p_offset..bytes_end,
        });
    }
    if segments.is_empty() {
        return Err(BootError::Corrupt("it has nothing to load"));
    }
    let entry = file.e_entry;
    if !(MIB..end).contains(&entry) {
        return Err(BootError::Corrupt("its entry lies outside its segments"));
    }
    fits(end, layout)?;
    Ok(BootImage {
        segments,
        entry,
        protocol: Protocol::Elf,
        end,
    })
}

fn fits(end: u64, layout: &Layout) -> Result<(), BootError> {
    if end <= layout.low_end() {
        return Ok(());
    }
    Err(BootError::KernelTooLarge {
        needs: end.div_ceil(MIB),
        has: layout.low_end() / MIB,
    })
}

fn parse_bzimage<'a>(image: &'a [u8], len: u64, layout: &Layout) -> Result<BootImage<'a>, BootError> {
    // Field offsets: boot.rst, "Details of Header Fields".
    let field = Fields(image);
    if field.u16(0x206)? < 0x020C {
        return Err(BootError::No64BitEntry("its boot protocol is older than 2.12"));
    }
    // xloadflags, XLF_KERNEL_64.
    if field.u16(0x236)? & 1 == 0 {
        return Err(BootError::No64BitEntry("it is a 32-bit kernel"));
    }
    let setup_sectors = match field.u8(0x1F1)? {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let start = (setup_sectors + 1) * 512;
    // syssize, in units of 16 bytes; the last unit may be incomplete.
    let size = u64::from(field.u32(0x1F4)?) * 16;
    if size == 0 || len.saturating_sub(start).next_multiple_of(16) < size {
        return Err(BootError::Corrupt("it is shorter than its header says"));
    }
    let header_end = 0x202 + usize::from(field.u8(0x201)?);
    let header = image
        .get(SETUP_HEADER..header_end)
        .filter(|header| header.len() >= 0x264 - SETUP_HEADER)
        .ok_or(BootError::Corrupt("its setup header is too short"))?;
    let init_size = u64::from(field.u32(0x260)?).max(size);
    let at = load_address(&field, init_size, layout)?;
    Ok(BootImage {
        segments: vec![Load {
            at,
            bytes: start..len.min(start + size),
        }],
        entry: at + 0x200,
        protocol: Protocol::BzImage(SetupHeader {
            bytes: header,
            initrd_max: field.u32(0x22C)?,
            cmdline_max: field.u32(0x238)?,
        }),
        end: at + init_size,
    })
}

/// Where a bzImage goes: where it likes to be, or, if memory is short and it may be moved, as low as possible.
fn load_address(field: &Fields<'_>, init_size: u64, layout: &Layout) -> Result<u64, BootError> {
    let preferred = field.u64(0x258)?;
    let alignment = u64::from(field.u32(0x230)?);
    if preferred < MIB || !alignment.is_power_of_two() {
        return Err(BootError::Corrupt("its load address or alignment"));
    }
    let end = preferred
        .checked_add(init_size)
        .ok_or(BootError::Corrupt("its load address"))?;
    if end <= layout.low_end() {
        return Ok(preferred);
    }
    let relocatable = field.u8(0x234)? != 0;
    let lowest = MIB.next_multiple_of(alignment);
    if relocatable && lowest < preferred {
        fits(lowest + init_size, layout)?;
        return Ok(lowest);
    }
    fits(end, layout)?;
    Ok(preferred)
}

/// Little-endian fields of a file that may end anywhere.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N], BootError> {
        let bytes = self.0.get(at..at + N).and_then(|bytes| bytes.try_into().ok());
        bytes.ok_or(BootError::Corrupt("it ends within its setup header"))
    }
    fn u8(&self, at: usize) -> Result<u8, BootError> {
        self.bytes(at).map(u8::from_le_bytes)
    }
    fn u16(&self, at: usize) -> Result<u16, BootError> {
        self.bytes(at).map(u16::from_le_bytes)
    }
    fn u32(&self, at: usize) -> Result<u32, BootError> {
        self.bytes(at).map(u32::from_le_bytes)
    }
    fn u64(&self, at: usize) -> Result<u64, BootError> {
        self.bytes(at).map(u64::from_le_bytes)
    }
}

fn low32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

// Control bits: Intel SDM volume 3, "Control Registers" and "Extended Feature Enable Register".
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

// Access rights as `Segment::access` has them: type, S, DPL, P; then AVL, L, D, G from bit 12.
/// 64-bit code, execute and read, accessed.
const CODE: u32 = 0xA09B;
/// Data, read and write, accessed.
const DATA: u32 = 0xC093;
/// 64-bit task state, busy: a processor in long mode cannot be without one.
const TASK: u32 = 0x008B;
const UNUSABLE: u32 = 1 << 16;
/// Last byte of five entries.
const GDT_LIMIT: u16 = 5 * 8 - 1;

fn segment(selector: u16, access: u32) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: if access == TASK { 0xFFFF } else { u32::MAX },
        access,
    }
}

/// The descriptors that the protocol asks for: code at 0x10, data at 0x18; the task state at 0x20.
fn gdt() -> Vec<u8> {
    let descriptor = |access: u32, limit: u64| {
        let access = u64::from(access);
        limit & 0xFFFF | (limit >> 16 & 0xF) << 48 | (access & 0xFF) << 40 | (access >> 12 & 0xF) << 52
    };
    [
        0,
        0,
        descriptor(CODE, 0xF_FFFF),
        descriptor(DATA, 0xF_FFFF),
        descriptor(TASK, 0xFFFF),
    ]
    .into_iter()
    .flat_map(u64::to_le_bytes)
    .collect()
}

/// The first 4 GiB, mapped one to one with large pages.
fn page_tables() -> Vec<u8> {
    /// Present, writable.
    const TABLE: u64 = 0b11;
    /// Present, writable, page size.
    const LARGE: u64 = 0b1000_0011;
    let top = [PDPT | TABLE].into_iter();
    let middle = (0..4).map(|gib| (DIRECTORIES + gib * PAGE) | TABLE);
    let bottom = (0..4 * 512).map(|page| (page * LARGE_PAGE) | LARGE);
    let zero = std::iter::repeat(0);
    let entries = top.chain(zero.clone()).take(512);
    let entries = entries.chain(middle.chain(zero).take(512)).chain(bottom);
    entries.flat_map(u64::to_le_bytes).collect()
}

#[cfg(test)]
mod tests;
