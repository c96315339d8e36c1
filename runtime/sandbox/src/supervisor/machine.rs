//! Starting the vmm process: what it gets, and the process itself.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use caisson_net::Joined;
use caisson_wire::vmm::{Confine, Emulator, Fd, Launch, Net, ToVmm};
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};

use super::console::{self, Blocking};
use super::network::{self, Attached};
use super::share::Share;
use super::state::Network;
use crate::plan::{MachineChoice, SandboxPlan};
use crate::process::ProcessId;
use crate::proto::MachineFailure;
use crate::sys::{self, Spawned};

/// The vmm process. Dropping it kills it, and with it, as it is the first of its PID namespace, all it started.
#[derive(Debug)]
pub(crate) struct Vmm {
    pub(crate) id: ProcessId,
    pidfd: OwnedFd,
}

/// A vmm process that was started, with its ends of everything.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) vmm: Vmm,
    /// Our end of its control socket.
    pub(crate) socket: OwnedFd,
    /// The launch message and its descriptors, to be sent first.
    pub(crate) message: ToVmm,
    pub(crate) descriptors: Vec<OwnedFd>,
    /// Where the guest's console comes from.
    pub(crate) console: OwnedFd,
    /// What the network gives the guest.
    pub(crate) network: Network,
    /// What keeps the network's interfaces at the machine's taps.
    pub(crate) joined: Option<Joined>,
    /// What the vmm process writes to its standard error.
    pub(crate) said: OwnedFd,
}

impl Vmm {
    /// Ends the process.
    pub(crate) fn kill(&self) {
        // Fails only if it has ended, which is what is wanted.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    pub(crate) fn pidfd(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }
}

/// How the process ended, once it has; it stays to be reaped.
pub(crate) fn how_it_ended(pidfd: &OwnedFd) -> String {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    let status = waitid(WaitId::PidFd(pidfd.as_fd()), options).ok().flatten();
    let (code, signal) = status.map_or((None, None), |s| (s.exit_status(), s.terminating_signal()));
    match (code, signal) {
        (Some(code), _) => format!("the vmm process ended with code {code}"),
        (None, Some(signal)) => format!("the vmm process was killed by signal {signal}"),
        (None, None) => "the vmm process ended".to_owned(),
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
        // Killed by the line above, so this does not wait long; without it a zombie would stay.
        let _ = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED);
    }
}

/// Opens what the plan names, and starts the vmm process.
pub(crate) fn launch(
    plan: &SandboxPlan,
    share: &Share,
    netns: Option<&Path>,
) -> Result<Launched, MachineFailure> {
    let mut descriptors = Vec::new();
    let mut give = |descriptor: OwnedFd| {
        descriptors.push(descriptor);
        Fd(u32::try_from(descriptors.len() - 1).unwrap_or(u32::MAX))
    };
    let kernel = give(open("open the kernel", &plan.kernel)?);
    let initramfs = give(open("open the initramfs", &plan.initramfs)?);
    let share = give(
        share
            .directory()
            .map_err(|err| failure("open the shared directory", &err))?,
    );
    // The machine drops what the console does not take; whoever writes errors waits until they are read.
    let (theirs, console) =
        console::pipe(Blocking::No).map_err(|err| failure("make the console's pipe", &err))?;
    let (log, said) =
        console::pipe(Blocking::Yes).map_err(|err| failure("make the vmm process's log", &err))?;
    let console_fd = give(theirs);
    let Attached {
        taps,
        network,
        joined,
    } = network::attach(netns).map_err(|err| failure("attach the network", &err))?;
    let nets = taps
        .into_iter()
        .map(|tap| Net {
            tap: give(tap.descriptor),
            mac: tap.mac,
            mtu: tap.mtu,
        })
        .collect();
    let launch = Launch {
        version: caisson_wire::VERSION,
        sandbox: plan.id.clone(),
        vcpus: plan.vcpus,
        memory: plan.memory,
        kernel,
        initramfs,
        cmdline: plan.cmdline.clone(),
        share: Some(share),
        disks: Vec::new(),
        nets,
        console: Some(console_fd),
        confine: match plan.confine {
            true => Confine::Full,
            false => Confine::Off,
        },
        emulator: emulator(&plan.machine),
    };
    let (socket, vmm) = spawn(&plan.id, log.as_fd()).map_err(|err| failure("start the vmm process", &err))?;
    Ok(Launched {
        vmm,
        socket,
        message: ToVmm::Launch(Box::new(launch)),
        descriptors,
        console,
        network,
        joined,
        said,
    })
}

fn emulator(machine: &MachineChoice) -> Option<Emulator> {
    match machine {
        MachineChoice::Native => None,
        MachineChoice::Qemu {
            program,
            arch,
            because,
        } => {
            tracing::info!(
                because,
                "no usable hardware virtualization; QEMU emulates the machine"
            );
            Some(Emulator {
                program: program.to_string_lossy().into_owned(),
                arch: arch.clone(),
            })
        }
    }
}

fn spawn(sandbox: &str, log: BorrowedFd<'_>) -> io::Result<(OwnedFd, Vmm)> {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let Spawned { pid, pidfd } = sys::spawn_vmm(c"/proc/self/exe", sandbox, theirs.as_fd(), log)?;
    // Ours and not reaped, so the pid is still its own.
    let id = ProcessId::of(pid)?;
    Ok((ours, Vmm { id, pidfd }))
}

fn open(stage: &str, path: &Path) -> Result<OwnedFd, MachineFailure> {
    let opened = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    opened.map_err(|err| MachineFailure {
        stage: format!("{stage} {}", path.display()),
        cause: format!("{}; set its path in the configuration", io::Error::from(err)),
        console: String::new(),
    })
}

fn failure(stage: &str, err: &dyn std::error::Error) -> MachineFailure {
    MachineFailure {
        stage: stage.to_owned(),
        cause: super::chain(err),
        console: String::new(),
    }
}
