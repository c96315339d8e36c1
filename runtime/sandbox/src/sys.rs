//! The system calls for which there is no safe binding: starting processes in their places, and signals.
#![expect(
    unsafe_code,
    reason = "fork-like calls whose child may only call what is async-signal-safe, signal masks, inherited descriptors"
)]

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The first descriptor after the standard ones: where the vmm process finds its control socket.
pub(crate) const VMM_SOCKET: RawFd = 3;
/// Descriptors that are to be moved below are first moved up here, out of one another's way.
const SPARE: RawFd = 16;

/// How to start one of our own processes that outlives the caller.
#[derive(Debug)]
pub(crate) struct Start<'a> {
    /// The binary: ours.
    pub(crate) program: &'a Path,
    /// Its arguments; the inherited socket's number is appended.
    pub(crate) arguments: &'a [&'a OsStr],
    pub(crate) stdin: Stdio,
    pub(crate) stdout: Stdio,
    pub(crate) stderr: Stdio,
    /// The one descriptor it inherits besides its standard streams.
    pub(crate) socket: OwnedFd,
    pub(crate) netns: Netns<'a>,
    /// Whether its standard input becomes its controlling terminal.
    pub(crate) terminal: bool,
    /// Whether it starts with every signal blocked, to take them from a descriptor.
    pub(crate) block_signals: bool,
}

/// In which network namespace to start.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Netns<'a> {
    Same,
    New,
    Of(BorrowedFd<'a>),
}

/// Starts a process as the leader of a session of its own. It inherits no other descriptor of ours.
pub(crate) fn start(order: Start<'_>) -> io::Result<Child> {
    let socket = order.socket.as_raw_fd();
    let netns = match order.netns {
        Netns::Same => None,
        Netns::New => Some(-1),
        Netns::Of(fd) => Some(fd.as_raw_fd()),
    };
    let (terminal, block_signals) = (order.terminal, order.block_signals);
    let mut command = Command::new(order.program);
    command
        .arg0("caisson")
        .current_dir("/") // so as not to keep the caller's file system busy
        .args(order.arguments)
        .arg(socket.to_string())
        .stdin(order.stdin)
        .stdout(order.stdout)
        .stderr(order.stderr);
    let prepare = move || {
        checked(setsid())?;
        match netns {
            None => {}
            Some(-1) => checked(unshare_network())?,
            Some(fd) => checked(enter_network(fd))?,
        }
        if terminal {
            checked(take_terminal())?;
        }
        checked(close_on_exec_from(3))?;
        checked(keep_on_exec(socket))?;
        if block_signals {
            checked(block_all())?;
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and must be async-signal-safe: it makes system calls
    // through the one-call functions below, touches captured integers only and allocates nothing.
    unsafe { command.pre_exec(prepare) };
    command.spawn()
}

fn checked(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn setsid() -> libc::c_long {
    // SAFETY: takes no argument and is async-signal-safe.
    unsafe { libc::setsid() }.into()
}

fn unshare_network() -> libc::c_long {
    // SAFETY: a plain system call on integers; the child has one thread.
    unsafe { libc::unshare(libc::CLONE_NEWNET) }.into()
}

fn enter_network(fd: RawFd) -> libc::c_long {
    // SAFETY: a plain system call on integers; a bad descriptor is an error return.
    unsafe { libc::setns(fd, libc::CLONE_NEWNET) }.into()
}

fn take_terminal() -> libc::c_long {
    // SAFETY: TIOCSCTTY takes an integer (ioctl_tty(2)); standard input is the terminal.
    unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) }.into()
}

fn close_on_exec_from(first: libc::c_uint) -> libc::c_long {
    // SAFETY: a plain system call on integers (close_range(2)); closes nothing before the exec.
    unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    }
}

fn keep_on_exec(fd: RawFd) -> libc::c_long {
    // SAFETY: F_SETFD takes an integer (fcntl(2)).
    unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }.into()
}

fn block_all() -> libc::c_long {
    let set = full_set();
    // SAFETY: `set` is initialised and lives through the call; no old mask is asked for.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) }.into()
}

fn unblock_all() -> libc::c_long {
    let mut set = full_set();
    // SAFETY: `set` is valid for writes.
    unsafe { libc::sigemptyset(&raw mut set) };
    // SAFETY: `set` is initialised and lives through the call; no old mask is asked for.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) }.into()
}

fn full_set() -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: `set` is valid for writes of a sigset_t.
    unsafe { libc::sigfillset(set.as_mut_ptr()) };
    // SAFETY: sigfillset initialised it, and cannot fail on a valid pointer (sigsetops(3)).
    unsafe { set.assume_init() }
}

/// Takes over a descriptor that this process was started with, named in its arguments.
pub(crate) fn inherited(number: &OsStr) -> io::Result<OwnedFd> {
    let fd: RawFd = number
        .to_str()
        .and_then(|text| text.parse().ok())
        .filter(|fd| *fd > 2)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no descriptor number"))?;
    // SAFETY: F_SETFD takes an integer; fails if `fd` is not open.
    let set = unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    checked(set.into())?;
    // SAFETY: `fd` is open, as the call above has shown, and nothing else in this process owns it: whoever
    // started the process passed it for this purpose alone, and it is read from the arguments once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Registers a descriptor with the runtime of the calling task, for reading, or for writing too.
pub(crate) fn watch(
    fd: OwnedFd,
    interest: tokio::io::Interest,
) -> io::Result<tokio::io::unix::AsyncFd<OwnedFd>> {
    // SAFETY: `as_raw_fd` must give the same open descriptor until the registration ends: an `OwnedFd` never
    // changes or closes its descriptor before it is dropped, and the `AsyncFd` owns it until then.
    let watched = unsafe { tokio::io::unix::AsyncFd::register_with_interest(fd, interest) };
    Ok(watched?)
}

/// Gives the calling thread a mount namespace of its own.
pub(crate) fn unshare_mounts() -> io::Result<()> {
    // SAFETY: a plain system call on integers; descriptors and memory stay as they are.
    checked(unsafe { libc::unshare(libc::CLONE_NEWNS) }.into())
}

/// `struct mount_attr` (Linux, include/uapi/linux/mount.h).
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

/// `MOUNT_ATTR_RDONLY` (Linux, include/uapi/linux/mount.h).
const MOUNT_ATTR_RDONLY: u64 = 1;

/// Makes the mount whose root `mount` is read-only, and those below it if `recursive`.
pub(crate) fn make_read_only(mount: impl AsFd, recursive: bool) -> io::Result<()> {
    let attributes = MountAttributes {
        set: MOUNT_ATTR_RDONLY,
        clear: 0,
        propagation: 0,
        userns: 0,
    };
    let below = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a valid string and `attributes` lives through the call, with its true size
    // (mount_setattr(2)).
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | below,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    checked(done)
}

/// Sends any signal, real-time ones too, through a pidfd.
pub(crate) fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: a plain system call; a null siginfo is allowed (pidfd_send_signal(2)).
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    checked(sent)
}

/// Every signal that may be caught, taken from a descriptor instead; dropping it restores the mask.
pub(crate) struct Signals {
    descriptor: OwnedFd,
    before: libc::sigset_t,
}

impl std::fmt::Debug for Signals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Signals").field(&self.descriptor).finish()
    }
}

impl Signals {
    /// Blocks every signal for this thread and those it starts, and opens the descriptor.
    /// A signal to the process still reaches other threads that had started before.
    pub(crate) fn take() -> io::Result<Self> {
        let set = full_set();
        let mut before = set;
        // SAFETY: both sets live through the call, and `before` is valid for writes.
        let blocked = unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const set, &raw mut before) };
        checked(blocked.into())?;
        // SAFETY: `set` is initialised and lives through the call; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        checked(fd.into())?;
        // SAFETY: signalfd has just returned it to us alone.
        let descriptor = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { descriptor, before })
    }

    /// The next signal that waits.
    pub(crate) fn next(&self) -> Option<i32> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        match rustix::io::read(&self.descriptor, &mut info) {
            // ssi_signo is the first field, a u32 (signalfd(2)).
            Ok(read) if read == info.len() => {
                let number = info.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))?;
                i32::try_from(number).ok()
            }
            _ => None,
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: `before` was filled in by the call that blocked the signals.
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut()) };
    }
}

/// Ends this process by `signal`, without a core file; by the shell's code if the signal does not kill.
pub(crate) fn die_by(signal: i32) -> ! {
    let none = rustix::process::Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    // A core file more is no reason to stay.
    let _ = rustix::process::setrlimit(rustix::process::Resource::Core, none);
    // SAFETY: the default disposition runs no code of ours; a bad number is an error return.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    let _ = checked(unblock_all());
    // SAFETY: sends this process a signal; no memory is involved.
    unsafe { libc::raise(signal) };
    std::process::exit(128 + (signal & 0x7f))
}

/// A process that was started in namespaces of its own.
#[derive(Debug)]
pub(crate) struct Spawned {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
}

/// Starts the vmm process: new PID, mount, network, IPC and UTS namespaces, `socket` as descriptor 3,
/// `log` as standard output and error, nothing else; it dies with the calling thread.
pub(crate) fn spawn_vmm(
    program: &CStr,
    sandbox: &str,
    socket: BorrowedFd<'_>,
    log: BorrowedFd<'_>,
) -> io::Result<Spawned> {
    let arguments = [c"caisson".to_owned(), c"vmm".to_owned(), CString::new(sandbox)?];
    let mut argv: Vec<*const libc::c_char> = arguments.iter().map(|text| text.as_ptr()).collect();
    argv.push(std::ptr::null());
    let envp = [std::ptr::null()];
    let null = rustix::fs::open(c"/dev/null", rustix::fs::OFlags::RDWR, rustix::fs::Mode::empty())?;
    let up = |fd: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, SPARE);
    let (null, log, socket) = (up(null.as_fd())?, up(log)?, up(socket)?);
    let plan = VmmChild {
        program: program.as_ptr(),
        argv: argv.as_ptr(),
        envp: envp.as_ptr(),
        null: null.as_raw_fd(),
        log: log.as_raw_fd(),
        socket: socket.as_raw_fd(),
    };

    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain integers, for which zero is the documented default (clone(2)).
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    let flags = libc::CLONE_PIDFD
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS;
    args.flags = u64::from(flags.cast_unsigned());
    args.pidfd = (&raw mut pidfd).expose_provenance() as u64;
    args.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    // SAFETY: `args` is initialised and of the size given; without CLONE_VM the child has a copy of this
    // memory, and runs only `VmmChild::run`, which keeps to async-signal-safe calls and never returns.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    if pid == 0 {
        plan.run();
    }
    checked(pid)?;
    // SAFETY: CLONE_PIDFD has the kernel store a new descriptor there, ours alone.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    let pid = i32::try_from(pid).map_err(io::Error::other)?;
    Ok(Spawned { pid, pidfd })
}

/// What the child of `spawn_vmm` needs, all of it made before the clone.
struct VmmChild {
    program: *const libc::c_char,
    argv: *const *const libc::c_char,
    envp: *const *const libc::c_char,
    null: RawFd,
    log: RawFd,
    socket: RawFd,
}

impl VmmChild {
    /// Runs in the child. If the parent died before the first call, the socket's end says so later.
    fn run(&self) -> ! {
        // SAFETY: takes integers (prctl(2)).
        let mut failed = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) } < 0;
        failed |= unblock_all() < 0;
        // SAFETY: the target is a valid string; the other pointers may be null for a change of propagation
        // (mount(2)). What the supervisor binds later still arrives, and nothing goes back.
        failed |= unsafe {
            libc::mount(
                std::ptr::null(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_SLAVE,
                std::ptr::null(),
            )
        } < 0;
        for (from, to) in [
            (self.null, 0),
            (self.log, 1),
            (self.log, 2),
            (self.socket, VMM_SOCKET),
        ] {
            // SAFETY: takes integers; `from` is at least SPARE, so no call undoes another.
            failed |= unsafe { libc::dup2(from, to) } < 0;
        }
        failed |= close_on_exec_from(VMM_SOCKET.cast_unsigned() + 1) < 0;
        if !failed {
            // SAFETY: the strings and the null-terminated arrays were made by `spawn_vmm` before the clone
            // and are part of this process's copy of its memory.
            unsafe { libc::execve(self.program, self.argv, self.envp) };
        }
        // SAFETY: leaves at once, without running anything of the parent's.
        unsafe { libc::_exit(127) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_is_no_open_descriptor_is_not_taken_over() {
        for text in ["", "x", "-1", "0", "2", "999999"] {
            assert!(inherited(OsStr::new(text)).is_err(), "{text}");
        }
    }
}
