//! One function: configuration space, the BAR and what lies where in it.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use caisson_hal::os::Event;
use caisson_hal::{GuestAddress, Interrupts};

use super::config::{ConfigSpace, Identity};
use super::msix::{CONTROL_ENABLE, CONTROL_MASK, ENTRY, Msix, fill};
use super::notifications::Notifications;
use super::state::FunctionState;
use super::transport::Transport;
use super::{Doorbells, PciError, Slot};
use crate::thread::Threads;
use crate::virtio::{ActivateError, Kind, Memory, VirtioDevice};

/// Size of each function's BAR.
pub(super) const BAR_SIZE: u64 = 0x8000;

/// What a new function gets.
pub(super) struct Birth {
    pub(super) slot: Slot,
    pub(super) bar: u64,
    /// Where the BAR decodes.
    pub(super) windows: [Range<u64>; 2],
    pub(super) doorbells: Arc<dyn Doorbells>,
    pub(super) interrupts: Arc<dyn Interrupts>,
    pub(super) memory: Memory,
    pub(super) threads: Threads,
}

/// A virtio device on the bus.
#[derive(Debug)]
pub(super) struct Function {
    slot: Slot,
    windows: [Range<u64>; 2],
    /// Where the BAR decodes, or [`NOWHERE`]. Written under the lock of `registers`.
    base: AtomicU64,
    /// By queue; signalled by the driver's notifications.
    kicks: Vec<Event>,
    notifications: Arc<Notifications>,
    doorbells: Arc<dyn Doorbells>,
    registers: Mutex<Registers>,
}

#[derive(Debug)]
struct Registers {
    config: ConfigSpace,
    transport: Transport,
    /// The base that the doorbells are bound for, or [`NOWHERE`].
    bound: u64,
}

impl Function {
    pub(super) fn new(birth: Birth, device: Box<dyn VirtioDevice>) -> Result<Self, PciError> {
        let queues = device.queue_sizes().len();
        if queues > MOST_QUEUES {
            return Err(PciError::Queues(queues));
        }
        let kicks = (0..queues).map(|_| Event::new()).collect::<Result<Vec<_>, _>>();
        let requester = u32::from(birth.slot.number()) << 3;
        let vectors = queues.saturating_add(1);
        let msix = Msix::new(vectors, requester, birth.interrupts);
        let notifications = Notifications::new(msix, queues);
        let config = config_space(device.kind(), birth.bar, vectors);
        let transport = Transport::new(device, notifications.clone(), birth.memory, birth.threads);
        let function = Self {
            slot: birth.slot,
            windows: birth.windows,
            base: AtomicU64::new(NOWHERE),
            kicks: kicks.map_err(PciError::Event)?,
            notifications,
            doorbells: birth.doorbells,
            registers: Mutex::new(Registers {
                config,
                transport,
                bound: NOWHERE,
            }),
        };
        function.settle(&mut function.lock());
        Ok(function)
    }

    pub(super) fn slot(&self) -> Slot {
        self.slot
    }

    /// The address in the BAR, decoded or not.
    pub(super) fn bar(&self) -> u64 {
        self.lock().config.bar()
    }

    /// The offset of `at` in the BAR if that decodes there.
    pub(super) fn offset(&self, at: GuestAddress) -> Option<u64> {
        let offset = at.0.checked_sub(self.base.load(Ordering::Acquire))?;
        (offset < BAR_SIZE).then_some(offset)
    }

    pub(super) fn config_load(&self, register: usize, data: &mut [u8]) {
        let mut registers = self.lock();
        if register == PCI_ACCESS + ACCESS_DATA
            && let Some(offset) = registers.access(data.len())
        {
            self.bar_load(&mut registers, offset, data);
        } else {
            registers.config.load(register, data);
        }
    }

    pub(super) fn config_store(&self, register: usize, data: &[u8]) {
        let mut registers = self.lock();
        registers.config.store(register, data);
        self.settle(&mut registers);
        if register == PCI_ACCESS + ACCESS_DATA
            && let Some(offset) = registers.access(data.len())
        {
            self.bar_store(&mut registers, offset, data);
        }
    }

    pub(super) fn load(&self, offset: u64, data: &mut [u8]) {
        match offset {
            TABLE..PENDING => self.notifications.msix.load(offset - TABLE, data),
            PENDING.. => self.notifications.msix.load_pending(offset - PENDING, data),
            _ => self.bar_load(&mut self.lock(), offset, data),
        }
    }

    pub(super) fn store(&self, offset: u64, data: &[u8]) {
        match offset {
            NOTIFY..TABLE => self.notify(offset),
            TABLE..PENDING => self.notifications.msix.store(offset - TABLE, data),
            PENDING.. => {} // read-only
            _ => self.bar_store(&mut self.lock(), offset, data),
        }
    }

    /// Stops the device where it stands.
    pub(super) fn pause(&self) {
        self.lock().transport.pause();
    }

    pub(super) fn resume(&self) -> Result<(), ActivateError> {
        let mut registers = self.lock();
        let outcome = registers.transport.resume(&self.kicks);
        self.settle(&mut registers);
        outcome
    }

    /// Ends the device and lets go of its doorbells.
    pub(super) fn shut(&self) {
        let mut registers = self.lock();
        registers.transport.reset();
        self.base.store(NOWHERE, Ordering::Release);
        self.bind(&mut registers, NOWHERE);
    }

    pub(super) fn save(&self) -> Result<FunctionState, PciError> {
        let registers = self.lock();
        Ok(FunctionState {
            slot: self.slot.number(),
            config: registers.config.bytes().to_vec(),
            vectors: self.notifications.msix.save(),
            transport: registers.transport.save().ok_or(PciError::Running(self.slot))?,
        })
    }

    pub(super) fn restore(&self, state: &FunctionState) -> Result<(), String> {
        let mut registers = self.lock();
        registers.config.restore(&state.config)?;
        self.notifications.msix.restore(&state.vectors)?;
        registers.transport.restore(&state.transport)?;
        self.settle(&mut registers);
        Ok(())
    }

    fn bar_load(&self, registers: &mut Registers, offset: u64, data: &mut [u8]) {
        match offset {
            COMMON..ISR => registers.transport.load_common(offset, data),
            // Reading it clears it (virtio 1.2, section 4.1.4.5).
            ISR => fill(data, 0, [self.notifications.take_isr()].into_iter()),
            DEVICE..NOTIFY => registers.transport.load_device(offset - DEVICE, data),
            TABLE..PENDING => self.notifications.msix.load(offset - TABLE, data),
            PENDING..BAR_SIZE => self.notifications.msix.load_pending(offset - PENDING, data),
            _ => data.fill(0),
        }
    }

    fn bar_store(&self, registers: &mut Registers, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => {
                registers.transport.store_common(offset, data, &self.kicks);
                self.settle(registers);
            }
            DEVICE..NOTIFY => registers.transport.store_device(offset - DEVICE, data),
            NOTIFY..TABLE => self.notify(offset),
            TABLE..PENDING => self.notifications.msix.store(offset - TABLE, data),
            _ => {}
        }
    }

    /// Signals the queue whose doorbell is at `offset`. The worker takes a kick too many as no harm.
    fn notify(&self, offset: u64) {
        let index = usize::try_from((offset - NOTIFY) / u64::from(NOTIFY_MULTIPLIER));
        if let Some(kick) = index.ok().and_then(|index| self.kicks.get(index)) {
            kick.signal();
        }
    }

    /// Makes true what the registers say: where the BAR decodes, MSI-X control, doorbells.
    fn settle(&self, registers: &mut Registers) {
        let bar = registers.config.bar();
        let reachable = self.windows.iter().any(|window| {
            bar >= window.start && bar.checked_add(BAR_SIZE).is_some_and(|end| end <= window.end)
        });
        let base = if reachable && registers.config.decodes() {
            bar
        } else {
            NOWHERE
        };
        self.base.store(base, Ordering::Release);
        self.notifications.msix.control(registers.config.word(MSIX + 2));
        let active = registers.transport.is_active();
        self.bind(registers, if active { base } else { NOWHERE });
    }

    /// Moves the doorbells to `base`.
    fn bind(&self, registers: &mut Registers, base: u64) {
        let before = std::mem::replace(&mut registers.bound, base);
        if before == base {
            return;
        }
        for (kick, offset) in self.kicks.iter().zip((NOTIFY..).step_by(4)) {
            if before != NOWHERE {
                let at = GuestAddress(before.saturating_add(offset));
                self.doorbells.unbind(at, kick);
            }
            if base != NOWHERE {
                let at = GuestAddress(base.saturating_add(offset));
                if let Err(error) = self.doorbells.bind(at, kick) {
                    tracing::debug!(%error, %self.slot, "doorbell goes by the bus");
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        self.shut();
    }
}

impl Registers {
    /// What the driver asks for through the PCI configuration access capability (virtio 1.2, section 4.1.4.9).
    fn access(&self, len: usize) -> Option<u64> {
        let bar = self.config.word(PCI_ACCESS + 4) & 0xff;
        let offset = u64::from(self.config.dword(PCI_ACCESS + 8));
        let wanted = usize::try_from(self.config.dword(PCI_ACCESS + 12)).ok()?;
        let aligned = matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len as u64);
        (bar == 0 && wanted == len && aligned && offset < BAR_SIZE).then_some(offset)
    }
}

fn config_space(kind: Kind, bar: u64, vectors: usize) -> ConfigSpace {
    let mut config = ConfigSpace::new(Identity {
        vendor: VENDOR,
        device: MODERN.saturating_add(kind as u16),
        revision: 1, // of a device without the legacy interface (section 4.1.2.1)
        class: class(kind),
        subsystem: MODERN_SUBSYSTEM,
    });
    config.add_bar(bar, BAR_SIZE);
    let last_vector = u16::try_from(vectors.saturating_sub(1)).unwrap_or(0);
    let mut msix = vec![0x11, 0];
    msix.extend(last_vector.to_le_bytes());
    msix.extend(dword(TABLE));
    msix.extend(dword(PENDING));
    let mut notify = virtio(CFG_NOTIFY, 20, NOTIFY, TABLE - NOTIFY);
    notify.extend(NOTIFY_MULTIPLIER.to_le_bytes());
    let mut access = virtio(CFG_PCI, 20, 0, 0);
    access.extend([0; 4]);
    config.add_capabilities(&[
        (MSIX, msix),
        (0x50, virtio(CFG_COMMON, 16, COMMON, COMMON_SIZE)),
        (0x60, notify),
        (0x74, virtio(CFG_ISR, 16, ISR, 1)),
        (0x84, virtio(CFG_DEVICE, 16, DEVICE, NOTIFY - DEVICE)),
        (PCI_ACCESS, access),
    ]);
    config.allow(MSIX + 2, &(CONTROL_ENABLE | CONTROL_MASK).to_le_bytes());
    config.allow(PCI_ACCESS + 4, &[0xff]);
    config.allow(PCI_ACCESS + 8, &[0xff; 12]);
    config
}

/// `struct virtio_pci_cap` (virtio 1.2, section 4.1.4) of `len` bytes, for a part of BAR 0.
fn virtio(kind: u8, len: u8, offset: u64, size: u64) -> Vec<u8> {
    let mut bytes = vec![0x09, 0, len, kind, 0, 0, 0, 0]; // 0x09: vendor-specific
    bytes.extend(dword(offset));
    bytes.extend(dword(size));
    bytes
}

fn dword(value: u64) -> [u8; 4] {
    u32::try_from(value).unwrap_or(0).to_le_bytes()
}

/// Base class and subclass (PCI Code and ID Assignment 1.11, section 1).
fn class(kind: Kind) -> u16 {
    match kind {
        Kind::Net => 0x0200,                     // Ethernet controller
        Kind::Block | Kind::Fs => 0x0180,        // other mass storage controller
        Kind::Console => 0x0780,                 // other communication controller
        Kind::Vsock => 0x0280,                   // other network controller
        Kind::Entropy | Kind::Balloon => 0x00ff, // fits no class
    }
}

/// No address at all.
const NOWHERE: u64 = u64::MAX;
/// Virtio's vendor id (virtio 1.2, section 4.1.2).
const VENDOR: u16 = 0x1af4;
/// Device id of a modern device, less its type (section 4.1.2).
const MODERN: u16 = 0x1040;
/// Subsystem id of a device without the legacy interface: 0x40 or above (section 4.1.2.1).
const MODERN_SUBSYSTEM: u16 = 0x1100;

// The BAR.
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
/// Size of `struct virtio_pci_common_cfg` with its last fields (virtio 1.2, section 4.1.4.3).
pub(super) const COMMON_SIZE: u64 = 0x40;
/// Distance of two queues' doorbells.
const NOTIFY_MULTIPLIER: u32 = 4;
/// Most queues of a device: with its vectors they fill the table's page.
const MOST_QUEUES: usize = 255;
const _: () = assert!((MOST_QUEUES as u64 + 1) * ENTRY == PENDING - TABLE);

// Configuration space.
/// The MSI-X capability.
const MSIX: usize = 0x40;
/// The PCI configuration access capability, and the place of its data.
const PCI_ACCESS: usize = 0x94;
const ACCESS_DATA: usize = 16;
// `cfg_type` (section 4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;
