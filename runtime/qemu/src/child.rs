//! The QEMU process: started confined, ended with its machine.
#![expect(
    unsafe_code,
    reason = "set-up between fork and exec, and the processor clock of another process"
)]

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use caisson_machine::confine::{enter_root_with, keep_capabilities};
use caisson_wire::vmm::Confine;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::process::{
    Pid, PidfdFlags, Resource, Rlimit, Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_open,
    pidfd_send_signal, set_parent_process_death_signal, setrlimit, waitid,
};
use rustix::thread::{CapabilitySet, set_no_new_privs};

/// The child's descriptors start here, above all that the standard library opens to start it.
const FIRST: RawFd = 200;
/// What a dynamically linked program of the system needs; some are missing on some systems.
const SYSTEM: [&str; 7] = [
    "/usr",
    "/bin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/alternatives",
];

/// Descriptors that the child inherits under the numbers they have here.
#[derive(Debug, Default)]
pub(crate) struct Inherited(Vec<OwnedFd>);

impl Inherited {
    /// Lets the child have `fd`; gives its number there.
    pub(crate) fn give(&mut self, fd: OwnedFd) -> io::Result<RawFd> {
        let moved = fcntl_dupfd_cloexec(&fd, FIRST)?;
        let number = moved.as_raw_fd();
        self.0.push(moved);
        Ok(number)
    }
}

/// A running QEMU. Dropping it kills and reaps it.
#[derive(Debug)]
pub(crate) struct Child {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Child {
    /// Starts `program`; its errors go to `stderr`. It dies with the calling thread, and has what `inherited`
    /// holds and nothing else.
    ///
    /// For a process with one thread if `confine` is full.
    pub(crate) fn spawn(
        program: &Path,
        arguments: &[String],
        inherited: Inherited,
        stderr: OwnedFd,
        confine: Confine,
    ) -> io::Result<Self> {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(stderr.try_clone()?)
            .stderr(stderr);
        let root = root_of(program);
        let descriptors = inherited.0;
        let prepare = move || {
            if confine == Confine::Full {
                let paths: Vec<&Path> = root.iter().map(PathBuf::as_path).collect();
                enter_root_with(&paths)?;
                keep_capabilities(CapabilitySet::empty())?;
                let none = Rlimit {
                    current: Some(0),
                    maximum: Some(0),
                };
                setrlimit(Resource::Core, none)?;
            }
            set_no_new_privs(true)?;
            for fd in &descriptors {
                fcntl_setfd(fd, FdFlags::empty())?;
            }
            Ok(set_parent_process_death_signal(Some(Signal::KILL))?)
        };
        // SAFETY: the closure runs between fork and exec. Confined, it allocates, and the caller's process has
        // one thread, so no other one holds a lock; otherwise it makes async-signal-safe system calls only.
        unsafe { command.pre_exec(prepare) };
        let child = command.spawn()?;
        let pid = Pid::from_child(&child);
        // Not reaped by anybody, so the pid is still its own.
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        Ok(Self { pid, pidfd })
    }

    /// Waits for the end; kills the process if it takes too long. Says how it ended.
    pub(crate) fn end(&self, patience: Duration) -> String {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let limit = Timespec::try_from(patience).unwrap_or_default();
        if !matches!(poll(&mut fds, Some(&limit)), Ok(1)) {
            self.kill();
        }
        // It stays to be reaped when this value is dropped, so that the pid stays its own.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        match waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
            Ok(Some(status)) => how(&status),
            _ => "QEMU ended".to_owned(),
        }
    }

    /// Processor time of all its threads.
    pub(crate) fn processor_time(&self) -> Option<Duration> {
        let mut clock = 0;
        // SAFETY: `clock` is valid for writes.
        if unsafe { libc::clock_getcpuclockid(self.pid.as_raw_nonzero().get(), &raw mut clock) } != 0 {
            return None;
        }
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: `time` is valid for writes.
        if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
            return None;
        }
        let (seconds, nanos) = (
            u64::try_from(time.tv_sec).ok()?,
            u32::try_from(time.tv_nsec).ok()?,
        );
        Some(Duration::new(seconds, nanos))
    }

    fn kill(&self) {
        // Fails only if it has ended, which is what is wanted.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
        // Killed by the line above, so this does not wait long; without it a zombie would stay.
        let _ = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED);
    }
}

fn how(status: &WaitIdStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("QEMU ended with code {code}"),
        (None, Some(signal)) => format!("QEMU was killed by signal {signal}"),
        (None, None) => "QEMU ended".to_owned(),
    }
}

/// What the child sees of the file system: the system's programs, and the prefix of its own if it is elsewhere.
fn root_of(program: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = SYSTEM.iter().map(PathBuf::from).collect();
    // Two levels up: the directory that holds `bin` and `share`.
    let prefix = program.parent().and_then(Path::parent);
    if let Some(prefix) = prefix
        && prefix != Path::new("/")
        && !paths.iter().any(|path| prefix.starts_with(path))
    {
        paths.push(prefix.to_owned());
    }
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_from_elsewhere_brings_its_prefix() {
        let system = root_of(Path::new("/usr/bin/qemu-system-x86_64"));
        assert_eq!(system.len(), SYSTEM.len());
        let own = root_of(Path::new("/opt/qemu/usr/bin/qemu-system-x86_64"));
        assert_eq!(own.last().unwrap(), Path::new("/opt/qemu/usr"));
    }
}
