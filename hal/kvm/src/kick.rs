//! Getting a vCPU out of the guest, once for each request.
//!
//! **No kick is lost, and none counts twice.** A kicker sets `wanted` and then `immediate_exit` in the run page that
//! KVM reads on entry, and signals the thread. The vCPU thread clears `immediate_exit` and then takes `wanted`, before
//! every entry. So a kick before the entry makes KVM return at once, one inside the guest ends it by the signal, and a
//! stale `immediate_exit` or signal of a kick already taken costs one empty turn of the loop. All accesses are
//! sequentially consistent: the argument needs each side's two accesses in order.
#![expect(unsafe_code, reason = "signals, and a byte shared with the kernel")]

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use kvm_bindings::{kvm_run, kvm_run__bindgen_ty_1};

/// One vCPU's requests to come out.
#[derive(Debug, Default)]
pub(crate) struct Kick {
    wanted: AtomicBool,
    target: Mutex<Option<Target>>,
}

/// Where a bound vCPU runs.
#[derive(Debug)]
struct Target {
    immediate_exit: NonNull<u8>,
    thread: libc::pid_t,
}

// SAFETY: the pointer leads into a mapping that does not belong to a thread, and is used for atomic stores only.
unsafe impl Send for Target {}

impl Kick {
    /// Makes the current run, or else the next one, come out.
    pub(crate) fn request(&self) {
        self.wanted.store(true, Ordering::SeqCst);
        let target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(target) = target.as_ref() else { return };
        // SAFETY: the vCPU unbinds before its run page goes, under the lock that is held here.
        unsafe { AtomicU8::from_ptr(target.immediate_exit.as_ptr()) }.store(1, Ordering::SeqCst);
        let process = std::process::id();
        // SAFETY: a system call without memory arguments. It fails only if the thread has ended, and then there is
        // nobody to wake.
        unsafe { libc::syscall(libc::SYS_tgkill, process, target.thread, signal()) };
    }

    /// Whether a request was made since the last call; for the vCPU's thread, before each entry.
    pub(crate) fn take(&self, page: &RunPage) -> bool {
        page.immediate_exit().store(0, Ordering::SeqCst);
        self.wanted.swap(false, Ordering::SeqCst)
    }

    /// Puts a taken request back, because `run` had something else to report.
    pub(crate) fn put_back(&self) {
        self.wanted.store(true, Ordering::SeqCst);
    }

    /// Directs requests at the calling thread from now on.
    pub(crate) fn bind(&self, page: &RunPage) -> io::Result<()> {
        accept_signal()?;
        let target = Target {
            immediate_exit: page.immediate_exit_ptr(),
            // SAFETY: takes nothing, cannot fail.
            thread: unsafe { libc::gettid() },
        };
        *self.target.lock().unwrap_or_else(PoisonError::into_inner) = Some(target);
        Ok(())
    }

    /// The inverse of [`Kick::bind`].
    pub(crate) fn unbind(&self) {
        *self.target.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// The page that a vCPU shares with the kernel. Valid as long as the vCPU's descriptor that it was taken from.
#[derive(Debug)]
pub(crate) struct RunPage(NonNull<kvm_run>);

/// What KVM says about a vCPU that it cannot run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InternalError {
    /// `KVM_INTERNAL_ERROR_…`
    pub(crate) suberror: u32,
    /// What comes with it, as many as the kernel filled in.
    pub(crate) data: [u64; 16],
    /// How many of [`InternalError::data`] the kernel filled in.
    pub(crate) count: usize,
}

impl RunPage {
    pub(crate) fn of(fd: &mut kvm_ioctls::VcpuFd) -> Self {
        Self(NonNull::from(fd.get_kvm_run()))
    }

    fn immediate_exit_ptr(&self) -> NonNull<u8> {
        let offset = std::mem::offset_of!(kvm_run, immediate_exit);
        // SAFETY: the page is mapped as long as the descriptor lives, and the offset is inside it.
        unsafe { self.0.cast::<u8>().add(offset) }
    }

    pub(crate) fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: as above; a byte is aligned, and everybody accesses it atomically.
        unsafe { AtomicU8::from_ptr(self.immediate_exit_ptr().as_ptr()) }
    }

    fn details(&self) -> kvm_run__bindgen_ty_1 {
        // SAFETY: the page is mapped as long as the descriptor lives, and the kernel writes to it during runs only.
        unsafe { (*self.0.as_ptr()).__bindgen_anon_1 }
    }

    /// Width in bytes of each access of a `KVM_EXIT_IO`.
    pub(crate) fn port_width(&self) -> usize {
        // SAFETY: every bit pattern is a valid integer, whichever exit it was.
        let width = unsafe { self.details().io.size };
        usize::from(width).max(1)
    }

    /// Details of a `KVM_EXIT_INTERNAL_ERROR`.
    pub(crate) fn internal_error(&self) -> InternalError {
        // SAFETY: every bit pattern is a valid integer, whichever exit it was.
        let error = unsafe { self.details().internal };
        InternalError {
            suberror: error.suberror,
            data: error.data,
            count: usize::try_from(error.ndata).unwrap_or(0).min(error.data.len()),
        }
    }
}

/// The signal that ends a run: the first real-time one, which nothing else in the process uses.
fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Makes the signal interrupt system calls of this thread and otherwise do nothing.
fn accept_signal() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    static INSTALLED: OnceLock<Option<i32>> = OnceLock::new();
    let failed = INSTALLED.get_or_init(|| {
        // SAFETY: all zeroes is a valid sigaction: no flags (so no SA_RESTART), empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
        // SAFETY: the handler does nothing, so it may run anywhere; the old action is not asked for.
        let result = unsafe { libc::sigaction(signal(), &raw const action, std::ptr::null_mut()) };
        (result != 0).then(|| io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL))
    });
    if let Some(errno) = failed {
        return Err(io::Error::from_raw_os_error(*errno));
    }
    // SAFETY: all zeroes is a valid value, replaced below.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is a valid variable of this function.
    unsafe { libc::sigemptyset(&raw mut set) };
    // SAFETY: the same, and the signal's number is valid.
    unsafe { libc::sigaddset(&raw mut set, signal()) };
    // SAFETY: the set is initialised; the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut()) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}
