//! Giving up what the process does not need to serve one guest.
//!
//! The order matters: the root is exchanged while the process has power over its mount namespace; the user
//! namespace is entered by the only thread there is; then capabilities, Landlock, and the filters that every
//! later thread inherits or takes on. What is needed from outside is open by then.

mod calls;
mod capabilities;
mod filter;
mod landlock;
mod root;
pub(crate) mod sys;
mod user;

use std::os::fd::BorrowedFd;

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::set_no_new_privs;

pub(crate) use calls::Thread;
pub use capabilities::keep as keep_capabilities;
pub(crate) use filter::Filters;
pub use root::enter_with as enter_root_with;

use crate::BuildError;

/// What is prepared while files can be opened and the process has its privileges.
#[derive(Debug)]
pub(crate) struct Confinement {
    identity: user::Identity,
    filters: Filters,
}

impl Confinement {
    /// Opens and compiles what is needed.
    pub(crate) fn prepare() -> Result<Self, BuildError> {
        // Asked of the kernel once and kept; a device that asks first when it is confined could not.
        rustix::param::page_size();
        Ok(Self {
            identity: user::Identity::open().at("read the process's ids")?,
            filters: Filters::compile().at("compile system-call filters")?,
        })
    }

    /// The filters, for threads that start later.
    pub(crate) fn filters(&self) -> Filters {
        self.filters.clone()
    }

    /// Gives everything up but for the filter of the calling thread. For a process with one thread.
    pub(crate) fn enter(self, share: Option<BorrowedFd<'_>>) -> Result<(), BuildError> {
        root::enter_empty().at("enter an empty root directory")?;
        if let Err(err) = self.identity.enter() {
            tracing::warn!(error = %err, "no user namespace; capabilities are dropped in the present one");
        }
        capabilities::keep(capabilities::KEPT).at("drop capabilities")?;
        set_no_new_privs(true).at("renounce new privileges")?;
        set_dumpable_behavior(DumpableBehavior::NotDumpable).at("hide the process's memory")?;
        let none = Rlimit {
            current: Some(0),
            maximum: Some(0),
        };
        setrlimit(Resource::Core, none).at("forbid core files")?;
        if !landlock::fence(share).at("enter the Landlock fence")? {
            tracing::debug!("this kernel has no Landlock, or not enough of it");
        }
        sys::report_trapped_calls().at("handle trapped system calls")?;
        self.filters.enter_base().at("forbid system calls")
    }
}

/// Lets the process have as many descriptors as it may: each file that the guest has open takes one.
pub(crate) fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(err) = setrlimit(Resource::Nofile, most) {
        tracing::debug!(error = %err, "cannot raise the limit of open files");
    }
}

/// Names the stage at which something failed.
trait At<T> {
    fn at(self, stage: &'static str) -> Result<T, BuildError>;
}

impl<T, E: std::error::Error + Send + Sync + 'static> At<T> for Result<T, E> {
    fn at(self, stage: &'static str) -> Result<T, BuildError> {
        self.map_err(|err| BuildError::new(stage, err))
    }
}
