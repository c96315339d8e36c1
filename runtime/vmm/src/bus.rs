//! What a vCPU reaches outside RAM: configuration space, device registers, and the few ports of a PC.
//!
//! Everything else reads as all ones and swallows stores, as an empty bus does.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use caisson_arch_x86_64::layout::{
    COM1, ECAM, RESET, RESET_VALUE, SLEEP_CONTROL, SLEEP_STATUS, is_power_off,
};
use caisson_devices::pci::PciRoot;
use caisson_devices::serial::Serial;
use caisson_devices::virtio::GuestAddress;
use caisson_hal::{GuestIo, Verdict};

use crate::doorbells::DoorbellTable;

/// The bus, shared by all vCPUs.
#[derive(Debug)]
pub(crate) struct Bus {
    pub(crate) pci: PciRoot,
    pub(crate) doorbells: Arc<DoorbellTable>,
    pub(crate) serial: Serial,
    /// Last value written to [`CONFIG_ADDRESS`]. One register for all vCPUs, as on a PC, where the guest locks it.
    pub(crate) config_address: AtomicU32,
}

/// The bus, as one vCPU sees it.
#[derive(Debug)]
pub(crate) struct BusPort {
    bus: Arc<Bus>,
    verdict: Option<Verdict>,
}

impl BusPort {
    pub(crate) fn new(bus: Arc<Bus>) -> Self {
        Self { bus, verdict: None }
    }
}

impl GuestIo for BusPort {
    fn load(&mut self, at: GuestAddress, data: &mut [u8]) {
        match within(&ECAM, at.0, data.len()) {
            Some(offset) => self.bus.pci.config_load(offset, data),
            None if self.bus.pci.load(at, data) => {}
            None => data.fill(0xFF),
        }
    }

    fn store(&mut self, at: GuestAddress, data: &[u8]) {
        if self.bus.doorbells.ring(at) {
            return;
        }
        match within(&ECAM, at.0, data.len()) {
            Some(offset) => self.bus.pci.config_store(offset, data),
            // Whether somebody was there or not, the store is over.
            None => drop(self.bus.pci.store(at, data)),
        }
    }

    fn port_in(&mut self, port: u16, data: &mut [u8]) {
        data.fill(0xFF);
        match port {
            COM1..COM1_END => self.bus.serial.load(u64::from(port - COM1), data),
            CONFIG_ADDRESS => {
                let address = self.bus.config_address.load(Ordering::Relaxed).to_le_bytes();
                if let Some(data) = data.first_chunk_mut::<4>() {
                    *data = address;
                }
            }
            CONFIG_DATA..CONFIG_DATA_END => {
                if let Some(offset) = self.configured(port, data.len()) {
                    self.bus.pci.config_load(offset, data);
                }
            }
            // The clock of a PC, which is not there: all zeroes is a time that nobody takes for one.
            CMOS_DATA | SLEEP_STATUS => data.fill(0),
            _ => {}
        }
    }

    fn port_out(&mut self, port: u16, data: &[u8]) {
        let byte = data.first().copied().unwrap_or_default();
        match port {
            COM1..COM1_END => self.bus.serial.store(u64::from(port - COM1), data),
            CONFIG_ADDRESS => {
                // Shorter accesses do not reach the register (PCI 3.0, 3.2.2.3.2).
                if let Ok(address) = data.try_into() {
                    let address = u32::from_le_bytes(address);
                    self.bus.config_address.store(address, Ordering::Relaxed);
                }
            }
            CONFIG_DATA..CONFIG_DATA_END => {
                if let Some(offset) = self.configured(port, data.len()) {
                    self.bus.pci.config_store(offset, data);
                }
            }
            KEYBOARD_COMMAND if byte == PULSE_RESET => self.verdict = Some(Verdict::Reset),
            RESET if byte == RESET_VALUE => self.verdict = Some(Verdict::Reset),
            SLEEP_CONTROL if is_power_off(byte) => self.verdict = Some(Verdict::PowerOff),
            _ => {}
        }
    }

    fn verdict(&mut self) -> Option<Verdict> {
        self.verdict.take()
    }
}

impl BusPort {
    /// Where in configuration space an access of `len` bytes to a data port goes (PCI 3.0, 3.2.2.3.2).
    fn configured(&self, port: u16, len: usize) -> Option<u64> {
        let address = self.bus.config_address.load(Ordering::Relaxed);
        let byte = port - CONFIG_DATA;
        let enabled = address >> 31 == 1;
        let bus = address >> 16 & 0xFF;
        if !enabled || bus != 0 || usize::from(byte) + len > 4 {
            return None;
        }
        let function = u64::from(address >> 8 & 0xFF);
        let register = u64::from(address & 0xFC) + u64::from(byte);
        Some(function << 12 | register)
    }
}

/// The offset in `range` of an access that lies wholly in it.
fn within(range: &Range<u64>, at: u64, len: usize) -> Option<u64> {
    let end = at.checked_add(len as u64)?;
    (at >= range.start && end <= range.end).then(|| at - range.start)
}

const COM1_END: u16 = COM1 + 8;
/// Configuration mechanism 1 (PCI 3.0, 3.2.2.3.2).
const CONFIG_ADDRESS: u16 = 0xCF8;
const CONFIG_DATA: u16 = 0xCFC;
const CONFIG_DATA_END: u16 = CONFIG_DATA + 4;
/// Command register of a PC's keyboard controller.
const KEYBOARD_COMMAND: u16 = 0x64;
/// Its command to pulse the processor's reset line.
const PULSE_RESET: u8 = 0xFE;
/// Data register of a PC's clock.
const CMOS_DATA: u16 = 0x71;
