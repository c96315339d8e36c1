//! The two queues: frames from the tap, frames to the tap.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};

use rustix::event::PollFlags;
use rustix::io::Errno;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use crate::virtio::{ActiveQueue, DriverFault, Memory, Queue, QueueHandler, QueueOwnedT, QueueT};

const RX: usize = 0;
const TX: usize = 1;
/// `struct virtio_net_hdr_v1` (virtio 1.2, section 5.1.6), in front of every frame on both sides.
const HEADER: usize = 12;
/// Offset of its `num_buffers`.
const NUM_BUFFERS: usize = 10;
/// The largest frame that a tap takes or gives: header, Ethernet header with a VLAN tag, an IP packet.
const FRAME: usize = HEADER + 18 + 65_535;
/// Most frames in one direction before the other one, and the order to stop, get their turn.
const TURN: usize = 256;

/// Everything between the queues and the tap.
#[derive(Debug)]
pub(super) struct Frames {
    tap: OwnedFd,
    /// Whether one frame may lie in several receive buffers (`VIRTIO_NET_F_MRG_RXBUF`).
    mergeable: bool,
    /// A frame on its way; with a length in `held` it waits for receive buffers.
    frame: Vec<u8>,
    held: Option<usize>,
    /// Receive buffers at hand, in the driver's order.
    taken: VecDeque<Buffer>,
    /// The driver has given too few receive buffers: reading from the tap would be pointless.
    starved: bool,
    /// The tap takes no more for the moment.
    full: bool,
    /// The tap has gone with its network namespace.
    gone: bool,
}

/// A receive buffer.
#[derive(Debug)]
struct Buffer {
    head: u16,
    parts: Vec<Part>,
    room: usize,
}

/// A piece of guest memory.
type Part = (GuestAddress, usize);

impl Frames {
    pub(super) fn new(tap: OwnedFd) -> Self {
        Self {
            tap,
            mergeable: false,
            frame: vec![0; FRAME],
            held: None,
            taken: VecDeque::new(),
            starved: false,
            full: false,
            gone: false,
        }
    }

    pub(super) fn tap(&self) -> BorrowedFd<'_> {
        self.tap.as_fd()
    }

    /// Gets ready for a driver.
    pub(super) fn begin(&mut self, mergeable: bool) {
        self.mergeable = mergeable;
        (self.starved, self.full) = (false, false);
    }

    /// Lets go of all buffers; says how many the driver has made available in vain.
    pub(super) fn end(&mut self) -> u16 {
        let taken = self.taken.len();
        self.taken.clear();
        u16::try_from(taken).unwrap_or(0) // a queue has at most 32768
    }

    /// Gives frames to the driver until there are none or it has no buffers.
    fn receive(&mut self, queues: &mut [Option<ActiveQueue>], memory: &Memory) -> Result<(), DriverFault> {
        let Some(Some(rx)) = queues.get_mut(RX) else {
            self.starved = true;
            return Ok(());
        };
        self.starved = false;
        let before = rx.queue.next_used();
        for _ in 0..TURN {
            if self.taken.is_empty() && !self.take(&mut rx.queue, memory)? {
                self.starved = true;
                break;
            }
            let Some(len) = self.next_frame() else {
                break;
            };
            match self.gather(len, &mut rx.queue, memory)? {
                Gathered::Enough => {
                    self.deliver(len, &mut rx.queue, memory)?;
                    self.held = None;
                }
                Gathered::NeverEnough => self.held = None,
                Gathered::NotYet => {
                    self.starved = true;
                    break;
                }
            }
        }
        if rx.queue.next_used() != before && wants_interrupt(&rx.queue, before, memory)? {
            rx.interrupt.signal();
        }
        Ok(())
    }

    /// The frame that waits, or one from the tap, now in `frame`.
    fn next_frame(&mut self) -> Option<usize> {
        while self.held.is_none() && !self.gone {
            match rustix::io::read(&self.tap, self.frame.as_mut_slice()) {
                Ok(0) => self.gone = true,
                Ok(len) if len <= HEADER => {} // no frame
                Ok(len) => self.held = Some(len),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => {
                    tracing::warn!(%error, "the network card lost its tap");
                    self.gone = true;
                }
            }
        }
        self.held
    }

    /// Takes buffers for `len` bytes.
    fn gather(&mut self, len: usize, queue: &mut Queue, memory: &Memory) -> Result<Gathered, DriverFault> {
        let mut room = 0usize;
        for at in 0.. {
            if self.taken.len() == at && !self.take(queue, memory)? {
                // A driver that has given its whole ring will not give more before it gets something.
                return Ok(match self.taken.len() < usize::from(queue.size()) {
                    true => Gathered::NotYet,
                    false => Gathered::NeverEnough,
                });
            }
            room = room.saturating_add(self.taken.get(at).map_or(0, |buffer| buffer.room));
            if room >= len {
                break;
            }
            if !self.mergeable {
                return Ok(Gathered::NeverEnough);
            }
        }
        Ok(Gathered::Enough)
    }

    /// Takes one more receive buffer, if there is one.
    fn take(&mut self, queue: &mut Queue, memory: &Memory) -> Result<bool, DriverFault> {
        loop {
            if let Some(chain) = queue.iter(memory)?.next() {
                let head = chain.head_index();
                let (parts, room) = parts(chain.writable());
                if room < HEADER {
                    return Err(DriverFault::Request(
                        "a receive buffer has no room for a frame's header",
                    ));
                }
                self.taken.push_back(Buffer { head, parts, room });
                return Ok(true);
            }
            if !queue.enable_notification(memory)? {
                return Ok(false);
            }
        }
    }

    /// Writes the frame of `len` bytes into the first buffers, which have the room, and hands them out.
    fn deliver(&mut self, len: usize, queue: &mut Queue, memory: &Memory) -> Result<(), DriverFault> {
        let (mut rest, mut room, mut count) = (len, 0usize, 0u16);
        for buffer in &self.taken {
            room = room.saturating_add(buffer.room);
            count = count.wrapping_add(1);
            if room >= len {
                break;
            }
        }
        if let Some(field) = self.frame.get_mut(NUM_BUFFERS..HEADER) {
            field.copy_from_slice(&count.to_le_bytes());
        }
        let mut bytes = self.frame.get(..len).unwrap_or_default();
        for left in (0..count).rev() {
            let Some(buffer) = self.taken.pop_front() else {
                break;
            };
            for (at, size) in buffer.parts {
                let (now, later) = bytes.split_at(size.min(bytes.len()));
                memory.write_slice(now, at)?;
                bytes = later;
            }
            let written = u32::try_from(buffer.room.min(rest)).unwrap_or(0);
            rest = rest.saturating_sub(buffer.room);
            if left > 0 {
                // The driver must see the buffers of a frame all at once: written now, shown with the last.
                write_used(queue, buffer.head, written, memory)?;
            } else {
                queue.add_used(memory, buffer.head, written)?;
            }
        }
        Ok(())
    }

    /// Takes frames of the driver until there are none or the tap is full.
    fn send(&mut self, queues: &mut [Option<ActiveQueue>], memory: &Memory) -> Result<(), DriverFault> {
        let Some(Some(tx)) = queues.get_mut(TX) else {
            return Ok(());
        };
        let mut scratch = Vec::new();
        let mut used = false;
        self.full = false;
        let mut turn = 0..TURN;
        loop {
            if turn.next().is_none() {
                tx.kick.signal(); // the rest after whatever else waits
                break;
            }
            let Some(chain) = tx.queue.iter(memory)?.next() else {
                if tx.queue.enable_notification(memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let (parts, len) = parts(chain.readable());
            if len < HEADER {
                return Err(DriverFault::Request("a frame is shorter than its header"));
            }
            // Larger than any frame can be: dropped, as by a card's own limit.
            if len <= FRAME {
                scratch.resize(len, 0);
                let mut rest = scratch.as_mut_slice();
                for (at, size) in parts {
                    let (now, later) = std::mem::take(&mut rest).split_at_mut(size);
                    memory.read_slice(now, at)?;
                    rest = later;
                }
                if !self.transmit(&scratch) {
                    self.full = true;
                    tx.queue.go_to_previous_position();
                    break;
                }
            }
            tx.queue.add_used(memory, head, 0)?;
            used = true;
        }
        if used && tx.queue.needs_notification(memory)? {
            tx.interrupt.signal();
        }
        Ok(())
    }

    /// Gives a frame to the tap; `false` says that it takes none now. One that it refuses is lost, as on a wire.
    fn transmit(&self, frame: &[u8]) -> bool {
        loop {
            match rustix::io::write(&self.tap, frame) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return false,
                Err(error) => {
                    tracing::trace!(%error, "the tap refused a frame");
                    return true;
                }
                Ok(_) => return true,
            }
        }
    }
}

/// Whether the buffers at hand are enough for a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gathered {
    Enough,
    /// When the driver has given more.
    NotYet,
    /// It cannot be delivered.
    NeverEnough,
}

impl QueueHandler for Frames {
    fn queue(
        &mut self,
        index: usize,
        queues: &mut [Option<ActiveQueue>],
        memory: &Memory,
    ) -> Result<(), DriverFault> {
        match index {
            RX => self.receive(queues, memory),
            TX => self.send(queues, memory),
            _ => Ok(()),
        }
    }

    fn sources(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, !self.starved);
        flags.set(PollFlags::OUT, self.full);
        match flags.is_empty() || self.gone {
            true => Vec::new(),
            false => vec![(self.tap.as_fd(), flags)],
        }
    }

    fn ready(
        &mut self,
        ready: &[(usize, PollFlags)],
        queues: &mut [Option<ActiveQueue>],
        memory: &Memory,
    ) -> Result<(), DriverFault> {
        for (_, flags) in ready {
            if flags.contains(PollFlags::OUT) {
                self.send(queues, memory)?;
            }
            if flags.intersects(PollFlags::IN | PollFlags::ERR | PollFlags::HUP) {
                self.receive(queues, memory)?;
                // An error that reading did not clear would be reported again at once, for ever.
                self.gone |=
                    !flags.contains(PollFlags::IN) && flags.intersects(PollFlags::ERR | PollFlags::HUP);
            }
        }
        Ok(())
    }
}

fn parts(descriptors: impl Iterator<Item = Descriptor>) -> (Vec<Part>, usize) {
    let parts: Vec<Part> = descriptors
        .map(|part| (part.addr(), usize::try_from(part.len()).unwrap_or(usize::MAX)))
        .filter(|(_, len)| *len > 0)
        .collect();
    let len = parts
        .iter()
        .fold(0usize, |sum, (_, len)| sum.saturating_add(*len));
    (parts, len)
}

/// Writes the next element of the used ring without telling the driver (virtio 1.2, section 2.7.8).
fn write_used(queue: &mut Queue, head: u16, len: u32, memory: &Memory) -> Result<(), DriverFault> {
    let next = queue.next_used();
    // A queue with chains in it has a size, which the transport has checked.
    let slot = u64::from(next.checked_rem(queue.size()).unwrap_or(0));
    let at = queue.used_ring().wrapping_add(4 + slot * 8);
    let element = u64::from(len) << 32 | u64::from(head); // `id`, then `len`, little-endian
    memory.write_obj(element.to_le(), GuestAddress(at))?;
    queue.set_next_used(next.wrapping_add(1));
    Ok(())
}

/// Whether the driver wants to hear of what was used since `before` (virtio 1.2, section 2.7.10).
///
/// The queue's own answer knows of [`Queue::add_used`] only.
fn wants_interrupt(queue: &Queue, before: u16, memory: &Memory) -> Result<bool, DriverFault> {
    if !queue.event_idx_enabled() {
        return Ok(true);
    }
    // What was used must be visible before the driver's wish is read, or both sides could miss each other.
    fence(Ordering::SeqCst);
    let at = queue.avail_ring().wrapping_add(4 + 2 * u64::from(queue.size()));
    let event = u16::from_le(memory.load(GuestAddress(at), Ordering::Relaxed)?);
    let now = queue.next_used();
    Ok(now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before))
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
