//! Kicks: the current run or else the next, exactly once.

use std::sync::mpsc::channel;

use caisson_arch_x86_64::X86_64;
use caisson_hal::{Exit, Hypervisor, Seat, Vcpu};

use crate::bench::{Bench, CODE, FINISH, Log, SPIN, Seen, byte_at, long};

pub(crate) fn a_kick_before_the_run_ends_it<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let mut bench = Bench::new(hypervisor, 1, &[SPIN]);
    let kicker = bench.seats[0].kicker();
    let mut vcpu = bench.bind(&long());
    for _ in 0..1000 {
        kicker.kick();
        assert_eq!(vcpu.run(&mut Log::new()).unwrap(), Exit::Kicked);
    }
}

pub(crate) fn kicks_coalesce_and_count_once<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let mut bench = Bench::new(hypervisor, 1, &[FINISH]);
    let kicker = bench.seats[0].kicker();
    let mut vcpu = bench.bind(&long());
    kicker.kick();
    kicker.kick();
    assert_eq!(vcpu.run(&mut Log::new()).unwrap(), Exit::Kicked);
    assert_eq!(vcpu.run(&mut Log::new()).unwrap(), Exit::PowerOff);
}

pub(crate) fn a_kick_before_the_seat_is_bound_counts<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let mut bench = Bench::new(hypervisor, 1, &[SPIN]);
    let kicker = bench.seats[0].kicker();
    kicker.kick();
    assert_eq!(bench.run(&long(), &mut Log::new()), Exit::Kicked);
    kicker.kick(); // of a vCPU that is no more: does nothing
}

pub(crate) fn of_ten_thousand_kicks_none_is_lost<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    const KICKS: usize = 10_000;
    let mut bench = Bench::new(hypervisor, 1, &[SPIN]);
    let kicker = bench.seats[0].kicker();
    let (ended, waits) = channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // Each kick falls somewhere else: before, at or after the entry.
            for turn in 0..KICKS {
                for _ in 0..turn % 512 {
                    std::hint::spin_loop();
                }
                kicker.kick();
                waits.recv().expect("the vCPU counts");
            }
        });
        let mut vcpu = bench.bind(&long());
        let mut io = Log::new();
        for _ in 0..KICKS {
            assert_eq!(vcpu.run(&mut io).unwrap(), Exit::Kicked);
            ended.send(()).expect("the kicker waits");
        }
    });
}

pub(crate) fn a_kick_during_an_access_leaves_it_complete<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let code: &[&[u8]] = &[
        &[0x48, 0x8b, 0x07], // mov rax, [rdi]: crosses a page, so it takes two exits
        &[0x48, 0xff, 0xc3], // inc rbx: not before the kick
        FINISH,
    ];
    let mut bench = Bench::new(hypervisor, 1, code);
    let kicker = bench.seats[0].kicker();
    let mut regs = long();
    regs.general.rdi += 0xffc;
    let at = regs.general.rdi;
    let mut vcpu = bench.bind(&regs);
    let mut io = Log::hooked(|seen| {
        if matches!(seen, Seen::Load(..)) {
            kicker.kick();
        }
    });
    assert_eq!(vcpu.run(&mut io).unwrap(), Exit::Kicked);
    let state = vcpu.save().unwrap();
    let loaded: Vec<_> = (at..at + 8).map(byte_at).collect();
    assert_eq!(state.general.rax.to_le_bytes(), *loaded);
    assert_eq!((state.general.rip, state.general.rbx), (CODE as u64 + 3, 0));
    // The second exit kicked as well, and that may count as another kick; never as more.
    let mut exit = vcpu.run(&mut io).unwrap();
    if exit == Exit::Kicked {
        exit = vcpu.run(&mut io).unwrap();
    }
    assert_eq!(exit, Exit::PowerOff);
    assert_eq!(vcpu.save().unwrap().general.rbx, 1);
}

pub(crate) fn a_kick_ends_a_halt<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let code: &[&[u8]] = &[
        &[0xe6, 0x10], // out 0x10, al
        &[0xf4],       // hlt, with interrupts off
    ];
    let mut bench = Bench::new(hypervisor, 1, code);
    let kicker = bench.seats[0].kicker();
    let (ready, waits) = channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            waits.recv().expect("the guest gets ready");
            kicker.kick();
        });
        let mut io = Log::hooked(|_| ready.send(()).expect("the kicker waits"));
        assert_eq!(bench.run(&long(), &mut io), Exit::Kicked);
    });
}
