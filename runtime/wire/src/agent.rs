//! Control plane and agent.
//!
//! The agent dials out to [`CONTROL_PORT`] of the host and waits; the control plane sends requests without
//! waiting for a greeting or for one another's answers. Requests about one container are carried out in
//! order. Standard streams are connections of their own: a request names host ports, the agent dials each,
//! and bytes flow until the side that writes shuts its direction down.
//!
//! **The control plane trusts nothing from here**: it checks lengths, ids and ports against its own tables.

use std::collections::BTreeMap;

use oci_spec::runtime::{LinuxResources, Process, Spec};
use serde::{Deserialize, Serialize};

/// Host port the agent dials first.
pub const CONTROL_PORT: u32 = 1024;
/// First of the host ports that name streams; each is used for one connection.
pub const FIRST_STREAM_PORT: u32 = 0x1_0000;
/// Largest message from the control plane, in bytes.
pub const TO_GUEST_LIMIT: usize = 8 << 20;
/// Largest message from the agent, in bytes.
pub const FROM_GUEST_LIMIT: usize = 1 << 20;
/// Where the agent mounts the shared file system; bind sources in a spec are paths below it.
pub const SHARE_DIR: &str = "/run/caisson/share";

/// A request to the agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the control plane, repeated in the answer.
    pub id: u64,
    /// What to do.
    pub call: Call,
}

/// What the agent can do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Call {
    /// Set the guest itself up. The first request of a sandbox.
    Setup(Box<Setup>),
    /// Create a container: everything up to, and not including, `execve` of its process.
    ///
    /// The process's program is looked up here, so that a missing one is reported now.
    Create(Box<Create>),
    /// Let a created container's process run.
    Start {
        /// Which container.
        container: String,
    },
    /// Run one more process in a started container.
    Exec(Box<Exec>),
    /// Send a signal.
    Signal {
        /// To whom.
        target: Target,
        /// Signal number.
        signal: i32,
        /// Whether every process of the container gets it.
        all: bool,
    },
    /// Change a terminal's size.
    Resize {
        /// Whose terminal.
        target: Target,
        /// The size.
        size: WindowSize,
    },
    /// Freeze every process of a container.
    Pause {
        /// Which container.
        container: String,
    },
    /// The inverse.
    Resume {
        /// Which container.
        container: String,
    },
    /// Change a container's limits.
    Update {
        /// Which container.
        container: String,
        /// The limits to change; absent ones stay.
        resources: Box<LinuxResources>,
    },
    /// List a container's processes.
    Processes {
        /// Which container.
        container: String,
    },
    /// Measure a container.
    Stats {
        /// Which container.
        container: String,
    },
    /// Remove a stopped container: its mounts, cgroup and namespaces.
    Delete {
        /// Which container.
        container: String,
    },
    /// Flush file systems and power off.
    Shutdown,
}

/// A process of a container.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Target {
    /// Which container.
    pub container: String,
    /// Which exec of it; `None` is the container's own process.
    pub exec: Option<String>,
}

/// The guest itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Setup {
    /// [`crate::VERSION`] of the sender.
    pub version: u32,
    /// Host name of the sandbox; containers without a UTS namespace of their own see it.
    pub hostname: String,
    /// Wall-clock time in nanoseconds since 1970.
    pub time_ns: u64,
    /// Bytes mixed into the guest's entropy pool.
    pub entropy: Vec<u8>,
    /// Whether the shared file system is there to be mounted.
    pub share: bool,
    /// Network interfaces, matched by their address.
    pub interfaces: Vec<Interface>,
    /// Routes, added after all interfaces are up.
    pub routes: Vec<Route>,
    /// Static neighbours.
    pub neighbours: Vec<Neighbour>,
    /// Kernel parameters of the whole guest, in the form of `sysctl`.
    pub sysctl: BTreeMap<String, String>,
}

/// One network interface of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Name it gets.
    pub name: String,
    /// Address by which it is found.
    pub mac: [u8; 6],
    /// Maximum transmission unit in bytes.
    pub mtu: u32,
    /// Addresses with their prefix lengths.
    pub addresses: Vec<(std::net::IpAddr, u8)>,
}

/// One route of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Destination; `None` is the default route.
    pub to: Option<(std::net::IpAddr, u8)>,
    /// Gateway.
    pub via: Option<std::net::IpAddr>,
    /// Interface name.
    pub dev: String,
    /// Preferred source.
    pub source: Option<std::net::IpAddr>,
    /// `RT_SCOPE_*` (rtnetlink(7)).
    pub scope: u8,
    /// Metric.
    pub metric: Option<u32>,
}

/// One static neighbour entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// Its address.
    pub address: std::net::IpAddr,
    /// Its link address.
    pub mac: [u8; 6],
    /// Interface name.
    pub dev: String,
}

/// A container to create.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Create {
    /// Its id, as the caller knows it. The agent does not use it as a path.
    pub container: String,
    /// Where its root file system is.
    pub root: Root,
    /// The OCI configuration with every path as the guest sees it.
    pub spec: Spec,
    /// The process's streams.
    pub stdio: Stdio,
    /// Containers of this sandbox whose namespaces it joins, by namespace type (`network`, `ipc`, `pid`, …).
    pub join: BTreeMap<String, String>,
}

/// A root file system, in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Root {
    /// A directory below [`SHARE_DIR`].
    Share {
        /// Path relative to [`SHARE_DIR`].
        path: String,
    },
    /// Read-only block devices, lowest first, under a writable layer in the guest's memory.
    Layers {
        /// Serial numbers of the disks ([`crate::vmm::Disk::serial`]) and their stated file-system types.
        disks: Vec<(String, String)>,
    },
}

/// One more process of a container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Exec {
    /// In which container.
    pub container: String,
    /// Its id, unique in the container.
    pub exec: String,
    /// What to run, and as whom.
    pub process: Process,
    /// Its streams.
    pub stdio: Stdio,
}

/// Host ports of a process's streams. With a terminal only `terminal` is set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stdio {
    /// Standard input; `None` is `/dev/null`.
    pub stdin: Option<u32>,
    /// Standard output; `None` is `/dev/null`.
    pub stdout: Option<u32>,
    /// Standard error; `None` is `/dev/null`.
    pub stderr: Option<u32>,
    /// A pseudo-terminal made in the container, both directions over one stream.
    pub terminal: Option<Terminal>,
}

/// A terminal's stream and first size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// Host port.
    pub port: u32,
    /// First size.
    pub size: WindowSize,
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// What the agent sends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromAgent {
    /// Answer to the request of the same id.
    Answer {
        /// The request's id.
        id: u64,
        /// What came of it.
        outcome: Result<Reply, Failure>,
    },
    /// A process has ended. Pushed once for each that was started.
    Exited {
        /// Which.
        target: Target,
        /// How.
        status: ExitStatus,
    },
    /// The kernel killed a process of the container for want of memory.
    OutOfMemory {
        /// Which container.
        container: String,
    },
}

/// A positive answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Done,
    /// A process exists.
    Process {
        /// Its pid in the guest's first PID namespace.
        pid: i32,
    },
    /// Answer to [`Call::Processes`].
    Processes(Vec<ProcessInfo>),
    /// Answer to [`Call::Stats`].
    Stats(Box<Stats>),
}

/// A row of a process table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// Pid in the guest's first PID namespace.
    pub pid: i32,
    /// Parent's pid there.
    pub parent: i32,
    /// Pid as the container sees it.
    pub inner_pid: i32,
    /// User id.
    pub uid: u32,
    /// Processor time in milliseconds.
    pub cpu_ms: u64,
    /// Start, in seconds since the guest's boot.
    pub start_s: u64,
    /// Controlling terminal as `ps` prints it, or "?".
    pub terminal: String,
    /// Command line.
    pub command: String,
}

/// What a container uses, from its cgroup v2 files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Processor time, in microseconds: `usage_usec`, `user_usec`, `system_usec`.
    pub cpu_usage_us: u64,
    /// Time in user mode.
    pub cpu_user_us: u64,
    /// Time in kernel mode.
    pub cpu_system_us: u64,
    /// Enforcement intervals that have elapsed, were throttled, and for how long in microseconds.
    pub cpu_periods: u64,
    /// Throttled intervals.
    pub cpu_throttled_periods: u64,
    /// Throttled time.
    pub cpu_throttled_us: u64,
    /// `memory.current` in bytes.
    pub memory_current: u64,
    /// `memory.peak` in bytes, where the kernel has it.
    pub memory_peak: u64,
    /// `memory.max` in bytes; `None` is no limit.
    pub memory_limit: Option<u64>,
    /// `memory.swap.current` in bytes.
    pub swap_current: u64,
    /// The lines of `memory.stat`.
    pub memory_stat: BTreeMap<String, u64>,
    /// `oom_kill` of `memory.events`.
    pub oom_kills: u64,
    /// `pids.current`.
    pub pids_current: u64,
    /// `pids.max`; `None` is no limit.
    pub pids_limit: Option<u64>,
    /// `io.stat`: (major, minor, read bytes, written bytes, reads, writes).
    pub io: Vec<(u32, u32, u64, u64, u64, u64)>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// Returned this code.
    Code(u8),
    /// Killed by this signal.
    Signal(i32),
}

impl ExitStatus {
    /// The code a shell would report: 128 and the signal for a killed process.
    pub fn shell_code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => u8::try_from(128 + (signal & 0x7f)).unwrap_or(u8::MAX),
        }
    }
}

/// A request that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{stage}: {message}")]
pub struct Failure {
    /// How far it came.
    pub stage: Stage,
    /// What failed and why, in one line.
    pub message: String,
    /// The system's error number, if it was a system call that failed.
    pub errno: Option<i32>,
}

/// How far a request came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Stage {
    /// The request itself: unknown id, wrong state, wrong version.
    Request,
    /// The guest's own set-up.
    Setup,
    /// Network interfaces and routes.
    Network,
    /// The container's root file system.
    Root,
    /// The container's mounts.
    Mounts,
    /// Device nodes.
    Devices,
    /// The container's cgroup and limits.
    Cgroup,
    /// Namespaces.
    Namespaces,
    /// Kernel parameters.
    Sysctl,
    /// Standard streams and terminal.
    Stdio,
    /// OCI hooks that run in the guest.
    Hooks,
    /// Resource limits, scheduling, out-of-memory score.
    Limits,
    /// User, groups, capabilities, `no_new_privs`.
    Credentials,
    /// The system-call filter.
    Seccomp,
    /// The working directory.
    WorkingDirectory,
    /// Finding or starting the program.
    Program,
    /// Signals, freezing, measuring.
    Control,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Request => "understand the request",
            Self::Setup => "set the guest up",
            Self::Network => "set the network up",
            Self::Root => "set the root file system up",
            Self::Mounts => "mount",
            Self::Devices => "create the devices",
            Self::Cgroup => "apply the cgroup limits",
            Self::Namespaces => "create the namespaces",
            Self::Sysctl => "set kernel parameters",
            Self::Stdio => "connect the standard streams",
            Self::Hooks => "run the hooks",
            Self::Limits => "apply the process limits",
            Self::Credentials => "set user and capabilities",
            Self::Seccomp => "load the system-call filter",
            Self::WorkingDirectory => "enter the working directory",
            Self::Program => "start the program",
            Self::Control => "control the container",
        })
    }
}
