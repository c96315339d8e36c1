//! Interrupts, halting, and starting a second CPU.

use std::sync::mpsc::channel;

use caisson_arch_x86_64::X86_64;
use caisson_hal::{Exit, GuestAddress, Hypervisor, Line, Msi, Seat, Vcpu, Vm};

use crate::bench::{Bench, HANDLER, Log, SECOND, SPIN, Seen, long};

/// Enables the local APIC: spurious vector 0xff, software enable (Intel SDM volume 3, "Spurious Interrupt").
pub(crate) const ENABLE_APIC: &[u8] = &[
    0xbf, 0x00, 0x00, 0xe0, 0xfe, // mov edi, 0xfee00000
    0xc7, 0x87, 0xf0, 0, 0, 0, 0xff, 0x01, 0, 0, // mov dword [rdi + 0xf0], 0x1ff
];
/// Says that it is ready, halts with interrupts on, and ends when it was woken.
pub(crate) const HALT: &[u8] = &[
    0xe6, 0x30, // out 0x30, al
    0xfb, // sti
    0xf4, // hlt
    0xe6, 0xf4, // out 0xf4, al
];
/// Says that it was called with the letter, and ends the interrupt.
pub(crate) fn handler(letter: u8) -> Vec<u8> {
    let mut code = vec![0xb0, letter]; // mov al, letter
    code.extend([0xe6, 0x31]); // out 0x31, al
    code.extend([0xc7, 0x87, 0xb0, 0, 0, 0, 0, 0, 0, 0]); // mov dword [rdi + 0xb0], 0: end of interrupt
    code.extend([0x48, 0xcf]); // iretq
    code
}

/// Runs a guest that halts; calls `wake` from another thread once the guest is about to, and `taken` when its
/// handler runs.
fn halted<H: Hypervisor<Arch = X86_64>>(
    mut bench: Bench<H>,
    vector: usize,
    wake: impl FnOnce() + Send,
    taken: impl Fn(),
) {
    bench.gate(vector, HANDLER);
    bench.write(usize::from(HANDLER), &handler(b'i'));
    let (ready, waits) = channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            waits.recv().expect("the guest gets ready");
            wake();
        });
        let mut io = Log::hooked(|seen| {
            if matches!(seen, Seen::Out(0x30, _)) {
                ready.send(()).expect("the waker waits");
            }
            if matches!(seen, Seen::Out(0x31, _)) {
                taken();
            }
        });
        assert_eq!(bench.run(&long(), &mut io), Exit::PowerOff);
        assert_eq!(io.out(0x31), [b"i"]);
    });
}

pub(crate) fn an_msi_wakes_a_halted_vcpu<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let bench = Bench::new(hypervisor, 1, &[ENABLE_APIC, HALT]);
    let interrupts = bench.vm.interrupts();
    halted(
        bench,
        0x40,
        move || interrupts.send_msi(msi(0x40)).unwrap(),
        || {},
    );
}

pub(crate) fn a_line_wakes_a_halted_vcpu<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let code: &[&[u8]] = &[
        ENABLE_APIC,
        &[0xb0, 0xff, 0xe6, 0x21, 0xe6, 0xa1], // mov al, 0xff; out 0x21, al; out 0xa1, al: both 8259 are masked
        &[0xbe, 0x00, 0x00, 0xc0, 0xfe],       // mov esi, 0xfec00000: the IOAPIC
        &[0xc7, 0x06, 0x1b, 0, 0, 0],          // mov dword [rsi], 0x1b: line 5, upper half
        &[0xc7, 0x46, 0x10, 0, 0, 0, 0],       // mov dword [rsi + 0x10], 0: to APIC 0
        &[0xc7, 0x06, 0x1a, 0, 0, 0],          // mov dword [rsi], 0x1a: line 5, lower half
        &[0xc7, 0x46, 0x10, 0x41, 0x80, 0, 0], // mov dword [rsi + 0x10], 0x8041: vector 0x41, level
        HALT,
    ];
    let bench = Bench::new(hypervisor, 1, code);
    let interrupts = bench.vm.interrupts();
    let lower = interrupts.clone();
    // The line stays up until the handler has run, as a device holds it: it would interrupt again otherwise.
    halted(
        bench,
        0x41,
        move || interrupts.set_line(Line(5), true).unwrap(),
        || lower.set_line(Line(5), false).unwrap(),
    );
}

pub(crate) fn the_local_timer_wakes_a_halted_vcpu<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let code: &[&[u8]] = &[
        ENABLE_APIC,
        &[0xc7, 0x87, 0xe0, 0x03, 0, 0, 0x0b, 0, 0, 0], // mov dword [rdi + 0x3e0], 0xb: divide by one
        &[0xc7, 0x87, 0x20, 0x03, 0, 0, 0x42, 0, 0, 0], // mov dword [rdi + 0x320], 0x42: once, vector 0x42
        &[0xc7, 0x87, 0x80, 0x03, 0, 0, 0, 0, 0x10, 0], // mov dword [rdi + 0x380], 0x100000: start
        HALT,
    ];
    halted(Bench::new(hypervisor, 1, code), 0x42, || {}, || {});
}

pub(crate) fn a_second_cpu_starts_by_init_and_sipi<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let first: &[&[u8]] = &[
        ENABLE_APIC,
        &[0xc7, 0x87, 0x10, 0x03, 0, 0, 0, 0, 0, 0x01], // mov dword [rdi + 0x310], 1 << 24: to APIC 1
        &[0xc7, 0x87, 0x00, 0x03, 0, 0, 0x00, 0x45, 0, 0], // mov dword [rdi + 0x300], 0x4500: INIT
        &[0xc7, 0x87, 0x00, 0x03, 0, 0, 0x03, 0x46, 0, 0], // mov dword [rdi + 0x300], 0x4603: start at 0x3000
        SPIN,
    ];
    let mut bench = Bench::new(hypervisor, 2, first);
    let second = [
        0xb0, b'2', // mov al, '2'
        0xe6, 0x10, // out 0x10, al
        0xe6, 0xf4, // out 0xf4, al
    ];
    bench.write(SECOND, &second);
    let seat = bench.seats.remove(1);
    assert_eq!(seat.id().0, 1);
    let kicker = bench.seats[0].kicker();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut io = Log::new();
            assert_eq!(seat.bind().unwrap().run(&mut io).unwrap(), Exit::PowerOff);
            assert_eq!(io.seen, [Seen::Out(0x10, b"2".to_vec())]);
            kicker.kick();
        });
        assert_eq!(bench.run(&long(), &mut Log::new()), Exit::Kicked);
    });
}

pub(crate) fn interrupts_to_nowhere_are_refused<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let bench = Bench::new(hypervisor, 1, &[SPIN]);
    let interrupts = bench.vm.interrupts();
    assert!(interrupts.set_line(Line(1000), true).is_err());
    let nowhere = Msi {
        address: GuestAddress(0x1000),
        ..msi(0x40)
    };
    assert!(interrupts.send_msi(nowhere).is_err());
}

/// A message to APIC 0 (Intel SDM volume 3, "Message Address Register Format").
pub(crate) fn msi(vector: u8) -> Msi {
    Msi {
        address: GuestAddress(0xfee0_0000),
        data: u32::from(vector),
        device: None,
    }
}
