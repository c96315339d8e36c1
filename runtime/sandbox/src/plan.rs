//! Every decision about a sandbox and a container, made before anything is touched.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use caisson_wire::agent;
use serde::{Deserialize, Serialize};

/// A sandbox to start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SandboxPlan {
    /// Its id: that of its first container.
    pub id: String,
    /// What runs the guest.
    pub machine: MachineChoice,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in bytes, a multiple of 1 MiB.
    pub memory: u64,
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initramfs: PathBuf,
    /// Words added to the kernel command line.
    pub cmdline: String,
    /// What the agent sets up before the first container; time and entropy are filled in when it is sent.
    pub setup: agent::Setup,
    /// The network namespace to enter for the taps; `None` has no network.
    pub netns: Option<PathBuf>,
    /// The host cgroup that holds every process of the sandbox; `None` leaves them where they are.
    pub cgroup: Option<CgroupPlan>,
    /// Whether the vmm process confines itself (off only for debugging, and said so).
    pub confine: bool,
    /// Longest time from launch until the agent dials in.
    pub boot_deadline: Duration,
    /// Longest time a request to the agent may take.
    pub call_deadline: Duration,
}

/// What runs the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MachineChoice {
    /// Our own machine on the built-in hypervisor.
    Native,
    /// QEMU with TCG.
    Qemu {
        /// The `qemu-system-*` program.
        program: PathBuf,
        /// Guest architecture, as `uname -m` prints it.
        arch: String,
        /// Why the built-in hypervisor was not taken, in one sentence.
        because: String,
    },
}

/// A host cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupPlan {
    /// Path below each hierarchy's mount point.
    pub path: String,
    /// Memory limit in bytes: guest memory and the measured overhead.
    pub memory: Option<u64>,
    /// Processor quota and period in microseconds.
    pub cpu: Option<(i64, u64)>,
    /// Relative weight, `cpu.shares` of cgroup v1.
    pub shares: Option<u64>,
    /// Processors and memory nodes the sandbox may use, in the kernel's list format.
    pub cpuset: Option<(String, String)>,
}

/// A container to create in a sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerPlan {
    /// Its id.
    pub id: String,
    /// Its bundle directory, absolute.
    pub bundle: PathBuf,
    /// `ociVersion` and annotations as given, for `state`.
    pub oci_version: String,
    /// Annotations as given.
    pub annotations: BTreeMap<String, String>,
    /// What the agent is asked to create: the spec with every path as the guest sees it. The host ports of
    /// `stdio` are filled in by the supervisor.
    pub create: agent::Create,
    /// What is bound into the shared directory before that, in this order.
    pub binds: Vec<Bind>,
    /// Hooks that run on the host, in runtime namespaces.
    pub hooks: HostHooks,
    /// Whether the process has a terminal.
    pub terminal: bool,
    /// The host network namespace of the stand-in process, and so of the sandbox's network.
    #[serde(default)]
    pub netns: NetworkNamespace,
}

/// The host network namespace a container stands in.
///
/// Engines find a container's interfaces through the namespaces of its pid, so the stand-in lives there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetworkNamespace {
    /// The caller's own.
    #[default]
    Caller,
    /// A new one, empty until an engine or a hook fills it.
    New,
    /// An existing one.
    Path(PathBuf),
}

/// One thing shared with the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// What, on the host: a directory or a file.
    pub source: PathBuf,
    /// Where, relative to the shared directory; its parents are made by us and by nobody else.
    pub target: String,
    /// Whether the guest may not write; enforced by the host's mount.
    pub read_only: bool,
    /// Whether mounts below the source come along.
    pub recursive: bool,
}

/// OCI hooks that run on the host (runtime-spec, config.md, "POSIX-platform Hooks").
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HostHooks {
    /// Deprecated, but used: after the namespaces exist, before the process starts.
    pub prestart: Vec<oci_spec::runtime::Hook>,
    /// After `prestart`, in the runtime's namespaces.
    pub create_runtime: Vec<oci_spec::runtime::Hook>,
    /// After the process has started.
    pub poststart: Vec<oci_spec::runtime::Hook>,
    /// After the container is deleted.
    pub poststop: Vec<oci_spec::runtime::Hook>,
}
