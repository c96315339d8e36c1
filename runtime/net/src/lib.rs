//! The host side of networking: what an engine put into a network namespace moves into a guest.
//!
//! Each Ethernet interface of the namespace (veth, macvlan, bridge, tap, …) gets a tap, and traffic control
//! carries every frame from the one to the other. The guest's card takes the interface's link address, MTU,
//! addresses, routes and static neighbours, so to the outside it *is* the interface.
//!
//! **Invariant:** a namespace is entered on a thread that ends with the visit; the caller's threads stay where
//! they are. Taps go away with their descriptors, the rest with [`Joined`] or with the namespace.
//!
//! Nothing here knows of machines or messages. Interfaces that appear after [`attach`] stay on the host.

mod join;
mod namespace;
mod netlink;
mod survey;
mod tap;

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

pub use join::Joined;
use namespace::Namespace;
use netlink::Socket;

/// What a network namespace gives a guest.
#[derive(Debug)]
pub struct Attached {
    /// Its interfaces, each with its tap.
    pub interfaces: Vec<Interface>,
    /// Routes by these interfaces, each after those that its gateway is reached by.
    pub routes: Vec<Route>,
    /// Static neighbours at these interfaces.
    pub neighbours: Vec<Neighbour>,
    /// Keeps the interfaces joined with their taps.
    pub joined: Joined,
}

/// An interface of the guest.
#[derive(Debug)]
pub struct Interface {
    /// Its name in the namespace.
    pub name: String,
    /// Its link address.
    pub mac: [u8; 6],
    /// Its maximum transmission unit in bytes.
    pub mtu: u16,
    /// Its addresses with their prefix lengths.
    pub addresses: Vec<(IpAddr, u8)>,
    /// The tap: non-blocking, with a 12-byte `virtio_net_hdr`.
    pub tap: OwnedFd,
}

/// A route of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Destination; `None` is the default route.
    pub to: Option<(IpAddr, u8)>,
    /// Gateway.
    pub via: Option<IpAddr>,
    /// Interface name.
    pub dev: String,
    /// Preferred source.
    pub source: Option<IpAddr>,
    /// `RT_SCOPE_*` (rtnetlink(7)).
    pub scope: u8,
    /// Metric.
    pub metric: Option<u32>,
}

/// A static neighbour of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Its address.
    pub address: IpAddr,
    /// Its link address.
    pub mac: [u8; 6],
    /// Interface name.
    pub dev: String,
}

/// A network namespace that could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The namespace is not there.
    #[error("cannot open the network namespace {}", path.display())]
    Open {
        /// Where it was looked for.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The caller's own namespace: taking its interfaces away would cut the host off.
    #[error("network namespace {} is the host's own; a guest cannot have it", .0.display())]
    Own(PathBuf),
    /// The namespace cannot be entered.
    #[error("cannot enter the network namespace")]
    Enter(#[source] io::Error),
    /// The kernel does not say what is in the namespace.
    #[error("cannot list the {what} of the network namespace")]
    List {
        /// Links, addresses, routes or neighbours.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Another sandbox has it.
    #[error("the network namespace has another sandbox's tap {0}; delete that sandbox first")]
    Taken(String),
    /// Too many interfaces.
    #[error("the network namespace has {0} interfaces; the limit is {MOST_INTERFACES}")]
    TooMany(usize),
    /// There is no tap to be had.
    #[error("cannot make a tap for {interface}; is the module \"tun\" loaded and /dev/net/tun there?")]
    Tap {
        /// For which interface.
        interface: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A tap cannot be joined with its interface.
    #[error(
        "cannot join {interface} with its tap; the kernel needs sch_ingress, act_mirred and cls_matchall or cls_u32"
    )]
    Join {
        /// Which interface.
        interface: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Joins each Ethernet interface that is up in the namespace at `netns` with a tap of its own.
///
/// # Errors
/// Fails if the namespace is not there, is the caller's own or another sandbox's, or the kernel lacks what
/// joining needs; nothing is left in the namespace then.
pub fn attach(netns: &Path) -> Result<Attached, NetError> {
    let namespace = Namespace::open(netns)?;
    namespace.visit(|| join_all(&namespace))?
}

fn join_all(namespace: &Namespace) -> Result<Attached, NetError> {
    let list = |what| move |source| NetError::List { what, source };
    let mut socket = Socket::open().map_err(list("links"))?;
    let links = survey::links(&socket.links().map_err(list("links"))?);
    if let Some(tap) = links.taken {
        return Err(NetError::Taken(tap));
    }
    let links = links.usable;
    if links.len() > MOST_INTERFACES {
        return Err(NetError::TooMany(links.len()));
    }
    let addresses = socket.addresses().map_err(list("addresses"))?;
    let routes = socket.routes().map_err(list("routes"))?;
    let neighbours = socket.neighbours().map_err(list("neighbours"))?;
    let mut joined = Joined::new(namespace.clone());
    let mut interfaces = Vec::with_capacity(links.len());
    let mut all_routes = survey::routes(&links, &routes);
    for link in &links {
        let (own, mut peers) = survey::addresses(link, &addresses);
        all_routes.append(&mut peers);
        interfaces.push(Interface {
            name: link.name.clone(),
            mac: link.mac,
            mtu: link.mtu,
            addresses: own,
            tap: joined.join(&mut socket, link)?,
        });
    }
    // A gateway must be reachable when a route names it.
    all_routes.sort_by_key(|route| route.via.is_some());
    Ok(Attached {
        interfaces,
        routes: all_routes,
        neighbours: survey::neighbours(&links, &neighbours),
        joined,
    })
}

/// Most interfaces of one guest: each takes a slot of its bus.
pub const MOST_INTERFACES: usize = 8;
