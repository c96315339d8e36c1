//! The machine put together, and its life.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Instant;

use caisson_arch_x86_64::layout::{COM1_IRQ, Layout, WINDOW32};
use caisson_arch_x86_64::{BootRegs, CpuPolicy, IrqLayout, X86_64};
use caisson_devices::net::{Net, NetConfig};
use caisson_devices::pci::{PciRoot, PciRootConfig};
use caisson_devices::serial::Serial;
use caisson_devices::thread::Threads;
use caisson_devices::virtio::VirtioDevice;
use caisson_devices::vsock::Vsock;
use caisson_hal::{Access, Hypervisor, Line, Seat as _, Vm as _, VmSpec};
use caisson_machine::{BuildError, Machine, Setup};
use caisson_wire::vmm::Usage;

use crate::bus::{Bus, BusPort};
use crate::doorbells::DoorbellTable;
use crate::kernel::Kernel;
use crate::memory::Ram;
use crate::vcpu::{Ending, PATIENCE, VcpuThread};

/// Most vCPUs of a machine.
const MOST_VCPUS: u32 = 64;
/// The guest's address on its vsock: the first that is not reserved (virtio 1.2, 5.10.4). Each machine has a vsock of
/// its own, so all guests can have the same.
const GUEST_CID: u64 = 3;

/// Builds the machine over the hypervisor `H`.
///
/// No thread is started and the guest does not run yet; nothing is opened by path later.
///
/// # Errors
/// Fails with the stage and its cause if the hypervisor, a descriptor of the plan or memory cannot be had, or the
/// kernel cannot be booted.
pub fn build<H: Hypervisor<Arch = X86_64>>(setup: Setup) -> Result<Box<dyn Machine>, BuildError> {
    let hypervisor = H::open().map_err(stage("open the hypervisor"))?;
    Ok(Box::new(assemble(hypervisor, setup)?))
}

/// The machine.
///
/// Its parts are dropped in the order in which they are listed: threads are gone before what they use.
pub(crate) struct Assembled<H: Hypervisor> {
    phase: Phase<H>,
    vcpus: Vec<VcpuThread>,
    /// Number of the last pause.
    pauses: u64,
    threads: Threads,
    ending: Ending,
    bus: Arc<Bus>,
    /// Held for what it undoes when dropped.
    _vm: H::Vm,
    _hypervisor: H,
    ram: Ram,
}

/// Where in its life a machine is.
enum Phase<H: Hypervisor> {
    Built {
        seats: Vec<H::Seat>,
        entry: Box<BootRegs>,
    },
    Running,
    Paused,
    /// A start, pause or resume did not succeed.
    Broken,
}

pub(crate) fn assemble<H: Hypervisor<Arch = X86_64>>(
    hypervisor: H,
    mut setup: Setup,
) -> Result<Assembled<H>, BuildError> {
    let launch = &setup.launch;
    if !(1..=MOST_VCPUS).contains(&launch.vcpus) {
        let cause = format!("{} vCPUs; a machine has 1 to {MOST_VCPUS}", launch.vcpus);
        return Err(BuildError::new("create the machine", cause));
    }
    let layout = Layout::new(launch.memory).map_err(stage("lay out the guest's memory"))?;
    let ram = Ram::reserve(&layout).map_err(stage("reserve the guest's memory"))?;
    let kernel = Kernel {
        image: File::from(
            setup
                .descriptors
                .take(launch.kernel, "take the kernel's descriptor")?,
        ),
        initramfs: File::from(
            setup
                .descriptors
                .take(launch.initramfs, "take the initramfs's descriptor")?,
        ),
        words: &launch.cmdline,
        vcpus: launch.vcpus,
    };
    let entry = kernel.load(&ram.memory, &layout)?;
    let spec = VmSpec {
        vcpus: launch.vcpus,
        phys_bits: layout.phys_bits,
        irq: IrqLayout::default(),
        cpu: CpuPolicy::default(),
    };
    let (vm, seats) = hypervisor.create(&spec).map_err(stage("create the machine"))?;
    for (at, region) in &ram.regions {
        vm.map(*at, region.clone(), Access::Full)
            .map_err(stage("map the guest's memory"))?;
    }
    let doorbells = Arc::new(DoorbellTable::new(vm.fast_paths()));
    let pci = PciRoot::new(PciRootConfig {
        window32: WINDOW32,
        window64: layout.window64.clone(),
        doorbells: doorbells.clone(),
        interrupts: vm.interrupts(),
        memory: ram.memory.clone(),
        threads: setup.threads.clone(),
    });
    for device in devices(&mut setup)? {
        pci.add(device).map_err(stage("add a device"))?;
    }
    let console = setup.console.clone();
    let serial = Serial::new(
        move |bytes| console.write(bytes),
        Some((vm.interrupts(), Line(COM1_IRQ))),
    );
    let kickers = seats.iter().map(caisson_hal::Seat::kicker).collect();
    Ok(Assembled {
        phase: Phase::Built {
            seats,
            entry: Box::new(entry),
        },
        vcpus: Vec::new(),
        pauses: 0,
        threads: setup.threads,
        ending: Ending::new(setup.ended, kickers),
        bus: Arc::new(Bus {
            pci,
            doorbells,
            serial,
            config_address: AtomicU32::new(0),
        }),
        _vm: vm,
        _hypervisor: hypervisor,
        ram,
    })
}

/// The devices of the plan, in the order of their slots: those that every machine has first.
fn devices(setup: &mut Setup) -> Result<Vec<Box<dyn VirtioDevice>>, BuildError> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = vec![Box::new(Vsock::new(GUEST_CID, setup.ports.clone()))];
    for net in &setup.launch.nets {
        devices.push(Box::new(Net::new(NetConfig {
            tap: setup.descriptors.take(net.tap, "take a tap's descriptor")?,
            mac: net.mac,
            mtu: net.mtu,
        })));
    }
    Ok(devices)
}

impl<H: Hypervisor<Arch = X86_64>> Machine for Assembled<H> {
    fn name(&self) -> &'static str {
        H::NAME
    }

    fn start(&mut self) -> Result<(), BuildError> {
        const STAGE: &str = "start the vCPUs";
        let Phase::Built { seats, entry } = std::mem::replace(&mut self.phase, Phase::Broken) else {
            return Err(BuildError::new(STAGE, "the machine was started before"));
        };
        for seat in seats {
            // The others wait for the first one to start them.
            let entry = (seat.id().0 == 0).then(|| (*entry).clone());
            let port = BusPort::new(self.bus.clone());
            let vcpu = VcpuThread::spawn(&self.threads, seat, entry, port, self.ending.clone());
            self.vcpus.push(vcpu.map_err(stage(STAGE))?);
        }
        let deadline = Instant::now() + PATIENCE;
        for vcpu in &self.vcpus {
            vcpu.ready(deadline).map_err(stage(STAGE))?;
        }
        self.let_run();
        Ok(())
    }

    fn pause(&mut self) -> Result<(), BuildError> {
        const STAGE: &str = "pause the machine";
        match self.phase {
            Phase::Running => {}
            Phase::Paused => return Ok(()),
            Phase::Built { .. } | Phase::Broken => return Err(BuildError::new(STAGE, "it does not run")),
        }
        self.pauses += 1;
        for vcpu in &self.vcpus {
            vcpu.pause(self.pauses);
        }
        let deadline = Instant::now() + PATIENCE;
        let mut outcome = Ok(());
        for vcpu in &self.vcpus {
            outcome = outcome.and(vcpu.paused(self.pauses, deadline));
        }
        if let Err(cause) = outcome {
            // Those that did come out go on, so that the machine is as it was.
            self.let_run();
            return Err(BuildError::new(STAGE, cause));
        }
        self.bus.pci.pause();
        self.phase = Phase::Paused;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), BuildError> {
        const STAGE: &str = "resume the machine";
        match self.phase {
            Phase::Paused => {}
            Phase::Running => return Ok(()),
            Phase::Built { .. } | Phase::Broken => return Err(BuildError::new(STAGE, "it was not paused")),
        }
        self.bus.pci.resume().map_err(stage(STAGE))?;
        self.let_run();
        Ok(())
    }

    fn usage(&self) -> Usage {
        let time: std::time::Duration = self.vcpus.iter().map(VcpuThread::time).sum();
        Usage {
            guest_resident: self.ram.resident(),
            vcpu_us: u64::try_from(time.as_micros()).unwrap_or(u64::MAX),
        }
    }
}

impl<H: Hypervisor> Assembled<H> {
    fn let_run(&mut self) {
        for vcpu in &self.vcpus {
            vcpu.run();
        }
        self.phase = Phase::Running;
    }
}

/// What tests look at.
#[cfg(test)]
impl<H: Hypervisor> Assembled<H> {
    pub(crate) fn doorbells(&self) -> &DoorbellTable {
        &self.bus.doorbells
    }
    pub(crate) fn memory(&self) -> &caisson_devices::virtio::Memory {
        &self.ram.memory
    }
    pub(crate) fn hypervisor(&self) -> &H {
        &self._hypervisor
    }
}

impl<H: Hypervisor> Drop for Assembled<H> {
    fn drop(&mut self) {
        for vcpu in &self.vcpus {
            vcpu.leave();
        }
        let deadline = Instant::now() + PATIENCE;
        for vcpu in self.vcpus.drain(..) {
            vcpu.join(deadline);
        }
        // Before the memory goes that the devices' workers use.
        self.bus.pci.pause();
    }
}

/// Turns a cause into a [`BuildError`] of `stage`.
fn stage<E: Into<Box<dyn std::error::Error + Send + Sync>>>(stage: &'static str) -> impl Fn(E) -> BuildError {
    move |cause| BuildError::new(stage, cause)
}
