//! The supervisor's side.

use std::fs;
use std::os::fd::{AsFd as _, BorrowedFd, FromRawFd as _, IntoRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use caisson_wire::vmm::{Confine, End, Ended, Fd, FromVmm, LIMIT, Launch, ToVmm};
use caisson_wire::{Receiver, RecvError, Sender, channel};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};

/// The longest that anything here may take.
const DEADLINE: Duration = Duration::from_secs(20);

/// As a supervisor, before it shares a directory.
pub(crate) fn private_mounts() {
    // SAFETY: a plain system call on integers.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS) }, 0, "needs root");
    mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .unwrap();
}

/// A directory as a supervisor shares it: what is bound below it later, in this namespace, appears there.
pub(crate) fn share(at: &Path) -> OwnedFd {
    mount("test", at, "tmpfs", MountFlags::empty(), None).unwrap();
    mount_change(at, MountPropagationFlags::SHARED).unwrap();
    rustix::fs::open(
        at,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .unwrap()
}

pub(crate) struct Vmm {
    child: Child,
    pub(crate) sender: Sender,
    receiver: Receiver,
    log: tempfile::NamedTempFile,
}

/// A launch whose fake machine does what `behaviour` says.
pub(crate) fn launch(behaviour: &str) -> Launch {
    Launch {
        version: caisson_wire::VERSION,
        sandbox: "test".to_owned(),
        vcpus: 1,
        memory: 64 << 20,
        kernel: Fd(0),
        initramfs: Fd(0),
        cmdline: behaviour.to_owned(),
        share: None,
        disks: Vec::new(),
        nets: Vec::new(),
        console: None,
        confine: Confine::Full,
        emulator: None,
    }
}

impl Vmm {
    /// Starts the process in namespaces of its own, with its socket at descriptor 3.
    pub(crate) fn start() -> Self {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let (sender, receiver) = channel(ours.into(), LIMIT).unwrap();
        receiver.set_timeout(Some(DEADLINE)).unwrap();
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut command = Command::new("unshare");
        command
            .args([
                "--pid",
                "--mount",
                "--net",
                "--ipc",
                "--uts",
                "--fork",
                "--kill-child",
            ])
            .args(["--propagation", "slave"])
            .arg(std::env::current_exe().unwrap())
            .args(["vmm", "test"])
            .env_clear() // as the supervisor does
            .stdin(Stdio::null())
            .stdout(log.reopen().unwrap())
            .stderr(log.reopen().unwrap());
        let socket = rustix::io::fcntl_dupfd_cloexec(&theirs, 16)
            .unwrap()
            .into_raw_fd();
        let place = move || match dup2(socket, 3) {
            3 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        };
        // SAFETY: the closure makes one system call on integers, and is async-signal-safe.
        unsafe { command.pre_exec(place) };
        let child = command.spawn().unwrap();
        // SAFETY: it is this function's own, made above and owned by nobody else.
        drop(unsafe { OwnedFd::from_raw_fd(socket) });
        Self {
            child,
            sender,
            receiver,
            log,
        }
    }

    pub(crate) fn launched(launch: &Launch, descriptors: &[BorrowedFd<'_>]) -> Self {
        let vmm = Self::start();
        vmm.sender
            .send_with(&ToVmm::Launch(Box::new(launch.clone())), descriptors)
            .unwrap();
        vmm
    }

    pub(crate) fn next(&mut self) -> (FromVmm, Vec<OwnedFd>) {
        match self.receiver.recv() {
            Ok(message) => message,
            Err(err) => panic!("{err:?}; log: {}", self.log()),
        }
    }

    pub(crate) fn started(&mut self) {
        let (message, _) = self.next();
        assert!(
            matches!(&message, FromVmm::Started { machine, .. } if machine == "fake"),
            "{message:?}; log: {}",
            self.log()
        );
    }

    /// How it ended, and nothing after that.
    pub(crate) fn ended(mut self) -> (End, String) {
        let (message, _) = self.next();
        let FromVmm::Ended(Ended { how, console }) = message else {
            panic!("{message:?}; log: {}", self.log());
        };
        let after = self.receiver.recv::<FromVmm>().map(|(message, _)| message);
        assert!(matches!(after, Err(RecvError::Closed)), "{after:?}");
        let status = self.exit();
        assert!(status.success(), "{status}; log: {}", self.log());
        (how, console)
    }

    /// It ends without a word; gives its status and log.
    pub(crate) fn breaks(mut self) -> (ExitStatus, String) {
        let last = self.receiver.recv::<FromVmm>().map(|(message, _)| message);
        assert!(last.is_err(), "{last:?}");
        (self.exit(), self.log())
    }

    /// Closes the supervisor's end.
    pub(crate) fn desert(self) -> ExitStatus {
        let Self {
            mut child,
            sender,
            receiver,
            ..
        } = self;
        drop((sender, receiver));
        wait(&mut child)
    }

    fn exit(&mut self) -> ExitStatus {
        wait(&mut self.child)
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.log.path()).unwrap()
    }
}

fn dup2(from: i32, to: i32) -> i32 {
    // SAFETY: a plain system call on integers; the child has nothing there that it needs.
    unsafe { libc::dup2(from, to) }
}

fn wait(child: &mut Child) -> ExitStatus {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if began.elapsed() > DEADLINE {
            child.kill().unwrap();
            panic!("the process does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn fds(owned: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    owned.iter().map(|fd| fd.as_fd()).collect()
}
