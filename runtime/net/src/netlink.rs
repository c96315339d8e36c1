//! Requests to the kernel's network tables (rtnetlink(7)), one at a time.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::neighbour::NeighbourMessage;
use netlink_packet_route::route::RouteMessage;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// A route socket of the namespace in which it was opened.
#[derive(Debug)]
pub(crate) struct Socket {
    socket: OwnedFd,
    sequence: u32,
}

impl Socket {
    pub(crate) fn open() -> io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None, // NETLINK_ROUTE is protocol 0
        )?;
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
        Ok(Self { socket, sequence: 0 })
    }

    pub(crate) fn links(&mut self) -> io::Result<Vec<LinkMessage>> {
        self.dump(
            RouteNetlinkMessage::GetLink(LinkMessage::default()),
            |message| match message {
                RouteNetlinkMessage::NewLink(link) => Some(link),
                _ => None,
            },
        )
    }

    pub(crate) fn addresses(&mut self) -> io::Result<Vec<AddressMessage>> {
        self.dump(
            RouteNetlinkMessage::GetAddress(AddressMessage::default()),
            |message| match message {
                RouteNetlinkMessage::NewAddress(address) => Some(address),
                _ => None,
            },
        )
    }

    pub(crate) fn routes(&mut self) -> io::Result<Vec<RouteMessage>> {
        self.dump(
            RouteNetlinkMessage::GetRoute(RouteMessage::default()),
            |message| match message {
                RouteNetlinkMessage::NewRoute(route) => Some(route),
                _ => None,
            },
        )
    }

    pub(crate) fn neighbours(&mut self) -> io::Result<Vec<NeighbourMessage>> {
        self.dump(
            RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()),
            |message| match message {
                RouteNetlinkMessage::NewNeighbour(neighbour) => Some(neighbour),
                _ => None,
            },
        )
    }

    pub(crate) fn index_of(&self, name: &str) -> io::Result<u32> {
        Ok(rustix::net::netdevice::name_to_index(&self.socket, name)?)
    }

    /// Asks for a change and waits for the kernel's word on it.
    pub(crate) fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.exchange(message, NLM_F_ACK | flags, |_| {})
    }

    fn dump<T>(
        &mut self,
        message: RouteNetlinkMessage,
        pick: impl Fn(RouteNetlinkMessage) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        let mut all = Vec::new();
        self.exchange(message, NLM_F_DUMP, |answer| all.extend(pick(answer)))?;
        Ok(all)
    }

    fn exchange(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        mut each: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(message));
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        let kernel = SocketAddrNetlink::new(0, 0);
        rustix::net::sendto(&self.socket, &bytes, SendFlags::empty(), &kernel)?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let (count, _) = rustix::net::recv(&self.socket, buffer.as_mut_slice(), RecvFlags::empty())?;
            let mut rest = buffer.get(..count).unwrap_or_default();
            while let Some((one, later)) = split_message(rest) {
                rest = later;
                let answer = match NetlinkMessage::<RouteNetlinkMessage>::deserialize(one) {
                    Ok(answer) => answer,
                    Err(error) => {
                        // Of a kind of object that the library does not know; none that we use.
                        tracing::debug!(%error, "skipping a message of the kernel");
                        continue;
                    }
                };
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) => {
                        return match error.code {
                            None => Ok(()),
                            Some(_) => Err(error.to_io()),
                        };
                    }
                    NetlinkPayload::InnerMessage(message) => each(message),
                    _ => {}
                }
            }
        }
    }
}

/// The first message of `bytes`, which its length field delimits (netlink(7)), and what follows.
fn split_message(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let len = u32::from_ne_bytes(*bytes.first_chunk()?);
    let len = usize::try_from(len).ok().filter(|len| *len >= HEADER)?;
    let one = bytes.get(..len)?;
    let later = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    Some((one, later))
}

/// The kernel answers while it handles a request; what takes longer is lost.
const PATIENCE: Duration = Duration::from_secs(5);
/// More than the kernel puts into one datagram of a dump (32 KiB).
const BUFFER: usize = 64 * 1024;
/// `NLMSG_HDRLEN` (netlink(3)).
const HEADER: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_split_by_their_length_and_nonsense_ends_the_list() {
        let mut bytes = vec![0; 36];
        bytes[0] = 18;
        bytes[20] = 16;
        let (one, later) = split_message(&bytes).unwrap();
        assert_eq!((one.len(), later.len()), (18, 16));
        assert!(split_message(later).is_some());
        bytes[0] = 200;
        assert!(split_message(&bytes).is_none());
        bytes[0] = 3;
        assert!(split_message(&bytes).is_none());
    }
}
