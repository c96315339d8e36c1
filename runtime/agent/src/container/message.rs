//! What the agent and a process that is being set up say to each other.
//!
//! They share a socket pair and one build, so there is no version and nothing is hostile here: the process
//! has run none of the container's code as long as it has the socket.

use caisson_wire::agent::{Failure, WindowSize};
use oci_spec::runtime::{LinuxIdMapping, LinuxPersonality, LinuxSeccomp, Process, Spec};
use serde::{Deserialize, Serialize};

use super::namespaces::Kind;

/// From the agent, with the descriptors that its members name.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// First: what to become.
    Job(Box<Job>),
    /// Answer to [`Report::MapIds`].
    Mapped,
    /// Answer to [`Report::LimitMe`].
    Limited,
    /// Run the program.
    Go,
}

/// What a process is to become. Descriptors: the streams if [`Job::pipes`], then one per member of
/// [`Job::join`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    /// The container's id.
    pub(crate) container: String,
    /// Whether three descriptors for the standard streams come along; otherwise a terminal is made.
    pub(crate) pipes: bool,
    /// First size of the terminal.
    pub(crate) size: WindowSize,
    /// Namespaces entered before anything is created, in this order.
    pub(crate) join: Vec<Kind>,
    /// Namespaces made.
    pub(crate) unshare: Vec<Kind>,
    /// The container's system-call filter.
    pub(crate) seccomp: Option<LinuxSeccomp>,
    /// The container's execution domain.
    pub(crate) personality: Option<LinuxPersonality>,
    /// What is run and as whom.
    pub(crate) process: Process,
    /// Mappings of the container's user namespace, if it has one of its own.
    pub(crate) uids: Vec<LinuxIdMapping>,
    /// The same for groups.
    pub(crate) gids: Vec<LinuxIdMapping>,
    /// The container that is made around the process; `None` for one more process of an existing one.
    pub(crate) make: Option<Box<Make>>,
}

/// A container to make.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Make {
    /// Where its root file system comes from.
    pub(crate) root: RootSource,
    /// The whole configuration.
    pub(crate) spec: Spec,
}

/// Where a root file system comes from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum RootSource {
    /// A directory, absolute, and how much of that path is ours rather than shared with containers.
    Directory {
        /// The directory that the path cannot leave.
        base: String,
        /// Path relative to it.
        path: String,
    },
    /// Block devices and their file-system types, lowest first.
    Layers(Vec<(String, String)>),
}

/// From the process.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The user namespace exists and needs its mappings.
    MapIds,
    /// The process that becomes the program exists; its pid descriptor comes along.
    Forked {
        /// Its pid as the agent sees it.
        pid: i32,
    },
    /// The container is around the process, which is still root and wants its limits now.
    LimitMe,
    /// Everything but `execve` is done. Descriptors: the namespaces in `kinds`, then the terminal's
    /// controlling side if there is one.
    Ready {
        /// Which namespaces come along.
        kinds: Vec<Kind>,
    },
    /// It will not become the program.
    Failed(Failure),
}
