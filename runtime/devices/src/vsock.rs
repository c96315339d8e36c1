//! Sockets between guest and host (virtio 1.2, section 5.10), in user space.

use std::fmt::Debug;
use std::os::unix::net::UnixStream;

/// The host's side of the guest's connections.
pub trait HostPorts: Send + Sync + Debug {
    /// The guest connects to `port` of the host; `stream` is the connection's host end.
    ///
    /// Must not block. Returning `false` refuses the connection: the guest gets a reset.
    fn accept(&self, port: u32, stream: UnixStream) -> bool;
}
