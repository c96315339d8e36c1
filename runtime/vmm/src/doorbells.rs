//! Doorbells that work on every backend.
//!
//! A bound doorbell signals its event at least once after each store, with or without kernel support. Where the
//! kernel can watch the address, it does; elsewhere the bus asks [`DoorbellTable`] before any device.
//! Interrupts towards the guest are not here.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use caisson_devices::pci::Doorbells;
use caisson_devices::virtio::GuestAddress;
use caisson_hal::FastPaths;
use caisson_hal::os::Event;

/// All doorbells of a machine.
///
/// Its lock is held for a look-up and a signal, never while a device is called.
pub(crate) struct DoorbellTable {
    kernel: Option<Arc<dyn FastPaths>>,
    ours: RwLock<HashMap<u64, Event>>,
}

impl DoorbellTable {
    /// `kernel` is the backend's own way, if it has one.
    pub(crate) fn new(kernel: Option<Arc<dyn FastPaths>>) -> Self {
        Self {
            kernel,
            ours: RwLock::default(),
        }
    }

    /// Signals the event bound to `at`; whether there is one.
    pub(crate) fn ring(&self, at: GuestAddress) -> bool {
        let ours = self.ours.read().unwrap_or_else(PoisonError::into_inner);
        ours.get(&at.0).map(Event::signal).is_some()
    }
}

impl Doorbells for DoorbellTable {
    fn bind(&self, at: GuestAddress, event: &Event) -> io::Result<()> {
        if let Some(kernel) = &self.kernel
            && kernel.bind_doorbell(at, None, event).is_ok()
        {
            return Ok(());
        }
        // No kernel support, or no room in the kernel's own table.
        let event = event.try_clone()?;
        let mut ours = self.ours.write().unwrap_or_else(PoisonError::into_inner);
        if ours.contains_key(&at.0) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        ours.insert(at.0, event);
        Ok(())
    }

    fn unbind(&self, at: GuestAddress, event: &Event) {
        let mut ours = self.ours.write().unwrap_or_else(PoisonError::into_inner);
        if ours.remove(&at.0).is_some() {
            return;
        }
        if let Some(kernel) = &self.kernel
            && let Err(error) = kernel.unbind_doorbell(at, None, event)
        {
            tracing::warn!(%error, "could not unbind a doorbell");
        }
    }
}

impl fmt::Debug for DoorbellTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DoorbellTable")
            .field("kernel", &self.kernel.is_some())
            .field("ours", &self.ours)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use caisson_hal::{Failed, Msi, Result};

    const AT: GuestAddress = GuestAddress(0xC000_3000);

    /// A kernel with room for `room` doorbells.
    struct Kernel {
        room: usize,
        bound: Mutex<Vec<u64>>,
    }

    impl FastPaths for Kernel {
        fn bind_doorbell(&self, at: GuestAddress, _: Option<u16>, _: &Event) -> Result<()> {
            let mut bound = self.bound.lock().unwrap();
            if bound.len() == self.room {
                return Err(Failed {
                    op: "bind a doorbell",
                    backend: "test",
                    source: io::ErrorKind::StorageFull.into(),
                });
            }
            bound.push(at.0);
            Ok(())
        }
        fn unbind_doorbell(&self, at: GuestAddress, _: Option<u16>, _: &Event) -> Result<()> {
            self.bound.lock().unwrap().retain(|bound| *bound != at.0);
            Ok(())
        }
        fn bind_irq(&self, _: &Event, _: Msi) -> Result<()> {
            Ok(())
        }
        fn unbind_irq(&self, _: &Event) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn without_a_kernel_the_table_rings() {
        let table = DoorbellTable::new(None);
        let event = Event::new().unwrap();
        table.bind(AT, &event).unwrap();
        assert!(table.bind(AT, &event).is_err());
        assert!(table.ring(AT) && event.clear());
        assert!(!table.ring(GuestAddress(AT.0 + 4)) && !event.clear());
        table.unbind(AT, &event);
        assert!(!table.ring(AT));
    }

    #[test]
    fn what_the_kernel_has_no_room_for_rings_from_the_table() {
        let kernel = Arc::new(Kernel {
            room: 1,
            bound: Mutex::default(),
        });
        let table = DoorbellTable::new(Some(kernel.clone()));
        let event = Event::new().unwrap();
        table.bind(AT, &event).unwrap();
        table.bind(GuestAddress(AT.0 + 4), &event).unwrap();
        assert!(!table.ring(AT), "the kernel's own");
        assert!(table.ring(GuestAddress(AT.0 + 4)));
        table.unbind(AT, &event);
        table.unbind(GuestAddress(AT.0 + 4), &event);
        assert_eq!(*kernel.bound.lock().unwrap(), Vec::<u64>::new());
    }
}
