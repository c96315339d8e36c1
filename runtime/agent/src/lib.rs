//! PID 1 of the guest: sets the guest up, makes containers, and reports.
//!
//! Promises: a container is made exactly as its configuration says or not at all, every failure names its
//! stage, every wait has a limit, and nothing that a container can write is trusted.
//!
//! Containers are made by code of our own rather than by an existing library, because none fits a guest: the
//! agent needs typed stages and deadlines, no state on a disk, namespaces pinned from birth, a mount code
//! that never resolves a path twice, and one static binary without C libraries.
//!
//! Not here: what the host decides. The agent takes a configuration whose paths are the guest's already, and
//! talks to nobody but the control plane.

pub mod container;
mod failure;
pub mod guest;
pub mod init;
pub mod reaper;
pub mod server;
pub mod streams;
mod sys;

use std::io;

/// Starts a thread with a small stack: a guest may have hundreds, and each is a short function.
fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    const STACK: usize = 256 * 1024;
    std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK)
        .spawn(work)
        .map(drop)
}
