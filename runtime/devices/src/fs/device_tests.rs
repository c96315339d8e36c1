//! The device with its threads, against a driver's queue in memory.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use caisson_hal::os::Event;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, IntoBytes};

use super::abi::{InHeader, InitIn, OutHeader, ROOT, op};
use super::*;
use crate::thread::Threads;
use crate::virtio::{ActiveQueue, QueueT};

const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const REQUEST: u64 = 0x1_0000;
const ANSWER: u64 = 0x2_0000;

#[derive(Debug)]
struct Told(Sender<()>);

impl Signal for Told {
    fn signal(&self) {
        let _gone = self.0.send(());
    }
}

struct Driver {
    device: Fs,
    memory: Memory,
    kick: Event,
    interrupts: Receiver<()>,
    sent: u16,
}

impl Driver {
    fn new() -> Self {
        let device = Fs::new(FsConfig {
            tag: "tag".into(),
            root: std::fs::File::open(std::env::temp_dir()).unwrap().into(),
            descriptors: own_descriptors().unwrap(),
            limits: Limits::of_process(),
        })
        .unwrap();
        let mut driver = Self {
            device,
            memory: Memory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap(),
            kick: Event::new().unwrap(),
            interrupts: channel().1,
            sent: 0,
        };
        let mut queue = Queue::new(16).unwrap();
        queue.set_size(16);
        queue.set_avail_ring_address(Some(0x1000), Some(0));
        queue.set_used_ring_address(Some(0x2000), Some(0));
        queue.set_ready(true);
        driver.activate(queue);
        driver
    }

    fn activate(&mut self, queue: Queue) {
        let (told, interrupts) = channel();
        self.interrupts = interrupts;
        let quiet: Arc<dyn Signal> = Arc::new(Told(channel().0));
        let active = ActiveQueue {
            queue,
            kick: self.kick.try_clone().unwrap(),
            interrupt: Arc::new(Told(told)),
        };
        self.device
            .activate(Activation {
                memory: self.memory.clone(),
                features: 0,
                queues: vec![None, Some(active)],
                config_changed: quiet.clone(),
                broken: quiet,
                threads: Threads::plain(),
            })
            .unwrap();
    }

    fn send(&mut self, opcode: u32, body: &[u8]) {
        let header = InHeader {
            len: u32::try_from(40 + body.len()).unwrap().into(),
            opcode: opcode.into(),
            unique: u64::from(self.sent).into(),
            node: ROOT.into(),
            ..InHeader::default()
        };
        let request = [header.as_bytes(), body].concat();
        self.memory.write_slice(&request, GuestAddress(REQUEST)).unwrap();
        let descriptor = |at: u64, len: u32, flags: u16, next: u16| {
            [
                &at.to_le_bytes()[..],
                &len.to_le_bytes(),
                &flags.to_le_bytes(),
                &next.to_le_bytes(),
            ]
            .concat()
        };
        let len = u32::try_from(request.len()).unwrap();
        let table = [descriptor(REQUEST, len, 1, 1), descriptor(ANSWER, 4096, 2, 0)].concat();
        self.memory.write_slice(&table, GuestAddress(0)).unwrap();
        let place = AVAIL + 4 + 2 * u64::from(self.sent % 16);
        self.memory.write_obj(0u16, GuestAddress(place)).unwrap();
        self.sent += 1;
        self.memory.write_obj(self.sent, GuestAddress(AVAIL + 2)).unwrap();
        self.kick.signal();
    }

    fn answer(&self) -> (i32, Vec<u8>) {
        while self.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap() != self.sent {
            let told = self.interrupts.recv_timeout(Duration::from_secs(5));
            told.expect("the device went silent");
        }
        let mut bytes = vec![0; 4096];
        self.memory.read_slice(&mut bytes, GuestAddress(ANSWER)).unwrap();
        let (header, body) = OutHeader::read_from_prefix(&bytes).unwrap();
        assert_eq!(header.unique.get(), u64::from(self.sent) - 1);
        (header.error.get(), body.to_vec())
    }

    fn hello(&mut self) {
        let hello = InitIn {
            major: 7.into(),
            minor: 37.into(),
            ..InitIn::default()
        };
        self.send(op::INIT, hello.as_bytes());
        assert_eq!(self.answer().0, 0);
    }
}

#[test]
fn configuration_space_names_the_tag_and_one_queue() {
    let driver = Driver::new();
    let mut bytes = [0xff; 44];
    driver.device.read_config(0, &mut bytes);
    assert_eq!(&bytes[..4], b"tag\0");
    assert_eq!(&bytes[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_session_outlives_a_pause_and_slow_requests_are_answered() {
    let mut driver = Driver::new();
    driver.hello();
    let queue = driver.device.deactivate().remove(0);
    driver.activate(queue);
    driver.send(op::OPENDIR, &[0; 8]);
    let (error, body) = driver.answer();
    assert_eq!(error, 0);
    driver.send(op::FSYNCDIR, &[&body[..8], &[0; 8]].concat());
    assert_eq!(driver.answer().0, 0);
    assert_eq!(driver.device.save()["session"], true);
}

#[test]
fn a_pause_answers_what_was_under_way() {
    let mut driver = Driver::new();
    driver.hello();
    driver.send(op::OPENDIR, &[0; 8]);
    let (_, body) = driver.answer();
    driver.send(op::FSYNCDIR, &[&body[..8], &[0; 8]].concat());
    let queue = driver.device.deactivate().remove(0);
    driver.activate(queue);
    assert!(matches!(driver.answer().0, 0 | -4)); // done, or EINTR
}
