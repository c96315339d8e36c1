//! Whether Linux guests run here at a sane speed.
//!
//! On some hosts `/dev/kvm` opens and every call works, but the guest's kernel mode is interpreted. So a tiny guest is
//! timed: it counts down a register between two writes to a port. The time between two writes with nothing between them
//! is what an exit costs, and is taken off.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use caisson_arch_x86_64::{BootRegs, CpuPolicy, GeneralRegs, IrqLayout, Segment, SpecialRegs, Table};
use caisson_hal::{
    Access, Exit, GuestAddress, GuestIo, Hypervisor as _, Kicker, Region, Result, Seat as _, Vcpu as _,
    Verdict, Vm as _, VmSpec,
};
use vm_memory::VolatileMemory as _;

use crate::{Kvm, failed, refused, x86_64};

/// The only version there ever was (`Documentation/virt/kvm/api.rst`, KVM_GET_API_VERSION).
pub(crate) const API_VERSION: i32 = 12;

const OP: &str = "run Linux guests";
/// Instructions that one turn counts down: few, so that some turn is not disturbed by a busy host.
const COUNTED: u32 = 2000;
/// Below this rate it is an interpreter: those were seen at half a million to 2 million instructions a second, hardware
/// and emulated hardware above 100 million. In between lies what the cost of an exit varies by.
const SANE_RATE: u64 = 5_000_000;
/// Turns after which a guest that never showed a sane rate is an interpreter's. Turns rather than time: where KVM itself
/// is emulated the first exits take milliseconds, and a busy host disturbs some turns.
const TURNS: u32 = 5;
/// When to give up on a guest that does not come that far.
const PATIENCE: Duration = Duration::from_millis(100);

pub(crate) fn probe(kvm: &Kvm) -> Result<()> {
    let missing: Vec<_> = x86_64::NEEDED
        .iter()
        .filter(|(cap, _)| !kvm.0.check_extension(*cap))
        .map(|(_, name)| *name)
        .collect();
    if !missing.is_empty() {
        let text = format!(
            "this kernel's KVM lacks {}; use Linux 4.11 or newer",
            missing.join(", ")
        );
        return Err(failed(OP, io::Error::new(ErrorKind::Unsupported, text)));
    }
    let rate = measure(kvm)?;
    if rate >= SANE_RATE {
        return Ok(());
    }
    let text = format!(
        "KVM is present but not hardware-accelerated (about {rate} instructions a second); enable VT-x or AMD-V in the \
         firmware, or nested virtualization if this is a virtual machine"
    );
    Err(failed(OP, io::Error::new(ErrorKind::Unsupported, text)))
}

/// What to tell somebody whose `/dev/kvm` does not open.
pub(crate) fn explain_open(error: io::Error) -> io::Error {
    let advice = match error.kind() {
        ErrorKind::PermissionDenied => "permission denied; add your user to the group \"kvm\"",
        ErrorKind::NotFound => {
            "there is no such device; load the module kvm_intel or kvm_amd, or enable nested virtualization if this \
             is a virtual machine"
        }
        _ if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => {
            "the processor's virtualization is not available; enable VT-x or AMD-V in the firmware"
        }
        _ => return error,
    };
    io::Error::new(error.kind(), advice)
}

/// Instructions a second that a guest's kernel mode runs at.
fn measure(kvm: &Kvm) -> Result<u64> {
    let spec = VmSpec {
        vcpus: 1,
        phys_bits: 0,
        irq: IrqLayout::default(),
        cpu: CpuPolicy::default(),
    };
    let (vm, seats) = kvm.create(&spec)?;
    let region = Region::new(GUEST_SIZE).map_err(|error| failed(OP, io::Error::other(error)))?;
    for (at, bytes) in guest() {
        let slice = region
            .get_slice(at, bytes.len())
            .map_err(|error| failed(OP, io::Error::other(error)))?;
        slice.copy_from(&bytes);
    }
    vm.map(GuestAddress(0), Arc::new(region), Access::Full)?;
    let seat = seats.into_iter().next();
    let seat = seat.ok_or_else(|| refused(OP, ErrorKind::NotFound, "KVM created no vCPU"))?;
    let kicker = seat.kicker();
    let mut vcpu = seat.bind()?;
    vcpu.set_boot_regs(&entry())?;
    let mut stopwatch = Stopwatch::default();
    let exit = bounded(&kicker, || vcpu.run(&mut stopwatch))?;
    drop(vcpu);
    // The kernel takes tens of milliseconds to end a machine, for which nobody needs to wait.
    let _ = std::thread::Builder::new().spawn(move || drop(vm));
    match exit {
        // Not one turn in all that time.
        Exit::Kicked if stopwatch.rate == 0 => Ok(rate(COUNTED, PATIENCE, Duration::ZERO)),
        Exit::PowerOff | Exit::Kicked => Ok(stopwatch.rate),
        other => {
            let text = format!("KVM cannot run a guest of ten instructions: {other:?}");
            Err(failed(OP, io::Error::new(ErrorKind::Unsupported, text)))
        }
    }
}

/// Runs `body`, and kicks once the patience is over.
fn bounded<T>(kicker: &Kicker, body: impl FnOnce() -> T) -> T {
    std::thread::scope(|scope| {
        let (done, waits) = channel::<()>();
        scope.spawn(move || {
            if waits.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                kicker.kick();
            }
        });
        let result = body();
        drop(done);
        result
    })
}

/// Times the guest's writes.
#[derive(Debug, Default)]
struct Stopwatch {
    last: Option<Instant>,
    /// The least that an exit has cost.
    exit: Option<Duration>,
    /// The best rate so far.
    rate: u64,
    /// How often the guest has counted.
    turns: u32,
}

impl GuestIo for Stopwatch {
    fn load(&mut self, _at: GuestAddress, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn store(&mut self, _at: GuestAddress, _data: &[u8]) {}

    fn port_out(&mut self, port: u16, _data: &[u8]) {
        let now = Instant::now();
        let lap = self.last.map(|last| now.saturating_duration_since(last));
        self.last = Some(now);
        match (port, lap, self.exit) {
            (EXIT_PORT, Some(lap), exit) => self.exit = Some(exit.map_or(lap, |exit| exit.min(lap))),
            (COUNT_PORT, Some(lap), Some(exit)) => {
                self.rate = self.rate.max(rate(COUNTED, lap, exit));
                self.turns = self.turns.saturating_add(1);
            }
            _ => {}
        }
    }

    fn verdict(&mut self) -> Option<Verdict> {
        (self.rate >= SANE_RATE || self.turns >= TURNS).then_some(Verdict::PowerOff)
    }
}

/// Instructions a second, when `lap` includes an exit.
fn rate(instructions: u32, lap: Duration, exit: Duration) -> u64 {
    let nanos = lap.saturating_sub(exit).as_nanos().max(1);
    u64::try_from(u128::from(instructions) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
}

/// Ports that the guest writes to: after nothing, and after counting.
const EXIT_PORT: u16 = 0x10;
const COUNT_PORT: u16 = 0x11;

/// Page tables from 0x1000, code at 0x4000.
const GUEST_SIZE: usize = 0x5000;
const CODE: usize = 0x4000;

fn guest() -> [(usize, Vec<u8>); 4] {
    let table = |entry: u64| entry.to_le_bytes().to_vec();
    let mut code = vec![
        0xe6, 0x10, // out 0x10, al
        0xe6, 0x10, // out 0x10, al
        0xe6, 0x10, // out 0x10, al
        0xe6, 0x10, // out 0x10, al
        0xb9, // mov ecx, COUNTED / 2
    ];
    code.extend((COUNTED / 2).to_le_bytes());
    code.extend([
        0xff, 0xc9, // again: dec ecx
        0x75, 0xfc, // jnz again
        0xe6, 0x11, // out 0x11, al
        0xeb, 0xeb, // jmp to the start
    ]);
    [
        (0x1000, table(0x2003)), // level 4: the next table, present and writable
        (0x2000, table(0x3003)), // level 3
        (0x3000, table(0x0083)), // level 2: a 2 MiB page at zero
        (CODE, code),
    ]
}

/// 64-bit mode with paging (Intel SDM volume 3, section "IA-32e Mode").
fn entry() -> BootRegs {
    const CODE_64: u32 = 0xa09b; // present, code, read, accessed; 64-bit, in pages
    const DATA: u32 = 0xc093; // present, data, write, accessed; 32-bit, in pages
    const TASK: u32 = 0x8b; // present, busy 64-bit task state
    const UNUSABLE: u32 = 0x1_0000;
    let segment = |selector, limit, access| Segment {
        selector,
        base: 0,
        limit,
        access,
    };
    let data = segment(0x10, u32::MAX, DATA);
    BootRegs {
        general: GeneralRegs {
            rip: CODE as u64,
            rflags: 2,
            ..Default::default()
        },
        special: SpecialRegs {
            cs: segment(0x8, u32::MAX, CODE_64),
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: segment(0x18, 0x67, TASK),
            ldt: segment(0, 0, UNUSABLE),
            gdt: Table::default(),
            idt: Table::default(),
            cr0: 0x8000_0031, // paging, native FPU errors, extension type, protected mode
            cr3: 0x1000,
            cr4: 0x20,   // physical address extension
            efer: 0x500, // long mode enabled and active
            ..Default::default()
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_leaves_the_exit_out() {
        let micros = Duration::from_micros;
        for (lap, exit, want) in [
            (1010, 10, 1_000_000),
            (400, 300, 10_000_000),
            (5, 10, 1_000_000_000_000),
        ] {
            assert_eq!(rate(1000, micros(lap), micros(exit)), want, "{lap} {exit}");
        }
    }

    #[test]
    fn a_device_that_does_not_open_is_explained() {
        for (errno, want) in [
            (libc::EACCES, "group \"kvm\""),
            (libc::ENOENT, "load the module"),
            (libc::ENODEV, "enable VT-x"),
        ] {
            let text = explain_open(io::Error::from_raw_os_error(errno)).to_string();
            assert!(text.contains(want), "{text}");
        }
    }
}
