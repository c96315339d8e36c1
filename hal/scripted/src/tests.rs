//! The contract, as far as a script can show it.

use std::sync::Arc;

use caisson_hal::{
    Access, Arch, Exit, GuestAddress, GuestIo, Hypervisor, Line, Msi, Region, Seat, Vcpu, VcpuId, Verdict,
    Vm, VmSpec,
};

use crate::{Scripted, Seen, States, Step};

/// An architecture that is nothing but a name.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Toy {}

impl Arch for Toy {
    const NAME: &'static str = "toy";
    type BootRegs = u64;
    type VcpuState = u32;
    type VmState = u32;
    type IrqLayout = ();
    type CpuPolicy = ();
    type CpuOn = u8;
}

/// A device that answers with its address's low byte and powers off on a store of 0xff.
#[derive(Default)]
struct Echo(Option<Verdict>);

impl GuestIo for Echo {
    fn load(&mut self, at: GuestAddress, data: &mut [u8]) {
        data.fill(at.0.to_le_bytes()[0]);
    }
    fn store(&mut self, _at: GuestAddress, data: &[u8]) {
        self.0 = (data == [0xff]).then_some(Verdict::PowerOff);
    }
    fn verdict(&mut self) -> Option<Verdict> {
        self.0.take()
    }
}

const SPEC: VmSpec<Toy> = VmSpec {
    vcpus: 1,
    phys_bits: 36,
    irq: (),
    cpu: (),
};

fn run(script: Vec<Step<Toy>>) -> Exit<Toy> {
    let (_vm, mut seats) = Scripted::new([script]).create(&SPEC).unwrap();
    seats.remove(0).bind().unwrap().run(&mut Echo::default()).unwrap()
}

#[test]
fn accesses_are_completed_below_the_contract() {
    let script = vec![
        Step::LoadExpect(GuestAddress(0x1042), vec![0x42, 0x42]),
        Step::PortExpect(0x60, vec![0xff]),
        Step::Exit(Exit::PowerOff),
    ];
    assert_eq!(run(script), Exit::PowerOff);
}

#[test]
fn a_wrong_answer_is_named() {
    let script = vec![Step::LoadExpect(GuestAddress(0x1042), vec![0x60])];
    assert_eq!(
        run(script),
        Exit::Crash("load at 0x1042: expected [60], device answered [42]".into())
    );
}

#[test]
fn a_devices_verdict_ends_the_run() {
    let script = vec![
        Step::Store(GuestAddress(0), vec![1]),
        Step::Store(GuestAddress(0), vec![0xff]),
    ];
    assert_eq!(run(script), Exit::PowerOff);
}

#[test]
fn a_script_that_just_ends_is_a_crash() {
    assert_eq!(run(vec![]), Exit::Crash("script ended without PowerOff".into()));
}

#[test]
fn a_kick_before_the_run_ends_it_once() {
    let (_vm, mut seats) = Scripted::<Toy>::new([vec![Step::Exit(Exit::PowerOff)]])
        .create(&SPEC)
        .unwrap();
    let seat = seats.remove(0);
    let kicker = seat.kicker();
    kicker.kick();
    kicker.kick();
    let mut vcpu = seat.bind().unwrap();
    assert_eq!(vcpu.run(&mut Echo::default()).unwrap(), Exit::Kicked);
    assert_eq!(vcpu.run(&mut Echo::default()).unwrap(), Exit::PowerOff);
}

#[test]
fn interrupts_and_entry_states_are_recorded() {
    let scripted = Scripted::<Toy>::new([vec![]]);
    let (vm, mut seats) = scripted.create(&SPEC).unwrap();
    let msi = Msi {
        address: GuestAddress(0xfee0_0000),
        data: 0x41,
        device: None,
    };
    vm.interrupts().set_line(Line(4), true).unwrap();
    vm.interrupts().send_msi(msi).unwrap();
    seats.remove(0).bind().unwrap().set_boot_regs(&0x1000).unwrap();
    let want = vec![
        Seen::Line(Line(4), true),
        Seen::Msi(msi),
        Seen::BootRegs(VcpuId(0)),
    ];
    assert_eq!(scripted.take_seen(), want);
}

#[test]
fn mappings_are_aligned_and_do_not_overlap() {
    let (vm, _) = Scripted::<Toy>::new([]).create(&SPEC).unwrap();
    let region = || Arc::new(Region::new(0x3000).unwrap());
    let map = |at| vm.map(GuestAddress(at), region(), Access::Full);
    map(0x4000).unwrap();
    for (at, fine) in [
        (0x1000, true),
        (0x2000, false),
        (0x6000, false),
        (0x7000, true),
        (0x10, false),
        (u64::MAX - 0xfff, false),
    ] {
        assert_eq!(map(at).is_ok(), fine, "{at:#x}");
    }
    vm.unmap(GuestAddress(0x4000)).unwrap();
    assert!(vm.unmap(GuestAddress(0x4000)).is_err());
    map(0x4000).unwrap();
}

#[test]
fn saved_states_are_accepted_and_others_are_not() {
    let scripted = Scripted::<Toy>::new([vec![]]).with_states(States { vcpu: 7, vm: 9 });
    let (vm, mut seats) = scripted.create(&SPEC).unwrap();
    let mut vcpu = seats.remove(0).bind().unwrap();
    let (saved, whole) = (vcpu.save().unwrap(), vm.save().unwrap());
    vcpu.restore(&saved).unwrap();
    vm.restore(&whole).unwrap();
    assert!(vcpu.restore(&8).is_err());
    assert!(vm.restore(&8).is_err());
}
