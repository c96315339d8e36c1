//! Which system calls each thread may make.
//!
//! Names, so that one table serves both architectures: a name that an architecture does not have is skipped
//! there. Both C libraries are covered, and `std`.

use caisson_devices::thread::Role;

/// A rule: the call, and what must hold of its arguments.
pub(super) type Rule = (&'static str, &'static [When]);

/// A condition on one argument, compared as 32 bits: descriptors, flags and commands have no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// Argument, value.
    Is(u8, u32),
    /// Argument, mask, value.
    Masked(u8, u32, u32),
    /// The argument is this process.
    Ourselves(u8),
}

use When::{Is, Masked, Ourselves};

/// A thread as the filters know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Thread {
    /// The main thread and those that talk to the supervisor.
    Control,
    /// The one that starts all others but those: it may make every call that any of them may.
    Starter,
    /// One that serves the guest.
    Serving(Role),
}

/// Every role.
pub(super) const ROLES: [Role; 6] = [
    Role::Vcpu,
    Role::Block,
    Role::Net,
    Role::Vsock,
    Role::Files,
    Role::Small,
];

/// What `thread` may do.
pub(super) fn allowed(thread: Thread) -> Vec<Rule> {
    let mut rules = COMMON.to_vec();
    match thread {
        Thread::Control => rules.extend([CONTROL, SOCKETS, KVM, CHILDREN].concat()),
        Thread::Starter => {
            rules.extend_from_slice(STARTER);
            for role in ROLES {
                rules.extend(serving(role));
            }
        }
        Thread::Serving(role) => rules.extend(serving(role)),
    }
    rules
}

fn serving(role: Role) -> Vec<Rule> {
    match role {
        Role::Vcpu => [VCPU, KVM, TAP].concat(),
        Role::Block => [BLOCK, INTERRUPTS].concat(),
        Role::Net => [TAP, SOCKETS, INTERRUPTS].concat(),
        Role::Vsock => [SOCKETS, INTERRUPTS].concat(),
        Role::Files => [FILES, INTERRUPTS].concat(),
        Role::Small => [SMALL, SOCKETS, INTERRUPTS, CHILDREN].concat(),
    }
}

/// What no thread ever has a reason to call: the process is killed at once, where other calls outside the
/// lists are reported first. Nothing here is on any list.
pub(super) const DEADLY: &[&str] = &[
    "execve",
    "execveat",
    "fork",
    "vfork",
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "pidfd_getfd",
    "mount",
    "umount2",
    "pivot_root",
    "chroot",
    "move_mount",
    "open_tree",
    "fsopen",
    "fsmount",
    "mount_setattr",
    "setns",
    "unshare",
    "bpf",
    "perf_event_open",
    "userfaultfd",
    "io_uring_setup",
    "io_uring_enter",
    "io_uring_register",
    "keyctl",
    "add_key",
    "request_key",
    "kexec_load",
    "kexec_file_load",
    "init_module",
    "finit_module",
    "delete_module",
    "open_by_handle_at",
    "reboot",
    "swapon",
    "modify_ldt",
    "personality",
];

/// `PROT_EXEC` (include/uapi/asm-generic/mman-common.h).
const PROT_EXEC: u32 = 4;
/// `PR_SET_NAME`, `PR_GET_NAME`, `PR_SET_VMA` and `PR_SET_NO_NEW_PRIVS` (include/uapi/linux/prctl.h).
const PR_SET_NAME: u32 = 15;
const PR_GET_NAME: u32 = 16;
const PR_SET_VMA: u32 = 0x5356_4d41;
const PR_SET_NO_NEW_PRIVS: u32 = 38;
/// `FIONBIO` and `FIONREAD` (include/uapi/asm-generic/ioctls.h).
const FIONBIO: u32 = 0x5421;
const FIONREAD: u32 = 0x541b;

/// What the runtime under every thread needs: memory that is never executable, locks, time, its own events.
const COMMON: &[Rule] = &[
    ("futex", &[]),
    ("futex_waitv", &[]),
    ("read", &[]),
    ("readv", &[]),
    ("write", &[]),
    ("writev", &[]),
    ("close", &[]),
    ("mmap", &[Masked(2, PROT_EXEC, 0)]),
    ("mprotect", &[Masked(2, PROT_EXEC, 0)]),
    ("munmap", &[]),
    ("mremap", &[]),
    ("madvise", &[]),
    ("brk", &[]),
    ("rt_sigprocmask", &[]),
    ("rt_sigreturn", &[]),
    ("sigaltstack", &[]),
    ("restart_syscall", &[]),
    ("exit", &[]),
    ("exit_group", &[]),
    ("poll", &[]),
    ("ppoll", &[]),
    ("epoll_create1", &[]),
    ("epoll_ctl", &[]),
    ("epoll_wait", &[]),
    ("epoll_pwait", &[]),
    ("eventfd2", &[]),
    ("pipe2", &[]),
    ("socketpair", &[]),
    ("dup", &[]),
    ("fcntl", &[Is(1, 1)]),    // F_GETFD
    ("fcntl", &[Is(1, 2)]),    // F_SETFD
    ("fcntl", &[Is(1, 3)]),    // F_GETFL
    ("fcntl", &[Is(1, 4)]),    // F_SETFL
    ("fcntl", &[Is(1, 1030)]), // F_DUPFD_CLOEXEC
    ("ioctl", &[Is(1, FIONBIO)]),
    ("clock_gettime", &[]),
    ("clock_getres", &[]),
    ("clock_nanosleep", &[]),
    ("nanosleep", &[]),
    ("gettimeofday", &[]),
    ("getrandom", &[]),
    ("sched_yield", &[]),
    ("sched_getaffinity", &[]),
    ("getcpu", &[]),
    ("getpid", &[]),
    ("gettid", &[]),
    ("tgkill", &[Ourselves(0)]),
    ("tkill", &[]),
    ("prctl", &[Is(0, PR_SET_NAME)]),
    ("prctl", &[Is(0, PR_GET_NAME)]),
    ("prctl", &[Is(0, PR_SET_VMA)]),
    ("rseq", &[]),
    ("set_robust_list", &[]),
    ("set_tid_address", &[]),
    ("fstat", &[]),
    ("lseek", &[]),
];

/// Starting threads, and giving each its filter.
const STARTER: &[Rule] = &[
    ("clone", &[Masked(0, CLONE_THREAD, CLONE_THREAD)]),
    ("clone3", &[]),
    ("seccomp", &[]),
    ("prctl", &[Is(0, PR_SET_NO_NEW_PRIVS)]),
    ("rt_sigaction", &[]),
];
/// `CLONE_THREAD` (include/uapi/linux/sched.h). What `clone3` is asked for lies in memory, where no filter looks.
const CLONE_THREAD: u32 = 0x0001_0000;

const SOCKETS: &[Rule] = &[
    ("sendto", &[]),
    ("sendmsg", &[]),
    ("recvfrom", &[]),
    ("recvmsg", &[]),
    ("shutdown", &[]),
    ("getsockopt", &[]),
    ("setsockopt", &[]),
    ("ioctl", &[Is(1, FIONREAD)]),
];

/// The type byte of KVM's ioctls, `KVMIO` (include/uapi/linux/kvm.h).
const KVMIO: u32 = 0xae00;
const IOCTL_TYPE: u32 = 0xff00;
/// Everything one can ask of a virtual machine that is open already.
const KVM: &[Rule] = &[("ioctl", &[Masked(1, IOCTL_TYPE, KVMIO)])];
/// Telling the guest: `KVM_SIGNAL_MSI`, `KVM_IRQ_LINE` and `KVM_IRQ_LINE_STATUS` (include/uapi/linux/kvm.h).
const INTERRUPTS: &[Rule] = &[
    ("ioctl", &[Is(1, 0x4020_aea5)]),
    ("ioctl", &[Is(1, 0x4008_ae61)]),
    ("ioctl", &[Is(1, 0xc008_ae67)]),
];

/// A vCPU also carries the registers of devices, and activates them.
const VCPU: &[Rule] = &[
    ("rt_sigaction", &[]),
    ("rt_sigpending", &[]),
    ("rt_sigtimedwait", &[]),
    ("timerfd_create", &[]),
    ("timerfd_settime", &[]),
    ("timerfd_gettime", &[]),
    ("sched_setaffinity", &[]),
    ("fallocate", &[]),
    ("getrusage", &[]),
];

const BLOCK: &[Rule] = &[
    ("pread64", &[]),
    ("pwrite64", &[]),
    ("preadv", &[]),
    ("pwritev", &[]),
    ("preadv2", &[]),
    ("pwritev2", &[]),
    ("fsync", &[]),
    ("fdatasync", &[]),
    ("fallocate", &[]),
    ("statx", &[]),
    ("newfstatat", &[]),
    ("ioctl", &[Is(1, 0x8008_1272)]), // BLKGETSIZE64 (include/uapi/linux/fs.h)
    ("ioctl", &[Is(1, 0x1268)]),      // BLKSSZGET
    ("ioctl", &[Is(1, 0x1277)]),      // BLKDISCARD
    ("ioctl", &[Is(1, 0x127f)]),      // BLKZEROOUT
];

/// The tap's offloads, header size and name (include/uapi/linux/if_tun.h).
const TAP: &[Rule] = &[
    ("ioctl", &[Is(1, 0x4004_54d0)]), // TUNSETOFFLOAD
    ("ioctl", &[Is(1, 0x4004_54d8)]), // TUNSETVNETHDRSZ
    ("ioctl", &[Is(1, 0x8004_54d2)]), // TUNGETIFF
];

/// Files below the shared directory: by descriptor, for every owner.
const FILES: &[Rule] = &[
    ("openat", &[]),
    ("openat2", &[]),
    ("open", &[]),
    ("statx", &[]),
    ("stat", &[]),
    ("lstat", &[]),
    ("newfstatat", &[]),
    ("statfs", &[]),
    ("fstatfs", &[]),
    ("access", &[]),
    ("faccessat", &[]),
    ("faccessat2", &[]),
    ("linkat", &[]),
    ("unlinkat", &[]),
    ("renameat", &[]),
    ("renameat2", &[]),
    ("mkdirat", &[]),
    ("mknodat", &[]),
    ("symlinkat", &[]),
    ("readlinkat", &[]),
    ("readlink", &[]),
    ("fchown", &[]),
    ("fchownat", &[]),
    ("chown", &[]),
    ("fchmod", &[]),
    ("chmod", &[]),
    ("fchmodat", &[]),
    ("fchmodat2", &[]),
    ("utimensat", &[]),
    ("truncate", &[]),
    ("ftruncate", &[]),
    ("fallocate", &[]),
    ("fadvise64", &[]),
    ("pread64", &[]),
    ("pwrite64", &[]),
    ("preadv", &[]),
    ("pwritev", &[]),
    ("preadv2", &[]),
    ("pwritev2", &[]),
    ("copy_file_range", &[]),
    ("getdents64", &[]),
    ("fsync", &[]),
    ("fdatasync", &[]),
    ("syncfs", &[]),
    ("sync_file_range", &[]),
    ("setxattr", &[]),
    ("lsetxattr", &[]),
    ("fsetxattr", &[]),
    ("getxattr", &[]),
    ("lgetxattr", &[]),
    ("fgetxattr", &[]),
    ("listxattr", &[]),
    ("llistxattr", &[]),
    ("flistxattr", &[]),
    ("removexattr", &[]),
    ("lremovexattr", &[]),
    ("fremovexattr", &[]),
    ("flock", &[]),
    ("fcntl", &[Is(1, 1024 + 8)]), // F_GETPIPE_SZ
    ("fcntl", &[Is(1, 36)]),       // F_OFD_GETLK
    ("fcntl", &[Is(1, 37)]),       // F_OFD_SETLK
    ("umask", &[]),
    ("fchdir", &[]),
    ("setfsuid", &[]),
    ("setfsgid", &[]),
    ("setresuid", &[]),
    ("setresgid", &[]),
    ("setgroups", &[]),
    ("getuid", &[]),
    ("geteuid", &[]),
    ("getgid", &[]),
    ("getegid", &[]),
    ("getgroups", &[]),
    ("capget", &[]),
    ("capset", &[]),
];

/// Entropy, balloon, console, interrupt pump, and the service of devices to a QEMU child.
const SMALL: &[Rule] = &[
    ("fallocate", &[]),
    ("statx", &[]),
    ("newfstatat", &[]),
    ("timerfd_create", &[]),
    ("timerfd_settime", &[]),
    ("timerfd_gettime", &[]),
];

/// Ending a child, and learning how it ended. The PID namespace holds nobody else.
const CHILDREN: &[Rule] = &[
    ("kill", &[]),
    ("pidfd_send_signal", &[]),
    ("waitid", &[]),
    ("wait4", &[]),
];

/// Obeying the supervisor: pausing, measuring, letting go.
const CONTROL: &[Rule] = &[
    ("fallocate", &[]),
    ("ftruncate", &[]),
    ("statx", &[]),
    ("newfstatat", &[]),
    ("pread64", &[]),
    ("pwrite64", &[]),
    ("fsync", &[]),
    ("fdatasync", &[]),
    ("mincore", &[]),
    ("getrusage", &[]),
    ("sysinfo", &[]),
    ("memfd_create", &[]),
    ("msync", &[]),
    ("timerfd_create", &[]),
    ("timerfd_settime", &[]),
];
