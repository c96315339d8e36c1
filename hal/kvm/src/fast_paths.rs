//! Events that the kernel turns into interrupts, and stores that it turns into events.
#![expect(unsafe_code, reason = "kvm-ioctls takes an event type of its own")]

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, IntoRawFd as _, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use caisson_hal::os::Event;
use caisson_hal::{FastPaths, GuestAddress, Msi, Result};
use kvm_bindings::KvmIrqRouting;
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

use crate::vm::Machine;
use crate::{failed, kernel_said, refused, x86_64};

/// The fast paths of one machine.
pub(crate) struct Fast {
    machine: Arc<Machine>,
    /// By the descriptor that the caller knows the event by; unbound before it closes that.
    bound: Mutex<BTreeMap<RawFd, Bound>>,
}

struct Bound {
    /// Its input of the kernel's routing table.
    gsi: u32,
    msi: Msi,
}

impl Fast {
    pub(crate) fn new(machine: Arc<Machine>) -> Self {
        Self {
            machine,
            bound: Mutex::default(),
        }
    }

    /// Replaces the kernel's routing table: the wired lines, and one message for each bound event.
    fn route(&self, bound: &BTreeMap<RawFd, Bound>, op: &'static str) -> Result<()> {
        let mut routes = x86_64::wired_routes();
        for Bound { gsi, msi } in bound.values() {
            let route = x86_64::msi_route(*gsi, *msi).ok_or_else(|| {
                refused(
                    op,
                    ErrorKind::InvalidInput,
                    "the address is no interrupt doorbell",
                )
            })?;
            routes.push(route);
        }
        let table = KvmIrqRouting::from_entries(&routes)
            .map_err(|_| refused(op, ErrorKind::QuotaExceeded, "the routing table is full"))?;
        self.machine.fd.set_gsi_routing(&table).map_err(kernel_said(op))
    }
}

impl FastPaths for Fast {
    fn bind_doorbell(&self, at: GuestAddress, value: Option<u16>, event: &Event) -> Result<()> {
        const OP: &str = "bind a doorbell";
        let event = duplicate(event, OP)?;
        let at = IoEventAddress::Mmio(at.0);
        match value {
            Some(value) => self.machine.fd.register_ioevent(&event, &at, value),
            None => self.machine.fd.register_ioevent(&event, &at, NoDatamatch),
        }
        .map_err(kernel_said(OP))
    }

    fn unbind_doorbell(&self, at: GuestAddress, value: Option<u16>, event: &Event) -> Result<()> {
        const OP: &str = "unbind a doorbell";
        let event = duplicate(event, OP)?;
        let at = IoEventAddress::Mmio(at.0);
        match value {
            Some(value) => self.machine.fd.unregister_ioevent(&event, &at, value),
            None => self.machine.fd.unregister_ioevent(&event, &at, NoDatamatch),
        }
        .map_err(kernel_said(OP))
    }

    fn bind_irq(&self, event: &Event, msi: Msi) -> Result<()> {
        const OP: &str = "bind an event to an interrupt";
        if x86_64::msi_address(msi.address).is_none() {
            return Err(refused(
                OP,
                ErrorKind::InvalidInput,
                "the address is no interrupt doorbell",
            ));
        }
        let key = event.as_raw_fd();
        let mut bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = bound.get_mut(&key) {
            let before = std::mem::replace(&mut known.msi, msi);
            return self.route(&bound, OP).inspect_err(|_| {
                if let Some(known) = bound.get_mut(&key) {
                    known.msi = before;
                }
            });
        }
        let gsi = (x86_64::LINES..x86_64::MOST_ROUTES)
            .find(|gsi| bound.values().all(|other| other.gsi != *gsi))
            .ok_or_else(|| refused(OP, ErrorKind::QuotaExceeded, "the routing table is full"))?;
        bound.insert(key, Bound { gsi, msi });
        // The route first, or an event signalled already would have nowhere to go.
        let done = self.route(&bound, OP).and_then(|()| {
            let event = duplicate(event, OP)?;
            self.machine
                .fd
                .register_irqfd(&event, gsi)
                .map_err(kernel_said(OP))
        });
        if done.is_err() {
            bound.remove(&key);
        }
        done
    }

    fn unbind_irq(&self, event: &Event) -> Result<()> {
        const OP: &str = "unbind an event from an interrupt";
        let mut bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(known) = bound.remove(&event.as_raw_fd()) else {
            return Err(refused(OP, ErrorKind::NotFound, "the event is not bound"));
        };
        let event = duplicate(event, OP)?;
        self.machine
            .fd
            .unregister_irqfd(&event, known.gsi)
            .map_err(kernel_said(OP))?;
        self.route(&bound, OP)
    }
}

/// The same event as the type that `kvm-ioctls` takes. The kernel keeps a reference of its own.
fn duplicate(event: &Event, op: &'static str) -> Result<EventFd> {
    let fd = event
        .as_fd()
        .try_clone_to_owned()
        .map_err(|error| failed(op, error))?;
    // SAFETY: the descriptor was made above, and nobody else has it.
    Ok(unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) })
}
