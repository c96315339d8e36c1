//! Saving and restoring.

use caisson_arch_x86_64::state::Activity;
use caisson_arch_x86_64::{VcpuState, VmState, X86_64};
use caisson_hal::{Exit, Hypervisor, Seat, Vcpu, Vm};

use crate::bench::{Bench, FINISH, Log, RAM, SPIN, Seen, long};

pub(crate) fn a_guest_goes_on_in_a_fresh_machine<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let code: &[&[u8]] = &[
        &[0xff, 0xc3],       // again: inc ebx
        &[0x89, 0xd8],       // mov eax, ebx
        &[0xe7, 0x10],       // out 0x10, eax
        &[0x83, 0xfb, 0x64], // cmp ebx, 100
        &[0x75, 0xf5],       // jne again
        FINISH,
    ];
    let mut counted = Vec::new();
    let mut saved: Option<(VcpuState, VmState, Vec<u8>)> = None;
    loop {
        let mut bench = Bench::new(hypervisor, 1, &[SPIN]);
        if saved.is_none() {
            bench = Bench::new(hypervisor, 1, code);
        }
        let kicker = bench.seats[0].kicker();
        let mut vcpu = bench.bind(&long());
        if let Some((vcpu_state, vm_state, ram)) = &saved {
            bench.write(0, ram);
            bench.vm.restore(vm_state).unwrap();
            vcpu.restore(vcpu_state).unwrap();
        }
        let mut count = 0;
        let mut io = Log::hooked(|seen| {
            count += 1;
            if count == 30 && matches!(seen, Seen::Out(0x10, _)) {
                kicker.kick();
            }
        });
        let exit = vcpu.run(&mut io).unwrap();
        counted.extend(
            io.out(0x10)
                .into_iter()
                .map(|data| u32::from_le_bytes(data.try_into().unwrap())),
        );
        drop(io);
        match exit {
            Exit::PowerOff => break,
            Exit::Kicked => {
                let state = vcpu.save().unwrap();
                assert_eq!(state.activity, Activity::Runs);
                // As it would be on a disk.
                let state = serde_json::to_vec(&state).unwrap();
                let vm = serde_json::to_vec(&bench.vm.save().unwrap()).unwrap();
                saved = Some((
                    serde_json::from_slice(&state).unwrap(),
                    serde_json::from_slice(&vm).unwrap(),
                    bench.read(0, RAM),
                ));
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    assert_eq!(counted, (1..=100).collect::<Vec<_>>());
}

pub(crate) fn an_unknown_version_is_refused<H: Hypervisor<Arch = X86_64>>(hypervisor: &H) {
    let mut bench = Bench::new(hypervisor, 1, &[SPIN]);
    let mut vcpu = bench.bind(&long());
    let mut state = vcpu.save().unwrap();
    vcpu.restore(&state).unwrap();
    state.version += 1;
    assert!(vcpu.restore(&state).is_err());
    let mut vm = bench.vm.save().unwrap();
    bench.vm.restore(&vm).unwrap();
    vm.version += 1;
    assert!(bench.vm.restore(&vm).is_err());
}
