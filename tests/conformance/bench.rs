//! What every conformance guest needs: a machine, code in it, and a record of what it did.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use caisson_arch_x86_64::{BootRegs, CpuPolicy, GeneralRegs, IrqLayout, Segment, SpecialRegs, Table, X86_64};
use caisson_hal::{Access, Exit, GuestAddress, GuestIo, Hypervisor, Region, Seat, Vcpu, Verdict, Vm, VmSpec};
use vm_memory::VolatileMemory as _;

/// Runs a case with a deadline, or says why it is skipped.
///
/// `CAISSON_NEED` turns a reason to skip into a failure: the backend's name if it must open, and "hardware" if it must
/// not interpret its guests either.
pub(crate) fn check<H: Hypervisor<Arch = X86_64>>(name: &str, case: impl FnOnce(&H)) {
    let wanted = std::env::var("CAISSON_NEED").unwrap_or_default();
    let hypervisor = match H::open() {
        Ok(hypervisor) => hypervisor,
        Err(error) => {
            assert!(!wanted.contains(H::NAME), "{} is needed: {error}", H::NAME);
            println!("skipped {name}: {error}");
            return;
        }
    };
    if wanted.contains("hardware")
        && let Err(error) = hypervisor.probe()
    {
        panic!("hardware virtualization is needed: {error}");
    }
    within(DEADLINE, name, || case(&hypervisor));
}

/// Ends the whole process if `body` takes too long: a guest that hangs cannot be unwound.
fn within(limit: Duration, name: &str, body: impl FnOnce()) {
    let (done, waits) = channel::<()>();
    let text = format!("{name}: not over after {limit:?}");
    let watchdog = std::thread::spawn(move || {
        if waits.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            eprintln!("{text}");
            std::process::abort();
        }
    });
    body();
    drop(done);
    watchdog.join().expect("the watchdog does not panic");
}

/// A machine with [`RAM`] bytes at zero.
pub(crate) struct Bench<H: Hypervisor> {
    pub(crate) vm: H::Vm,
    pub(crate) seats: Vec<H::Seat>,
    pub(crate) ram: Arc<Region>,
}

/// The vCPU type of a backend.
pub(crate) type VcpuOf<H> = <<H as Hypervisor>::Seat as Seat>::Vcpu;

impl<H: Hypervisor<Arch = X86_64>> Bench<H> {
    /// A machine with `code` at [`CODE`].
    pub(crate) fn new(hypervisor: &H, vcpus: u32, code: &[&[u8]]) -> Self {
        let spec = VmSpec {
            vcpus,
            phys_bits: 0,
            irq: IrqLayout::default(),
            cpu: CpuPolicy::default(),
        };
        let (vm, seats) = hypervisor.create(&spec).unwrap();
        let ram = Arc::new(Region::new(RAM).unwrap());
        vm.map(GuestAddress(0), ram.clone(), Access::Full).unwrap();
        let bench = Self { vm, seats, ram };
        bench.write(CODE, &code.concat());
        // Identity-mapped: the first GiB, and the GiB below 4 GiB with the interrupt controllers, in 2 MiB pages.
        let large = |base: u64| (0..512).flat_map(move |page: u64| (base | page << 21 | 0x83).to_le_bytes());
        bench.write(0x9000, &0xa003_u64.to_le_bytes());
        bench.write(0xa000, &0xb003_u64.to_le_bytes());
        bench.write(0xa018, &0xc003_u64.to_le_bytes());
        bench.write(0xb000, &large(0).collect::<Vec<_>>());
        bench.write(0xc000, &large(0xc000_0000).collect::<Vec<_>>());
        // Null, 64-bit code, data.
        let descriptors = [0, 0x00af_9b00_0000_ffff_u64, 0x00cf_9300_0000_ffff];
        bench.write(GDT, &descriptors.map(u64::to_le_bytes).concat());
        bench
    }

    pub(crate) fn write(&self, at: usize, bytes: &[u8]) {
        self.ram.get_slice(at, bytes.len()).unwrap().copy_from(bytes);
    }

    pub(crate) fn read(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.get_slice(at, len).unwrap().copy_to(&mut bytes);
        bytes
    }

    /// Points `vector` at `handler` (Intel SDM volume 3, section "64-Bit Mode IDT").
    pub(crate) fn gate(&self, vector: usize, handler: u16) {
        let [low, high] = handler.to_le_bytes();
        self.write(
            IDT + vector * 16,
            &[low, high, 8, 0, 0, 0x8e, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        );
    }

    /// The next seat's vCPU, on this thread.
    pub(crate) fn bind(&mut self, regs: &BootRegs) -> VcpuOf<H> {
        let mut vcpu = self.seats.remove(0).bind().unwrap();
        vcpu.set_boot_regs(regs).unwrap();
        vcpu
    }

    /// Runs a guest of one vCPU to its end.
    pub(crate) fn run(&mut self, regs: &BootRegs, io: &mut Log<'_>) -> Exit<X86_64> {
        self.bind(regs).run(io).unwrap()
    }
}

/// Runs `code` in 64-bit mode until it writes to [`END`], and gives what it did before.
pub(crate) fn run_long<H: Hypervisor<Arch = X86_64>>(
    hypervisor: &H,
    code: &[&[u8]],
    io: &mut Log<'_>,
) -> Bench<H> {
    let mut bench = Bench::new(hypervisor, 1, code);
    assert_eq!(bench.run(&long(), io), Exit::PowerOff, "after {:?}", io.seen);
    bench
}

/// Bytes of memory at address zero.
pub(crate) const RAM: usize = 0x4_0000;
/// Where code is.
pub(crate) const CODE: usize = 0x1000;
/// Where a second piece of code is, such as an interrupt handler.
pub(crate) const HANDLER: u16 = 0x2000;
/// Where a second CPU starts.
pub(crate) const SECOND: usize = 0x3000;
/// Memory for the guest's use.
pub(crate) const DATA: usize = 0x1_0000;
/// An address range with no memory.
pub(crate) const DEVICE: u64 = 0x1000_0000;
/// The port whose writing ends a guest.
pub(crate) const END: u16 = 0xf4;
const GDT: usize = 0xd000;
const IDT: usize = 0xe000;
/// Generous: an emulated host is a hundred times slower than a real one.
const DEADLINE: Duration = Duration::from_secs(60);

/// Writes to [`END`].
pub(crate) const FINISH: &[u8] = &[0xe6, 0xf4]; // out 0xf4, al
/// Goes nowhere.
pub(crate) const SPIN: &[u8] = &[0xeb, 0xfe]; // jmp to itself

/// What a guest did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Load(u64, usize),
    Store(u64, Vec<u8>),
    In(u16, usize),
    Out(u16, Vec<u8>),
}

/// The device side: records everything, and answers loads with [`byte_at`] of each address.
pub(crate) struct Log<'a> {
    pub(crate) seen: Vec<Seen>,
    /// Called after each access was recorded.
    pub(crate) hook: Box<dyn FnMut(&Seen) + 'a>,
    /// Whether loads are answered as if nothing were there.
    pub(crate) unclaimed: bool,
    verdict: Option<Verdict>,
    next_in: u8,
}

impl<'a> Log<'a> {
    pub(crate) fn new() -> Self {
        Self::hooked(|_| {})
    }

    pub(crate) fn hooked(hook: impl FnMut(&Seen) + 'a) -> Self {
        Self {
            seen: Vec::new(),
            hook: Box::new(hook),
            unclaimed: false,
            verdict: None,
            next_in: 0x11,
        }
    }

    fn record(&mut self, seen: Seen) {
        (self.hook)(&seen);
        self.seen.push(seen);
    }

    /// What was written to `port`, in order.
    pub(crate) fn out(&self, port: u16) -> Vec<Vec<u8>> {
        let data = |seen: &Seen| match seen {
            Seen::Out(to, data) if *to == port => Some(data.clone()),
            _ => None,
        };
        self.seen.iter().filter_map(data).collect()
    }

    /// Each byte that was stored, with its address.
    pub(crate) fn stored(&self) -> Vec<(u64, u8)> {
        let mut bytes = Vec::new();
        for seen in &self.seen {
            if let Seen::Store(at, data) = seen {
                bytes.extend((*at..).zip(data.iter().copied()));
            }
        }
        bytes.sort_unstable();
        bytes
    }
}

/// What a load of one byte at `at` is answered with.
pub(crate) fn byte_at(at: u64) -> u8 {
    at.wrapping_mul(37).wrapping_add(11).to_le_bytes()[0]
}

impl GuestIo for Log<'_> {
    fn load(&mut self, at: GuestAddress, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(at.0..) {
            *byte = if self.unclaimed { 0xff } else { byte_at(at) };
        }
        self.record(Seen::Load(at.0, data.len()));
    }

    fn store(&mut self, at: GuestAddress, data: &[u8]) {
        self.record(Seen::Store(at.0, data.to_vec()));
    }

    /// Every byte is one more than the byte before.
    fn port_in(&mut self, port: u16, data: &mut [u8]) {
        for byte in data.iter_mut() {
            *byte = self.next_in;
            self.next_in = self.next_in.wrapping_add(1);
        }
        self.record(Seen::In(port, data.len()));
    }

    fn port_out(&mut self, port: u16, data: &[u8]) {
        if port == END {
            self.verdict = Some(Verdict::PowerOff);
            return;
        }
        self.record(Seen::Out(port, data.to_vec()));
    }

    fn verdict(&mut self) -> Option<Verdict> {
        self.verdict
    }
}

/// Real mode at [`CODE`], with flat segments.
pub(crate) fn real() -> BootRegs {
    let segment = |access| Segment {
        selector: 0,
        base: 0,
        limit: 0xffff,
        access,
    };
    let data = segment(0x93);
    BootRegs {
        general: GeneralRegs {
            rip: CODE as u64,
            rsp: 0x8000,
            rflags: 2,
            ..Default::default()
        },
        special: SpecialRegs {
            cs: segment(0x9b),
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: segment(0x8b),
            ldt: segment(0x82),
            gdt: Table {
                base: 0,
                limit: 0xffff,
            },
            idt: Table {
                base: 0,
                limit: 0x3ff,
            },
            cr0: 0x10,
            ..Default::default()
        },
    }
}

/// 64-bit mode at [`CODE`] with interrupts off, the tables of [`Bench::new`], and `rdi` at [`DEVICE`].
pub(crate) fn long() -> BootRegs {
    let segment = |selector, limit, access| Segment {
        selector,
        base: 0,
        limit,
        access,
    };
    let data = segment(0x10, u32::MAX, 0xc093);
    BootRegs {
        general: GeneralRegs {
            rip: CODE as u64,
            rsp: 0x8000,
            rdi: DEVICE,
            rflags: 2,
            ..Default::default()
        },
        special: SpecialRegs {
            cs: segment(0x8, u32::MAX, 0xa09b),
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: segment(0x18, 0x67, 0x8b),
            ldt: segment(0, 0, 0x1_0000),
            gdt: Table {
                base: GDT as u64,
                limit: 23,
            },
            idt: Table {
                base: IDT as u64,
                limit: 0xfff,
            },
            cr0: 0x8000_0031,
            cr3: 0x9000,
            cr4: 0x20,
            efer: 0x500,
            ..Default::default()
        },
    }
}
