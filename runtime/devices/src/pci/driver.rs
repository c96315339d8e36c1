//! A driver for tests: it finds, sets up and uses a device through the bus, as Linux does.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use caisson_hal::{Line, Msi};
use vm_memory::Bytes;

use super::*;

pub(crate) const WINDOW: u64 = 0xc000_0000;
pub(crate) const WINDOW_HIGH: u64 = 0x10_0000_0000;
pub(crate) const SIZE: u16 = 16;
pub(crate) const MEMORY: u64 = 16 << 20;
pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const EVENT_IDX: u64 = 1 << 29;

#[derive(Debug)]
struct Wire(Mutex<Sender<Msi>>);

impl Interrupts for Wire {
    fn set_line(&self, _line: Line, _high: bool) -> caisson_hal::Result<()> {
        Ok(())
    }

    fn send_msi(&self, msi: Msi) -> caisson_hal::Result<()> {
        let _ = self.0.lock().unwrap().send(msi);
        Ok(())
    }
}

/// Doorbells by address.
#[derive(Debug, Default)]
pub(crate) struct Bells(pub(crate) Mutex<Vec<u64>>);

impl Doorbells for Bells {
    fn bind(&self, at: GuestAddress, _event: &Event) -> io::Result<()> {
        self.0.lock().unwrap().push(at.0);
        Ok(())
    }

    fn unbind(&self, at: GuestAddress, _event: &Event) {
        let mut bells = self.0.lock().unwrap();
        let place = bells.iter().position(|bell| *bell == at.0);
        bells.remove(place.expect("what is unbound was bound"));
    }
}

pub(crate) fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap()
}

pub(crate) struct Driver {
    pub(crate) root: PciRoot,
    pub(crate) memory: Memory,
    pub(crate) slot: Slot,
    pub(crate) bells: Arc<Bells>,
    pub(crate) messages: Receiver<Msi>,
    pub(crate) bar: u64,
    /// Offsets of common, notify, ISR and device configuration in the BAR.
    pub(crate) parts: [u64; 5],
    pub(crate) msix: u64,
    rings: Vec<Ring>,
}

#[derive(Clone, Copy, Default)]
struct Ring {
    available: u16,
    taken: u16,
    next: u16,
}

impl Driver {
    /// A bus with `device` on it, found but not set up.
    pub(crate) fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::with(device, memory())
    }

    pub(crate) fn with(device: Box<dyn VirtioDevice>, memory: Memory) -> Self {
        let (sender, messages) = channel();
        let bells = Arc::new(Bells::default());
        let root = PciRoot::new(PciRootConfig {
            window32: WINDOW..WINDOW + 0x100_0000,
            window64: WINDOW_HIGH..WINDOW_HIGH + 0x100_0000,
            doorbells: bells.clone(),
            interrupts: Arc::new(Wire(Mutex::new(sender))),
            memory: memory.clone(),
            threads: Threads::plain(),
        });
        let slot = root.add(device).unwrap();
        let mut driver = Self {
            root,
            memory,
            slot,
            bells,
            messages,
            bar: 0,
            parts: [0; 5],
            msix: 0,
            rings: Vec::new(),
        };
        driver.discover();
        driver
    }

    /// Walks the capability list.
    fn discover(&mut self) {
        self.bar = self.config(0x10, 4) & !0xf | self.config(0x14, 4) << 32;
        let mut at = self.config(0x34, 1);
        while at != 0 {
            match self.config(at, 1) {
                0x09 => {
                    let kind = self.config(at + 3, 1) as usize;
                    if kind < 5 {
                        self.parts[kind] = self.config(at + 8, 4);
                    }
                }
                0x11 => self.msix = at,
                other => panic!("capability {other:#x}"),
            }
            at = self.config(at + 1, 1);
        }
    }

    pub(crate) fn config(&self, register: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        let offset = u64::from(self.slot.number()) << 15 | register;
        self.root.config_load(offset, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    }

    pub(crate) fn set_config(&self, register: u64, len: usize, value: u64) {
        let offset = u64::from(self.slot.number()) << 15 | register;
        self.root.config_store(offset, &value.to_le_bytes()[..len]);
    }

    pub(crate) fn load(&self, offset: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        assert!(self.root.load(GuestAddress(self.bar + offset), &mut bytes[..len]));
        u64::from_le_bytes(bytes)
    }

    pub(crate) fn store(&self, offset: u64, len: usize, value: u64) {
        let at = GuestAddress(self.bar + offset);
        assert!(self.root.store(at, &value.to_le_bytes()[..len]));
    }

    pub(crate) fn status(&self) -> u64 {
        self.load(self.parts[1] + 0x14, 1)
    }

    pub(crate) fn set_status(&self, status: u64) {
        self.store(self.parts[1] + 0x14, 1, status);
    }

    pub(crate) fn offered(&self) -> u64 {
        let half = |select| {
            self.store(self.parts[1], 4, select);
            self.load(self.parts[1] + 4, 4)
        };
        half(0) | half(1) << 32
    }

    pub(crate) fn accept(&self, features: u64) {
        for select in 0..2 {
            self.store(self.parts[1] + 8, 4, select);
            self.store(self.parts[1] + 12, 4, features >> (32 * select) & 0xffff_ffff);
        }
    }

    /// Sets the device up, up to and including `DRIVER_OK`.
    pub(crate) fn start(&mut self) {
        let wanted = self.offered();
        self.start_with(wanted);
    }

    pub(crate) fn start_with(&mut self, features: u64) {
        let common = self.parts[1];
        self.set_status(0);
        self.set_status(1);
        self.set_status(3);
        self.accept(features);
        self.set_status(11);
        assert_eq!(self.status(), 11);
        self.set_config(self.msix + 2, 2, 0x8000);
        let queues = self.load(common + 0x12, 2);
        for vector in 0..=queues {
            let entry = self.table() + vector * 16;
            self.store(entry, 8, 0xfee0_0000);
            self.store(entry + 8, 8, 0x40 + vector);
        }
        self.store(common + 0x10, 2, queues);
        self.rings = vec![Ring::default(); queues as usize];
        for queue in 0..queues {
            let base = Self::base(queue as usize);
            let zeros = vec![0; 0x8000];
            self.memory.write_slice(&zeros, GuestAddress(base)).unwrap();
            self.store(common + 0x16, 2, queue);
            self.store(common + 0x18, 2, u64::from(SIZE));
            self.store(common + 0x1a, 2, queue);
            assert_eq!(self.load(common + 0x1a, 2), queue);
            for (field, offset) in [(0x20, 0), (0x28, 0x2000), (0x30, 0x4000)] {
                self.store(common + field, 4, base + offset);
                self.store(common + field + 4, 4, 0);
            }
            self.store(common + 0x1c, 2, 1);
        }
        self.set_status(15);
    }

    pub(crate) fn table(&self) -> u64 {
        self.config(self.msix + 4, 4)
    }

    fn base(queue: usize) -> u64 {
        0x1_0000 * (queue as u64 + 1)
    }

    /// Where data of a chain lies.
    pub(crate) fn data(queue: usize) -> u64 {
        0x10_0000 * (queue as u64 + 1)
    }

    /// Makes a chain available of what is to be read and of what is to be filled, and notifies.
    /// Says where each part to be filled is.
    pub(crate) fn submit(&mut self, queue: usize, read: &[&[u8]], fill: &[usize]) -> Vec<u64> {
        let mut at = Self::data(queue);
        let mut parts = Vec::new();
        for bytes in read {
            self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
            parts.push((at, bytes.len(), 0u16));
            at += bytes.len() as u64 + 16;
        }
        let mut filled = Vec::new();
        for len in fill {
            parts.push((at, *len, 2));
            filled.push(at);
            at += *len as u64 + 16;
        }
        self.submit_raw(queue, &parts);
        filled
    }

    /// Makes a chain of descriptors available as they are: address, length, flags.
    pub(crate) fn submit_raw(&mut self, queue: usize, parts: &[(u64, usize, u16)]) {
        let base = Self::base(queue);
        let mut ring = self.rings[queue];
        let head = ring.next % SIZE;
        for (place, (at, len, flags)) in parts.iter().enumerate() {
            let index = (head + place as u16) % SIZE;
            let last = place + 1 == parts.len();
            let entry = base + u64::from(index) * 16;
            self.memory.write_obj(*at, GuestAddress(entry)).unwrap();
            self.memory
                .write_obj(*len as u32, GuestAddress(entry + 8))
                .unwrap();
            let flags = flags | u16::from(!last);
            self.memory.write_obj(flags, GuestAddress(entry + 12)).unwrap();
            let next = (index + 1) % SIZE;
            self.memory.write_obj(next, GuestAddress(entry + 14)).unwrap();
        }
        ring.next = (head + parts.len() as u16) % SIZE;
        let available = base + 0x2000;
        let entry = available + 4 + u64::from(ring.available % SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        ring.available = ring.available.wrapping_add(1);
        self.memory
            .write_obj(ring.available, GuestAddress(available + 2))
            .unwrap();
        self.rings[queue] = ring;
        self.notify(queue);
    }

    pub(crate) fn notify(&self, queue: usize) {
        self.store(self.parts[2] + queue as u64 * 4, 2, queue as u64);
    }

    /// Waits for the next used chain; its length.
    pub(crate) fn used(&mut self, queue: usize) -> u32 {
        let base = Self::base(queue);
        let taken = self.rings[queue].taken;
        loop {
            let index: u16 = self.memory.read_obj(GuestAddress(base + 0x4002)).unwrap();
            if index != taken {
                break;
            }
            let message = self.messages.recv_timeout(PATIENCE);
            message.expect("the device went silent");
        }
        let entry = base + 0x4004 + u64::from(taken % SIZE) * 8;
        self.rings[queue].taken = taken.wrapping_add(1);
        let event = base + 0x2004 + u64::from(SIZE) * 2;
        self.memory
            .write_obj(self.rings[queue].taken, GuestAddress(event))
            .unwrap();
        self.memory.read_obj(GuestAddress(entry + 4)).unwrap()
    }

    /// Waits for the next used chain without its interrupt.
    pub(crate) fn await_used(&self, queue: usize) {
        let end = Instant::now() + PATIENCE;
        let index = GuestAddress(Self::base(queue) + 0x4002);
        while self.memory.read_obj::<u16>(index).unwrap() == self.rings[queue].taken {
            assert!(Instant::now() < end, "the device went silent");
            std::thread::yield_now();
        }
    }

    pub(crate) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Waits until the device says that it needs a reset.
    pub(crate) fn await_broken(&self) {
        while self.status() & 0x40 == 0 {
            let message = self.messages.recv_timeout(PATIENCE);
            message.expect("the device went silent");
        }
    }
}

/// A sequence that looks random and is the same each time.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    pub(crate) fn any(&mut self) -> u64 {
        self.below(u64::MAX) >> (self.below(8) * 8)
    }
}

const PATIENCE: Duration = Duration::from_secs(5);
