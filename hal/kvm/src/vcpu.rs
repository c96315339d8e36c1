//! A vCPU: from KVM's exits to the contract's.
//!
//! KVM reports a load, store or port access and completes it at the next entry; until then the registers are those of
//! the middle of an instruction. [`KvmVcpu::settle`] makes that entry, with `immediate_exit` set so that no further
//! instruction begins, before anything is reported upwards.

use std::fmt;
use std::fmt::Write as _;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use caisson_arch_x86_64::{BootRegs, VcpuState, X86_64};
use caisson_hal::{Exit, GuestAddress, GuestIo, Kicker, Result, Seat, Vcpu, VcpuId, Verdict};
use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::kick::{InternalError, Kick, RunPage};
use crate::vm::Machine;
use crate::{failed, kernel_said, x86_64};

/// A vCPU that no thread runs yet.
pub struct KvmSeat {
    pub(crate) id: VcpuId,
    pub(crate) fd: VcpuFd,
    pub(crate) kick: Arc<Kick>,
    pub(crate) processor: Arc<x86_64::Processor>,
    #[expect(
        dead_code,
        reason = "keeps the guest's memory: the kernel's VM lives as long as its last vCPU"
    )]
    pub(crate) machine: Arc<Machine>,
}

impl Seat for KvmSeat {
    type Arch = X86_64;
    type Vcpu = KvmVcpu;

    fn id(&self) -> VcpuId {
        self.id
    }

    fn kicker(&self) -> Kicker {
        let kick = self.kick.clone();
        Kicker::new(move || kick.request())
    }

    fn bind(mut self) -> Result<KvmVcpu> {
        let page = RunPage::of(&mut self.fd);
        self.kick
            .bind(&page)
            .map_err(|error| failed("prepare a thread for its vCPU", error))?;
        Ok(KvmVcpu {
            seat: self,
            page,
            pending: false,
            not_send: PhantomData,
        })
    }
}

impl fmt::Debug for KvmSeat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmSeat")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// A vCPU on its thread.
#[derive(Debug)]
pub struct KvmVcpu {
    seat: KvmSeat,
    page: RunPage,
    /// Whether an access was answered that KVM completes at the next entry.
    pending: bool,
    /// A kick goes to the thread that bound the vCPU.
    not_send: PhantomData<*const ()>,
}

impl Vcpu for KvmVcpu {
    type Arch = X86_64;

    fn run(&mut self, io: &mut dyn GuestIo) -> Result<Exit<X86_64>> {
        loop {
            if self.seat.kick.take(&self.page) {
                let Some(exit) = self.settle(io)? else {
                    return Ok(Exit::Kicked);
                };
                self.seat.kick.put_back();
                return Ok(exit);
            }
            match self.enter(io)? {
                Entered::Access => {
                    if let Some(verdict) = io.verdict() {
                        // What else the instruction does no longer matters; the machine ends.
                        self.settle(io)?;
                        return Ok(end(verdict));
                    }
                }
                Entered::Nothing => {}
                Entered::Exit(exit) => return Ok(exit),
            }
        }
    }

    fn set_boot_regs(&mut self, regs: &BootRegs) -> Result<()> {
        x86_64::set_boot_regs(&self.seat.fd, regs)
    }

    fn save(&mut self) -> Result<VcpuState> {
        x86_64::save_vcpu(&self.seat.fd, &self.seat.processor)
    }

    fn restore(&mut self, state: &VcpuState) -> Result<()> {
        x86_64::restore_vcpu(&self.seat.fd, state)
    }
}

impl KvmVcpu {
    /// Completes an access that is only half done. Something else to report may come out of that.
    fn settle(&mut self, io: &mut dyn GuestIo) -> Result<Option<Exit<X86_64>>> {
        let mut verdict = None;
        while self.pending {
            self.page.immediate_exit().store(1, Ordering::SeqCst);
            match self.enter(io)? {
                // The rest of an access that crosses a page, or of a string instruction.
                Entered::Access => verdict = verdict.or_else(|| io.verdict()),
                Entered::Nothing => {}
                Entered::Exit(exit) => return Ok(Some(verdict.map_or(exit, end))),
            }
        }
        Ok(verdict.map(end))
    }

    /// Enters the guest once and answers one access.
    fn enter(&mut self, io: &mut dyn GuestIo) -> Result<Entered> {
        self.pending = false;
        let exit = match self.seat.fd.run() {
            Ok(exit) => exit,
            Err(errno) => {
                return match errno.errno() {
                    // A kick, or a vCPU that waited for its start-up interrupt.
                    libc::EINTR | libc::EAGAIN => Ok(Entered::Nothing),
                    // The guest touched memory that the host could not supply.
                    libc::EFAULT | libc::EHWPOISON => {
                        Ok(self.crash("the host could not supply a page of guest memory"))
                    }
                    _ => Err(kernel_said("run a vCPU")(errno)),
                };
            }
        };
        match exit {
            VcpuExit::IoIn(port, data) => {
                for item in data.chunks_mut(self.page.port_width()) {
                    io.port_in(port, item);
                }
            }
            VcpuExit::IoOut(port, data) => {
                for item in data.chunks(self.page.port_width()) {
                    io.port_out(port, item);
                }
            }
            VcpuExit::MmioRead(at, data) => io.load(GuestAddress(at), data),
            VcpuExit::MmioWrite(at, data) => io.store(GuestAddress(at), data),
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => return Ok(Entered::Nothing),
            // A triple fault: the processor stops, and a PC's chipset resets it.
            VcpuExit::Shutdown => return Ok(Entered::Exit(Exit::Reset)),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => return Ok(Entered::Exit(Exit::PowerOff)),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => return Ok(Entered::Exit(Exit::Reset)),
            VcpuExit::InternalError => {
                let text = describe(self.page.internal_error());
                return Ok(self.crash(&text));
            }
            VcpuExit::FailEntry(reason, _) => {
                return Ok(self.crash(&format!(
                    "the processor refused the guest's state, reason {reason:#x}"
                )));
            }
            VcpuExit::MemoryFault { gpa, .. } => {
                return Ok(self.crash(&format!("guest memory at {gpa:#x} could not be supplied")));
            }
            other => {
                let text = format!("unexpected exit from KVM: {other:?}");
                return Ok(self.crash(&text));
            }
        }
        self.pending = true;
        Ok(Entered::Access)
    }

    fn crash(&self, why: &str) -> Entered {
        let mut text = why.to_owned();
        if let Ok(regs) = self.seat.fd.get_regs() {
            // Writing to a string does not fail.
            let _ = write!(text, ", at rip {:#x}", regs.rip);
        }
        Entered::Exit(Exit::Crash(text))
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.seat.kick.unbind();
    }
}

/// What one entry came to.
#[derive(Debug)]
enum Entered {
    /// An access was answered and awaits completion.
    Access,
    /// Nothing to report.
    Nothing,
    /// Something for the caller.
    Exit(Exit<X86_64>),
}

fn end(verdict: Verdict) -> Exit<X86_64> {
    match verdict {
        Verdict::PowerOff => Exit::PowerOff,
        Verdict::Reset => Exit::Reset,
    }
}

fn describe(error: InternalError) -> String {
    use kvm_bindings as kvm;
    let what = match error.suberror {
        kvm::KVM_INTERNAL_ERROR_EMULATION => "KVM cannot emulate an instruction",
        kvm::KVM_INTERNAL_ERROR_SIMUL_EX => "KVM met an exception during another",
        kvm::KVM_INTERNAL_ERROR_DELIVERY_EV => "KVM could not deliver an interrupt",
        kvm::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "KVM met an exit that it does not know",
        _ => "KVM cannot go on",
    };
    let mut text = format!("{what} (suberror {}", error.suberror);
    for word in error.data.iter().take(error.count) {
        // Writing to a string does not fail.
        let _ = write!(text, " {word:#x}");
    }
    text.push(')');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_internal_error_is_told_with_what_the_kernel_filled_in() {
        let mut data = [0; 16];
        data[0] = 0x10;
        let error = InternalError {
            suberror: 1,
            data,
            count: 1,
        };
        assert_eq!(
            describe(error),
            "KVM cannot emulate an instruction (suberror 1 0x10)"
        );
    }
}
