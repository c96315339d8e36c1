//! The machine over a script: what a guest does, and what comes of it.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use caisson_arch_x86_64::X86_64;
use caisson_arch_x86_64::layout::{ECAM, MIB, RESET, RESET_VALUE, SLEEP_CONTROL};
use caisson_devices::pci::Doorbells as _;
use caisson_devices::thread::Threads;
use caisson_devices::virtio::GuestAddress;
use caisson_hal::os::Event;
use caisson_hal::{Exit, VcpuId};
use caisson_hal_scripted::{Scripted, Seen, Step};
use caisson_machine::{Console, Descriptors, Machine as _, NoPorts, Setup};
use caisson_wire::vmm::{Confine, End, Fd, Launch};
use vm_memory::Bytes as _;

use crate::assembly::{Assembled, assemble};

type Script = Vec<Step<X86_64>>;
type Built = Assembled<Scripted<X86_64>>;

/// Where the test kernel is loaded.
const KERNEL: u64 = 16 * MIB;

/// An ELF file with one segment of "kernel" at [`KERNEL`].
fn vmlinux() -> Vec<u8> {
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    let mut words = |words: &[u64]| words.iter().for_each(|word| image.extend(word.to_le_bytes()));
    words(&[KERNEL, 64, 0]); // entry, program headers, section headers
    words(&[64 << 32 | 56 << 48, 1]); // sizes and number of headers
    words(&[1 | 7 << 32, 120, KERNEL, KERNEL, 6, 4096, 4096]); // PT_LOAD
    image.extend(b"kernel");
    image
}

fn file(contents: &[u8]) -> OwnedFd {
    let mut file: File = tempfile::tempfile().unwrap();
    file.write_all(contents).unwrap();
    file.into()
}

fn setup(vcpus: u32, kernel: &[u8]) -> (Setup, Console, Receiver<End>) {
    let console = Console::new(None);
    let (ended, ends) = channel();
    let setup = Setup {
        launch: Launch {
            version: caisson_wire::VERSION,
            sandbox: "test".into(),
            vcpus,
            memory: 64 * MIB,
            kernel: Fd(0),
            initramfs: Fd(1),
            cmdline: "debug".into(),
            share: None,
            disks: vec![],
            nets: vec![],
            console: None,
            confine: Confine::Off,
            emulator: None,
        },
        descriptors: Descriptors::new(vec![file(kernel), file(b"initramfs")]),
        console: console.clone(),
        ports: Arc::new(NoPorts),
        threads: Threads::plain(),
        ended,
    };
    (setup, console, ends)
}

fn machine(scripts: Vec<Script>) -> (Built, Console, Receiver<End>) {
    let (setup, console, ends) = setup(u32::try_from(scripts.len()).unwrap(), &vmlinux());
    (assemble(Scripted::new(scripts), setup).unwrap(), console, ends)
}

/// Runs one vCPU to the machine's end.
fn run(script: Script) -> (End, Console) {
    let (mut machine, console, ends) = machine(vec![script]);
    machine.start().unwrap();
    (next(&ends), console)
}

fn next(ends: &Receiver<End>) -> End {
    ends.recv_timeout(Duration::from_secs(5))
        .expect("the machine went silent")
}

#[test]
fn registers_that_end_the_machine_end_it() {
    for (port, value, want) in [
        (SLEEP_CONTROL, 0x34, End::PowerOff),
        (RESET, RESET_VALUE, End::Reset),
        (0x64, 0xFE, End::Reset),
    ] {
        assert_eq!(
            run(vec![Step::PortOut(port, vec![value])]).0,
            want,
            "port {port:#x}"
        );
    }
}

#[test]
fn registers_that_do_not_end_the_machine_do_not() {
    let script = vec![
        Step::PortOut(SLEEP_CONTROL, vec![0x14]),
        Step::PortOut(RESET, vec![0]),
        Step::PortOut(0x64, vec![0xD1]),
        Step::PortOut(0x80, vec![1]),
        Step::Exit(Exit::PowerOff),
    ];
    assert_eq!(run(script).0, End::PowerOff);
}

#[test]
fn a_crash_says_why() {
    let script = vec![Step::Exit(Exit::Crash("triple fault".into()))];
    assert_eq!(run(script).0, End::Crashed("triple fault".into()));
}

#[test]
fn the_end_is_told_once_and_stops_every_vcpu() {
    let others = || vec![Step::SpinUntilKicked, Step::Exit(Exit::Crash("ran on".into()))];
    let (mut machine, _, ends) = machine(vec![vec![Step::Exit(Exit::Reset)], others(), others()]);
    machine.start().unwrap();
    assert_eq!(next(&ends), End::Reset);
    // Answers only once every vCPU waits for orders; running again is refused by then.
    machine.pause().unwrap();
    machine.resume().unwrap();
    machine.pause().unwrap();
    drop(machine);
    assert!(ends.try_recv().is_err());
}

#[test]
fn a_paused_machine_stands_still_and_goes_on_where_it_was() {
    let spins = || vec![Step::SpinUntilKicked, Step::SpinUntilKicked];
    let mut first = spins();
    first.push(Step::Exit(Exit::PowerOff));
    let mut second = spins();
    second.extend([Step::SpinUntilKicked, Step::SpinUntilKicked]);
    let (mut machine, _, ends) = machine(vec![first, second]);
    machine.start().unwrap();
    machine.pause().unwrap();
    machine.pause().unwrap();
    machine.resume().unwrap();
    machine.resume().unwrap();
    machine.pause().unwrap();
    assert!(ends.try_recv().is_err());
    machine.resume().unwrap();
    assert_eq!(next(&ends), End::PowerOff);
}

#[test]
fn an_idle_vcpu_can_be_paused() {
    let script = vec![
        Step::Exit(Exit::Idle { until: None }),
        Step::SpinUntilKicked,
        Step::Exit(Exit::PowerOff),
    ];
    let (mut machine, _, ends) = machine(vec![script]);
    machine.start().unwrap();
    machine.pause().unwrap();
    machine.resume().unwrap();
    machine.pause().unwrap();
    machine.resume().unwrap();
    assert_eq!(next(&ends), End::PowerOff);
}

#[test]
fn a_machine_is_started_once_and_paused_only_while_it_runs() {
    let (mut machine, _, _ends) = machine(vec![vec![Step::SpinUntilKicked]]);
    assert!(machine.pause().is_err());
    machine.start().unwrap();
    assert!(machine.start().is_err());
}

#[test]
fn dropping_a_running_machine_ends_its_threads() {
    let (mut machine, _, ends) = machine(vec![vec![Step::SpinUntilKicked], vec![Step::SpinUntilKicked]]);
    machine.start().unwrap();
    let begun = Instant::now();
    drop(machine);
    assert!(begun.elapsed() < Duration::from_secs(2));
    assert!(
        ends.recv_timeout(Duration::from_secs(5)).is_err(),
        "nothing ended by itself"
    );
}

#[test]
fn the_first_device_is_found_by_both_ways_into_configuration_space() {
    // Vendor and device of a virtio socket device: 0x1040 + 19 (virtio 1.2, 4.1.2.1).
    let identity = vec![0xF4, 0x1A, 0x53, 0x10];
    let script = vec![
        Step::LoadExpect(GuestAddress(ECAM.start + (1 << 15)), identity.clone()),
        Step::PortOut(0xCF8, 0x8000_0800u32.to_le_bytes().to_vec()),
        Step::PortExpect(0xCF8, 0x8000_0800u32.to_le_bytes().to_vec()),
        Step::PortExpect(0xCFC, identity.clone()),
        Step::PortExpect(0xCFE, identity[2..].to_vec()),
        Step::PortExpect(0xCFE, vec![0xFF; 4]),
        Step::PortOut(0xCF8, 0x0000_0800u32.to_le_bytes().to_vec()),
        Step::PortExpect(0xCFC, vec![0xFF; 4]),
        Step::PortOut(0xCF8, 0x8001_0800u32.to_le_bytes().to_vec()),
        Step::PortExpect(0xCFC, vec![0xFF; 4]),
        Step::Exit(Exit::PowerOff),
    ];
    assert_eq!(run(script).0, End::PowerOff);
}

#[test]
fn where_nobody_is_loads_are_ones_and_stores_vanish() {
    let script = vec![
        Step::LoadExpect(GuestAddress(0xD800_0000), vec![0xFF; 4]),
        Step::LoadExpect(GuestAddress(ECAM.end - 2), vec![0xFF; 4]),
        Step::LoadExpect(GuestAddress(u64::MAX), vec![0xFF; 8]),
        Step::Store(GuestAddress(u64::MAX), vec![0; 8]),
        Step::Store(GuestAddress(0xD800_0000), vec![0; 4]),
        Step::PortExpect(0x64, vec![0xFF]),
        Step::PortExpect(0x71, vec![0]),
        Step::PortExpect(0x1234, vec![0xFF; 2]),
        Step::Exit(Exit::PowerOff),
    ];
    assert_eq!(run(script).0, End::PowerOff);
}

#[test]
fn what_the_guest_prints_reaches_the_console() {
    let print = |byte: &u8| Step::PortOut(0x3F8, vec![*byte]);
    let mut script: Script = b"Kernel panic".iter().map(print).collect();
    script.push(Step::PortOut(RESET, vec![RESET_VALUE]));
    let (end, console) = run(script);
    assert_eq!((end, console.tail().as_str()), (End::Reset, "Kernel panic"));
}

#[test]
fn a_doorbell_without_kernel_support_rings_from_the_bus() {
    let at = GuestAddress(0xD000_3004);
    let script = vec![Step::Store(at, vec![1, 0]), Step::Exit(Exit::PowerOff)];
    let (mut machine, _, ends) = machine(vec![script]);
    let event = Event::new().unwrap();
    machine.doorbells().bind(at, &event).unwrap();
    machine.start().unwrap();
    assert_eq!(next(&ends), End::PowerOff);
    assert!(event.clear());
}

#[test]
fn the_kernel_is_in_memory_and_only_the_first_vcpu_enters_it() {
    let scripted = Scripted::new([vec![Step::Exit(Exit::PowerOff)], vec![Step::SpinUntilKicked]]);
    let (setup, _, ends) = setup(2, &vmlinux());
    let mut machine = assemble(scripted, setup).unwrap();
    let mut loaded = [0; 6];
    machine
        .memory()
        .read_slice(&mut loaded, GuestAddress(KERNEL))
        .unwrap();
    assert_eq!(&loaded, b"kernel");
    let mut initramfs = [0; 9];
    machine
        .memory()
        .read_slice(&mut initramfs, GuestAddress(64 * MIB - 4096))
        .unwrap();
    assert_eq!(&initramfs, b"initramfs");
    machine.start().unwrap();
    next(&ends);
    assert_eq!(machine.hypervisor().take_seen(), [Seen::BootRegs(VcpuId(0))]);
    assert!(machine.usage().guest_resident > 0);
}

#[test]
fn what_cannot_be_built_says_the_stage_and_the_cause() {
    let refused = |change: &dyn Fn(&mut Setup), kernel: &[u8]| {
        let (mut setup, _, _ends) = setup(1, kernel);
        change(&mut setup);
        let error = assemble(Scripted::<X86_64>::new([]), setup).err().unwrap();
        format!("{}: {}", error.stage, error.source)
    };
    let unchanged = |_: &mut Setup| {};
    for (got, want) in [
        (
            refused(&unchanged, b"#!/bin/sh"),
            "load the kernel: this is no Linux kernel",
        ),
        (
            refused(&unchanged, b""),
            "load the kernel: this is no Linux kernel",
        ),
        (
            refused(&unchanged, &vmlinux()[..100]),
            "load the kernel: the kernel is damaged",
        ),
        (
            refused(&|setup| setup.launch.memory = MIB, &vmlinux()),
            "lay out the guest's memory: 1 MiB of memory are too little",
        ),
        (
            refused(&|setup| setup.launch.vcpus = 0, &vmlinux()),
            "create the machine: 0 vCPUs",
        ),
        (
            refused(&|setup| setup.launch.kernel = Fd(7), &vmlinux()),
            "take the kernel's descriptor",
        ),
        (
            refused(&|setup| setup.launch.cmdline = "x".repeat(4096), &vmlinux()),
            "set up the kernel's parameters: the kernel command line has",
        ),
        (
            refused(
                &|setup| setup.descriptors = Descriptors::new(vec![file(&vmlinux()), file(b"")]),
                &vmlinux(),
            ),
            "read the initramfs: the file is empty",
        ),
    ] {
        assert!(got.starts_with(want), "{got}");
    }
}
