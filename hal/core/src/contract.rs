//! Traits and values of the contract.

use std::fmt::{self, Debug};
use std::sync::Arc;
use std::time::{Duration, Instant};

use caisson_arch::{Arch, GuestAddress};
use vm_memory::MmapRegion;

use crate::os::Event;

/// A wired interrupt input of the VM's main controller: an IOAPIC pin on x86_64, an SPI number counted
/// from zero (INTID - 32) on aarch64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Line(pub u32);

/// A message-signalled interrupt exactly as the guest wrote it in the MSI-X table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    /// Guest-physical doorbell address (LAPIC window, GICv2m or ITS frame).
    pub address: GuestAddress,
    /// Payload written to the doorbell.
    pub data: u32,
    /// PCI requester id, needed by the ITS; `None` where the bus has none.
    pub device: Option<u32>,
}

/// Index of a virtual CPU, dense from zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VcpuId(pub u32);

/// A backend failure: what was being done, and what the system said.
#[derive(Debug, thiserror::Error)]
#[error("cannot {op} ({backend}): {source}")]
pub struct Failed {
    /// The operation, as a verb phrase: "map guest memory".
    pub op: &'static str,
    /// The backend's name.
    pub backend: &'static str,
    /// The cause.
    pub source: std::io::Error,
}

/// Shorthand for this crate.
pub type Result<T> = std::result::Result<T, Failed>;

/// What this backend accelerates.
///
/// Everything absent here is emulated above the HAL; nothing here changes what the guest can observe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent powers, each named")]
pub struct Accel {
    /// The kernel turns an event descriptor into an interrupt (KVM, MSHV).
    pub irq_event: bool,
    /// The kernel turns a guest store into an event (KVM, MSHV).
    pub doorbell: bool,
    /// The hypervisor parks halted vCPUs itself; [`Exit::Idle`] never appears.
    pub halt_in_kernel: bool,
    /// Written pages are tracked by hardware or kernel.
    pub dirty_log: bool,
}

/// Everything a VM needs at birth.
///
/// Backends differ in the *order* they want these (HVF: GIC before vCPUs; MSHV: properties before
/// initialise), so the order is the backend's business and the caller hands over the whole set.
#[derive(Clone, Debug)]
pub struct VmSpec<A: Arch> {
    /// Number of vCPUs, all created up front.
    pub vcpus: u32,
    /// Guest-physical address width in bits.
    pub phys_bits: u8,
    /// Interrupt controller layout.
    pub irq: A::IrqLayout,
    /// What the guest may know about its processor.
    pub cpu: A::CpuPolicy,
}

/// An open hypervisor.
pub trait Hypervisor: Sized + Send + Sync + 'static {
    /// Guest architecture this build runs.
    type Arch: Arch;
    /// Its machines.
    type Vm: Vm<Arch = Self::Arch>;
    /// A vCPU that no thread owns yet.
    type Seat: Seat<Arch = Self::Arch>;
    /// Short name for messages: "kvm".
    const NAME: &'static str;

    /// Opens the device or framework and checks its version.
    ///
    /// # Errors
    /// Fails if the hypervisor is absent, forbidden or too old; the error says which.
    fn open() -> Result<Self>;
    /// Checks that Linux guests run here at a sane speed, not merely that the device opens.
    ///
    /// Takes under 20 ms.
    ///
    /// # Errors
    /// Fails with the reason in one sentence if a required capability is missing or the measured
    /// speed is that of an interpreter.
    fn probe(&self) -> Result<()>;
    /// What the backend accelerates.
    fn accel(&self) -> Accel;
    /// Creates the machine, its interrupt controller and all its seats.
    ///
    /// # Errors
    /// Fails if the system refuses any part of it; nothing is left behind then.
    fn create(&self, spec: &VmSpec<Self::Arch>) -> Result<(Self::Vm, Vec<Self::Seat>)>;
}

/// Host memory that backs a guest range.
pub type Region = MmapRegion;

/// What the guest may do to a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Loads, stores, fetches.
    Full,
    /// Loads and fetches; stores exit.
    ReadOnly,
}

/// A virtual machine: memory map, interrupts, clock.
pub trait Vm: Send + Sync + 'static {
    /// Guest architecture.
    type Arch: Arch;
    /// Maps `region` into the guest at `at`.
    ///
    /// The VM keeps a reference until it is unmapped, so the host pages outlive the mapping.
    ///
    /// # Errors
    /// Fails if `at` or the length is not page-aligned, or the range overlaps an earlier one.
    fn map(&self, at: GuestAddress, region: Arc<Region>, access: Access) -> Result<()>;
    /// Removes a mapping made by [`Vm::map`].
    ///
    /// # Errors
    /// Fails if nothing was mapped at `at`.
    fn unmap(&self, at: GuestAddress) -> Result<()>;
    /// The interrupt input side, shared by every device.
    fn interrupts(&self) -> Arc<dyn Interrupts>;
    /// Kernel fast paths, where the backend has them.
    fn fast_paths(&self) -> Option<Arc<dyn FastPaths>> {
        None
    }
    /// Pages written since the last call, of the mapping at `at`: one bit a host page, lowest first.
    ///
    /// The first call starts the tracking and reports every page as written.
    ///
    /// # Errors
    /// Fails if nothing is mapped at `at` or the backend has no dirty log.
    fn dirty_pages(&self, at: GuestAddress) -> Result<Vec<u64>>;
    /// Copies out interrupt controller and clock. Every vCPU must be out of the guest.
    ///
    /// # Errors
    /// Fails if the system refuses to hand out a part of the state.
    fn save(&self) -> Result<<Self::Arch as Arch>::VmState>;
    /// The inverse of [`Vm::save`], on a machine of the same [`VmSpec`].
    ///
    /// # Errors
    /// Fails if the state's version is unknown or the system refuses a part of it.
    fn restore(&self, state: &<Self::Arch as Arch>::VmState) -> Result<()>;
}

/// Raising interrupts. Devices see this and never a backend.
pub trait Interrupts: Send + Sync {
    /// Drives a level-triggered line.
    ///
    /// # Errors
    /// Fails if the controller has no such line.
    fn set_line(&self, line: Line, high: bool) -> Result<()>;
    /// Delivers a message-signalled interrupt.
    ///
    /// # Errors
    /// Fails if the address is no interrupt doorbell.
    fn send_msi(&self, msi: Msi) -> Result<()>;
}

/// Optional kernel shortcuts between events and the guest; `runtime/vmm` supplies each fallback.
pub trait FastPaths: Send + Sync {
    /// Has the kernel signal `event` when the guest stores to `at` (a 2-byte `value`, where given).
    ///
    /// # Errors
    /// Fails if the same doorbell is bound already.
    fn bind_doorbell(&self, at: GuestAddress, value: Option<u16>, event: &Event) -> Result<()>;
    /// Undoes [`FastPaths::bind_doorbell`] with the same arguments.
    ///
    /// # Errors
    /// Fails if no such doorbell is bound.
    fn unbind_doorbell(&self, at: GuestAddress, value: Option<u16>, event: &Event) -> Result<()>;
    /// Has the kernel raise `msi` when `event` is signalled; binding the same event again re-targets it.
    ///
    /// # Errors
    /// Fails if the kernel's routing table is full.
    fn bind_irq(&self, event: &Event, msi: Msi) -> Result<()>;
    /// Undoes [`FastPaths::bind_irq`].
    ///
    /// # Errors
    /// Fails if `event` is not bound.
    fn unbind_irq(&self, event: &Event) -> Result<()>;
}

/// A vCPU waiting for its thread.
pub trait Seat: Send + 'static {
    /// Guest architecture.
    type Arch: Arch;
    /// The bound vCPU. Not `Send`: HVF ties a vCPU to its creating thread.
    type Vcpu: Vcpu<Arch = Self::Arch>;
    /// Which vCPU this is.
    fn id(&self) -> VcpuId;
    /// A handle that interrupts the vCPU; valid before and after `bind`.
    fn kicker(&self) -> Kicker;
    /// Creates the vCPU on the calling thread, which must then run it.
    ///
    /// # Errors
    /// Fails if the system refuses another vCPU.
    fn bind(self) -> Result<Self::Vcpu>;
}

/// A running vCPU, owned by one thread.
pub trait Vcpu {
    /// Guest architecture.
    type Arch: Arch;
    /// Runs the guest until the caller has to decide something.
    ///
    /// Loads and stores to unmapped addresses go to `io` and are *completed* before this returns, however
    /// many exits that takes. Therefore: whenever `run` has returned, the state is consistent.
    ///
    /// # Errors
    /// Fails if the hypervisor itself fails; what the *guest* does wrong is an [`Exit::Crash`].
    fn run(&mut self, io: &mut dyn GuestIo) -> Result<Exit<Self::Arch>>;
    /// Sets the entry state of a boot protocol.
    ///
    /// # Errors
    /// Fails if the hypervisor refuses a register.
    fn set_boot_regs(&mut self, regs: &<Self::Arch as Arch>::BootRegs) -> Result<()>;
    /// Copies out everything needed to resume elsewhere.
    ///
    /// # Errors
    /// Fails if the hypervisor refuses to hand out a part of the state.
    fn save(&mut self) -> Result<<Self::Arch as Arch>::VcpuState>;
    /// The inverse of [`Vcpu::save`].
    ///
    /// # Errors
    /// Fails if the state's version is unknown or a part of it is refused.
    fn restore(&mut self, state: &<Self::Arch as Arch>::VcpuState) -> Result<()>;
}

/// The device side, as a vCPU sees it.
pub trait GuestIo {
    /// Completes a load; an unclaimed address reads as all ones.
    fn load(&mut self, at: GuestAddress, data: &mut [u8]);
    /// Completes a store; an unclaimed address swallows it.
    fn store(&mut self, at: GuestAddress, data: &[u8]);
    /// Completes an x86 `in`. Never called for other guests.
    fn port_in(&mut self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    /// Completes an x86 `out`. Never called for other guests.
    fn port_out(&mut self, _port: u16, _data: &[u8]) {}
    /// Whether the access just completed asked for the machine to stop or restart, as [`Exit::PowerOff`]
    /// or [`Exit::Reset`]; `run` then returns with it.
    fn verdict(&mut self) -> Option<Verdict> {
        None
    }
}

/// What a device's register asked of the whole machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Power off (for example the ACPI sleep control register).
    PowerOff,
    /// Restart (for example port 0x64 with 0xfe, or the ACPI reset register).
    Reset,
}

/// Why [`Vcpu::run`] returned. Few, because most exits are settled below.
#[derive(Debug, PartialEq)]
pub enum Exit<A: Arch> {
    /// A [`Kicker`] was used.
    Kicked,
    /// The guest waits for an interrupt; park until one arrives or `until`.
    Idle {
        /// Guest timer deadline, if armed.
        until: Option<Instant>,
    },
    /// The guest asks to start another vCPU.
    CpuOn(A::CpuOn),
    /// The guest powered off.
    PowerOff,
    /// The guest rebooted.
    Reset,
    /// The vCPU cannot continue; the text is for the log and the exit report.
    Crash(String),
}

/// Interrupts one vCPU from any thread.
///
/// Level-triggered and coalescing: after [`Kicker::kick`] returns, the current `run` or else the next one
/// returns [`Exit::Kicked`], exactly once.
#[derive(Clone)]
pub struct Kicker(Arc<dyn Fn() + Send + Sync>);

impl Kicker {
    /// Wraps a backend's mechanism.
    pub fn new(kick: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(kick))
    }

    /// Requests the exit.
    pub fn kick(&self) {
        (self.0)();
    }
}

impl Debug for Kicker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kicker")
    }
}

/// Longest time a probe may take.
pub const PROBE_LIMIT: Duration = Duration::from_millis(20);
