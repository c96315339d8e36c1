//! The three queues: packets in, packets out, events; and the connections between them.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use zerocopy::{FromZeros, IntoBytes};

use super::HostPorts;
use super::connection::Connection;
use super::packet::{HEADER, Header, Op, STREAM};
use crate::virtio::buffers::TURN_CHAINS;
use crate::virtio::{ActiveQueue, DriverFault, Memory, QueueHandler, QueueOwnedT, QueueT};

/// Most connections at a time; one more is refused.
pub const CONNECTIONS: usize = 256;
/// Most resets that wait for the guest to take them; with more, its packets wait.
pub const RESETS: usize = 64;

const HOST_CID: u64 = 2; // VMADDR_CID_HOST
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// Most data in one packet to the guest, so that connections take turns.
const PACKET: usize = 64 * 1024;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2, section 5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

/// A connection's port on the host and on the guest.
type Key = (u32, u32);

/// Everything between the queues and the host's streams.
#[derive(Debug)]
pub(super) struct Traffic {
    guest_cid: u64,
    ports: Arc<dyn HostPorts>,
    connections: BTreeMap<Key, Connection>,
    /// Connections with something for the guest, each once, in the order of their turns.
    turns: VecDeque<Key>,
    resets: VecDeque<Header>,
    /// The receive queue is out of buffers: reading from the host would be pointless.
    starved: bool,
    restored: bool,
    /// Chains left in this turn.
    budget: usize,
    /// What the last [`QueueHandler::sources`] named, in its order.
    polled: RefCell<Vec<Key>>,
}

impl Traffic {
    pub(super) fn new(guest_cid: u64, ports: Arc<dyn HostPorts>) -> Self {
        Self {
            guest_cid,
            ports,
            connections: BTreeMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            starved: false,
            restored: false,
            budget: TURN_CHAINS,
            polled: RefCell::default(),
        }
    }

    /// Starts over as `guest_cid`; the driver is told that its connections are gone.
    pub(super) fn forget(&mut self, guest_cid: u64) {
        *self = Self::new(guest_cid, self.ports.clone());
        self.restored = true;
    }

    /// Takes packets of the driver until there are none or the guest must first take its resets.
    fn receive(&mut self, queues: &mut [Option<ActiveQueue>], memory: &Memory) -> Result<(), DriverFault> {
        let Some(Some(tx)) = queues.get_mut(TX) else {
            return Ok(());
        };
        let mut used = false;
        while self.resets.len() < RESETS {
            if self.budget == 0 {
                tx.kick.signal();
                break;
            }
            let Some(chain) = tx.queue.iter(memory)?.next() else {
                if tx.queue.enable_notification(memory)? {
                    continue;
                }
                break;
            };
            self.budget -= 1;
            let head = chain.head_index();
            let parts = parts(chain.readable());
            self.packet(&parts, memory)?;
            tx.queue.add_used(memory, head, 0)?;
            used = true;
        }
        if used && tx.queue.needs_notification(memory)? {
            tx.interrupt.signal();
        }
        Ok(())
    }

    /// One packet of the driver.
    fn packet(&mut self, parts: &[Part], memory: &Memory) -> Result<(), DriverFault> {
        let (front, data) = split(parts, HEADER);
        let mut header = Header::new_zeroed();
        let mut rest = header.as_mut_bytes();
        for (at, len) in front {
            let (now, later) = rest
                .split_at_mut_checked(len)
                .ok_or(DriverFault::Request("a vsock header is longer than itself"))?;
            memory.read_slice(now, at)?;
            rest = later;
        }
        if !rest.is_empty() {
            return Err(DriverFault::Request("a vsock packet is shorter than its header"));
        }
        if header.src_cid.get() != self.guest_cid {
            return Ok(()); // not from this guest: there is nobody to answer (5.10.6.4.1)
        }
        let key = (header.dst_port.get(), header.src_port.get());
        let len = usize::try_from(header.len.get()).unwrap_or(usize::MAX);
        let held: usize = data.iter().map(|(_, len)| len).sum();
        let sane = header.dst_cid.get() == HOST_CID && header.kind.get() == STREAM && len <= held;
        match Op::decode(header.op.get()) {
            Some(Op::Reset) => drop(self.connections.remove(&key)),
            Some(op) if sane => self.operate(op, key, &header, split(&data, len).0, memory)?,
            _ => self.reset(key, &header),
        }
        Ok(())
    }

    fn operate(
        &mut self,
        op: Op,
        key: Key,
        header: &Header,
        data: Vec<Part>,
        memory: &Memory,
    ) -> Result<(), DriverFault> {
        if op == Op::Request {
            self.request(key, header);
            return Ok(());
        }
        let Some(connection) = self.connections.get_mut(&key) else {
            self.reset(key, header);
            return Ok(());
        };
        connection.hear_credit(header);
        let outcome = match op {
            Op::Data => take(connection, &data, memory)?,
            Op::Shutdown => {
                connection.close_guest(header.flags.get());
                connection.drain().is_ok()
            }
            Op::CreditRequest => {
                connection.owed.credit = true;
                true
            }
            Op::CreditUpdate => true,
            Op::Request | Op::Response | Op::Reset => false,
        };
        if outcome && !connection.is_over() {
            self.schedule(key);
        } else {
            self.reset(key, header);
        }
        Ok(())
    }

    fn request(&mut self, key: Key, header: &Header) {
        let known = self.connections.contains_key(&key);
        if known || self.connections.len() >= CONNECTIONS {
            return self.reset(key, header);
        }
        if let Ok((ours, host)) = UnixStream::pair()
            && ours.set_nonblocking(true).is_ok()
            && self.ports.accept(key.0, host)
        {
            self.connections.insert(key, Connection::new(ours, header));
            self.schedule(key);
        } else {
            self.reset(key, header);
        }
    }

    /// Ends what there is under `key` and tells the guest.
    fn reset(&mut self, key: Key, about: &Header) {
        self.connections.remove(&key);
        let kind = about.kind.get();
        self.resets.push_back(self.header(Op::Reset, key, kind));
    }

    fn header(&self, op: Op, (host, guest): Key, kind: u16) -> Header {
        Header {
            src_cid: HOST_CID.into(),
            dst_cid: self.guest_cid.into(),
            src_port: host.into(),
            dst_port: guest.into(),
            kind: kind.into(),
            op: (op as u16).into(),
            ..Header::default()
        }
    }

    /// Gives a connection its place in the order of turns if it wants one.
    fn schedule(&mut self, key: Key) {
        if let Some(connection) = self.connections.get_mut(&key)
            && !connection.queued
            && connection.wants_turn()
        {
            connection.queued = true;
            self.turns.push_back(key);
        }
    }

    /// Gives packets to the driver until there are none or it has no buffers.
    fn send(&mut self, queues: &mut [Option<ActiveQueue>], memory: &Memory) -> Result<(), DriverFault> {
        let Some(Some(rx)) = queues.get_mut(RX) else {
            return Ok(());
        };
        let mut used = false;
        self.starved = false;
        while !(self.resets.is_empty() && self.turns.is_empty()) {
            if self.budget == 0 {
                rx.kick.signal();
                break;
            }
            let Some(chain) = rx.queue.iter(memory)?.next() else {
                if rx.queue.enable_notification(memory)? {
                    continue;
                }
                self.starved = true;
                break;
            };
            self.budget -= 1;
            let head = chain.head_index();
            let (front, room) = split(&parts(chain.writable()), HEADER);
            if front.iter().map(|(_, len)| len).sum::<usize>() < HEADER || room.is_empty() {
                return Err(DriverFault::Request("a vsock buffer has no room for a packet"));
            }
            let Some(header) = self.produce(&room, memory)? else {
                rx.queue.go_to_previous_position();
                break;
            };
            let mut rest = header.as_bytes();
            for (at, len) in front {
                let Some((now, later)) = rest.split_at_checked(len) else {
                    break;
                };
                memory.write_slice(now, at)?;
                rest = later;
            }
            let len = u32::try_from(HEADER).unwrap_or(0) + header.len.get();
            rx.queue.add_used(memory, head, len)?;
            used = true;
        }
        if used && rx.queue.needs_notification(memory)? {
            rx.interrupt.signal();
        }
        Ok(())
    }

    /// The next packet for the driver, its data already in `room`.
    fn produce(&mut self, room: &[Part], memory: &Memory) -> Result<Option<Header>, DriverFault> {
        if let Some(reset) = self.resets.pop_front() {
            return Ok(Some(reset));
        }
        while let Some(key) = self.turns.pop_front() {
            let mut header = self.header(Op::CreditUpdate, key, STREAM);
            let Some(connection) = self.connections.get_mut(&key) else {
                continue;
            };
            connection.queued = false;
            if !connection.wants_turn() {
                continue;
            }
            let op = if std::mem::take(&mut connection.owed.response) {
                Op::Response
            } else if connection.can_read() && connection.credit() > 0 {
                let len = read(connection, room, memory)?;
                header.len.set(u32::try_from(len).unwrap_or(0));
                if len == 0 {
                    self.schedule(key); // what else it owes
                    continue;
                }
                connection.count_sent(len);
                Op::Data
            } else if connection.owed.shutdown != 0 {
                header.flags.set(std::mem::take(&mut connection.owed.shutdown));
                Op::Shutdown
            } else if std::mem::take(&mut connection.owed.credit_request) {
                Op::CreditRequest
            } else {
                Op::CreditUpdate
            };
            header.op.set(op as u16);
            connection.announce(&mut header);
            self.schedule(key);
            return Ok(Some(header));
        }
        Ok(None)
    }

    /// Tells the driver once after a restore that every connection is gone.
    fn event(&mut self, queues: &mut [Option<ActiveQueue>], memory: &Memory) -> Result<(), DriverFault> {
        let Some(Some(events)) = queues.get_mut(EVENT) else {
            return Ok(());
        };
        if !self.restored {
            return Ok(());
        }
        let Some(chain) = events.queue.iter(memory)?.next() else {
            return Ok(());
        };
        let head = chain.head_index();
        let (at, _) = parts(chain.writable())
            .into_iter()
            .find(|(_, len)| *len >= size_of::<u32>())
            .ok_or(DriverFault::Request("a vsock event buffer is too small"))?;
        memory.write_slice(&TRANSPORT_RESET.to_le_bytes(), at)?;
        events.queue.add_used(memory, head, 4)?;
        self.restored = false;
        if events.queue.needs_notification(memory)? {
            events.interrupt.signal();
        }
        Ok(())
    }

    /// Sends, and takes the packets that waited for the resets to go out.
    fn settle(&mut self, queues: &mut [Option<ActiveQueue>], memory: &Memory) -> Result<(), DriverFault> {
        loop {
            let full = self.resets.len() >= RESETS;
            self.send(queues, memory)?;
            if !full || self.resets.len() >= RESETS || self.budget == 0 {
                return Ok(());
            }
            self.receive(queues, memory)?;
        }
    }
}

impl QueueHandler for Traffic {
    fn queue(
        &mut self,
        index: usize,
        queues: &mut [Option<ActiveQueue>],
        memory: &Memory,
    ) -> Result<(), DriverFault> {
        self.budget = TURN_CHAINS;
        match index {
            TX => self.receive(queues, memory)?,
            EVENT => self.event(queues, memory)?,
            _ => {}
        }
        self.settle(queues, memory)
    }

    fn sources(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        let mut polled = self.polled.borrow_mut();
        polled.clear();
        let mut sources = Vec::new();
        for (key, connection) in &self.connections {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, !self.starved && connection.wants_input());
            flags.set(PollFlags::OUT, !connection.is_drained());
            if !flags.is_empty() {
                polled.push(*key);
                sources.push((connection.stream.as_fd(), flags));
            }
        }
        sources
    }

    fn ready(
        &mut self,
        ready: &[(usize, PollFlags)],
        queues: &mut [Option<ActiveQueue>],
        memory: &Memory,
    ) -> Result<(), DriverFault> {
        self.budget = TURN_CHAINS;
        let polled = std::mem::take(self.polled.get_mut());
        for (place, _) in ready {
            let Some(key) = polled.get(*place).copied() else {
                continue;
            };
            // The connection may be another one by now; a look too many does no harm.
            let Some(connection) = self.connections.get_mut(&key) else {
                continue;
            };
            connection.readable |= connection.wants_input();
            let drained = connection.is_drained() || connection.drain().is_ok();
            if drained && !connection.is_over() {
                self.schedule(key);
            } else {
                let about = self.header(Op::Reset, key, STREAM);
                self.reset(key, &about);
            }
        }
        self.settle(queues, memory)
    }
}

/// A piece of guest memory.
type Part = (GuestAddress, usize);

fn parts(descriptors: impl Iterator<Item = Descriptor>) -> Vec<Part> {
    descriptors
        .map(|part| (part.addr(), usize::try_from(part.len()).unwrap_or(usize::MAX)))
        .filter(|(_, len)| *len > 0)
        .collect()
}

/// The first `len` bytes of `parts`, or fewer if there are no more, and what follows.
fn split(parts: &[Part], mut len: usize) -> (Vec<Part>, Vec<Part>) {
    let (mut front, mut back) = (Vec::new(), Vec::new());
    for &(at, size) in parts {
        let here = size.min(len);
        len -= here;
        if here > 0 {
            front.push((at, here));
        }
        if here < size {
            back.push((GuestAddress(at.0.wrapping_add(here as u64)), size - here));
        }
    }
    (front, back)
}

/// Data of the guest: to the host end as far as it takes it now, the rest kept. `false` ends the connection.
fn take(connection: &mut Connection, data: &[Part], memory: &Memory) -> Result<bool, DriverFault> {
    let total = data.iter().fold(0usize, |sum, (_, len)| sum.saturating_add(*len));
    if connection.admits(total).is_err() {
        return Ok(false);
    }
    let mut done = 0;
    let mut direct = connection.is_drained();
    while direct && done < total {
        let Some(&(at, len)) = split(data, done).1.first() else {
            break;
        };
        match memory.write_volatile_to(at, &mut connection.stream, len) {
            Ok(0) => direct = false,
            Ok(len) => {
                done += len;
                connection.count_forwarded(len);
            }
            Err(error) => match stream_error(error)? {
                io::ErrorKind::WouldBlock => direct = false,
                io::ErrorKind::Interrupted => {}
                _ => return Ok(false),
            },
        }
    }
    for (at, len) in split(data, done).1 {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, at)?;
        connection.keep(&bytes);
    }
    Ok(true)
}

/// Reads from the host end straight into `room`; 0 says that there is nothing for now, or for good.
fn read(connection: &mut Connection, room: &[Part], memory: &Memory) -> Result<usize, DriverFault> {
    let most = PACKET.min(usize::try_from(connection.credit()).unwrap_or(PACKET));
    let mut total = 0;
    for (at, len) in split(room, most).0 {
        match memory.read_volatile_from(at, &mut connection.stream, len) {
            Ok(0) => {
                let gone = hung_up(&connection.stream);
                connection.close_host(gone);
                break;
            }
            Ok(read) => {
                total += read;
                if read < len {
                    break; // the next turn asks again
                }
            }
            Err(error) => match stream_error(error)? {
                io::ErrorKind::WouldBlock => {
                    connection.readable = false;
                    break;
                }
                io::ErrorKind::Interrupted => break,
                _ => {
                    connection.close_host(true);
                    break;
                }
            },
        }
    }
    Ok(total)
}

/// Whether the other end is closed in both directions.
fn hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::empty())];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).is_ok() && fds.iter().any(|fd| fd.revents().contains(PollFlags::HUP))
}

/// Tells the stream's errors from the guest's.
fn stream_error(error: GuestMemoryError) -> Result<io::ErrorKind, DriverFault> {
    match error {
        GuestMemoryError::IOError(error) => Ok(error.kind()),
        other => Err(other.into()),
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
