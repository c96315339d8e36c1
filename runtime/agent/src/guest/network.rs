//! Interfaces, routes and neighbours, by rtnetlink(7).
//!
//! A handful of requests with a few attributes each: encoded here, where a general library would be larger
//! than the rest of the agent's network code.

use std::ffi::CString;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use caisson_wire::agent::{Failure, Interface, Neighbour, Route, Setup, Stage};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::failure::{At, failure_with};

/// Brings the loopback interface and everything that `setup` lists up.
///
/// # Errors
/// Fails with the stage [`Stage::Network`] and the object in the message.
pub(super) fn set_up(setup: &Setup) -> Result<(), Failure> {
    let mut socket = Socket::open().at(Stage::Network, || "cannot open a route socket")?;
    let loopback = index_of("lo")?;
    socket.up(loopback).at(Stage::Network, || "cannot bring lo up")?;
    for interface in &setup.interfaces {
        add_interface(&mut socket, interface)?;
    }
    for route in &setup.routes {
        let to = route.to.map_or("default".to_owned(), |(address, prefix)| {
            format!("{address}/{prefix}")
        });
        let cannot = || format!("cannot add the route to {to} by {}", route.dev);
        let message = route_message(route, index_of(&route.dev)?);
        socket.request(&message).at(Stage::Network, cannot)?;
    }
    for neighbour in &setup.neighbours {
        let message = neighbour_message(neighbour, index_of(&neighbour.dev)?);
        socket.request(&message).at(Stage::Network, || {
            format!("cannot add the neighbour {}", neighbour.address)
        })?;
    }
    Ok(())
}

fn add_interface(socket: &mut Socket, interface: &Interface) -> Result<(), Failure> {
    let name = &interface.name;
    let cannot = |what: &str| format!("cannot {what} the interface {name}");
    let found = find_by_address(&interface.mac)
        .at(Stage::Network, || cannot("find"))?
        .ok_or_else(|| {
            let text = format!(
                "cannot find the interface {name}: none has the address {}",
                hex(&interface.mac)
            );
            failure_with(Stage::Network, Errno::NODEV, text)
        })?;
    let index = index_of(&found)?;
    if found != *name {
        let c_name = CString::new(name.as_str())
            .map_err(|_| Errno::INVAL)
            .at(Stage::Network, || cannot("name"))?;
        let mut message = link_message(index, 0);
        message.attribute(IFLA_IFNAME, c_name.as_bytes_with_nul());
        socket.request(&message).at(Stage::Network, || cannot("name"))?;
    }
    let mut message = link_message(index, IFF_UP);
    if interface.mtu != 0 {
        message.attribute(IFLA_MTU, &interface.mtu.to_ne_bytes());
    }
    socket
        .request(&message)
        .at(Stage::Network, || cannot("bring up"))?;
    for (address, prefix) in &interface.addresses {
        socket
            .request(&address_message(*address, *prefix, index))
            .at(Stage::Network, || {
                format!("cannot add the address {address}/{prefix} to {name}")
            })?;
    }
    Ok(())
}

/// A socket that carries requests one at a time.
struct Socket {
    socket: OwnedFd,
    sequence: u32,
}

impl Socket {
    fn open() -> rustix::io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // The kernel answers while it handles the request, so an answer that is not there is a lost one.
        let limit = Some(std::time::Duration::from_secs(5));
        rustix::net::sockopt::set_socket_timeout(&socket, rustix::net::sockopt::Timeout::Recv, limit)?;
        Ok(Self { socket, sequence: 0 })
    }

    fn up(&mut self, index: u32) -> io::Result<()> {
        self.request(&link_message(index, IFF_UP))
    }

    /// Sends a request and waits for the kernel's word on it.
    fn request(&mut self, message: &Message) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = message.encode(self.sequence);
        rustix::net::sendto(
            &self.socket,
            &bytes,
            SendFlags::empty(),
            &SocketAddrNetlink::new(0, 0),
        )?;
        let mut buffer = [0; 4096];
        loop {
            let (count, _) = rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::empty())?;
            if let Some(result) = acknowledgement(buffer.get(..count).unwrap_or_default(), self.sequence) {
                return Ok(result?);
            }
        }
    }
}

/// A request under construction: `struct nlmsghdr`, a fixed part, attributes (netlink(7)).
#[derive(Debug)]
struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Message {
    fn new(kind: u16, flags: u16, fixed: &[&[u8]]) -> Self {
        Self {
            kind,
            flags,
            body: fixed.concat(),
        }
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        let len = u16::try_from(value.len().saturating_add(4)).unwrap_or(u16::MAX);
        self.body.extend(len.to_ne_bytes());
        self.body.extend(kind.to_ne_bytes());
        self.body.extend(value);
        self.body.resize(self.body.len().next_multiple_of(4), 0);
    }

    fn address(&mut self, kind: u16, address: IpAddr) {
        match address {
            IpAddr::V4(v4) => self.attribute(kind, &v4.octets()),
            IpAddr::V6(v6) => self.attribute(kind, &v6.octets()),
        }
    }

    fn encode(&self, sequence: u32) -> Vec<u8> {
        let len = u32::try_from(HEADER_LEN.saturating_add(self.body.len())).unwrap_or(u32::MAX);
        let flags = NLM_F_REQUEST | NLM_F_ACK | self.flags;
        [
            &len.to_ne_bytes()[..],
            &self.kind.to_ne_bytes(),
            &flags.to_ne_bytes(),
            &sequence.to_ne_bytes(),
            &[0; 4],
            &self.body,
        ]
        .concat()
    }
}

/// `struct ifinfomsg`: turns the flags `up` on.
fn link_message(index: u32, up: u32) -> Message {
    let fixed: [&[u8]; 5] = [
        &[0; 4],
        &index.to_ne_bytes(),
        &up.to_ne_bytes(),
        &up.to_ne_bytes(),
        &[],
    ];
    Message::new(RTM_NEWLINK, 0, &fixed)
}

/// `struct ifaddrmsg`.
fn address_message(address: IpAddr, prefix: u8, index: u32) -> Message {
    // No duplicate address detection: the host has made sure, and a container must not wait for it.
    let flags = if address.is_ipv6() { IFA_F_NODAD } else { 0 };
    let fixed: [&[u8]; 2] = [&[family(address), prefix, flags, 0], &index.to_ne_bytes()];
    let mut message = Message::new(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &fixed);
    message.address(IFA_LOCAL, address);
    message.address(IFA_ADDRESS, address);
    if let IpAddr::V4(v4) = address
        && prefix < 31
    {
        let host_bits = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
        message.attribute(IFA_BROADCAST, &(v4.to_bits() | host_bits).to_be_bytes());
    }
    message
}

/// `struct rtmsg`.
fn route_message(route: &Route, index: u32) -> Message {
    let address = route
        .to
        .map(|(address, _)| address)
        .or(route.via)
        .or(route.source);
    let family = address.map_or(AF_INET, family);
    let prefix = route.to.map_or(0, |(_, prefix)| prefix);
    let fixed: [&[u8]; 1] = [&[
        family,
        prefix,
        0,
        0,
        RT_TABLE_MAIN,
        RTPROT_BOOT,
        route.scope,
        RTN_UNICAST,
        0,
        0,
        0,
        0,
    ]];
    let mut message = Message::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &fixed);
    if let Some((to, _)) = route.to {
        message.address(RTA_DST, to);
    }
    if let Some(via) = route.via {
        message.address(RTA_GATEWAY, via);
    }
    if let Some(source) = route.source {
        message.address(RTA_PREFSRC, source);
    }
    message.attribute(RTA_OIF, &index.to_ne_bytes());
    if let Some(metric) = route.metric {
        message.attribute(RTA_PRIORITY, &metric.to_ne_bytes());
    }
    message
}

/// `struct ndmsg`.
fn neighbour_message(neighbour: &Neighbour, index: u32) -> Message {
    let fixed: [&[u8]; 4] = [
        &[family(neighbour.address), 0, 0, 0],
        &index.to_ne_bytes(),
        &NUD_PERMANENT.to_ne_bytes(),
        &[0, 0],
    ];
    let mut message = Message::new(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &fixed);
    message.address(NDA_DST, neighbour.address);
    message.attribute(NDA_LLADDR, &neighbour.mac);
    message
}

/// The kernel's word on the request `sequence`, if `bytes` is that: `struct nlmsgerr`.
fn acknowledgement(bytes: &[u8], sequence: u32) -> Option<Result<(), Errno>> {
    let (header, rest) = bytes.split_first_chunk::<HEADER_LEN>()?;
    let [_, _, _, _, k0, k1, _, _, s0, s1, s2, s3, ..] = *header;
    if u16::from_ne_bytes([k0, k1]) != NLMSG_ERROR || u32::from_ne_bytes([s0, s1, s2, s3]) != sequence {
        return None;
    }
    match i32::from_ne_bytes(*rest.first_chunk()?) {
        0 => Some(Ok(())),
        error => Some(Err(Errno::from_raw_os_error(error.saturating_neg()))),
    }
}

fn index_of(name: &str) -> Result<u32, Failure> {
    let cannot = || format!("there is no interface {name:?}");
    let path = format!("/sys/class/net/{name}/ifindex");
    if name.is_empty() || name.contains('/') || name.starts_with('.') {
        return Err(Errno::INVAL).at(Stage::Network, cannot);
    }
    let text = std::fs::read_to_string(path).at(Stage::Network, cannot)?;
    text.trim()
        .parse()
        .map_err(|_| Errno::INVAL)
        .at(Stage::Network, cannot)
}

/// The name of the interface with this link address.
fn find_by_address(mac: &[u8; 6]) -> io::Result<Option<String>> {
    let wanted = hex(mac);
    for entry in std::fs::read_dir("/sys/class/net")? {
        let entry = entry?;
        let address = std::fs::read_to_string(entry.path().join("address")).unwrap_or_default();
        if address.trim() == wanted {
            return Ok(entry.file_name().into_string().ok());
        }
    }
    Ok(None)
}

fn hex(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    }
}

/// `struct nlmsghdr`.
const HEADER_LEN: usize = 16;
/// include/linux/socket.h.
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// include/uapi/linux/netlink.h.
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 0x001;
const NLM_F_ACK: u16 = 0x004;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
/// include/uapi/linux/rtnetlink.h.
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const RTM_NEWNEIGH: u16 = 28;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;
/// include/uapi/linux/if_link.h and if.h.
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFF_UP: u32 = 1;
/// include/uapi/linux/if_addr.h.
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_F_NODAD: u8 = 2;
/// include/uapi/linux/neighbour.h.
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_the_header_counts_everything() {
        let mut message = link_message(7, IFF_UP);
        message.attribute(IFLA_IFNAME, b"eth0\0");
        let bytes = message.encode(9);
        assert_eq!(bytes.len(), 16 + 16 + 12);
        assert_eq!(bytes[..4], 44_u32.to_ne_bytes());
        assert_eq!(bytes[8..12], 9_u32.to_ne_bytes());
        assert_eq!(bytes[32..34], 9_u16.to_ne_bytes()); // without the padding
    }

    #[test]
    fn only_the_answer_to_the_request_counts() {
        let answer = |sequence: u32, error: i32| {
            [
                &36_u32.to_ne_bytes()[..],
                &NLMSG_ERROR.to_ne_bytes(),
                &[0; 2],
                &sequence.to_ne_bytes(),
                &[0; 4],
                &error.to_ne_bytes(),
                &[0; 16],
            ]
            .concat()
        };
        assert_eq!(acknowledgement(&answer(3, 0), 3), Some(Ok(())));
        assert_eq!(acknowledgement(&answer(3, -19), 3), Some(Err(Errno::NODEV)));
        assert_eq!(acknowledgement(&answer(2, 0), 3), None);
        assert_eq!(acknowledgement(&[0; 5], 3), None);
    }

    #[test]
    fn a_default_route_takes_its_family_from_the_gateway() {
        let mut route = Route {
            to: None,
            via: Some("fe80::1".parse().unwrap()),
            dev: "eth0".to_owned(),
            source: None,
            scope: 0,
            metric: None,
        };
        assert_eq!(route_message(&route, 2).body.first(), Some(&AF_INET6));
        route.via = Some("10.0.0.1".parse().unwrap());
        assert_eq!(route_message(&route, 2).body.first(), Some(&AF_INET));
    }
}
