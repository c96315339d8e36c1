//! Ports, loads and stores.

use caisson_arch_x86_64::X86_64;
use caisson_hal::Hypervisor;

use crate::bench::{Bench, DATA, DEVICE, FINISH, Log, RAM, Seen, byte_at, long, run_long};

pub(crate) fn ports_are_written_in_every_width<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let code: &[&[u8]] = &[
        &[0xb8, 0x44, 0x33, 0x22, 0x11], // mov eax, 0x11223344
        &[0xe6, 0x10],                   // out 0x10, al
        &[0x66, 0xe7, 0x11],             // out 0x11, ax
        &[0xe7, 0x12],                   // out 0x12, eax
        &[0xba, 0x78, 0x56, 0x00, 0x00], // mov edx, 0x5678
        &[0xee],                         // out dx, al
        FINISH,
    ];
    let mut io = Log::new();
    run_long(hypervisor, code, &mut io);
    let want = [
        Seen::Out(0x10, vec![0x44]),
        Seen::Out(0x11, vec![0x44, 0x33]),
        Seen::Out(0x12, vec![0x44, 0x33, 0x22, 0x11]),
        Seen::Out(0x5678, vec![0x44]),
    ];
    assert_eq!(io.seen, want);
}

pub(crate) fn ports_are_read_in_every_width<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let code: &[&[u8]] = &[
        &[0x31, 0xc0],       // xor eax, eax
        &[0xe4, 0x10],       // in al, 0x10
        &[0x89, 0x07],       // mov [rdi], eax
        &[0x66, 0xe5, 0x10], // in ax, 0x10
        &[0x89, 0x07],       // mov [rdi], eax
        &[0xe5, 0x10],       // in eax, 0x10
        &[0x89, 0x07],       // mov [rdi], eax
        FINISH,
    ];
    let mut io = Log::new();
    run_long(hypervisor, code, &mut io);
    let want = [
        Seen::In(0x10, 1),
        Seen::Store(DEVICE, vec![0x11, 0, 0, 0]),
        Seen::In(0x10, 2),
        Seen::Store(DEVICE, vec![0x12, 0x13, 0, 0]),
        Seen::In(0x10, 4),
        Seen::Store(DEVICE, vec![0x14, 0x15, 0x16, 0x17]),
    ];
    assert_eq!(io.seen, want);
}

pub(crate) fn string_output_is_one_access_an_item<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let code: &[&[u8]] = &[
        &[0xbe, 0x00, 0x00, 0x01, 0x00], // mov esi, DATA
        &[0xba, 0x10, 0x00, 0x00, 0x00], // mov edx, 0x10
        &[0xb9, 0x05, 0x00, 0x00, 0x00], // mov ecx, 5
        &[0xf3, 0x6e],                   // rep outsb
        &[0xb9, 0x02, 0x00, 0x00, 0x00], // mov ecx, 2
        &[0x66, 0xf3, 0x6f],             // rep outsw
        &[0xb9, 0x01, 0x00, 0x00, 0x00], // mov ecx, 1
        &[0xf3, 0x6f],                   // rep outsd
        FINISH,
    ];
    let mut bench = Bench::new(hypervisor, 1, code);
    bench.write(DATA, b"helloABCDwxyz");
    let mut io = Log::new();
    assert_eq!(bench.run(&long(), &mut io), caisson_hal::Exit::PowerOff);
    let want: [&[u8]; 8] = [b"h", b"e", b"l", b"l", b"o", b"AB", b"CD", b"wxyz"];
    assert_eq!(io.out(0x10), want);
}

pub(crate) fn string_input_fills_memory<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let code: &[&[u8]] = &[
        &[0xbf, 0x00, 0x00, 0x01, 0x00], // mov edi, DATA
        &[0xba, 0x10, 0x00, 0x00, 0x00], // mov edx, 0x10
        &[0xb9, 0x03, 0x00, 0x00, 0x00], // mov ecx, 3
        &[0xf3, 0x6c],                   // rep insb
        &[0xb9, 0x02, 0x00, 0x00, 0x00], // mov ecx, 2
        &[0x66, 0xf3, 0x6d],             // rep insw
        FINISH,
    ];
    let mut io = Log::new();
    let bench = run_long(hypervisor, code, &mut io);
    assert_eq!(bench.read(DATA, 8), [0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0]);
    let widths: Vec<_> = io
        .seen
        .iter()
        .map(|seen| matches!(seen, Seen::In(0x10, 1 | 2)))
        .collect();
    assert_eq!(widths, [true; 5]);
}

pub(crate) fn loads_have_every_width<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let code: &[&[u8]] = &[
        &[0xbe, 0x00, 0x00, 0x01, 0x00], // mov esi, DATA
        &[0x8a, 0x07],                   // mov al, [rdi]
        &[0x88, 0x06],                   // mov [rsi], al
        &[0x66, 0x8b, 0x47, 0x08],       // mov ax, [rdi + 8]
        &[0x66, 0x89, 0x46, 0x08],       // mov [rsi + 8], ax
        &[0x8b, 0x47, 0x10],             // mov eax, [rdi + 16]
        &[0x89, 0x46, 0x10],             // mov [rsi + 16], eax
        &[0x48, 0x8b, 0x47, 0x18],       // mov rax, [rdi + 24]
        &[0x48, 0x89, 0x46, 0x18],       // mov [rsi + 24], rax
        FINISH,
    ];
    let mut io = Log::new();
    let bench = run_long(hypervisor, code, &mut io);
    let mut want = Vec::new();
    for (offset, width) in [(0, 1), (8, 2), (16, 4), (24, 8)] {
        want.push(Seen::Load(DEVICE + offset, width));
        let at = DATA + usize::try_from(offset).unwrap();
        assert_eq!(
            bench.read(at, width),
            pattern(DEVICE + offset, width),
            "width {width}"
        );
    }
    assert_eq!(io.seen, want);
}

pub(crate) fn stores_have_every_width<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let code: &[&[u8]] = &[
        &[0x48, 0xb8, 8, 7, 6, 5, 4, 3, 2, 1], // mov rax, 0x0102030405060708
        &[0x88, 0x07],                         // mov [rdi], al
        &[0x66, 0x89, 0x47, 0x08],             // mov [rdi + 8], ax
        &[0x89, 0x47, 0x10],                   // mov [rdi + 16], eax
        &[0x48, 0x89, 0x47, 0x18],             // mov [rdi + 24], rax
        FINISH,
    ];
    let mut io = Log::new();
    run_long(hypervisor, code, &mut io);
    let want = [
        Seen::Store(DEVICE, vec![8]),
        Seen::Store(DEVICE + 8, vec![8, 7]),
        Seen::Store(DEVICE + 16, vec![8, 7, 6, 5]),
        Seen::Store(DEVICE + 24, vec![8, 7, 6, 5, 4, 3, 2, 1]),
    ];
    assert_eq!(io.seen, want);
}

/// Offsets into [`DEVICE`] at which an 8-byte access is misaligned, or crosses a page.
const ODD: [u64; 3] = [1, 0xffc, 0x1fff];

pub(crate) fn misaligned_and_page_crossing_loads_are_whole<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let code: &[&[u8]] = &[
        &[0x48, 0x8b, 0x07], // mov rax, [rdi]
        &[0x48, 0x89, 0x06], // mov [rsi], rax
        FINISH,
    ];
    let last = (RAM - 3) as u64; // three bytes of memory, and five beyond
    for at in ODD.map(|offset| DEVICE + offset).into_iter().chain([last]) {
        let mut bench = Bench::new(hypervisor, 1, code);
        let mut want = pattern(at, 8);
        if at == last {
            bench.write(RAM - 3, b"ram");
            want.splice(..3, *b"ram");
        }
        let mut regs = long();
        regs.general.rdi = at;
        regs.general.rsi = DATA as u64;
        assert_eq!(bench.run(&regs, &mut Log::new()), caisson_hal::Exit::PowerOff);
        assert_eq!(bench.read(DATA, 8), want, "load at {at:#x}");
    }
}

pub(crate) fn misaligned_and_page_crossing_stores_are_whole<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let code: &[&[u8]] = &[
        &[0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8], // mov rax, 0x0807060504030201
        &[0x48, 0x89, 0x07],                   // mov [rdi], rax
        FINISH,
    ];
    for at in ODD.map(|offset| DEVICE + offset) {
        let mut regs = long();
        regs.general.rdi = at;
        let mut io = Log::new();
        assert_eq!(
            Bench::new(hypervisor, 1, code).run(&regs, &mut io),
            caisson_hal::Exit::PowerOff
        );
        let want: Vec<_> = (at..).zip(1..=8).collect();
        assert_eq!(io.stored(), want, "store at {at:#x}");
    }
}

pub(crate) fn an_unclaimed_address_reads_as_ones<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let code: &[&[u8]] = &[
        &[0xbe, 0x00, 0x00, 0x01, 0x00], // mov esi, DATA
        &[0x48, 0x8b, 0x07],             // mov rax, [rdi]
        &[0x48, 0x89, 0x06],             // mov [rsi], rax
        FINISH,
    ];
    let mut io = Log::new();
    io.unclaimed = true;
    let bench = run_long(hypervisor, code, &mut io);
    assert_eq!(bench.read(DATA, 8), [0xff; 8]);
}

fn pattern(at: u64, len: usize) -> Vec<u8> {
    (at..).map(byte_at).take(len).collect()
}
