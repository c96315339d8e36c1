//! System calls that rustix has no safe function for.
#![expect(unsafe_code, reason = "system calls by number, with arguments checked here")]

use std::ffi::CString;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::time::Duration;

use rustix::mount::MountAttrFlags;
use rustix::thread::UnshareFlags;

/// Connects a stream socket to `port` of the machine `cid`.
///
/// # Errors
/// Fails if the peer refuses, or does not answer within `limit`.
pub(crate) fn vsock_connect(cid: u32, port: u32, limit: Duration) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::VSOCK,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    let timeout = libc::timeval {
        tv_sec: limit.as_secs().try_into().unwrap_or(i64::MAX),
        tv_usec: limit.subsec_micros().into(),
    };
    // SAFETY: the option's value is a `timeval` of the stated length that lives through the call.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::AF_VSOCK,
            SO_VM_SOCKETS_CONNECT_TIMEOUT,
            ptr::from_ref(&timeout).cast(),
            socklen::<libc::timeval>(),
        )
    })?;
    // SAFETY: `sockaddr_vm` is plain integers, for which all zeroes is a value.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    address.svm_family = libc::AF_VSOCK.try_into().unwrap_or_default();
    address.svm_port = port;
    address.svm_cid = cid;
    // SAFETY: the address is a `sockaddr_vm` of the stated length that lives through the call.
    check(unsafe {
        libc::connect(
            socket.as_raw_fd(),
            ptr::from_ref(&address).cast(),
            socklen::<libc::sockaddr_vm>(),
        )
    })?;
    Ok(socket)
}

fn socklen<T>() -> libc::socklen_t {
    mem::size_of::<T>().try_into().unwrap_or(libc::socklen_t::MAX)
}

/// What [`fork`] returns.
pub(crate) enum Forked {
    /// In the parent: the child's pid.
    Parent(i32),
    /// In the child.
    Child,
}

/// Proof that this process has a single thread, and starts none as long as this is about.
#[derive(Debug)]
pub(crate) struct SingleThread(());

impl SingleThread {
    /// Looks. Needs a `/proc` that can be trusted.
    ///
    /// # Errors
    /// Fails if there are more.
    pub(crate) fn check() -> io::Result<Self> {
        match std::fs::read_dir("/proc/self/task")?.count() {
            1 => Ok(Self(())),
            count => Err(io::Error::other(format!("there are {count} threads"))),
        }
    }
}

/// Splits the process in two.
///
/// # Errors
/// Fails if the kernel has no room for a process.
pub(crate) fn fork(_: &SingleThread) -> io::Result<Forked> {
    // SAFETY: the only thread calls, as the argument proves, so no other one holds a lock in the child.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent(pid)),
    }
}

/// Moves the calling thread into new namespaces.
///
/// # Errors
/// As unshare(2).
pub(crate) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    debug_assert!(!flags.contains(UnshareFlags::FILES));
    // SAFETY: the function is unsafe because of `FILES` alone, which no caller here passes.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}

/// Replaces the process image; returns only on failure.
pub(crate) fn execve(program: &CString, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings
            .iter()
            .map(|text| text.as_ptr())
            .chain([ptr::null()])
            .collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays end with a null pointer, and the strings they point to outlive the call.
    unsafe { libc::execve(program.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// What [`mount_setattr`] changes: `struct mount_attr` (include/uapi/linux/mount.h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct MountAttr {
    /// Attributes set.
    pub(crate) set: u64,
    /// Attributes cleared.
    pub(crate) clear: u64,
    /// One of `MS_SHARED`, `MS_PRIVATE`, `MS_SLAVE`, `MS_UNBINDABLE`, or 0 for no change.
    pub(crate) propagation: u64,
    /// Descriptor of a user namespace for `MOUNT_ATTR_IDMAP`.
    pub(crate) userns: u64,
}

impl MountAttr {
    /// Only sets `flags`.
    pub(crate) fn set(flags: MountAttrFlags) -> Self {
        Self {
            set: flags.bits().into(),
            ..Self::default()
        }
    }
}

/// Whether a change reaches the mounts below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// This mount alone.
    One,
    /// And every mount below it.
    Tree,
}

/// Changes the attributes of the mount that `mount` is the root of.
///
/// # Errors
/// As mount_setattr(2).
pub(crate) fn mount_setattr(mount: BorrowedFd<'_>, reach: Reach, attr: &MountAttr) -> io::Result<()> {
    let mut flags = libc::AT_EMPTY_PATH;
    if reach == Reach::Tree {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the path is a C string, and `attr` a `mount_attr` of the stated size; both outlive the call.
    check_long(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            ptr::from_ref(attr),
            mem::size_of::<MountAttr>(),
        )
    })
    .map(drop)
}

/// Sends `signal`, which may be a real-time one, to the process.
///
/// # Errors
/// As pidfd_send_signal(2).
pub(crate) fn pidfd_send_signal(process: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: without a `siginfo` the call takes integers only.
    check_long(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            signal,
            ptr::null::<libc::siginfo_t>(),
            0,
        )
    })
    .map(drop)
}

/// Sends `signal`, which may be a real-time one, to the process with this pid.
///
/// # Errors
/// As kill(2).
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    if pid <= 0 {
        return Err(io::ErrorKind::InvalidInput.into()); // would be a group, or everybody
    }
    // SAFETY: takes integers only.
    check(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Sets a resource limit of a process.
///
/// # Errors
/// As prlimit(2).
pub(crate) fn set_limit(pid: i32, resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: `limit` is a `rlimit64` that outlives the call; no old value is asked for.
    check_long(unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            pid,
            resource,
            ptr::from_ref(&limit),
            ptr::null_mut::<libc::rlimit64>(),
        )
    })
    .map(drop)
}

/// Adds `bytes` to the entropy pool and credits them.
///
/// # Errors
/// As the `RNDADDENTROPY` ioctl of random(4).
pub(crate) fn add_entropy(random: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    /// `struct rand_pool_info` (include/uapi/linux/random.h) with room for one chunk.
    #[repr(C)]
    struct Pool {
        bits: libc::c_int,
        len: libc::c_int,
        bytes: [u8; ENTROPY_CHUNK],
    }
    for chunk in bytes.chunks(ENTROPY_CHUNK) {
        let len = i32::try_from(chunk.len()).unwrap_or_default();
        let mut pool = Pool {
            bits: len * 8,
            len,
            bytes: [0; ENTROPY_CHUNK],
        };
        for (place, byte) in pool.bytes.iter_mut().zip(chunk) {
            *place = *byte;
        }
        // SAFETY: the request reads a `rand_pool_info` and `len` bytes behind it, which `pool` has.
        check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, ptr::from_ref(&pool)) })?;
    }
    Ok(())
}

/// Attaches a classic BPF program as a system-call filter of this thread.
///
/// # Errors
/// As seccomp(2).
pub(crate) fn seccomp_set_filter(program: &[libc::sock_filter], flags: u64) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let filter = libc::sock_fprog {
        len,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: `filter` describes `program`, which outlives the call; the kernel only reads it.
    check_long(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            ptr::from_ref(&filter),
        )
    })
    .map(drop)
}

/// Loads a cgroup-device program.
///
/// # Errors
/// As bpf(2); the verifier's log is not kept.
pub(crate) fn bpf_load_cgroup_device(program: &[u64]) -> io::Result<OwnedFd> {
    /// The part of `union bpf_attr` that `BPF_PROG_LOAD` reads (include/uapi/linux/bpf.h).
    #[repr(C)]
    struct Load {
        kind: u32,
        len: u32,
        program: u64,
        license: u64,
        log: [u64; 2],
        kernel_and_flags: [u32; 2],
    }
    let load = Load {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        len: u32::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        program: program.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        log: [0; 2],
        kernel_and_flags: [0; 2],
    };
    // SAFETY: `load` is as long as stated and points to `len` instructions and a C string, all of which
    // outlive the call.
    let fd = check_long(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            ptr::from_ref(&load),
            mem::size_of::<Load>(),
        )
    })?;
    let fd = RawFd::try_from(fd).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: the call returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a device program to a cgroup, beside those that are there.
///
/// # Errors
/// As bpf(2).
pub(crate) fn bpf_attach_cgroup_device(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    bpf_attachment(BPF_PROG_ATTACH, cgroup, program)
}

/// Takes a device program away from a cgroup.
///
/// # Errors
/// As bpf(2).
pub(crate) fn bpf_detach_cgroup_device(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    bpf_attachment(BPF_PROG_DETACH, cgroup, program)
}

fn bpf_attachment(command: libc::c_long, cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let attach: [u32; 4] = [
        cgroup.as_raw_fd().try_into().unwrap_or(u32::MAX),
        program.as_raw_fd().try_into().unwrap_or(u32::MAX),
        BPF_CGROUP_DEVICE,
        if command == BPF_PROG_ATTACH {
            BPF_F_ALLOW_MULTI
        } else {
            0
        },
    ];
    // SAFETY: `attach` is the part of `bpf_attr` that the command reads, as long as stated.
    check_long(unsafe { libc::syscall(libc::SYS_bpf, command, attach.as_ptr(), mem::size_of_val(&attach)) })
        .map(drop)
}

/// Sets the I/O priority of a process.
///
/// # Errors
/// As ioprio_set(2).
pub(crate) fn set_io_priority(pid: i32, value: u32) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: u32 = 1;
    // SAFETY: takes integers only.
    check_long(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, pid, value) }).map(drop)
}

/// `struct sched_attr` (include/uapi/linux/sched/types.h), its first version.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct SchedAttr {
    /// Length of this structure.
    pub(crate) size: u32,
    /// `SCHED_*`.
    pub(crate) policy: u32,
    /// `SCHED_FLAG_*`.
    pub(crate) flags: u64,
    /// Nice value.
    pub(crate) nice: i32,
    /// Static priority of the real-time policies.
    pub(crate) priority: u32,
    /// Nanoseconds a period.
    pub(crate) runtime: u64,
    /// Nanoseconds.
    pub(crate) deadline: u64,
    /// Nanoseconds.
    pub(crate) period: u64,
}

/// Sets the scheduling policy of a process.
///
/// # Errors
/// As sched_setattr(2).
pub(crate) fn sched_setattr(pid: i32, mut attr: SchedAttr) -> io::Result<()> {
    attr.size = u32::try_from(mem::size_of::<SchedAttr>()).unwrap_or_default();
    // SAFETY: `attr` is a `sched_attr` that states its size and outlives the call.
    check_long(unsafe { libc::syscall(libc::SYS_sched_setattr, pid, ptr::from_ref(&attr), 0) }).map(drop)
}

/// Sets the execution domain of this process.
///
/// # Errors
/// As personality(2).
pub(crate) fn personality(persona: u32) -> io::Result<()> {
    // SAFETY: takes an integer only.
    check(unsafe { libc::personality(persona.into()) }).map(drop)
}

/// Forgets every signal disposition and mask that this process was started with.
pub(crate) fn reset_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL installs no code; signals that cannot be changed fail without effect.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: `sigset_t` is plain integers, for which all zeroes is a value.
    let mut none: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: `none` is a signal set that outlives the call.
    unsafe { libc::sigemptyset(&raw mut none) };
    // SAFETY: `none` is an initialized set; no old one is asked for.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()) };
}

/// A copy of `fd` with the lowest number from 3 on, closed on exec: clear of the standard streams.
///
/// # Errors
/// Fails if the process is out of descriptors.
pub(crate) fn above_stdio(fd: impl AsFd) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, 3)?)
}

/// Makes `fd` the standard stream with this number, which stays open on exec.
///
/// # Errors
/// As dup3(2).
pub(crate) fn make_stdio(fd: BorrowedFd<'_>, number: RawFd) -> io::Result<()> {
    debug_assert!((0..3).contains(&number));
    // SAFETY: takes integers only; 0 to 2 belong to nobody in this process but the standard library's
    // streams, which refer to them by number.
    check(unsafe { libc::dup2(fd.as_raw_fd(), number) }).map(drop)
}

/// The standard stream with this number.
///
/// # Errors
/// Fails if it is closed.
pub(crate) fn stdio(number: RawFd) -> io::Result<BorrowedFd<'static>> {
    debug_assert!((0..3).contains(&number));
    // SAFETY: takes integers only.
    check(unsafe { libc::fcntl(number, libc::F_GETFD) })?;
    // SAFETY: the descriptor is open (line above), and nothing in this process closes 0 to 2 for good.
    Ok(unsafe { BorrowedFd::borrow_raw(number) })
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn check_long(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// include/uapi/linux/vm_sockets.h; the variant with the old `timeval` layout, which is 64-bit here.
const SO_VM_SOCKETS_CONNECT_TIMEOUT: libc::c_int = 6;
/// `_IOW('R', 0x03, int[2])`, include/uapi/linux/random.h.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
/// Bytes given to the pool at once.
const ENTROPY_CHUNK: usize = 256;
/// Commands, program and attach types of bpf(2), include/uapi/linux/bpf.h.
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_DETACH: libc::c_long = 9;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;
