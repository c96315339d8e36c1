//! From the kernel's first process to a server of the control plane.
//!
//! Quiet while all is well, since every byte on a serial console costs an exit. Whatever goes wrong before
//! there is a connection goes to the console, and the guest is powered off: the host keeps the console's
//! tail.

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use caisson_wire::agent::{CONTROL_PORT, FROM_GUEST_LIMIT, TO_GUEST_LIMIT};
use caisson_wire::channel;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::system::RebootCommand;

use crate::container::{self, Context, Events};
use crate::reaper::Reaper;
use crate::server::{End, Server};
use crate::streams::Dial;
use crate::sys;

/// What kept the guest from coming up.
#[derive(Debug, thiserror::Error)]
enum BootError {
    #[error("cannot mount {target}")]
    Mount {
        target: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot leave the initial RAM file system")]
    SwitchRoot(#[source] io::Error),
    #[error("cannot load the module {name}")]
    Module {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot connect to the control plane, port {CONTROL_PORT} of the host")]
    Dial(#[source] io::Error),
    #[error("cannot start")]
    Start(#[source] io::Error),
    #[error("{0}")]
    Prepare(String),
}

/// Runs the guest; comes back only where this is not PID 1 of a guest.
pub fn main() -> ExitCode {
    if std::process::id() != 1 {
        tell("this program is the first process of a Caisson guest and does nothing elsewhere");
        return ExitCode::from(2);
    }
    std::panic::set_hook(Box::new(|info| {
        tell(&format!("the agent failed: {info}"));
        power_off();
    }));
    if let Err(err) = run() {
        let mut text = format!("cannot bring the guest up: {err}");
        let mut source = std::error::Error::source(&err);
        while let Some(cause) = source {
            text.push_str(&format!(": {cause}"));
            source = cause.source();
        }
        tell(&text);
    }
    power_off();
    ExitCode::FAILURE
}

fn run() -> Result<(), BootError> {
    mount_early()?;
    load_modules(Path::new("/modules.list"))?;
    switch_root().map_err(BootError::SwitchRoot)?;
    container::prepare().map_err(|failed| BootError::Prepare(failed.to_string()))?;
    container::delegate_cgroups(Path::new(CGROUP_ROOT));

    let control = dial_control().map_err(BootError::Dial)?;
    let receive = control.try_clone().map_err(BootError::Start)?;
    let (answers, _) = channel(control, FROM_GUEST_LIMIT).map_err(BootError::Start)?;
    let (_, mut requests) = channel(receive, TO_GUEST_LIMIT).map_err(BootError::Start)?;
    answers.set_timeout(SEND_LIMIT).map_err(BootError::Start)?;

    let reaper = Reaper::default();
    reaper.start().map_err(BootError::Start)?;
    let events = answers.clone();
    let context = Context {
        reaper,
        dial: Arc::new(Vsock),
        program: "/proc/self/exe".into(),
        cgroup: PathBuf::from(CGROUP_ROOT),
        // If the control plane takes no events it has gone, which the reading thread notices.
        events: Events::new(move |event| drop(events.send(&event))),
        next: AtomicU64::new(0),
    };
    match Server::new(context, answers).serve(&mut requests) {
        // Without a control plane there is nobody whom the guest works for.
        End::Shutdown | End::Lost(_) => Ok(()),
    }
}

/// Connections to the host.
#[derive(Debug)]
struct Vsock;

impl Dial for Vsock {
    fn dial(&self, port: u32) -> io::Result<OwnedFd> {
        sys::vsock_connect(HOST_CID, port, STREAM_LIMIT)
    }
}

/// The control connection. The device may not have been probed yet when the first process runs.
fn dial_control() -> io::Result<OwnedFd> {
    let deadline = Instant::now() + CONTROL_LIMIT;
    loop {
        match sys::vsock_connect(HOST_CID, CONTROL_PORT, STREAM_LIMIT) {
            Err(_) if Instant::now() < deadline => std::thread::sleep(CONTROL_PAUSE),
            other => return other,
        }
    }
}

fn mount_early() -> Result<(), BootError> {
    for (target, kind, flags, data) in [
        ("/proc", "proc", SAFE, None),
        ("/sys", "sysfs", SAFE, None),
        ("/dev", "devtmpfs", MountFlags::NOSUID, Some(c"mode=0755")),
    ] {
        make_mount(target, kind, flags, data)?;
    }
    Ok(())
}

/// Everything below the roots that [`mount_early`] has made.
fn mount_rest() -> Result<(), BootError> {
    for (target, kind, flags, data) in [
        (
            "/dev/pts",
            "devpts",
            MountFlags::NOSUID.union(MountFlags::NOEXEC),
            Some(c"mode=0620,ptmxmode=0666"),
        ),
        (
            "/dev/shm",
            "tmpfs",
            MountFlags::NOSUID.union(MountFlags::NODEV),
            Some(c"mode=1777"),
        ),
        (
            "/run",
            "tmpfs",
            MountFlags::NOSUID.union(MountFlags::NODEV),
            Some(c"mode=0755"),
        ),
        (CGROUP_ROOT, "cgroup2", SAFE, None),
    ] {
        make_mount(target, kind, flags, data)?;
    }
    Ok(())
}

fn make_mount(
    target: &'static str,
    kind: &str,
    flags: MountFlags,
    data: Option<&'static std::ffi::CStr>,
) -> Result<(), BootError> {
    let make = || -> io::Result<()> {
        fs::create_dir_all(target)?;
        match rustix::mount::mount(kind, target, kind, flags, data) {
            Ok(()) | Err(Errno::BUSY) => Ok(()), // devtmpfs may have mounted itself
            Err(err) => Err(err.into()),
        }
    };
    make().map_err(|source| BootError::Mount { target, source })
}

/// Loads the modules that `list` names, in that order, and gives their memory back.
fn load_modules(list: &Path) -> Result<(), BootError> {
    let Ok(text) = fs::read_to_string(list) else {
        return Ok(());
    }; // a kernel that needs none
    for name in text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        let path = Path::new("/").join(name);
        let load = || -> io::Result<()> {
            let module = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
            match rustix::system::finit_module(&module, c"", 0) {
                Ok(()) | Err(Errno::EXIST) => Ok(()),
                Err(err) => Err(err.into()),
            }
        };
        load().map_err(|source| BootError::Module {
            name: name.to_owned(),
            source,
        })?;
        drop(fs::remove_file(&path));
    }
    Ok(())
}

/// Moves to a tmpfs of its own.
///
/// The initial RAM file system cannot be pivoted away from (pivot_root(2), "rootfs"), and every container
/// does that. The kernel's root stays below, out of reach, with nothing but this program in it, which cannot
/// be written as long as it runs.
fn switch_root() -> Result<(), io::Error> {
    const NEW: &str = "/new-root";
    fs::create_dir_all(NEW)?;
    rustix::mount::mount(
        "tmpfs",
        NEW,
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        Some(c"mode=0755"),
    )?;
    for directory in ["proc", "sys", "dev"] {
        let target = Path::new(NEW).join(directory);
        fs::create_dir(&target)?;
        rustix::mount::mount_move(Path::new("/").join(directory), &target)?;
    }
    rustix::process::chdir(NEW)?;
    rustix::mount::mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    mount_rest().map_err(io::Error::other)
}

/// Writes a line where the host sees it.
fn tell(text: &str) {
    let console = fs::OpenOptions::new().write(true).open("/dev/console");
    let mut line = format!("caisson-agent: {text}\n");
    line.truncate(line.floor_char_boundary(LONGEST_LINE));
    match console {
        Ok(mut console) => {
            drop(console.write_all(line.as_bytes()));
            // A power-off right behind would overtake it: the kernel sends what is written by and by.
            let _ = rustix::termios::tcdrain(&console);
        }
        // Before /dev is there: the kernel's own standard error, if it opened one.
        Err(_) => drop(io::stderr().write_all(line.as_bytes())),
    }
}

/// Ends the guest. Only the kernel's refusal brings this back.
fn power_off() {
    rustix::fs::sync();
    let _ = rustix::system::reboot(RebootCommand::PowerOff);
    // A machine without a power switch: a restart ends it as well, since it is started not to come up again.
    let _ = rustix::system::reboot(RebootCommand::Restart);
}

const SAFE: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);
const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// `VMADDR_CID_HOST`, vsock(7).
const HOST_CID: u32 = 2;
/// Longest time until the control plane accepts; its own deadline for the boot is shorter.
const CONTROL_LIMIT: Duration = Duration::from_secs(30);
/// Time between two attempts.
const CONTROL_PAUSE: Duration = Duration::from_millis(2);
/// Longest time until a stream is accepted.
const STREAM_LIMIT: Duration = Duration::from_secs(10);
/// Longest time that one message to the control plane may take.
const SEND_LIMIT: Duration = Duration::from_secs(60);
/// Longest line on the console.
const LONGEST_LINE: usize = 2048;
