//! What is in a namespace, and which of it a guest gets. No system calls here.

use std::net::{IpAddr, Ipv6Addr};

use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};

use crate::{Neighbour, Route, tap};

/// An interface that a guest can have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) mac: [u8; 6],
    pub(crate) mtu: u16,
}

/// The interfaces of a namespace.
#[derive(Debug, Default)]
pub(crate) struct Links {
    pub(crate) usable: Vec<Link>,
    /// A tap of ours, if there is one already.
    pub(crate) taken: Option<String>,
}

/// Sorts out interfaces: Ethernet, up, and not a part of another one.
pub(crate) fn links(messages: &[LinkMessage]) -> Links {
    let mut links = Links::default();
    for message in messages {
        let (mut name, mut mac, mut mtu, mut part) = (None, None, None, false);
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(value) => name = Some(value.clone()),
                LinkAttribute::Address(value) => mac = <[u8; 6]>::try_from(value.as_slice()).ok(),
                LinkAttribute::Mtu(value) => mtu = Some(*value),
                LinkAttribute::Controller(_) => part = true,
                _ => {}
            }
        }
        let Some(name) = name else {
            continue;
        };
        let header = &message.header;
        let ethernet = header.link_layer_type == LinkLayerType::Ether;
        if ethernet && name.starts_with(tap::PREFIX) {
            links.taken = Some(name);
            continue;
        }
        match (mac, mtu) {
            (Some(mac), Some(mtu))
                if ethernet && mac != [0; 6] && !part && header.flags.contains(LinkFlags::Up) =>
            {
                links.usable.push(Link {
                    index: header.index,
                    name,
                    mac,
                    mtu: u16::try_from(mtu).unwrap_or(u16::MAX).min(LARGEST_MTU),
                });
            }
            _ if header.flags.contains(LinkFlags::Up) && !header.flags.contains(LinkFlags::Loopback) => {
                tracing::info!(interface = name, "the guest does not get this interface");
            }
            _ => {}
        }
    }
    links
}

/// The addresses of `link`, and routes to the other ends of its point-to-point addresses.
pub(crate) fn addresses(link: &Link, messages: &[AddressMessage]) -> (Vec<(IpAddr, u8)>, Vec<Route>) {
    let (mut own, mut peers) = (Vec::new(), Vec::new());
    for message in messages.iter().filter(|one| one.header.index == link.index) {
        let (mut local, mut address) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Local(value) => local = Some(*value),
                AddressAttribute::Address(value) => address = Some(*value),
                _ => {}
            }
        }
        let prefix = message.header.prefix_len;
        match (local, address) {
            (Some(local), Some(peer)) if local != peer => {
                own.push((local, whole(local)));
                peers.push(Route {
                    to: Some((peer, prefix)),
                    via: None,
                    dev: link.name.clone(),
                    source: Some(local),
                    scope: RT_SCOPE_LINK,
                    metric: None,
                });
            }
            // A guest makes the link-local address of its card itself.
            (Some(only), _) | (None, Some(only)) if only != IpAddr::V6(link_local(link.mac)) => {
                own.push((only, prefix));
            }
            _ => {}
        }
    }
    (own, peers)
}

/// The routes of the main table by one of `links`, but for those that come with an address.
pub(crate) fn routes(links: &[Link], messages: &[RouteMessage]) -> Vec<Route> {
    let mut routes = Vec::new();
    for message in messages {
        let header = &message.header;
        let unicast = header.kind == RouteType::Unicast && header.protocol != RouteProtocol::Kernel;
        let family = matches!(header.address_family, AddressFamily::Inet | AddressFamily::Inet6);
        let (mut to, mut via, mut source, mut metric, mut index) = (None, None, None, None, None);
        let mut table = u32::from(header.table);
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(value) => to = ip(value),
                RouteAttribute::Gateway(value) => via = ip(value),
                RouteAttribute::PrefSource(value) => source = ip(value),
                RouteAttribute::Priority(value) => metric = Some(*value),
                RouteAttribute::Oif(value) => index = Some(*value),
                RouteAttribute::Table(value) => table = *value,
                _ => {}
            }
        }
        if !unicast || !family || table != u32::from(RouteHeader::RT_TABLE_MAIN) {
            continue;
        }
        let Some(link) = links.iter().find(|link| Some(link.index) == index) else {
            tracing::debug!(
                ?to,
                "the guest does not get a route by several or by no interface of its own"
            );
            continue;
        };
        let scope = u8::from(header.scope);
        if let Some(gateway) = via
            && header.flags.contains(RouteFlags::Onlink)
        {
            // "On link" without a word of its own: a route to the gateway alone.
            routes.push(Route {
                to: Some((gateway, whole(gateway))),
                via: None,
                dev: link.name.clone(),
                source: None,
                scope: RT_SCOPE_LINK,
                metric: None,
            });
        }
        let default = match header.address_family {
            // Nothing else would say of which family a default route without a gateway is.
            AddressFamily::Inet6 if via.is_none() && source.is_none() => {
                Some((Ipv6Addr::UNSPECIFIED.into(), 0))
            }
            _ => None,
        };
        routes.push(Route {
            to: to
                .map(|address| (address, header.destination_prefix_length))
                .or(default),
            via,
            dev: link.name.clone(),
            source,
            scope,
            metric,
        });
    }
    routes
}

/// The permanent neighbours at one of `links`.
pub(crate) fn neighbours(links: &[Link], messages: &[NeighbourMessage]) -> Vec<Neighbour> {
    let permanent = messages
        .iter()
        .filter(|message| message.header.state == NeighbourState::Permanent);
    let known = permanent.filter_map(|message| {
        let link = links.iter().find(|link| link.index == message.header.ifindex)?;
        let (mut address, mut mac) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => address = Some((*v4).into()),
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => address = Some((*v6).into()),
                NeighbourAttribute::LinkLayerAddress(value) => {
                    mac = <[u8; 6]>::try_from(value.as_slice()).ok();
                }
                _ => {}
            }
        }
        Some(Neighbour {
            address: address?,
            mac: mac?,
            dev: link.name.clone(),
        })
    });
    known.collect()
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

/// The prefix length that leaves one address.
fn whole(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// The link-local address of a card (RFC 4291, appendix A).
fn link_local([a, b, c, d, e, f]: [u8; 6]) -> Ipv6Addr {
    Ipv6Addr::from_bits(u128::from_be_bytes([
        0xfe,
        0x80,
        0,
        0,
        0,
        0,
        0,
        0,
        a ^ 2,
        b,
        c,
        0xff,
        0xfe,
        d,
        e,
        f,
    ]))
}

/// `RT_SCOPE_LINK` (rtnetlink(7)).
const RT_SCOPE_LINK: u8 = 253;
/// The largest that the kernel allows a tap: 65535 bytes with the Ethernet header.
const LARGEST_MTU: u16 = 65_535 - 14;

#[cfg(test)]
mod tests {
    use netlink_packet_route::route::RouteScope;

    use super::*;

    fn eth0() -> Link {
        Link {
            index: 2,
            name: "eth0".to_owned(),
            mac: [2, 0, 0, 0, 0, 7],
            mtu: 1400,
        }
    }

    fn link(name: &str, flags: LinkFlags, more: Option<LinkAttribute>) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = 2;
        message.header.link_layer_type = LinkLayerType::Ether;
        message.header.flags = flags;
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Address(vec![2, 0, 0, 0, 0, 7]),
            LinkAttribute::Mtu(1400),
        ];
        message.attributes.extend(more);
        message
    }

    fn address(value: IpAddr, prefix: u8, local: Option<IpAddr>) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.index = 2;
        message.header.prefix_len = prefix;
        message.attributes = vec![AddressAttribute::Address(value)];
        message.attributes.extend(local.map(AddressAttribute::Local));
        message
    }

    fn route(to: Option<(&str, u8)>, via: Option<&str>, flags: RouteFlags) -> RouteMessage {
        let mut message = RouteMessage::default();
        let any = to.map(|(to, _)| to).or(via).unwrap();
        message.header.address_family = match any.contains(':') {
            true => AddressFamily::Inet6,
            false => AddressFamily::Inet,
        };
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.kind = RouteType::Unicast;
        message.header.scope = RouteScope::Universe;
        message.header.flags = flags;
        message.attributes = vec![RouteAttribute::Oif(2)];
        let parsed = |text: &str| RouteAddress::from(text.parse::<IpAddr>().unwrap());
        if let Some((to, prefix)) = to {
            message.header.destination_prefix_length = prefix;
            message.attributes.push(RouteAttribute::Destination(parsed(to)));
        }
        message
            .attributes
            .extend(via.map(|via| RouteAttribute::Gateway(parsed(via))));
        message
    }

    #[test]
    fn a_guest_gets_ethernet_interfaces_that_are_up_and_no_part_of_another() {
        let found = links(&[
            link("eth0", LinkFlags::Up, None),
            link("down0", LinkFlags::empty(), None),
            link("port0", LinkFlags::Up, Some(LinkAttribute::Controller(9))),
            link("zero0", LinkFlags::Up, Some(LinkAttribute::Address(vec![0; 6]))),
            link("huge0", LinkFlags::Up, Some(LinkAttribute::Mtu(65_535))),
        ]);
        let names: Vec<_> = found.usable.iter().map(|link| link.name.as_str()).collect();
        assert_eq!(names, ["eth0", "huge0"]);
        assert_eq!(found.usable[1].mtu, 65_521);
        assert_eq!(found.taken, None);
    }

    #[test]
    fn a_tap_of_ours_says_that_the_namespace_is_taken() {
        let found = links(&[link("caisson0", LinkFlags::Up, None)]);
        assert_eq!(found.taken.as_deref(), Some("caisson0"));
    }

    #[test]
    fn addresses_keep_their_prefix_and_a_derived_link_local_one_stays_behind() {
        let (own, peers) = addresses(
            &eth0(),
            &[
                address("10.0.0.2".parse().unwrap(), 24, Some("10.0.0.2".parse().unwrap())),
                address("fd00::2".parse().unwrap(), 64, None),
                address("fe80::ff:fe00:7".parse().unwrap(), 64, None),
                address("fe80::1234".parse().unwrap(), 64, None),
            ],
        );
        let own: Vec<_> = own.iter().map(|(ip, prefix)| format!("{ip}/{prefix}")).collect();
        assert_eq!(own, ["10.0.0.2/24", "fd00::2/64", "fe80::1234/64"]);
        assert!(peers.is_empty());
    }

    #[test]
    fn a_point_to_point_address_becomes_one_address_and_a_route() {
        let peer = address("10.9.0.1".parse().unwrap(), 32, Some("10.0.0.2".parse().unwrap()));
        let (own, peers) = addresses(&eth0(), &[peer]);
        assert_eq!(own, [("10.0.0.2".parse().unwrap(), 32)]);
        assert_eq!(peers[0].to, Some(("10.9.0.1".parse().unwrap(), 32)));
    }

    #[test]
    fn an_on_link_gateway_gets_a_route_of_its_own() {
        let found = routes(&[eth0()], &[route(None, Some("169.254.1.1"), RouteFlags::Onlink)]);
        assert_eq!(found[0].to, Some(("169.254.1.1".parse().unwrap(), 32)));
        assert_eq!((found[0].via, found[0].scope), (None, RT_SCOPE_LINK));
        assert_eq!(found[1].to, None);
        assert_eq!(found[1].via, Some("169.254.1.1".parse().unwrap()));
    }

    #[test]
    fn routes_of_the_kernel_of_other_tables_and_of_other_interfaces_stay_behind() {
        let mut kernel = route(Some(("10.0.0.0", 24)), None, RouteFlags::empty());
        kernel.header.protocol = RouteProtocol::Kernel;
        let mut local = route(Some(("10.0.0.0", 24)), None, RouteFlags::empty());
        local.header.table = 255;
        let mut other = route(Some(("10.0.0.0", 24)), None, RouteFlags::empty());
        other.attributes[0] = RouteAttribute::Oif(3);
        let kept = route(Some(("fd01::", 64)), Some("fd00::1"), RouteFlags::empty());
        let found = routes(&[eth0()], &[kernel, local, other, kept]);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].to, Some(("fd01::".parse().unwrap(), 64)));
    }

    #[test]
    fn only_permanent_neighbours_move() {
        let neighbour = |state| {
            let mut message = NeighbourMessage::default();
            message.header.ifindex = 2;
            message.header.state = state;
            message.attributes = vec![
                NeighbourAttribute::Destination(NeighbourAddress::Inet([10, 0, 0, 1].into())),
                NeighbourAttribute::LinkLayerAddress(vec![2, 0, 0, 0, 0, 1]),
            ];
            message
        };
        let found = neighbours(
            &[eth0()],
            &[
                neighbour(NeighbourState::Reachable),
                neighbour(NeighbourState::Permanent),
            ],
        );
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].mac, [2, 0, 0, 0, 0, 1]);
    }
}
