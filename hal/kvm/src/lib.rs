//! The KVM backend.
//!
//! Keeps the contract of [`caisson_hal`] on Linux's `/dev/kvm`: interrupt controllers and halted vCPUs are the
//! kernel's, accesses are completed before [`caisson_hal::Vcpu::run`] returns. What is specific to an architecture is in its
//! file (`x86_64.rs`): types converted, and KVM's order of calls. No type of `kvm-ioctls` is in a public signature.

mod fast_paths;
mod kick;
mod probe;
mod vcpu;
mod vm;
mod x86_64;

use std::fmt;
use std::io;
use std::sync::Arc;

use caisson_arch_x86_64::X86_64;
use caisson_hal::{Accel, Failed, Hypervisor, Result, VcpuId, VmSpec};
use kvm_ioctls::Cap;

use crate::kick::Kick;
pub use crate::vcpu::{KvmSeat, KvmVcpu};
pub use crate::vm::KvmVm;
use crate::vm::Machine;

/// The kernel's hypervisor.
pub struct Kvm(kvm_ioctls::Kvm);

impl Hypervisor for Kvm {
    type Arch = X86_64;
    type Vm = KvmVm;
    type Seat = KvmSeat;
    const NAME: &'static str = "kvm";

    fn open() -> Result<Self> {
        const OP: &str = "open /dev/kvm";
        let kvm = kvm_ioctls::Kvm::new().map_err(|errno| failed(OP, probe::explain_open(errno.into())))?;
        let version = kvm.get_api_version();
        if version != probe::API_VERSION {
            let text = format!(
                "its API version is {version}, and {} is needed; use Linux 4.11 or newer",
                probe::API_VERSION
            );
            return Err(failed(OP, io::Error::new(io::ErrorKind::Unsupported, text)));
        }
        Ok(Self(kvm))
    }

    fn probe(&self) -> Result<()> {
        probe::probe(self)
    }

    fn accel(&self) -> Accel {
        Accel {
            irq_event: self.0.check_extension(Cap::Irqfd) && self.0.check_extension(Cap::IrqRouting),
            doorbell: self.0.check_extension(Cap::Ioeventfd)
                && self.0.check_extension(Cap::IoeventfdNoLength),
            halt_in_kernel: true,
            dirty_log: true,
        }
    }

    fn create(&self, spec: &VmSpec<X86_64>) -> Result<(KvmVm, Vec<KvmSeat>)> {
        const OP: &str = "create a virtual machine";
        let most = self.0.get_max_vcpus().min(x86_64::MOST_VCPUS);
        if spec.vcpus == 0 || usize::try_from(spec.vcpus).map_or(true, |vcpus| vcpus > most) {
            let text = format!(
                "{} vCPUs asked for, and 1 to {most} are possible here",
                spec.vcpus
            );
            return Err(failed(OP, io::Error::new(io::ErrorKind::InvalidInput, text)));
        }
        let fd = self.0.create_vm().map_err(kernel_said(OP))?;
        x86_64::set_up_vm(&fd, spec)?;
        let processor = Arc::new(x86_64::Processor::read(&self.0)?);
        let machine = Arc::new(Machine::new(fd, self.0.get_nr_memslots()));
        let seat = |id| {
            let fd = machine
                .fd
                .create_vcpu(u64::from(id))
                .map_err(kernel_said("create a vCPU"))?;
            x86_64::set_up_vcpu(&fd, &processor, spec, id)?;
            Ok(KvmSeat {
                id: VcpuId(id),
                fd,
                kick: Arc::new(Kick::default()),
                processor: processor.clone(),
                machine: machine.clone(),
            })
        };
        let seats = (0..spec.vcpus).map(seat).collect::<Result<_>>()?;
        Ok((KvmVm::new(machine, self.accel()), seats))
    }
}

impl fmt::Debug for Kvm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kvm")
    }
}

/// An error of this backend.
fn failed(op: &'static str, source: io::Error) -> Failed {
    Failed {
        op,
        backend: Kvm::NAME,
        source,
    }
}

/// The same, of a failed system call.
fn kernel_said(op: &'static str) -> impl Fn(kvm_ioctls::Error) -> Failed {
    move |errno| failed(op, errno.into())
}

/// The same, of an argument that the contract refuses.
fn refused(op: &'static str, kind: io::ErrorKind, why: &str) -> Failed {
    failed(op, io::Error::new(kind, why))
}
