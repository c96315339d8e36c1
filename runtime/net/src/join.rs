//! Interfaces and taps, joined by traffic control (tc(8)).

use std::io;
use std::os::fd::OwnedFd;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage,
};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterMatchAll, TcFilterMatchAllOption, TcFilterU32, TcFilterU32Option,
    TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};
use rustix::io::Errno;

use crate::NetError;
use crate::namespace::Namespace;
use crate::netlink::Socket;
use crate::survey::Link;
use crate::tap;

/// The joints of a namespace's interfaces; dropping it gives the interfaces back to the namespace.
#[derive(Debug)]
pub struct Joined {
    namespace: Namespace,
    /// Interfaces whose incoming frames go to a tap.
    links: Vec<u32>,
}

impl Joined {
    pub(crate) fn new(namespace: Namespace) -> Self {
        Self {
            namespace,
            links: Vec::new(),
        }
    }

    /// Makes a tap for `link` and joins them. Called inside the namespace.
    pub(crate) fn join(&mut self, socket: &mut Socket, link: &Link) -> Result<OwnedFd, NetError> {
        let failed = |source| NetError::Tap {
            interface: link.name.clone(),
            source,
        };
        let (tap, name) = tap::make().map_err(failed)?;
        let index = socket.index_of(&name).map_err(failed)?;
        bring_up(socket, index, link.mtu).map_err(failed)?;
        let failed = |source| NetError::Join {
            interface: link.name.clone(),
            source,
        };
        self.links.push(link.index);
        redirect(socket, link.index, index).map_err(failed)?;
        redirect(socket, index, link.index).map_err(failed)?;
        Ok(tap)
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        let links = std::mem::take(&mut self.links);
        if links.is_empty() {
            return;
        }
        let undone = self.namespace.visit(|| -> io::Result<()> {
            let mut socket = Socket::open()?;
            for link in links {
                // Fails if the interface has gone, and the joint with it.
                let _ = remove_ingress(&mut socket, link);
            }
            Ok(())
        });
        if let Ok(Err(error)) = &undone {
            tracing::debug!(%error, "could not give a namespace's interfaces back");
        }
    }
}

/// Brings a tap up, without addresses of its own: nothing but the guest's frames may come out of it.
fn bring_up(socket: &mut Socket, tap: u32, mtu: u16) -> io::Result<()> {
    let quiet = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    let mut message = LinkMessage::default();
    message.header.index = tap;
    message.attributes = vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![
        quiet,
    ])])];
    // A kernel without IPv6 knows of no such mode, and has none of its addresses.
    match socket.change(RouteNetlinkMessage::SetLink(message), 0) {
        Err(error) if error.raw_os_error() != Some(Errno::AFNOSUPPORT.raw_os_error()) => return Err(error),
        _ => {}
    }
    let mut message = LinkMessage::default();
    message.header.index = tap;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message.attributes = vec![LinkAttribute::Mtu(mtu.into())];
    socket.change(RouteNetlinkMessage::SetLink(message), 0)
}

/// Sends every frame that comes in at the interface `from` out of `to`.
fn redirect(socket: &mut Socket, from: u32, to: u32) -> io::Result<()> {
    match add_ingress(socket, from) {
        // Of a sandbox that was killed: its tap has gone, what pointed there has not.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            remove_ingress(socket, from)?;
            add_ingress(socket, from)?;
        }
        outcome => outcome?,
    }
    let all = [TcFilterMatchAllOption::Action(vec![mirror(to)])].map(TcOption::MatchAll);
    match add_filter(socket, from, TcFilterMatchAll::KIND, all.to_vec()) {
        // A kernel without this classifier has the older one.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut selector = TcU32Selector::default();
            selector.flags = TcU32SelectorFlags::Terminal;
            selector.nkeys = 1;
            selector.keys = vec![TcU32Key::default()]; // no bit of the mask is set: all match
            let all = [
                TcFilterU32Option::Selector(selector),
                TcFilterU32Option::Action(vec![mirror(to)]),
            ];
            add_filter(socket, from, TcFilterU32::KIND, all.map(TcOption::U32).to_vec())
        }
        outcome => outcome,
    }
}

fn mirror(to: u32) -> TcAction {
    let mut generic = TcActionGeneric::default();
    generic.action = TcActionType::Stolen;
    let mut redirect = TcMirror::default();
    redirect.generic = generic;
    redirect.eaction = TcMirrorActionType::EgressRedir;
    redirect.ifindex = to;
    let options = vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(redirect))];
    let mut action = TcAction::default();
    action.tab = 1; // the first action of the filter
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(options),
    ];
    action
}

fn add_filter(socket: &mut Socket, index: u32, kind: &str, options: Vec<TcOption>) -> io::Result<()> {
    let mut message = message(index);
    message.header.parent = INGRESS;
    message.header.info = u32::from(PRIORITY) << 16 | u32::from(ETH_P_ALL.to_be());
    message.attributes = vec![TcAttribute::Kind(kind.to_owned()), TcAttribute::Options(options)];
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    socket.change(RouteNetlinkMessage::NewTrafficFilter(message), flags)
}

fn add_ingress(socket: &mut Socket, index: u32) -> io::Result<()> {
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    socket.change(RouteNetlinkMessage::NewQueueDiscipline(ingress(index)), flags)
}

fn remove_ingress(socket: &mut Socket, index: u32) -> io::Result<()> {
    socket.change(RouteNetlinkMessage::DelQueueDiscipline(ingress(index)), 0)
}

fn ingress(index: u32) -> TcMessage {
    let mut message = message(index);
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = INGRESS;
    message.attributes = vec![TcAttribute::Kind("ingress".to_owned())];
    message
}

fn message(index: u32) -> TcMessage {
    TcMessage::with_index(index.cast_signed())
}

/// `ffff:`, the handle of an interface's ingress queue (tc(8)).
const INGRESS: TcHandle = TcHandle {
    major: 0xffff,
    minor: 0,
};
/// The one filter's place among those of its queue.
const PRIORITY: u16 = 1;
/// `ETH_P_ALL` (linux/if_ether.h).
const ETH_P_ALL: u16 = 0x0003;
