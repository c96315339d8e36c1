//! The system calls of confinement for which there is no safe binding.
#![expect(
    unsafe_code,
    reason = "fork, unshare and a signal handler; taking over the descriptor that the process was born with"
)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Takes over a descriptor with which this process was started.
pub(crate) fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Err(io::Error::other("the process has taken its descriptor already"));
    }
    // SAFETY: F_SETFD takes an integer; it fails if `fd` is not open.
    let set = unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    checked(set)?;
    // SAFETY: `fd` is open, as the call above has shown; whoever started the process passed it for this
    // purpose alone, and `TAKEN` lets one caller through.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Enters a user namespace in which no id is mapped yet. For a process with one thread.
pub(crate) fn unshare_user() -> io::Result<()> {
    // SAFETY: a plain system call on integers; memory and descriptors stay as they are.
    checked(unsafe { libc::unshare(libc::CLONE_NEWUSER) })
}

/// Enters a mount namespace of this process's own.
pub(crate) fn unshare_mounts() -> io::Result<()> {
    // SAFETY: a plain system call on integers; memory and descriptors stay as they are.
    checked(unsafe { libc::unshare(libc::CLONE_NEWNS) })
}

/// A child that runs `body` and leaves with 0 if it succeeded. For a process with one thread.
#[derive(Debug)]
pub(crate) struct Child(libc::pid_t);

impl Child {
    pub(crate) fn run(body: impl FnOnce() -> io::Result<()>) -> io::Result<Self> {
        // SAFETY: the process has one thread, so no lock is held by another one, and the child may run any
        // code on its copy of the memory; it leaves below without running the parent's exit handlers.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let code = i32::from(body().is_err());
            // SAFETY: leaves at once.
            unsafe { libc::_exit(code) }
        }
        checked(pid)?;
        Ok(Self(pid))
    }

    /// Waits for its end.
    pub(crate) fn finish(self) -> io::Result<()> {
        let mut status = 0;
        loop {
            // SAFETY: `status` is valid for writes.
            let waited = unsafe { libc::waitpid(self.0, &raw mut status, 0) };
            match checked(waited) {
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(err),
                Ok(()) if status == 0 => return Ok(()),
                Ok(()) => return Err(io::Error::other("the child that was to do it failed")),
            }
        }
    }
}

/// Lets a write beyond a limit of file size fail rather than end the process.
pub(crate) fn ignore_file_size_signal() {
    // SAFETY: ignoring a signal runs no code of ours; SIGXFSZ is a valid number.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Lets a system call that a filter traps end the process with a line on standard error that names it.
pub(crate) fn report_trapped_calls() -> io::Result<()> {
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = trapped;
    // SAFETY: `sigaction` is plain data, for which zero means no flag and an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `action` is initialised, and its handler is async-signal-safe (see there) and never returns.
    checked(unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) })
}

/// Exit code of a process that made a system call its filter does not allow: 128 + `SIGSYS`.
pub(crate) const TRAPPED: i32 = 128 + libc::SIGSYS;
/// Offset of `si_syscall` in `siginfo_t` of 64-bit Linux: after four ints (one of them padding) and the
/// address of the call (include/uapi/asm-generic/siginfo.h, `_sigsys`).
const SI_SYSCALL: usize = 24;

extern "C" fn trapped(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    let number = info.wrapping_byte_add(SI_SYSCALL).cast::<libc::c_int>();
    // SAFETY: the kernel passes a whole siginfo_t, 128 bytes, and the offset is within and aligned.
    let number = unsafe { number.read() };
    let mut name = [0u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes (prctl(2)).
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let length = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    let mut digits = [b'0'; 10];
    let mut rest = number.unsigned_abs();
    let mut used = 0;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        rest /= 10;
        used += 1;
        if rest == 0 {
            break;
        }
    }
    for part in [
        b"ERROR thread ".as_slice(),
        name.get(..length).unwrap_or_default(),
        b" made system call ",
        digits.get(digits.len() - used..).unwrap_or_default(),
        b", which its filter does not allow\n",
    ] {
        // SAFETY: `part` is valid for reads of its length; write is async-signal-safe.
        let _written = unsafe { libc::write(2, part.as_ptr().cast(), part.len()) };
    }
    // SAFETY: leaves at once; async-signal-safe.
    unsafe { libc::_exit(TRAPPED) }
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
