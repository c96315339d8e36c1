//! The PCI root: one bus of virtio functions behind ECAM, each with MSI-X.
//!
//! Bus 0 holds the host bridge in slot 0 and one single-function device in each slot after it. A function has
//! one memory BAR that holds everything; the root assigns it as firmware would, and the guest may move it. Stores to
//! the notify area signal the queue's event, through the kernel where [`Doorbells`] can and on the bus where not.
//! Functions come and go while the guest runs; telling the guest to look again is not done here.
//!
//! **Invariant:** a device sees queues only after the transport has checked them, and they do not change
//! while it works on them. Interrupts take no function's lock, so a device's worker can always finish.

mod config;
mod function;
mod msix;
mod notifications;
mod state;
mod transport;

use std::fmt::{self, Debug};
use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use caisson_hal::os::Event;
use caisson_hal::{GuestAddress, Interrupts};

use crate::thread::Threads;
use crate::virtio::{ActivateError, Memory, VirtioDevice};
use config::HostBridge;
use function::{BAR_SIZE, Birth, Function};
pub use state::RootState;

/// Stores of the guest that signal an event without a visit to the bus, where the backend can do that.
pub trait Doorbells: Send + Sync + Debug {
    /// Has `event` signalled when the guest stores to `at`.
    ///
    /// # Errors
    /// Fails if the system refuses; stores to `at` then come to [`PciRoot::store`], which signals it itself.
    fn bind(&self, at: GuestAddress, event: &Event) -> io::Result<()>;
    /// Undoes [`Doorbells::bind`] with the same arguments.
    fn unbind(&self, at: GuestAddress, event: &Event);
}

/// What a root is made of.
pub struct PciRootConfig {
    /// Addresses below 4 GiB that the root decodes.
    pub window32: Range<u64>,
    /// Addresses above, used when the lower window is full.
    pub window64: Range<u64>,
    /// Kernel shortcuts for notifications.
    pub doorbells: Arc<dyn Doorbells>,
    /// Where MSI-X messages go.
    pub interrupts: Arc<dyn Interrupts>,
    /// The guest's memory.
    pub memory: Memory,
    /// Starts the devices' workers.
    pub threads: Threads,
}

impl Debug for PciRootConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciRootConfig")
            .field("window32", &self.window32)
            .field("window64", &self.window64)
            .finish_non_exhaustive()
    }
}

/// A device number on bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(u8);

impl Slot {
    /// The number, 1 to 31.
    pub fn number(self) -> u8 {
        self.0
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.0", self.0)
    }
}

/// What the root can fail with.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// All slots are taken.
    #[error("cannot add a PCI device: all {SLOTS} slots are taken")]
    Slots,
    /// The windows have no room for another BAR.
    #[error("cannot add a PCI device: the memory windows are full")]
    Window,
    /// A device with more queues than the transport carries.
    #[error("cannot add a PCI device with {0} queues")]
    Queues(usize),
    /// No event for a queue.
    #[error("cannot create the event of a virtqueue")]
    Event(#[source] io::Error),
    /// There is no such device.
    #[error("there is no PCI device {0}")]
    Absent(Slot),
    /// A device could not go on.
    #[error("cannot resume the PCI device {slot}")]
    Resume {
        /// Which device.
        slot: Slot,
        /// The cause.
        #[source]
        source: ActivateError,
    },
    /// State was asked for while devices run.
    #[error("cannot save the PCI device {0} while it runs; pause it first")]
    Running(Slot),
    /// The state does not fit.
    #[error("cannot restore the PCI device in slot {slot}: {reason}")]
    State {
        /// Which slot.
        slot: u8,
        /// Why.
        reason: String,
    },
}

/// The root and everything behind it.
#[derive(Debug)]
pub struct PciRoot {
    config: PciRootConfig,
    bridge: HostBridge,
    /// By slot; slot 0 is the host bridge.
    functions: RwLock<Vec<Option<Arc<Function>>>>,
}

impl PciRoot {
    /// A bus with nothing but its host bridge.
    pub fn new(config: PciRootConfig) -> Self {
        Self {
            config,
            bridge: HostBridge::default(),
            functions: RwLock::new(vec![None; usize::from(SLOTS) + 1]),
        }
    }

    /// Puts `device` into the first free slot and assigns its BAR.
    ///
    /// # Errors
    /// Fails if the bus or its windows are full, or the process is out of descriptors.
    pub fn add(&self, device: Box<dyn VirtioDevice>) -> Result<Slot, PciError> {
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        let free = (1..=SLOTS).find(|slot| matches!(functions.get(usize::from(*slot)), Some(None)));
        let slot = Slot(free.ok_or(PciError::Slots)?);
        let taken: Vec<u64> = functions.iter().flatten().map(|other| other.bar()).collect();
        let bar = self.free_bar(&taken).ok_or(PciError::Window)?;
        let function = Function::new(
            Birth {
                slot,
                bar,
                windows: [self.config.window32.clone(), self.config.window64.clone()],
                doorbells: self.config.doorbells.clone(),
                interrupts: self.config.interrupts.clone(),
                memory: self.config.memory.clone(),
                threads: self.config.threads.clone(),
            },
            device,
        )?;
        if let Some(place) = functions.get_mut(usize::from(slot.0)) {
            *place = Some(Arc::new(function));
        }
        Ok(slot)
    }

    /// Takes the device out of `slot`, as if pulled: its workers have ended when this returns.
    ///
    /// # Errors
    /// Fails if there is no device.
    pub fn remove(&self, slot: Slot) -> Result<(), PciError> {
        let taken = {
            let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
            functions
                .get_mut(usize::from(slot.0))
                .and_then(Option::take)
                .ok_or(PciError::Absent(slot))?
        };
        taken.shut();
        Ok(())
    }

    /// Completes a load from the ECAM window; what is absent reads as all ones.
    pub fn config_load(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        match decode(offset) {
            Some((0, register)) => self.bridge.load(register, data),
            Some((slot, register)) => {
                if let Some(function) = self.function(slot) {
                    function.config_load(register, data);
                }
            }
            None => {}
        }
    }

    /// Completes a store to the ECAM window.
    pub fn config_store(&self, offset: u64, data: &[u8]) {
        if let Some((slot, register)) = decode(offset)
            && let Some(function) = self.function(slot)
        {
            function.config_store(register, data);
        }
    }

    /// Completes a load from a BAR; `false` says that nobody is there.
    pub fn load(&self, at: GuestAddress, data: &mut [u8]) -> bool {
        match self.decoder(at) {
            Some((function, offset)) => {
                function.load(offset, data);
                true
            }
            None => false,
        }
    }

    /// Completes a store to a BAR; `false` says that nobody is there.
    pub fn store(&self, at: GuestAddress, data: &[u8]) -> bool {
        match self.decoder(at) {
            Some((function, offset)) => {
                function.store(offset, data);
                true
            }
            None => false,
        }
    }

    /// Stops every device where it stands. Every vCPU must be out of the guest.
    pub fn pause(&self) {
        for function in self.all() {
            function.pause();
        }
    }

    /// The inverse of [`PciRoot::pause`].
    ///
    /// # Errors
    /// Fails with the first device that cannot go on; the others do.
    pub fn resume(&self) -> Result<(), PciError> {
        let mut outcome = Ok(());
        for function in self.all() {
            let slot = function.slot();
            let resumed = function
                .resume()
                .map_err(|source| PciError::Resume { slot, source });
            outcome = outcome.and(resumed);
        }
        outcome
    }

    /// The state of every function, while paused.
    ///
    /// # Errors
    /// Fails if a device runs.
    pub fn save(&self) -> Result<RootState, PciError> {
        let functions = self
            .all()
            .iter()
            .map(|function| function.save())
            .collect::<Result<_, _>>()?;
        Ok(RootState {
            version: state::VERSION,
            functions,
        })
    }

    /// Puts saved state into a root with the same devices in the same slots, none of them used yet.
    ///
    /// [`PciRoot::resume`] then sets them going.
    ///
    /// # Errors
    /// Fails if the state is of another version or of other devices, or contradicts itself.
    pub fn restore(&self, state: &RootState) -> Result<(), PciError> {
        let functions = self.all();
        let slots: Vec<u8> = functions.iter().map(|function| function.slot().0).collect();
        let wanted: Vec<u8> = state.functions.iter().map(|saved| saved.slot).collect();
        if state.version != state::VERSION || slots != wanted {
            return Err(PciError::State {
                slot: 0,
                reason: format!("the saved bus has version {} and slots {wanted:?}", state.version),
            });
        }
        for (function, saved) in functions.iter().zip(&state.functions) {
            function.restore(saved).map_err(|reason| PciError::State {
                slot: saved.slot,
                reason,
            })?;
        }
        Ok(())
    }

    /// The first place of a BAR's size that none of `taken` touches.
    fn free_bar(&self, taken: &[u64]) -> Option<u64> {
        [&self.config.window32, &self.config.window64]
            .into_iter()
            .find_map(|window| {
                let first = window.start.checked_next_multiple_of(BAR_SIZE)?;
                // A BAR is aligned to its size, so each of the others can spoil one place only.
                (0..=u64::from(SLOTS)).find_map(|place| {
                    let base = first.checked_add(place.checked_mul(BAR_SIZE)?)?;
                    let fits = base.checked_add(BAR_SIZE)? <= window.end;
                    (fits && !taken.contains(&base)).then_some(base)
                })
            })
    }

    fn all(&self) -> Vec<Arc<Function>> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.iter().flatten().cloned().collect()
    }

    fn function(&self, slot: u8) -> Option<Arc<Function>> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.get(usize::from(slot))?.clone()
    }

    /// Who decodes `at`, and the offset in its BAR. Where the guest put two on top of each other, the lower slot.
    fn decoder(&self, at: GuestAddress) -> Option<(Arc<Function>, u64)> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.iter().flatten().find_map(|function| {
            let offset = function.offset(at)?;
            Some((function.clone(), offset))
        })
    }
}

/// Slot and register of an ECAM offset (PCI Express 5.0, section 7.2.2); `None` if no function can be there.
fn decode(offset: u64) -> Option<(u8, usize)> {
    let register = usize::try_from(offset & 0xfff).ok()?;
    let device_function = offset >> 12;
    let slot = u8::try_from(device_function >> 3).ok()?;
    (device_function & 7 == 0 && slot <= SLOTS).then_some((slot, register))
}

/// Slots for devices: 32, less the host bridge's.
const SLOTS: u8 = 31;

#[cfg(test)]
mod tests;
