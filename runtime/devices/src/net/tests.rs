//! The device against a driver in memory, with a socket pair for a tap.

use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use caisson_hal::os::Event;

use super::*;
use crate::virtio::Signal;

const SIZE: u16 = 8;
const AREA: u64 = 0x1000;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x800;
const BUFFERS: u64 = 0x1_0000;
/// Buffer `n` of queue `i` lies here; larger than any frame.
const BUFFER: u64 = 0x2_0000;

#[derive(Debug, Default)]
struct Count(AtomicUsize);

impl Signal for Count {
    fn signal(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct Driver {
    memory: Memory,
    frames: Frames,
    wire: UnixDatagram,
    queues: Vec<Option<ActiveQueue>>,
    interrupts: Arc<Count>,
    avail: [u16; 2],
    taken: [u16; 2],
}

impl Driver {
    fn new(mergeable: bool) -> Self {
        let (tap, wire) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        wire.set_nonblocking(true).unwrap();
        let interrupts = Arc::new(Count::default());
        let queues = (0..2u32)
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
                    interrupt: interrupts.clone(),
                })
            })
            .collect();
        let mut frames = Frames::new(tap.into());
        frames.begin(mergeable);
        Self {
            memory: Memory::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap(),
            frames,
            wire,
            queues,
            interrupts,
            avail: [0; 2],
            taken: [0; 2],
        }
    }

    fn address(queue: usize, slot: u16) -> u64 {
        BUFFERS + (queue as u64 * u64::from(SIZE) + u64::from(slot)) * BUFFER
    }

    /// Makes a buffer of `len` bytes available.
    fn offer(&mut self, queue: usize, len: u32) {
        let slot = self.avail[queue] % SIZE;
        let base = queue as u64 * AREA;
        let at = base + u64::from(slot) * 16;
        let flags: u16 = if queue == TX { 0 } else { 2 };
        let address = Self::address(queue, slot);
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        let ring = base + AVAIL + 4 + u64::from(slot) * 2;
        self.memory.write_obj(slot, GuestAddress(ring)).unwrap();
        self.avail[queue] = self.avail[queue].wrapping_add(1);
        let index = GuestAddress(base + AVAIL + 2);
        self.memory.write_obj(self.avail[queue], index).unwrap();
    }

    fn kick(&mut self, queue: usize) -> Result<(), DriverFault> {
        self.frames.queue(queue, &mut self.queues, &self.memory)
    }

    fn say(&mut self, frame: &[u8]) -> Result<(), DriverFault> {
        let at = Self::address(TX, self.avail[TX] % SIZE);
        self.memory.write_slice(frame, GuestAddress(at)).unwrap();
        self.offer(TX, u32::try_from(frame.len()).unwrap());
        self.kick(TX)
    }

    /// The buffers used since the last look.
    fn used(&mut self, queue: usize) -> Vec<Vec<u8>> {
        let used = queue as u64 * AREA + USED;
        let index: u16 = self.memory.read_obj(GuestAddress(used + 2)).unwrap();
        let mut all = Vec::new();
        while self.taken[queue] != index {
            let entry = used + 4 + u64::from(self.taken[queue] % SIZE) * 8;
            let slot: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
            let len: u32 = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
            let mut bytes = vec![0; len as usize];
            let at = Self::address(queue, u16::try_from(slot).unwrap());
            self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            all.push(bytes);
            self.taken[queue] = self.taken[queue].wrapping_add(1);
        }
        all
    }
}

fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    frame.extend((0..=250u8).cycle().take(len));
    frame
}

#[test]
fn a_frame_of_the_driver_reaches_the_wire_as_it_is() {
    let mut driver = Driver::new(true);
    driver.say(&frame(60)).unwrap();
    let mut heard = [0; 100];
    let len = driver.wire.recv(&mut heard).unwrap();
    assert_eq!(heard[..len], frame(60));
    assert_eq!(driver.used(TX).len(), 1);
    assert_eq!(driver.interrupts.0.load(Ordering::Relaxed), 1);
}

#[test]
fn a_frame_of_the_wire_is_spread_over_the_buffers_it_needs() {
    let mut driver = Driver::new(true);
    for _ in 0..5 {
        driver.offer(RX, 100);
    }
    driver.wire.send(&frame(200)).unwrap();
    driver.wire.send(&frame(60)).unwrap();
    driver.kick(RX).unwrap();
    let used = driver.used(RX);
    assert_eq!(used.iter().map(Vec::len).collect::<Vec<_>>(), [100, 100, 12, 72]);
    assert_eq!(used[0][NUM_BUFFERS..HEADER], 3u16.to_le_bytes());
    assert_eq!(used[3][NUM_BUFFERS..HEADER], 1u16.to_le_bytes());
    assert_eq!(used[..3].concat()[HEADER..], frame(200)[HEADER..]);
}

#[test]
fn a_frame_waits_for_the_buffers_it_needs_without_polling_the_tap() {
    let mut driver = Driver::new(true);
    driver.wire.send(&frame(200)).unwrap();
    driver.kick(RX).unwrap();
    assert!(driver.frames.sources().is_empty());
    driver.offer(RX, 150);
    driver.kick(RX).unwrap();
    assert!(driver.frames.sources().is_empty());
    driver.offer(RX, 150);
    driver.kick(RX).unwrap();
    assert_eq!(driver.used(RX).concat()[HEADER..], frame(200)[HEADER..]);
    driver.offer(RX, 150);
    driver.kick(RX).unwrap();
    assert_eq!(driver.frames.sources().len(), 1);
}

#[test]
fn a_frame_that_never_fits_is_lost_and_the_next_one_is_not() {
    for mergeable in [false, true] {
        let mut driver = Driver::new(mergeable);
        for _ in 0..SIZE {
            driver.offer(RX, 100);
        }
        driver.wire.send(&frame(900)).unwrap();
        driver.wire.send(&frame(60)).unwrap();
        driver.kick(RX).unwrap();
        assert_eq!(driver.used(RX).concat()[HEADER..], frame(60)[HEADER..]);
    }
}

#[test]
fn buffers_taken_in_vain_are_given_back() {
    let mut driver = Driver::new(true);
    for _ in 0..4 {
        driver.offer(RX, 100);
    }
    driver.kick(RX).unwrap();
    let next = driver.queues[RX].as_ref().unwrap().queue.next_avail();
    assert_eq!(next, driver.frames.end());
}

#[test]
fn a_wire_that_takes_no_more_holds_the_driver_up_and_nothing_is_lost() {
    let mut driver = Driver::new(true);
    let mut said = 0;
    while !driver.frames.full {
        driver.say(&frame(1500)).unwrap();
        said += 1;
        assert!(said < 10_000, "the wire never fills");
    }
    assert!(driver.frames.sources()[0].1.contains(PollFlags::OUT));
    let mut heard = 0;
    let mut buffer = [0; 2000];
    while driver.wire.recv(&mut buffer).is_ok() {
        heard += 1;
        driver
            .frames
            .ready(&[(0, PollFlags::OUT)], &mut driver.queues, &driver.memory)
            .unwrap();
    }
    assert_eq!(heard, said);
}

#[test]
fn what_is_no_frame_breaks_the_device_and_what_is_too_large_is_dropped() {
    assert!(Driver::new(true).say(&[0; HEADER - 1]).is_err());
    let mut driver = Driver::new(true);
    driver.offer(RX, 11);
    assert!(driver.kick(RX).is_err());
    let mut driver = Driver::new(true);
    driver.say(&frame(FRAME)).unwrap();
    assert_eq!(driver.used(TX).len(), 1);
    assert!(driver.wire.recv(&mut [0; 8]).is_err());
    let mut driver = Driver::new(true);
    driver.offer(TX, u32::MAX);
    driver.kick(TX).unwrap();
    assert_eq!(driver.used(TX).len(), 1);
}

#[test]
fn a_buffer_outside_memory_breaks_the_device() {
    let mut driver = Driver::new(true);
    driver.offer(RX, 2000);
    driver.memory.write_obj(u64::MAX - 100, GuestAddress(0)).unwrap();
    driver.wire.send(&frame(200)).unwrap();
    assert!(driver.kick(RX).is_err());
}

#[test]
fn a_tap_that_is_gone_is_not_polled() {
    let mut driver = Driver::new(true);
    driver.offer(RX, 2000);
    driver.kick(RX).unwrap();
    driver
        .frames
        .ready(&[(0, PollFlags::ERR)], &mut driver.queues, &driver.memory)
        .unwrap();
    assert!(driver.frames.sources().is_empty());
}

#[test]
fn with_event_indexes_the_driver_is_told_of_the_frame_it_waits_for_and_of_no_other() {
    let mut driver = Driver::new(true);
    driver.queues[RX].as_mut().unwrap().queue.set_event_idx(true);
    let event = GuestAddress(AVAIL + 4 + 2 * u64::from(SIZE));
    driver.memory.write_obj(2u16, event).unwrap(); // after the third buffer
    for _ in 0..4 {
        driver.offer(RX, 100);
    }
    driver.wire.send(&frame(150)).unwrap();
    driver.kick(RX).unwrap();
    assert_eq!(driver.interrupts.0.load(Ordering::Relaxed), 0);
    driver.wire.send(&frame(150)).unwrap();
    driver.kick(RX).unwrap();
    assert_eq!(driver.interrupts.0.load(Ordering::Relaxed), 1);
}
