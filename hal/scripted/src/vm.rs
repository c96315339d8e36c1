//! The scripted machine.

use std::collections::BTreeMap;
use std::fmt;
use std::io::ErrorKind;
use std::sync::{Arc, Mutex, PoisonError};

use caisson_hal::{Access, Arch, GuestAddress, Interrupts, Line, Msi, Region, Result, Vm};

use crate::{Record, Seen, States, failed};

/// Alignment of a mapping: the smallest page of every architecture, 4 KiB.
const PAGE: u64 = 4096;

/// The scripted machine.
pub struct ScriptedVm<A: Arch> {
    map: Mutex<BTreeMap<u64, Arc<Region>>>,
    states: Option<States<A>>,
    record: Record,
}

impl<A: Arch> ScriptedVm<A> {
    pub(crate) fn new(states: Option<States<A>>, record: Record) -> Self {
        Self {
            map: Mutex::default(),
            states,
            record,
        }
    }
}

impl<A: Arch> fmt::Debug for ScriptedVm<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScriptedVm").finish_non_exhaustive()
    }
}

impl<A: Arch> Vm for ScriptedVm<A> {
    type Arch = A;

    fn map(&self, at: GuestAddress, region: Arc<Region>, _access: Access) -> Result<()> {
        const OP: &str = "map guest memory";
        let len = region.size() as u64;
        let end =
            at.0.checked_add(len)
                .ok_or_else(|| failed(OP, ErrorKind::InvalidInput))?;
        if len == 0 || !at.0.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            return Err(failed(OP, ErrorKind::InvalidInput));
        }
        let mut map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        let before = map.range(..end).next_back();
        if before.is_some_and(|(start, other)| start + other.size() as u64 > at.0) {
            return Err(failed(OP, ErrorKind::AlreadyExists));
        }
        map.insert(at.0, region);
        Ok(())
    }

    fn unmap(&self, at: GuestAddress) -> Result<()> {
        let mut map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        map.remove(&at.0)
            .map(drop)
            .ok_or_else(|| failed("unmap guest memory", ErrorKind::NotFound))
    }

    fn interrupts(&self) -> Arc<dyn Interrupts> {
        Arc::new(self.record.clone())
    }

    fn dirty_pages(&self, _at: GuestAddress) -> Result<Vec<u64>> {
        Err(failed("read the dirty log", ErrorKind::Unsupported))
    }

    fn save(&self) -> Result<A::VmState> {
        let states = self
            .states
            .as_ref()
            .ok_or_else(|| failed("save the machine", ErrorKind::Unsupported))?;
        Ok(states.vm.clone())
    }

    fn restore(&self, state: &A::VmState) -> Result<()> {
        match &self.states {
            Some(states) if states.vm == *state => Ok(()),
            _ => Err(failed("restore the machine", ErrorKind::InvalidData)),
        }
    }
}

impl Interrupts for Record {
    fn set_line(&self, line: Line, high: bool) -> Result<()> {
        self.push(Seen::Line(line, high));
        Ok(())
    }

    fn send_msi(&self, msi: Msi) -> Result<()> {
        self.push(Seen::Msi(msi));
        Ok(())
    }
}
