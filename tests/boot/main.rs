//! Linux in our own machine, on a hypervisor that is really there.
//!
//! `CAISSON_GUEST` names the directory with `vmlinux`, `vmlinuz` and `initramfs.cpio`, as `cargo xtask guest` makes
//! it. Without it, or where the hypervisor's probe says no, nothing runs; with `CAISSON_NEED=kvm` that is a failure.
//! `CAISSON_BOOT_WORDS` are added to the kernel's command line, and then its console is shown.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and says how long a boot took"
)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use caisson_devices::thread::Threads;
use caisson_devices::vsock::HostPorts;
use caisson_hal::Hypervisor as _;
use caisson_hal_native::Native;
use caisson_machine::{Console, Descriptors, Machine, Setup};
use caisson_wire::vmm::{Confine, End, Fd, Launch};

const MIB: u64 = 1 << 20;
/// A boot takes seconds even where the hardware is emulated.
const PATIENCE: Duration = Duration::from_secs(120);

/// A guest that was started.
struct Guest {
    machine: Box<dyn Machine>,
    console: Console,
    ends: Receiver<End>,
    connections: Receiver<(u32, UnixStream)>,
    begun: Instant,
}

/// Gives each connection of the guest to the test.
#[derive(Debug)]
struct Accept(Sender<(u32, UnixStream)>);

impl HostPorts for Accept {
    fn accept(&self, port: u32, stream: UnixStream) -> bool {
        self.0.send((port, stream)).is_ok()
    }
}

/// The guest's files, or `None` if nothing can run here and nobody said that it must.
fn guest() -> Option<PathBuf> {
    let needed = std::env::var("CAISSON_NEED").is_ok_and(|need| need == "kvm");
    let files = std::env::var_os("CAISSON_GUEST").map(PathBuf::from);
    if needed {
        return Some(files.expect("CAISSON_GUEST names the guest's files"));
    }
    let usable = Native::open().and_then(|native| native.probe());
    if let Err(why) = &usable {
        println!("not run: {why}");
    }
    files.filter(|_| usable.is_ok())
}

fn start(kernel: &str, vcpus: u32, memory: u64, words: &str) -> Option<Guest> {
    let files = guest()?;
    let open = |name: &str| OwnedFd::from(File::open(files.join(name)).unwrap());
    let console = Console::new(None);
    let (ended, ends) = channel();
    let (accept, connections) = channel();
    let begun = Instant::now();
    let setup = Setup {
        launch: Launch {
            version: caisson_wire::VERSION,
            sandbox: "boot".into(),
            vcpus,
            memory,
            kernel: Fd(0),
            initramfs: Fd(1),
            cmdline: format!(
                "{words} {}",
                std::env::var("CAISSON_BOOT_WORDS").unwrap_or_default()
            ),
            share: None,
            disks: vec![],
            nets: vec![],
            console: None,
            confine: Confine::Off,
            emulator: None,
        },
        descriptors: Descriptors::new(vec![open(kernel), open("initramfs.cpio")]),
        console: console.clone(),
        ports: Arc::new(Accept(accept)),
        threads: Threads::plain(),
        ended,
    };
    let mut machine = caisson_vmm::build::<Native>(setup).unwrap();
    let built = begun.elapsed();
    machine.start().unwrap();
    println!("built in {built:?}, started after {:?}", begun.elapsed());
    Some(Guest {
        machine,
        console,
        ends,
        connections,
        begun,
    })
}

impl Guest {
    /// Waits for the agent to dial out.
    fn connected(&self) -> (u32, UnixStream) {
        let connected = self.connections.recv_timeout(PATIENCE);
        let connected =
            connected.unwrap_or_else(|_| panic!("no agent; the console: {}", self.console.tail()));
        println!(
            "agent after {:?}, {:?}",
            self.begun.elapsed(),
            self.machine.usage()
        );
        connected
    }

    fn ended(&self) -> End {
        let end = self.ends.recv_timeout(PATIENCE);
        let end = end.unwrap_or_else(|_| panic!("no end; the console: {}", self.console.tail()));
        println!("ended after {:?}: {end:?}", self.begun.elapsed());
        if std::env::var_os("CAISSON_BOOT_WORDS").is_some() {
            println!("{}", self.console.tail());
        }
        end
    }
}

/// The agent connects, loses its control plane, and powers the guest off.
fn boots(kernel: &str, vcpus: u32, memory: u64) {
    let Some(guest) = start(kernel, vcpus, memory, "") else {
        return;
    };
    let (port, stream) = guest.connected();
    assert_eq!(port, caisson_wire::agent::CONTROL_PORT);
    drop(stream);
    assert_eq!(guest.ended(), End::PowerOff, "{}", guest.console.tail());
}

#[test]
fn a_vmlinux_boots_to_the_agent_and_powers_off() {
    boots("vmlinux", 1, 256 * MIB);
}

#[test]
fn a_bzimage_boots_with_two_vcpus() {
    boots("vmlinuz", 2, 256 * MIB);
}

#[test]
fn memory_goes_on_beyond_the_hole() {
    boots("vmlinux", 2, 5 * 1024 * MIB);
}

#[test]
fn a_guest_without_an_init_panics_and_the_console_says_so() {
    let Some(guest) = start("vmlinux", 1, 256 * MIB, "rdinit=/none") else {
        return;
    };
    assert_eq!(guest.ended(), End::Reset);
    let console = guest.console.tail();
    assert!(console.contains("Kernel panic"), "{console}");
}

#[test]
fn a_paused_guest_goes_on() {
    let Some(mut guest) = start("vmlinux", 2, 256 * MIB, "") else {
        return;
    };
    guest.machine.pause().unwrap();
    guest.machine.resume().unwrap();
    let (_, stream) = guest.connected();
    guest.machine.pause().unwrap();
    let before = guest.machine.usage().vcpu_us;
    assert_eq!(
        guest.machine.usage().vcpu_us,
        before,
        "a paused guest takes no time"
    );
    guest.machine.resume().unwrap();
    drop(stream);
    assert_eq!(guest.ended(), End::PowerOff, "{}", guest.console.tail());
}
