//! The supervisor's side: starts the vmm process, talks to it and to the guest's agent.

use std::fs::{self, File};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use caisson_wire::agent::{Call, FROM_GUEST_LIMIT, FromAgent, Request, TO_GUEST_LIMIT};
use caisson_wire::vmm::{Confine, Emulator, End, Ended, Fd, FromVmm, LIMIT, Launch, ToVmm};
use caisson_wire::{Receiver, Sender, channel};

/// The longest that one answer may take: an emulated boot on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(90);

/// The files of a guest.
#[derive(Debug)]
pub(crate) struct Guest {
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl Guest {
    pub(crate) fn from_environment() -> Option<Self> {
        let path = |name| std::env::var_os(name).map(PathBuf::from);
        Some(Self {
            kernel: path("CAISSON_TEST_KERNEL")?,
            initramfs: path("CAISSON_TEST_INITRAMFS")?,
        })
    }
}

pub(crate) struct Vmm {
    child: Child,
    pub(crate) sender: Sender,
    receiver: Receiver,
    log: tempfile::NamedTempFile,
}

pub(crate) struct Plan<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initramfs: &'a Path,
    pub(crate) cmdline: &'a str,
    pub(crate) program: &'a str,
    pub(crate) share: Option<&'a Path>,
    pub(crate) confine: Confine,
}

impl<'a> Plan<'a> {
    pub(crate) fn of(guest: &'a Guest) -> Self {
        Self {
            kernel: &guest.kernel,
            initramfs: &guest.initramfs,
            cmdline: "",
            program: "/usr/bin/qemu-system-x86_64",
            share: None,
            confine: Confine::Full,
        }
    }

    pub(crate) fn launch(&self) -> Vmm {
        let mut descriptors: Vec<OwnedFd> = vec![
            File::open(self.kernel).unwrap().into(),
            File::open(self.initramfs).unwrap().into(),
        ];
        descriptors.extend(self.share.map(|share| File::open(share).unwrap().into()));
        let launch = Launch {
            version: caisson_wire::VERSION,
            sandbox: "test".to_owned(),
            vcpus: 2,
            memory: 256 << 20,
            kernel: Fd(0),
            initramfs: Fd(1),
            cmdline: self.cmdline.to_owned(),
            share: self.share.map(|_| Fd(2)),
            disks: Vec::new(),
            nets: Vec::new(),
            console: None,
            confine: self.confine,
            emulator: Some(Emulator {
                program: self.program.to_owned(),
                arch: "x86_64".to_owned(),
            }),
        };
        let vmm = Vmm::start();
        let borrowed: Vec<_> = descriptors.iter().map(|fd| fd.as_fd()).collect();
        vmm.sender
            .send_with(&ToVmm::Launch(Box::new(launch)), &borrowed)
            .unwrap();
        vmm
    }
}

impl Vmm {
    fn start() -> Self {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let (sender, receiver) = channel(ours.into(), LIMIT).unwrap();
        receiver.set_timeout(Some(DEADLINE)).unwrap();
        let log = tempfile::NamedTempFile::new().unwrap();
        let socket = rustix::io::fcntl_dupfd_cloexec(&theirs, 16).unwrap();
        let number = socket.as_raw_fd();
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
        let place = move || match dup2(number, 3) {
            3 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        };
        // SAFETY: the closure makes one system call on integers, and is async-signal-safe.
        unsafe { command.pre_exec(place) };
        let child = command.spawn().unwrap();
        Self {
            child,
            sender,
            receiver,
            log,
        }
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
            matches!(&message, FromVmm::Started { machine, .. } if machine == "qemu"),
            "{message:?}; log: {}",
            self.log()
        );
    }

    /// The agent, once it has dialled.
    pub(crate) fn agent(&mut self) -> Agent {
        let (message, mut descriptors) = self.next();
        let dialled = matches!(message, FromVmm::GuestConnected { port: 1024 });
        assert!(dialled, "{message:?}; log: {}", self.log());
        let stream = descriptors.remove(0);
        let (sender, _) = channel(stream.try_clone().unwrap(), TO_GUEST_LIMIT).unwrap();
        let (_, receiver) = channel(stream, FROM_GUEST_LIMIT).unwrap();
        receiver.set_timeout(Some(DEADLINE)).unwrap();
        Agent {
            sender,
            receiver,
            id: 0,
        }
    }

    /// How it ended, with the console.
    pub(crate) fn ended(mut self) -> (End, String) {
        let (message, _) = self.next();
        let FromVmm::Ended(Ended { how, console }) = message else {
            panic!("{message:?}; log: {}", self.log());
        };
        let began = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(began.elapsed() < Duration::from_secs(5), "the process stays");
            std::thread::sleep(Duration::from_millis(5));
        }
        (how, console)
    }

    /// The first process below it, or below those, that runs `name`.
    pub(crate) fn descendant(&self, name: &str) -> i32 {
        let mut parents = vec![self.child.id().to_string()];
        while let Some(parent) = parents.pop() {
            let listed = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap();
            for child in listed.split_ascii_whitespace() {
                let command = fs::read_to_string(format!("/proc/{child}/comm")).unwrap();
                if name.starts_with(command.trim()) {
                    return child.parse().unwrap();
                }
                parents.push(child.to_owned());
            }
        }
        panic!("no {name}");
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.log.path()).unwrap()
    }
}

fn dup2(from: i32, to: i32) -> i32 {
    // SAFETY: a plain system call on integers; the child has nothing there that it needs.
    unsafe { libc::dup2(from, to) }
}

pub(crate) struct Agent {
    sender: Sender,
    receiver: Receiver,
    id: u64,
}

impl Agent {
    pub(crate) fn call(&mut self, call: Call) -> FromAgent {
        self.id += 1;
        self.sender.send(&Request { id: self.id, call }).unwrap();
        loop {
            let (message, _) = self.receiver.recv().unwrap();
            if matches!(message, FromAgent::Answer { .. }) {
                return message;
            }
        }
    }
}
