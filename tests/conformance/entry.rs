//! How a guest begins and ends.

use caisson_arch_x86_64::{Table, X86_64};
use caisson_hal::{Exit, Hypervisor};

use crate::bench::{Bench, DEVICE, FINISH, Log, Seen, long, real, run_long};

pub(crate) fn a_vcpu_starts_in_real_mode<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let code: &[&[u8]] = &[
        &[0xb8, 0x34, 0x12], // mov ax, 0x1234: three bytes long in 16-bit mode only
        &[0xe7, 0x10],       // out 0x10, ax
        FINISH,
    ];
    let mut io = Log::new();
    let exit = Bench::new(hypervisor, 1, code).run(&real(), &mut io);
    assert_eq!(exit, Exit::PowerOff);
    assert_eq!(io.seen, [Seen::Out(0x10, vec![0x34, 0x12])]);
}

pub(crate) fn a_vcpu_starts_in_64_bit_mode_with_all_registers<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let code: &[&[u8]] = &[
        &[0x48, 0x89, 0x07], // mov [rdi], rax
        &[0x48, 0x89, 0x1f], // mov [rdi], rbx
        &[0x48, 0x89, 0x0f], // mov [rdi], rcx
        &[0x48, 0x89, 0x17], // mov [rdi], rdx
        &[0x48, 0x89, 0x37], // mov [rdi], rsi
        &[0x48, 0x89, 0x2f], // mov [rdi], rbp
        &[0x48, 0x89, 0x27], // mov [rdi], rsp
        &[0x4c, 0x89, 0x07], // mov [rdi], r8
        &[0x4c, 0x89, 0x0f], // mov [rdi], r9
        &[0x4c, 0x89, 0x17], // mov [rdi], r10
        &[0x4c, 0x89, 0x1f], // mov [rdi], r11
        &[0x4c, 0x89, 0x27], // mov [rdi], r12
        &[0x4c, 0x89, 0x2f], // mov [rdi], r13
        &[0x4c, 0x89, 0x37], // mov [rdi], r14
        &[0x4c, 0x89, 0x3f], // mov [rdi], r15
        FINISH,
    ];
    let mut regs = long();
    let value = |n: u64| 0x0123_4567_89ab_0000 | n;
    let general = &mut regs.general;
    let written = [
        &mut general.rax,
        &mut general.rbx,
        &mut general.rcx,
        &mut general.rdx,
        &mut general.rsi,
        &mut general.rbp,
        &mut general.rsp,
        &mut general.r8,
        &mut general.r9,
        &mut general.r10,
        &mut general.r11,
        &mut general.r12,
        &mut general.r13,
        &mut general.r14,
        &mut general.r15,
    ];
    for (register, n) in written.into_iter().zip(0..) {
        *register = value(n);
    }
    let mut io = Log::new();
    let exit = Bench::new(hypervisor, 1, code).run(&regs, &mut io);
    assert_eq!(exit, Exit::PowerOff);
    let want: Vec<_> = (0..15)
        .map(|n| Seen::Store(DEVICE, value(n).to_le_bytes().to_vec()))
        .collect();
    assert_eq!(io.seen, want);
}

pub(crate) fn a_triple_fault_resets_the_machine<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let code: &[&[u8]] = &[&[0x0f, 0x0b]]; // ud2, with no table to find a handler in
    let mut regs = long();
    regs.special.idt = Table { base: 0, limit: 0 };
    let exit = Bench::new(hypervisor, 1, code).run(&regs, &mut Log::new());
    assert_eq!(exit, Exit::Reset);
}

pub(crate) fn a_fetch_from_nowhere_crashes_with_a_report<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let code: &[&[u8]] = &[&[0xff, 0xe7]]; // jmp rdi, where there is no memory
    let exit = Bench::new(hypervisor, 1, code).run(&long(), &mut Log::new());
    let Exit::Crash(text) = exit else {
        panic!("expected a crash, got {exit:?}");
    };
    assert!(text.contains("rip 0x10000000"), "{text}");
}

pub(crate) fn the_device_sides_verdict_ends_the_run<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let code: &[&[u8]] = &[
        FINISH,
        &[0xe6, 0x10], // out 0x10, al: never reached
    ];
    let mut io = Log::new();
    run_long(hypervisor, code, &mut io);
    assert_eq!(io.seen, []);
}
