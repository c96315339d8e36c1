//! A backend that replays a script instead of running a guest.
//!
//! Ordinary code, not `cfg(test)`: any crate may use it, for any guest architecture, on any machine. It keeps the
//! whole contract of [`caisson_hal`], kicks and save and restore included, so that what is above the contract can
//! be tested without a hypervisor. Guest memory is mapped but never executed.
#![forbid(unsafe_code)]

mod vcpu;
mod vm;

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use caisson_hal::{Accel, Arch, Exit, Failed, GuestAddress, Hypervisor, Line, Msi, Result, VcpuId, VmSpec};

pub use vcpu::{ScriptedSeat, ScriptedVcpu};
pub use vm::ScriptedVm;

/// Name in messages.
const NAME: &str = "scripted";

/// One thing the pretend guest does.
#[derive(Debug)]
pub enum Step<A: Arch> {
    /// Stores, then goes on.
    Store(GuestAddress, Vec<u8>),
    /// Loads, and crashes if the device answers anything else.
    LoadExpect(GuestAddress, Vec<u8>),
    /// Writes to a port, then goes on.
    PortOut(u16, Vec<u8>),
    /// Reads a port, and crashes if the device answers anything else.
    PortExpect(u16, Vec<u8>),
    /// Spins until kicked.
    SpinUntilKicked,
    /// Leaves `run` with this.
    Exit(Exit<A>),
}

/// What the machine did, for assertions.
#[derive(Clone, Debug, PartialEq)]
pub enum Seen {
    /// A line was driven.
    Line(Line, bool),
    /// An MSI was sent.
    Msi(Msi),
    /// The entry state of a vCPU was set.
    BootRegs(VcpuId),
}

/// What happened so far, shared by everything that belongs to one machine.
#[derive(Clone, Debug, Default)]
pub(crate) struct Record(Arc<Mutex<Vec<Seen>>>);

impl Record {
    pub(crate) fn push(&self, seen: Seen) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(seen);
    }
}

/// The states that `save` hands out, because a script has none of its own.
#[derive(Clone, Debug)]
pub struct States<A: Arch> {
    /// Of every vCPU.
    pub vcpu: A::VcpuState,
    /// Of the machine.
    pub vm: A::VmState,
}

/// The scripted hypervisor.
#[derive(Debug)]
pub struct Scripted<A: Arch> {
    scripts: Mutex<VecDeque<Vec<Step<A>>>>,
    states: Option<States<A>>,
    record: Record,
}

impl<A: Arch> Scripted<A> {
    /// One script for each vCPU, the boot vCPU's first. A vCPU without a script crashes when it runs.
    pub fn new(scripts: impl IntoIterator<Item = Vec<Step<A>>>) -> Self {
        Self {
            scripts: Mutex::new(scripts.into_iter().collect()),
            states: None,
            record: Record::default(),
        }
    }

    /// Adds what `save` hands out and `restore` accepts; without it both fail.
    #[must_use]
    pub fn with_states(mut self, states: States<A>) -> Self {
        self.states = Some(states);
        self
    }

    /// What the machine did so far, oldest first; the record is empty afterwards.
    pub fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut *self.record.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<A: Arch> Hypervisor for Scripted<A> {
    type Arch = A;
    type Vm = ScriptedVm<A>;
    type Seat = ScriptedSeat<A>;
    const NAME: &'static str = NAME;

    fn open() -> Result<Self> {
        Ok(Self::new([]))
    }

    fn probe(&self) -> Result<()> {
        Ok(())
    }

    fn accel(&self) -> Accel {
        Accel::default()
    }

    fn create(&self, spec: &VmSpec<A>) -> Result<(ScriptedVm<A>, Vec<ScriptedSeat<A>>)> {
        let mut scripts = self.scripts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut seat = |id| {
            let script = scripts.pop_front().unwrap_or_default();
            ScriptedSeat::new(VcpuId(id), script, self.states.clone(), self.record.clone())
        };
        let seats = (0..spec.vcpus).map(&mut seat).collect();
        Ok((ScriptedVm::new(self.states.clone(), self.record.clone()), seats))
    }
}

/// An error of this backend.
pub(crate) fn failed(op: &'static str, why: io::ErrorKind) -> Failed {
    Failed {
        op,
        backend: NAME,
        source: why.into(),
    }
}

#[cfg(test)]
mod tests;
