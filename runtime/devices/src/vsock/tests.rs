//! The device against a driver in memory: the handler is called as its worker would.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::Mutex;

use caisson_hal::os::Event;
use virtio_queue::Queue;

use super::super::connection::WINDOW;
use super::*;
use crate::virtio::Signal;

const GUEST: u64 = 3;
const SIZE: u16 = 16;
/// Queue `i` lies at `i * AREA`: descriptors, then the available ring, then the used ring.
const AREA: u64 = 0x1000;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x800;
/// Buffer `n` of queue `i`.
const BUFFERS: u64 = 0x1_0000;
const BUFFER: u64 = 0x1_0000 + 0x100;

#[derive(Debug, Default)]
struct Accepted {
    streams: Mutex<Vec<(u32, UnixStream)>>,
}

impl HostPorts for Accepted {
    fn accept(&self, port: u32, stream: UnixStream) -> bool {
        if port != 1024 {
            return false;
        }
        self.streams.lock().unwrap().push((port, stream));
        true
    }
}

#[derive(Debug)]
struct Quiet;

impl Signal for Quiet {
    fn signal(&self) {}
}

struct Driver {
    memory: Memory,
    traffic: Traffic,
    ports: Arc<Accepted>,
    queues: Vec<Option<ActiveQueue>>,
    avail: [u16; 3],
    taken: [u16; 3],
}

impl Driver {
    fn new() -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap();
        let ports = Arc::new(Accepted::default());
        let queues = (0..3u32)
            .map(|index| {
                let base = index * 0x1000;
                let mut queue = Queue::new(SIZE).unwrap();
                queue.set_size(SIZE);
                queue.set_desc_table_address(Some(base), Some(0));
                queue.set_avail_ring_address(Some(base + 0x400), Some(0));
                queue.set_used_ring_address(Some(base + 0x800), Some(0));
                queue.set_ready(true);
                Some(ActiveQueue {
                    queue,
                    kick: Event::new().unwrap(),
                    interrupt: Arc::new(Quiet),
                })
            })
            .collect();
        Self {
            memory,
            traffic: Traffic::new(GUEST, ports.clone()),
            ports,
            queues,
            avail: [0; 3],
            taken: [0; 3],
        }
    }

    fn address(queue: usize, slot: u16) -> u64 {
        BUFFERS + (queue as u64 * u64::from(SIZE) + u64::from(slot)) * BUFFER
    }

    /// Makes a buffer available: one descriptor of `len` bytes.
    fn offer(&mut self, queue: usize, len: u32) {
        let slot = self.avail[queue] % SIZE;
        let base = queue as u64 * AREA;
        let at = base + u64::from(slot) * 16;
        let flags: u16 = if queue == TX { 0 } else { 2 };
        self.memory
            .write_obj(Self::address(queue, slot), GuestAddress(at))
            .unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        let ring = base + AVAIL + 4 + u64::from(slot) * 2;
        self.memory.write_obj(slot, GuestAddress(ring)).unwrap();
        self.avail[queue] = self.avail[queue].wrapping_add(1);
        self.memory
            .write_obj(self.avail[queue], GuestAddress(base + AVAIL + 2))
            .unwrap();
    }

    /// Whether the ring has a free slot, as a driver that keeps the rules must ask.
    fn has_room(&self, queue: usize) -> bool {
        let next = self.queues[queue].as_ref().unwrap().queue.next_avail();
        self.avail[queue].wrapping_sub(next) < SIZE
    }

    fn kick(&mut self, queue: usize) -> Result<(), DriverFault> {
        self.traffic.queue(queue, &mut self.queues, &self.memory)
    }

    fn try_say(&mut self, bytes: &[u8]) -> Result<(), DriverFault> {
        let at = Self::address(TX, self.avail[TX] % SIZE);
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        self.offer(TX, u32::try_from(bytes.len()).unwrap());
        self.kick(TX)
    }

    /// Sends a packet from guest port 7 to host port 1024.
    fn say(&mut self, op: Op, flags: u32, data: &[u8]) {
        let mut bytes = header(op, flags, data.len()).as_bytes().to_vec();
        bytes.extend(data);
        self.try_say(&bytes).unwrap();
    }

    /// One look at the host's streams, as the worker takes it.
    fn poll(&mut self) {
        let ready: Vec<_> = {
            let sources = self.traffic.sources();
            let mut fds: Vec<_> = sources
                .iter()
                .map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags))
                .collect();
            poll(
                &mut fds,
                Some(&Timespec {
                    tv_sec: 0,
                    tv_nsec: 0,
                }),
            )
            .unwrap();
            let revents = fds.iter().map(PollFd::revents).enumerate();
            revents.filter(|(_, ready)| !ready.is_empty()).collect()
        };
        self.traffic
            .ready(&ready, &mut self.queues, &self.memory)
            .unwrap();
    }

    /// Takes the next packet that the device gave.
    fn hear(&mut self) -> Option<(Header, Vec<u8>)> {
        let used = RX as u64 * AREA + USED;
        let index: u16 = self.memory.read_obj(GuestAddress(used + 2)).unwrap();
        if index == self.taken[RX] {
            return None;
        }
        let entry = used + 4 + u64::from(self.taken[RX] % SIZE) * 8;
        let slot: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
        self.taken[RX] = self.taken[RX].wrapping_add(1);
        let mut bytes = vec![0; len as usize];
        let at = Self::address(RX, u16::try_from(slot).unwrap());
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        let mut header = Header::new_zeroed();
        header.as_mut_bytes().copy_from_slice(&bytes[..HEADER]);
        Some((header, bytes.split_off(HEADER)))
    }

    fn hear_op(&mut self) -> Option<u16> {
        self.hear().map(|(header, _)| header.op.get())
    }

    fn connect(&mut self) -> UnixStream {
        for _ in 0..8 {
            self.offer(RX, 4096);
        }
        self.say(Op::Request, 0, &[]);
        assert_eq!(self.hear_op(), Some(Op::Response as u16));
        let (_, stream) = self.ports.streams.lock().unwrap().pop().unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }
}

fn header(op: Op, flags: u32, len: usize) -> Header {
    Header {
        src_cid: GUEST.into(),
        dst_cid: HOST_CID.into(),
        src_port: 7.into(),
        dst_port: 1024.into(),
        len: u32::try_from(len).unwrap().into(),
        kind: STREAM.into(),
        op: (op as u16).into(),
        flags: flags.into(),
        buf_alloc: 8192.into(),
        fwd_cnt: 0.into(),
    }
}

#[test]
fn bytes_go_both_ways_over_a_connection_the_guest_opened() {
    let mut driver = Driver::new();
    let mut host = driver.connect();
    driver.say(Op::Data, 0, b"to the host");
    let mut bytes = [0; 32];
    let len = host.read(&mut bytes).unwrap();
    assert_eq!(&bytes[..len], b"to the host");
    host.write_all(b"to the guest").unwrap();
    driver.poll();
    let (header, data) = driver.hear().unwrap();
    assert_eq!((header.op.get(), header.fwd_cnt.get()), (Op::Data as u16, 11));
    assert_eq!(data, b"to the guest");
}

#[test]
fn a_port_that_nobody_serves_is_reset() {
    let mut driver = Driver::new();
    driver.offer(RX, 4096);
    let mut request = header(Op::Request, 0, 0);
    request.dst_port.set(5);
    driver.try_say(request.as_bytes()).unwrap();
    assert_eq!(driver.hear_op(), Some(Op::Reset as u16));
}

#[test]
fn the_host_is_not_read_beyond_the_guests_credit() {
    let mut driver = Driver::new();
    let mut host = driver.connect();
    host.write_all(&[1; 10_000]).unwrap();
    driver.poll();
    let mut got = 0;
    let mut last = 0;
    while let Some((header, data)) = driver.hear() {
        got += data.len();
        last = header.op.get();
    }
    assert_eq!(got, 8192);
    assert_eq!(last, Op::CreditRequest as u16);
    let mut update = header(Op::CreditUpdate, 0, 0);
    update.fwd_cnt.set(8192);
    driver.try_say(update.as_bytes()).unwrap();
    assert_eq!(driver.hear().unwrap().1.len(), 10_000 - 8192);
}

#[test]
fn a_half_closed_guest_still_hears_and_a_half_closed_host_still_speaks() {
    let mut driver = Driver::new();
    let mut host = driver.connect();
    driver.say(Op::Data, 0, b"last");
    driver.say(Op::Shutdown, 2, &[]);
    let mut all = String::new();
    host.read_to_string(&mut all).unwrap();
    assert_eq!(all, "last");
    host.write_all(b"answer").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    driver.poll();
    assert_eq!(driver.hear().unwrap().1, b"answer");
    let (header, _) = driver.hear().unwrap();
    assert_eq!(
        (header.op.get(), header.flags.get() & 2),
        (Op::Shutdown as u16, 2)
    );
}

#[test]
fn a_guest_that_closes_both_halves_gets_its_reset_and_the_host_its_end() {
    let mut driver = Driver::new();
    let mut host = driver.connect();
    driver.say(Op::Shutdown, 3, &[]);
    assert_eq!(driver.hear_op(), Some(Op::Reset as u16));
    assert_eq!(host.read(&mut [0; 1]).unwrap(), 0);
    assert!(driver.traffic.connections.is_empty());
}

#[test]
fn a_slow_host_is_buffered_up_to_the_window_and_then_the_guest_is_reset() {
    let mut driver = Driver::new();
    let _host = driver.connect();
    let mut said = 0;
    while !driver.traffic.connections.is_empty() {
        driver.say(Op::Data, 0, &[0; 32 * 1024]);
        said += 1;
        assert!(said < 100, "the backlog has no bound");
    }
    assert!(said * 32 * 1024 > WINDOW);
}

#[test]
fn a_packet_without_its_header_breaks_the_device_and_other_nonsense_is_reset() {
    assert!(Driver::new().try_say(&[0; HEADER - 1]).is_err());
    let spoil: [fn(&mut Header); 4] = [
        |header| header.op.set(99),
        |header| header.kind.set(2),
        |header| header.len.set(u32::MAX),
        |header| header.dst_cid.set(9),
    ];
    for spoil in spoil {
        let mut driver = Driver::new();
        let _host = driver.connect();
        let mut packet = header(Op::Data, 0, 0);
        spoil(&mut packet);
        driver.try_say(packet.as_bytes()).unwrap();
        assert_eq!(driver.hear_op(), Some(Op::Reset as u16));
    }
}

#[test]
fn resets_that_the_guest_does_not_take_hold_up_its_own_packets_only() {
    let mut driver = Driver::new();
    while driver.has_room(TX) {
        driver.say(Op::Data, 0, &[]);
    }
    assert_eq!(driver.traffic.resets.len(), RESETS);
}

#[test]
fn a_turn_ends_with_its_budget_and_the_rest_is_looked_at_later() {
    let mut driver = Driver::new();
    for _ in 0..SIZE {
        driver.offer(TX, u32::try_from(HEADER).unwrap()); // zeros: from nobody, to nobody
    }
    driver.traffic.budget = 5;
    driver
        .traffic
        .receive(&mut driver.queues, &driver.memory)
        .unwrap();
    let tx = driver.queues[TX].as_ref().unwrap();
    assert_eq!(tx.queue.next_avail(), 5);
    assert!(tx.kick.clear());
    driver.kick(TX).unwrap();
    assert_eq!(driver.queues[TX].as_ref().unwrap().queue.next_avail(), SIZE);
}

#[test]
fn random_packets_neither_panic_nor_outgrow_the_bounds() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut driver = Driver::new();
    for _ in 0..20_000 {
        let mut packet = header(Op::Request, 0, 0);
        packet.op.set((next() % 9) as u16);
        packet.src_port.set((next() % 600) as u32);
        packet.dst_port.set(if next() % 8 == 0 { 1 } else { 1024 });
        packet.flags.set((next() % 5) as u32);
        packet.len.set((next() % 70) as u32);
        packet.buf_alloc.set(u32::try_from(next() >> 32).unwrap());
        packet.fwd_cnt.set(u32::try_from(next() >> 32).unwrap());
        let mut bytes = packet.as_bytes().to_vec();
        bytes.resize(HEADER + (next() % 64) as usize, 0xa5);
        if driver.has_room(TX) {
            driver.try_say(&bytes).unwrap();
        }
        if next() % 2 == 0 && driver.has_room(RX) {
            driver.offer(RX, 4096);
            driver.kick(RX).unwrap();
        }
        driver.poll();
        if next() % 4 == 0 {
            driver.ports.streams.lock().unwrap().pop();
        }
        assert!(driver.traffic.connections.len() <= CONNECTIONS);
        assert!(driver.traffic.resets.len() <= RESETS + CONNECTIONS);
    }
}

#[test]
fn after_a_restore_the_driver_is_told_that_the_transport_was_reset() {
    let mut driver = Driver::new();
    let _host = driver.connect();
    driver.traffic.forget(GUEST);
    driver.offer(EVENT, 8);
    driver.kick(EVENT).unwrap();
    let used: u16 = driver
        .memory
        .read_obj(GuestAddress(EVENT as u64 * AREA + USED + 2))
        .unwrap();
    assert_eq!(used, 1);
    assert!(driver.traffic.connections.is_empty());
}
