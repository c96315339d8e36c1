//! Configuration space of type 0: what each byte reads as and which of its bits the guest may write.

/// Bytes that exist; the extended space above holds no capability and reads as zero.
pub(super) const SIZE: usize = 256;

/// Where the registers are (PCI Local Bus 3.0, section 6.1, figure 6-1).
pub(super) mod at {
    pub(in super::super) const COMMAND: usize = 0x04;
    pub(super) const STATUS: usize = 0x06;
    pub(super) const REVISION: usize = 0x08;
    pub(super) const CACHE_LINE: usize = 0x0c;
    pub(in super::super) const BAR0: usize = 0x10;
    pub(super) const SUBSYSTEM: usize = 0x2c;
    pub(super) const CAPABILITIES: usize = 0x34;
    pub(super) const INTERRUPT_LINE: usize = 0x3c;
}

/// Command register: memory space (section 6.2.2).
pub(super) const COMMAND_MEMORY: u16 = 1 << 1;
/// Command register: bus master.
const COMMAND_MASTER: u16 = 1 << 2;
/// Command register: interrupt disable.
const COMMAND_NO_INTX: u16 = 1 << 10;
/// Status register: there is a capability list (section 6.2.3).
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// A 64-bit memory BAR that is not prefetchable (section 6.2.5.1).
const BAR_MEMORY_64: u64 = 0b100;

/// The identity of a function.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity {
    pub(super) vendor: u16,
    pub(super) device: u16,
    pub(super) revision: u8,
    /// Base class and subclass.
    pub(super) class: u16,
    pub(super) subsystem: u16,
}

/// Registers and their masks.
#[derive(Debug)]
pub(super) struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    bar_size: u64,
}

impl ConfigSpace {
    pub(super) fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bar_size: 0,
        };
        space.set(0, &identity.vendor.to_le_bytes());
        space.set(2, &identity.device.to_le_bytes());
        let [subclass, class] = identity.class.to_le_bytes();
        space.set(at::REVISION, &[identity.revision, 0, subclass, class]);
        space.set(at::SUBSYSTEM, &identity.vendor.to_le_bytes());
        space.set(at::SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_INTX;
        space.allow(at::COMMAND, &command.to_le_bytes());
        space.allow(at::CACHE_LINE, &[0xff]);
        space.allow(at::INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Gives the function its memory BAR of `size` bytes, a power of two, and has it decode.
    pub(super) fn add_bar(&mut self, base: u64, size: u64) {
        self.bar_size = size;
        self.set(at::BAR0, &(base | BAR_MEMORY_64).to_le_bytes());
        self.allow(at::BAR0, &(!size.wrapping_sub(1)).to_le_bytes());
        self.set(at::COMMAND, &COMMAND_MEMORY.to_le_bytes());
    }

    /// Adds the capabilities, each at its place and in this order.
    pub(super) fn add_capabilities(&mut self, capabilities: &[(usize, Vec<u8>)]) {
        let mut link = at::CAPABILITIES;
        for (place, bytes) in capabilities {
            self.set(link, &[u8::try_from(*place).unwrap_or(0)]);
            self.set(*place, bytes);
            link = place.saturating_add(1);
            self.set(link, &[0]);
        }
        self.set(at::STATUS, &STATUS_CAPABILITIES.to_le_bytes());
    }

    /// Lets the guest write the bits of `mask` at `register`.
    pub(super) fn allow(&mut self, register: usize, mask: &[u8]) {
        copy(&mut self.writable, register, mask);
    }

    /// Sets registers from our side.
    pub(super) fn set(&mut self, register: usize, bytes: &[u8]) {
        copy(&mut self.bytes, register, bytes);
    }

    pub(super) fn load(&self, register: usize, data: &mut [u8]) {
        let known = self.bytes.iter().copied().chain(std::iter::repeat(0));
        for (to, from) in data.iter_mut().zip(known.skip(register.min(SIZE))) {
            *to = from;
        }
    }

    pub(super) fn store(&mut self, register: usize, data: &[u8]) {
        let registers = self.bytes.iter_mut().zip(&self.writable);
        for ((byte, mask), new) in registers.skip(register).zip(data) {
            *byte = (*byte & !mask) | (new & mask);
        }
    }

    pub(super) fn word(&self, register: usize) -> u16 {
        let mut bytes = [0; 2];
        self.load(register, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    pub(super) fn dword(&self, register: usize) -> u32 {
        let mut bytes = [0; 4];
        self.load(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// The address in the BAR, whether it decodes or not.
    pub(super) fn bar(&self) -> u64 {
        let mut bytes = [0; 8];
        self.load(at::BAR0, &mut bytes);
        u64::from_le_bytes(bytes) & !self.bar_size.wrapping_sub(1)
    }

    /// Whether the function answers to its BAR.
    pub(super) fn decodes(&self) -> bool {
        self.word(at::COMMAND) & COMMAND_MEMORY != 0
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Puts back what [`ConfigSpace::bytes`] gave, as far as the guest could have written it.
    pub(super) fn restore(&mut self, bytes: &[u8]) -> Result<(), String> {
        if bytes.len() != SIZE {
            return Err(format!("configuration space of {} bytes", bytes.len()));
        }
        self.store(0, bytes);
        Ok(())
    }
}

fn copy(to: &mut [u8; SIZE], register: usize, from: &[u8]) {
    for (to, from) in to.iter_mut().skip(register).zip(from) {
        *to = *from;
    }
}

/// The host bridge in slot 0: an identity without registers to write.
#[derive(Debug)]
pub(super) struct HostBridge(ConfigSpace);

impl Default for HostBridge {
    fn default() -> Self {
        Self(ConfigSpace::new(Identity {
            vendor: 0x1b36, // the id that the field uses for a bridge with nothing but ECAM
            device: 0x0008,
            revision: 0,
            class: 0x0600,
            subsystem: 0,
        }))
    }
}

impl HostBridge {
    pub(super) fn load(&self, register: usize, data: &mut [u8]) {
        self.0.load(register, data);
    }
}
