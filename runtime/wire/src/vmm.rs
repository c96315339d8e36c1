//! Control plane and vmm process.
//!
//! The vmm process is born with one socket. It gets one [`ToVmm::Launch`] with every descriptor it will
//! ever need, gives up everything else, and from then on only reports and obeys.

use serde::{Deserialize, Serialize};

/// Largest message in either direction, in bytes.
pub const LIMIT: usize = 1 << 20;
/// Most bytes of the guest's console that a report carries: its tail.
pub const CONSOLE_TAIL: usize = 16 * 1024;

/// Place of a descriptor among those that came with the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fd(pub u32);

/// What the control plane tells the vmm process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToVmm {
    /// Build the machine, confine yourself, start the guest. The first message, and only once.
    Launch(Box<Launch>),
    /// Do one thing and answer with the same `id`.
    Ask {
        /// Chosen by the control plane, repeated in the answer.
        id: u64,
        /// What to do.
        order: Order,
    },
    /// Power the guest off now and leave.
    Shutdown,
}

/// One thing the vmm process does on request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Take every vCPU out of the guest and quiesce the devices.
    Pause,
    /// The inverse.
    Resume,
    /// Measure what the machine uses.
    Usage,
}

/// Everything a machine is made of. Paths do not appear: descriptors do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Launch {
    /// [`crate::VERSION`] of the sender.
    pub version: u32,
    /// Sandbox id, for logs and thread names only.
    pub sandbox: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in bytes, a multiple of 1 MiB.
    pub memory: u64,
    /// Kernel image.
    pub kernel: Fd,
    /// Initial RAM file system.
    pub initramfs: Fd,
    /// Words added to the kernel command line after the machine's own.
    pub cmdline: String,
    /// The directory served by virtio-fs under [`SHARE_TAG`], an open directory.
    pub share: Option<Fd>,
    /// Block devices, in the order of their slots.
    pub disks: Vec<Disk>,
    /// Network devices.
    pub nets: Vec<Net>,
    /// Where the guest's console goes as well as into reports: an open file or pipe.
    pub console: Option<Fd>,
    /// How the machine is confined.
    pub confine: Confine,
    /// For the QEMU machine only: what to start.
    pub emulator: Option<Emulator>,
}

/// Tag of the shared file system in the guest.
pub const SHARE_TAG: &str = "caisson";

/// One raw disk image or block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The open image. Opened read-only by the control plane if `read_only`.
    pub image: Fd,
    /// Whether the guest may not write; enforced by the vmm process.
    pub read_only: bool,
    /// Name by which the agent finds the disk: `/sys/block/*/serial`. At most 20 bytes (virtio 1.2, 5.2.6).
    pub serial: String,
}

/// One network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Net {
    /// The tap's open descriptor, with a 12-byte virtio-net header; offloads are for the device to ask for.
    pub tap: Fd,
    /// Address of the guest's side.
    pub mac: [u8; 6],
    /// Maximum transmission unit in bytes.
    pub mtu: u16,
}

/// How far the vmm process confines itself before the guest's first instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Confine {
    /// Everything: namespaces, pivoted root, capabilities, `no_new_privs`, Landlock where there, seccomp.
    Full,
    /// Nothing: for tests of the machine itself, run by hand.
    Off,
}

/// The emulator the QEMU machine starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Emulator {
    /// Path of the `qemu-system-*` program, opened before confinement.
    pub program: String,
    /// Guest architecture, as `uname -m` prints it.
    pub arch: String,
}

/// What the vmm process tells the control plane.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromVmm {
    /// The guest runs.
    Started {
        /// What runs it: "kvm", "qemu".
        machine: String,
        /// Time from the launch message to the guest's first instruction, in microseconds.
        built_us: u64,
    },
    /// The guest connected to `port` of the host; the stream's host end is the message's one descriptor.
    GuestConnected {
        /// Vsock port.
        port: u32,
    },
    /// Answer to [`ToVmm::Ask`].
    Answer {
        /// The request's id.
        id: u64,
        /// What came of it; the error is a sentence.
        outcome: Result<Answer, String>,
    },
    /// The machine is no more, or never came to be. The last message.
    Ended(Ended),
}

/// A positive answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Done.
    Done,
    /// Answer to [`Order::Usage`].
    Usage(Usage),
}

/// What a machine uses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Guest memory that is backed by host pages, in bytes.
    pub guest_resident: u64,
    /// Processor time of all vCPU threads, in microseconds.
    pub vcpu_us: u64,
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// How.
    pub how: End,
    /// The last bytes of the guest's console, at most [`CONSOLE_TAIL`].
    pub console: String,
}

/// Ways to end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// The guest powered off.
    PowerOff,
    /// The guest restarted; we do not run it again.
    Reset,
    /// Told to, by [`ToVmm::Shutdown`].
    Stopped,
    /// The machine could not be built or confined: the stage, as a verb phrase, and the chain of causes.
    Refused {
        /// "open the kernel", "map guest memory", …
        stage: String,
        /// The chain of causes, joined by colons.
        cause: String,
    },
    /// A vCPU or device failed in a way that ends the guest.
    Crashed(String),
}
