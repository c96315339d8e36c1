//! The supervisor: the process that owns one sandbox.
//!
//! It outlives the command that started it, holds the vmm process and the stand-ins' sockets, and answers on
//! the sandbox's control socket. [`state`] is what a sandbox is, [`step`] what follows from an event, and
//! [`drive`] the loop around both. If it dies, everything it started dies with it; if anything it started dies,
//! it ends the sandbox.

mod console;
mod drive;
mod link;
mod machine;
mod network;
mod share;
mod state;
mod step;

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::id::ContainerId;
use crate::sys::inherited;

/// Runs the supervisor of one sandbox. `arguments` are those after `caisson supervise`: the runtime's root, the
/// sandbox's id, and the socket to whoever creates it.
///
/// Call it before the process has a second thread: it enters a mount namespace of its own.
pub fn main(arguments: &[OsString]) -> ExitCode {
    match serve(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            tracing::error!(error = chain(&*err), "the supervisor ended");
            ExitCode::FAILURE
        }
    }
}

type Failure = Box<dyn std::error::Error>;

fn serve(arguments: &[OsString]) -> Result<(), Failure> {
    let [root, id, socket] = arguments else {
        return Err("a supervisor is started by caisson itself".into());
    };
    let root = PathBuf::from(root);
    let id = ContainerId::try_from(id.to_str().ok_or("the sandbox's id is no text")?)?;
    let socket: OwnedFd = inherited(socket)?;
    // What `ps` shows; without it the name is that of /proc/self/exe.
    let _ = rustix::thread::set_name(c"caisson");
    share::enter_private_mounts()?;
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, drive::run(root, id, socket))
}

/// The vmm process inherits the limit, and its file server holds a descriptor for each file the guest knows.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(err) = setrlimit(Resource::Nofile, raised) {
        tracing::debug!(error = %err, "could not raise the limit of open files");
    }
}

/// An error with its causes, joined by colons.
fn chain(err: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(err.source(), |err| err.source());
    causes.fold(err.to_string(), |text, cause| format!("{text}: {cause}"))
}
