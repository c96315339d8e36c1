//! Real namespaces, interfaces and taps, with a guest of a few lines at the tap's end. Needs root and `ip`.
#![expect(unsafe_code, reason = "a test's thread gets a network namespace of its own")]
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use std::io::ErrorKind;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use caisson_net::{Attached, NetError, attach};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{UnshareFlags, gettid, unshare_unsafe};

/// A thread that lives in a network namespace of its own.
struct Room {
    path: PathBuf,
    work: mpsc::Sender<Box<dyn FnOnce() + Send>>,
}

impl Room {
    fn new() -> Self {
        let (work, orders) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (said, heard) = mpsc::channel();
        std::thread::spawn(move || {
            // SAFETY: a new network namespace changes nothing that other threads use.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
            said.send(gettid().as_raw_nonzero()).unwrap();
            orders.into_iter().for_each(|order| order());
        });
        let tid = heard.recv_timeout(LIMIT).unwrap();
        Self {
            path: format!("/proc/self/task/{tid}/ns/net").into(),
            work,
        }
    }

    fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (said, heard) = mpsc::channel();
        let order = move || said.send(work()).unwrap();
        self.work.send(Box::new(order)).unwrap();
        heard.recv_timeout(LIMIT * 4).expect("the room went silent")
    }

    /// Runs `ip` or `tc` with these words.
    fn run(&self, line: &str) -> String {
        let line = line.to_owned();
        self.inside(move || {
            let mut words = line.split_whitespace();
            let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{line}: {error}");
            String::from_utf8(output.stdout).unwrap()
        })
    }
}

/// A sandbox's namespace with `eth0`, and the host at the other end of the wire.
fn rooms() -> (Room, Room) {
    let (sandbox, host) = (Room::new(), Room::new());
    let tid = host.path.iter().nth(4).unwrap().to_str().unwrap();
    sandbox.run("ip link add eth0 type veth peer name host0");
    sandbox.run(&format!("ip link set host0 netns {tid}"));
    sandbox.run("ip link set eth0 address 02:00:00:00:00:07 mtu 1400 up");
    sandbox.run("ip address add 10.77.0.2/24 dev eth0");
    sandbox.run("ip -6 address add fd77::2/64 dev eth0 nodad");
    sandbox.run("ip route add default via 10.77.0.1 metric 50");
    sandbox.run("ip route add 10.88.0.0/16 via 169.254.7.7 dev eth0 onlink");
    sandbox.run("ip neighbour add 10.77.0.9 lladdr 02:00:00:00:00:09 dev eth0");
    host.run("ip link set host0 mtu 1400 up");
    host.run("ip address add 10.77.0.1/24 dev host0");
    (sandbox, host)
}

#[test]
fn what_an_engine_configured_is_what_the_guest_gets() {
    let (sandbox, _host) = rooms();
    let attached = attach(&sandbox.path).unwrap();
    let [eth0] = &attached.interfaces[..] else {
        panic!("{attached:?}");
    };
    assert_eq!(
        (eth0.name.as_str(), eth0.mac, eth0.mtu),
        ("eth0", [2, 0, 0, 0, 0, 7], 1400)
    );
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    assert!(eth0.addresses.contains(&(ip("10.77.0.2"), 24)), "{eth0:?}");
    assert!(eth0.addresses.contains(&(ip("fd77::2"), 64)), "{eth0:?}");
    assert!(
        !eth0
            .addresses
            .iter()
            .any(|(ip, _)| ip.to_string().starts_with("fe80"))
    );
    let default = attached
        .routes
        .iter()
        .position(|route| route.to.is_none())
        .unwrap();
    assert_eq!(attached.routes[default].via, Some(ip("10.77.0.1")));
    assert_eq!(attached.routes[default].metric, Some(50));
    let gateway = attached
        .routes
        .iter()
        .position(|route| route.to == Some((ip("169.254.7.7"), 32)))
        .unwrap();
    let behind = attached
        .routes
        .iter()
        .position(|route| route.via == Some(ip("169.254.7.7")))
        .unwrap();
    assert!(gateway < behind, "{:?}", attached.routes);
    assert_eq!(attached.neighbours[0].address, ip("10.77.0.9"));
}

#[test]
fn a_host_talks_to_the_guest_behind_the_tap() {
    let (sandbox, host) = rooms();
    let attached = attach(&sandbox.path).unwrap();
    let (said, heard) = mpsc::channel();
    std::thread::spawn({
        let order = host.work.clone();
        move || {
            let talk = move || {
                let socket = UdpSocket::bind("10.77.0.1:0").unwrap();
                socket.set_read_timeout(Some(LIMIT)).unwrap();
                socket.send_to(b"hello guest", "10.77.0.2:7").unwrap();
                let mut answer = [0; 64];
                let outcome = socket.recv(&mut answer).map(|len| answer[..len].to_vec());
                said.send(outcome).unwrap();
            };
            order.send(Box::new(talk)).unwrap();
        }
    });
    let guest = &attached.interfaces[0].tap;
    loop {
        match heard.try_recv() {
            Ok(answer) => {
                assert_eq!(answer.unwrap(), b"hello guest");
                break;
            }
            Err(_) => echo(guest),
        }
    }
}

#[test]
fn what_the_guest_sends_leaves_by_the_interface() {
    let (sandbox, host) = rooms();
    let attached = attach(&sandbox.path).unwrap();
    let count = |room: &Room| -> u64 {
        let text = room.inside(|| std::fs::read_to_string("/proc/thread-self/net/dev").unwrap());
        let line = text
            .lines()
            .find(|line| line.trim_start().starts_with("host0:"))
            .unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let before = count(&host);
    let mut frame = vec![0; 12]; // a header that asks for nothing
    frame.extend([0xff; 6]);
    frame.extend([2, 0, 0, 0, 0, 7, 0x88, 0xb5]); // a local experimental type (IEEE 802)
    frame.resize(12 + 1000, 0x5a);
    rustix::io::write(&attached.interfaces[0].tap, &frame).unwrap();
    assert!(count(&host) >= before + 1000);
}

#[test]
fn dropping_it_gives_the_interface_back_and_it_can_be_attached_again() {
    let (sandbox, _host) = rooms();
    let attached = attach(&sandbox.path).unwrap();
    assert!(sandbox.run("ip link").contains("caisson0"));
    assert!(sandbox.run("tc qdisc show dev eth0").contains("ingress"));
    assert!(matches!(attach(&sandbox.path), Err(NetError::Taken(_))));
    drop(attached);
    assert!(!sandbox.run("ip link").contains("caisson0"));
    assert!(!sandbox.run("tc qdisc show dev eth0").contains("ingress"));

    // As a killed supervisor leaves it: the taps are gone, the redirection is not.
    let Attached {
        interfaces, joined, ..
    } = attach(&sandbox.path).unwrap();
    std::mem::forget(joined);
    drop(interfaces);
    assert!(sandbox.run("tc qdisc show dev eth0").contains("ingress"));
    attach(&sandbox.path).unwrap();
}

#[test]
fn an_empty_namespace_gives_nothing_and_the_host_s_own_is_refused() {
    let empty = Room::new();
    let attached = attach(&empty.path).unwrap();
    assert!(attached.interfaces.is_empty() && attached.routes.is_empty());
    assert!(matches!(
        attach("/proc/self/ns/net".as_ref()),
        Err(NetError::Own(_))
    ));
    assert!(matches!(
        attach("/nonexistent".as_ref()),
        Err(NetError::Open { .. })
    ));
    assert!(matches!(attach("/dev/null".as_ref()), Err(NetError::Enter(_))));
}

/// Takes one frame of the tap, and answers it if it asks for 10.77.0.2 or is a datagram for it.
fn echo(tap: &OwnedFd) {
    let limit = Timespec::try_from(Duration::from_millis(100)).unwrap();
    poll(
        &mut [PollFd::from_borrowed_fd(tap.as_fd(), PollFlags::IN)],
        Some(&limit),
    )
    .unwrap();
    let mut frame = [0; 2048];
    let len = match rustix::io::read(tap, &mut frame) {
        Ok(len) => len,
        Err(error) if error.kind() == ErrorKind::WouldBlock => return,
        Err(error) => panic!("{error}"),
    };
    let guest = [2, 0, 0, 0, 0, 7];
    let (header, rest) = frame[..len].split_at_mut(12);
    header.fill(0);
    let sender: [u8; 6] = rest[6..12].try_into().unwrap();
    match rest[12..14] {
        [0x08, 0x06] if rest[20..22] == [0, 1] && rest[38..42] == [10, 77, 0, 2] => {
            let asker: [u8; 4] = rest[28..32].try_into().unwrap();
            rest[21] = 2; // a reply
            rest[22..28].copy_from_slice(&guest);
            rest[28..32].copy_from_slice(&[10, 77, 0, 2]);
            rest[32..38].copy_from_slice(&sender);
            rest[38..42].copy_from_slice(&asker);
        }
        [0x08, 0x00] if rest[23] == 17 && rest[30..34] == [10, 77, 0, 2] => {
            for byte in 26..30 {
                rest.swap(byte, byte + 4); // addresses; the sum of the header stays
            }
            for byte in 34..36 {
                rest.swap(byte, byte + 2); // ports
            }
            rest[40..42].fill(0); // no checksum
        }
        _ => return,
    }
    rest[..6].copy_from_slice(&sender);
    rest[6..12].copy_from_slice(&guest);
    rustix::io::write(tap, &frame[..len]).unwrap();
}

const LIMIT: Duration = Duration::from_secs(5);
