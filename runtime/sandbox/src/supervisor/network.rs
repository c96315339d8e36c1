//! The sandbox's network, as far as the supervisor sees it: taps for the machine, addresses for the guest.

use std::os::fd::OwnedFd;
use std::path::Path;

use caisson_net::{Joined, NetError};
use caisson_wire::agent;

use super::state::Network;

/// A tap of the sandbox.
#[derive(Debug)]
pub(crate) struct Tap {
    pub(crate) descriptor: OwnedFd,
    /// Address of the guest's side.
    pub(crate) mac: [u8; 6],
    pub(crate) mtu: u16,
}

/// What a network namespace gives a sandbox.
#[derive(Debug, Default)]
pub(crate) struct Attached {
    pub(crate) taps: Vec<Tap>,
    pub(crate) network: Network,
    /// Keeps the namespace's interfaces joined with the taps.
    pub(crate) joined: Option<Joined>,
}

/// Joins each interface of `netns` to a tap. Without a namespace the guest has its loopback only.
///
/// Called when the hooks that fill a namespace have run: a client asks for a machine after them.
pub(crate) fn attach(netns: Option<&Path>) -> Result<Attached, NetError> {
    match netns.map(caisson_net::attach) {
        Some(Ok(attached)) => Ok(convert(attached)),
        Some(Err(NetError::Own(_))) | None => {
            tracing::warn!(
                "the container has the host's network, which no guest gets: it has its loopback only; \
                 give it a network namespace"
            );
            Ok(Attached::default())
        }
        Some(Err(error)) => Err(error),
    }
}

fn convert(attached: caisson_net::Attached) -> Attached {
    let mut all = Attached {
        joined: Some(attached.joined),
        ..Attached::default()
    };
    for interface in attached.interfaces {
        all.network.interfaces.push(agent::Interface {
            name: interface.name,
            mac: interface.mac,
            mtu: interface.mtu.into(),
            addresses: interface.addresses,
        });
        all.taps.push(Tap {
            descriptor: interface.tap,
            mac: interface.mac,
            mtu: interface.mtu,
        });
    }
    all.network.routes = attached
        .routes
        .into_iter()
        .map(|route| agent::Route {
            to: route.to,
            via: route.via,
            dev: route.dev,
            source: route.source,
            scope: route.scope,
            metric: route.metric,
        })
        .collect();
    all.network.neighbours = attached
        .neighbours
        .into_iter()
        .map(|neighbour| agent::Neighbour {
            address: neighbour.address,
            mac: neighbour.mac,
            dev: neighbour.dev,
        })
        .collect();
    all
}
