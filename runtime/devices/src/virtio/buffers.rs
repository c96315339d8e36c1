//! The buffers of one descriptor chain, and the turn in which a device serves a queue.

use std::collections::VecDeque;

use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::{ActiveQueue, DriverFault, Memory, QueueOwnedT};

/// A piece of guest memory.
pub(crate) type Part = (GuestAddress, usize);

/// What the driver gives to read and to fill, as two streams of bytes.
#[derive(Debug)]
pub(crate) struct Buffers {
    readable: VecDeque<Part>,
    writable: VecDeque<Part>,
    written: u32,
}

impl Buffers {
    fn new(chain: DescriptorChain<&Memory>) -> Result<Self, DriverFault> {
        let mut buffers = Self {
            readable: VecDeque::new(),
            writable: VecDeque::new(),
            written: 0,
        };
        for part in chain {
            let len = usize::try_from(part.len()).unwrap_or(usize::MAX);
            if part.addr().0.checked_add(len as u64).is_none() {
                return Err(DriverFault::Request("a buffer wraps around"));
            }
            if part.is_write_only() {
                buffers.writable.push_back((part.addr(), len));
            } else if buffers.writable.is_empty() {
                buffers.readable.push_back((part.addr(), len));
            } else {
                // Virtio 1.2, section 2.7.4.2.
                return Err(DriverFault::Request("a readable buffer follows a writable one"));
            }
        }
        Ok(buffers)
    }

    /// Bytes left to read.
    pub(crate) fn readable(&self) -> u64 {
        self.readable.iter().map(|(_, len)| *len as u64).sum()
    }

    /// Bytes left to fill.
    pub(crate) fn writable(&self) -> u64 {
        self.writable.iter().map(|(_, len)| *len as u64).sum()
    }

    /// The pieces left to fill.
    pub(crate) fn parts_to_fill(&self) -> impl Iterator<Item = Part> {
        self.writable.iter().copied()
    }

    /// Reads on, as far as there is something; says how far.
    pub(crate) fn read(&mut self, memory: &Memory, bytes: &mut [u8]) -> Result<usize, DriverFault> {
        let mut rest = bytes;
        let mut done = 0usize;
        while !rest.is_empty()
            && let Some((at, len)) = take(&mut self.readable, rest.len())
        {
            let Some((now, later)) = rest.split_at_mut_checked(len) else {
                break;
            };
            memory.read_slice(now, at)?;
            done = done.saturating_add(len);
            rest = later;
        }
        Ok(done)
    }

    /// Fills on, as far as there is room; says how far.
    pub(crate) fn write(&mut self, memory: &Memory, bytes: &[u8]) -> Result<usize, DriverFault> {
        let mut rest = bytes;
        let mut done = 0usize;
        while !rest.is_empty()
            && let Some((at, len)) = take(&mut self.writable, rest.len())
        {
            let Some((now, later)) = rest.split_at_checked(len) else {
                break;
            };
            memory.write_slice(now, at)?;
            done = done.saturating_add(len);
            rest = later;
        }
        self.count(done);
        Ok(done)
    }

    /// Takes the last byte to fill out of the stream.
    pub(crate) fn take_last(&mut self) -> Option<GuestAddress> {
        while let Some((at, len)) = self.writable.pop_back() {
            if let Some(before) = len.checked_sub(1) {
                self.writable.push_back((at, before));
                return Some(GuestAddress(at.0.wrapping_add(before as u64)));
            }
        }
        None
    }

    /// Counts `bytes` as filled that were written elsewhere than through [`Buffers::write`].
    pub(crate) fn count(&mut self, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.written = self.written.saturating_add(bytes);
    }
}

/// Up to `most` bytes off the front of `parts`.
fn take(parts: &mut VecDeque<Part>, most: usize) -> Option<Part> {
    while let Some((at, len)) = parts.pop_front() {
        let here = len.min(most);
        if here < len {
            let later = GuestAddress(at.0.wrapping_add(here as u64));
            parts.push_front((later, len.saturating_sub(here)));
        }
        if here > 0 {
            return Some((at, here));
        }
    }
    None
}

/// Serves what the driver has made available, for one turn.
///
/// `each` says how many bytes a chain cost. After [`TURN_CHAINS`] or [`TURN_BYTES`] the queue's own kick is
/// signalled and the turn ends, so that a driver that never stops cannot keep its worker from stopping.
pub(crate) fn serve(
    active: &mut ActiveQueue,
    memory: &Memory,
    mut each: impl FnMut(&mut Buffers) -> Result<u64, DriverFault>,
) -> Result<(), DriverFault> {
    let mut used = false;
    let (mut chains, mut bytes) = (0usize, 0u64);
    loop {
        if chains >= TURN_CHAINS || bytes >= TURN_BYTES {
            active.kick.signal();
            break;
        }
        let Some(chain) = active.queue.iter(memory)?.next() else {
            if active.queue.enable_notification(memory)? {
                continue;
            }
            break;
        };
        let head = chain.head_index();
        let mut buffers = Buffers::new(chain)?;
        bytes = bytes.saturating_add(each(&mut buffers)?);
        chains = chains.saturating_add(1);
        active.queue.add_used(memory, head, buffers.written)?;
        used = true;
    }
    if used && active.queue.needs_notification(memory)? {
        active.interrupt.signal();
    }
    Ok(())
}

/// Most chains in a turn.
pub(crate) const TURN_CHAINS: usize = 256;
/// Bytes after which a turn ends.
pub(crate) const TURN_BYTES: u64 = 32 << 20;
