//! The machine: what is prepared for the child, and orders to it.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use caisson_devices::fs::{Fs, FsConfig, Limits, own_descriptors};
use caisson_devices::thread::{Role, Threads};
use caisson_devices::vhost_user::serve;
use caisson_devices::virtio::VirtioDevice;
use caisson_devices::vsock::{GUEST_CID, Vsock};
use caisson_machine::{BuildError, Machine, Setup};
use caisson_wire::vmm::{Emulator, Fd, SHARE_TAG, Usage};
use rustix::fs::{FileType, MemfdFlags, fstat, ftruncate, memfd_create};

use crate::arguments::{Arch, Disk, Net, Parts, arguments};
use crate::child::{Child, Inherited};
use crate::monitor::{Complaints, Monitor};
use crate::qmp;

/// How long QEMU may take from its start to its first answer. It is quick, but a loaded host is not.
const START: Duration = Duration::from_secs(30);
/// How long QEMU may take to carry an order out.
const ORDER: Duration = Duration::from_secs(2);

/// Prepares a QEMU child and starts it. It comes as far as its first question to one of our devices, and
/// waits there for [`Machine::start`].
///
/// # Errors
/// Fails with the stage: the emulator is not there, the guest's memory cannot be had, …
pub fn build(mut setup: Setup) -> Result<Box<dyn Machine>, BuildError> {
    let launch = &setup.launch;
    let emulator = launch
        .emulator
        .as_ref()
        .ok_or_else(|| BuildError::new("find the emulator", "the launch message names none"))?;
    let arch = Arch::named(&emulator.arch).ok_or_else(|| {
        let why = format!(
            "no machine for {} is known; x86_64 and aarch64 are",
            emulator.arch
        );
        BuildError::new("choose the machine", why)
    })?;
    let program = program(emulator, arch)?;

    let mut inherited = Inherited::default();
    let mut give = |stage, fd| inherited.give(fd).map_err(|err| BuildError::new(stage, err));
    let descriptors = &mut setup.descriptors;
    let mut take = |fd: Fd, stage| descriptors.take(fd, stage);

    let kernel = take(launch.kernel, "open the kernel")?;
    check_kernel(&kernel, arch)?;
    let initramfs = take(launch.initramfs, "open the initramfs")?;
    let memory = memory(launch.memory).map_err(|err| BuildError::new("make guest memory", err))?;
    let keep = memory
        .try_clone()
        .map_err(|err| BuildError::new("make guest memory", err))?;

    let (qmp, qmp_theirs) = pair()?;
    let (serial, serial_theirs) = pair()?;
    let (stderr, stderr_theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|err| BuildError::new(CONNECT, err))?;
    let mut served = Vec::new();
    let mut device = |device: Box<dyn VirtioDevice>, name| {
        let (ours, theirs) = pair()?;
        served.push(Served {
            device,
            stream: ours,
            name,
        });
        Ok::<OwnedFd, BuildError>(theirs.into())
    };
    let vsock = device(Box::new(Vsock::new(GUEST_CID, setup.ports)), "vsock-service")?;

    let share = match launch.share {
        None => None,
        Some(share) => {
            const STAGE: &str = "share the directory";
            let fs = own_descriptors().and_then(|descriptors| {
                let root = take(share, STAGE).map_err(io::Error::other)?;
                Fs::new(FsConfig {
                    tag: SHARE_TAG.to_owned(),
                    root,
                    descriptors,
                    limits: Limits::of_process(),
                })
            });
            let fs = fs.map_err(|err| BuildError::new(STAGE, err))?;
            Some(device(Box::new(fs), "files-service")?)
        }
    };

    let mut disks = Vec::new();
    for disk in &launch.disks {
        const STAGE: &str = "open a disk";
        let image = take(disk.image, STAGE)?;
        let stat = fstat(&image).map_err(|err| BuildError::new(STAGE, err))?;
        disks.push(Disk {
            is_device: FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice,
            image: give(STAGE, image)?,
            read_only: disk.read_only,
            serial: &disk.serial,
        });
    }
    let mut nets = Vec::new();
    for net in &launch.nets {
        const STAGE: &str = "open a network card's tap";
        nets.push(Net {
            tap: give(STAGE, take(net.tap, STAGE)?)?,
            mac: net.mac,
            mtu: net.mtu,
        });
    }
    let line = arguments(&Parts {
        arch,
        vcpus: launch.vcpus,
        memory: (launch.memory, give("make guest memory", memory)?),
        kernel: give("open the kernel", kernel)?,
        initramfs: give("open the initramfs", initramfs)?,
        cmdline: &launch.cmdline,
        qmp: give(CONNECT, qmp_theirs.into())?,
        serial: give(CONNECT, serial_theirs.into())?,
        vsock: give(CONNECT, vsock)?,
        share: share.map(|share| give(CONNECT, share)).transpose()?,
        disks,
        nets,
    });
    let child = Child::spawn(&program, &line, inherited, stderr_theirs, launch.confine)
        .map_err(|err| BuildError::new("start QEMU", err))?;
    let child = Arc::new(child);

    let orders = qmp.try_clone().map_err(|err| BuildError::new(CONNECT, err))?;
    orders
        .set_write_timeout(Some(ORDER))
        .map_err(|err| BuildError::new(CONNECT, err))?;
    let (answer, answers) = channel();
    let complaints = Complaints::default();
    let monitor = Monitor {
        child: Arc::clone(&child),
        qmp: qmp.into(),
        serial: serial.into(),
        stderr,
        console: setup.console,
        complaints: complaints.clone(),
        answers: answer,
        ended: setup.ended,
    };
    Ok(Box::new(Qemu {
        prepared: Some((monitor, served)),
        threads: setup.threads,
        orders,
        answers,
        complaints,
        memory: keep,
        child,
    }))
}

const CONNECT: &str = "connect with QEMU";

/// A device of ours and the socket on which QEMU asks for it.
#[derive(Debug)]
struct Served {
    device: Box<dyn VirtioDevice>,
    stream: UnixStream,
    name: &'static str,
}

struct Qemu {
    /// What is to run, until it does.
    prepared: Option<(Monitor, Vec<Served>)>,
    threads: Threads,
    orders: UnixStream,
    answers: Receiver<Result<(), String>>,
    complaints: Complaints,
    memory: OwnedFd,
    child: Arc<Child>,
}

impl fmt::Debug for Qemu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qemu")
            .field("child", &self.child)
            .finish_non_exhaustive()
    }
}

impl Machine for Qemu {
    fn name(&self) -> &'static str {
        "qemu"
    }

    fn start(&mut self) -> Result<(), BuildError> {
        const STAGE: &str = "start the machine";
        let (monitor, served) = self
            .prepared
            .take()
            .ok_or_else(|| BuildError::new(STAGE, "it was started before"))?;
        for Served { device, stream, name } in served {
            serve(device, stream, &self.threads, name).map_err(|err| BuildError::new(STAGE, err))?;
        }
        self.threads
            .spawn(Role::Small, "qemu-monitor", move || monitor.run())
            .map_err(|err| BuildError::new(STAGE, err))?;
        // The guest runs when this is answered.
        self.order("qmp_capabilities", STAGE, START)
    }

    fn pause(&mut self) -> Result<(), BuildError> {
        self.order("stop", "pause the machine", ORDER)
    }

    fn resume(&mut self) -> Result<(), BuildError> {
        self.order("cont", "resume the machine", ORDER)
    }

    fn usage(&self) -> Usage {
        // st_blocks counts 512-byte units whatever the file system (inode(7)).
        let blocks = fstat(&self.memory).map_or(0, |stat| stat.st_blocks);
        let time = self.child.processor_time().unwrap_or_default();
        Usage {
            guest_resident: u64::try_from(blocks).unwrap_or(0).saturating_mul(512),
            vcpu_us: u64::try_from(time.as_micros()).unwrap_or(u64::MAX),
        }
    }
}

impl Qemu {
    fn order(&mut self, name: &str, stage: &'static str, patience: Duration) -> Result<(), BuildError> {
        // A late answer to an order that was given up is not this one's.
        while self.answers.try_recv().is_ok() {}
        let sent = io::Write::write_all(&mut self.orders, qmp::command(name).as_bytes());
        let answer = match &sent {
            Ok(()) => self.answers.recv_timeout(patience),
            // It has gone, or takes nothing; the monitor says which.
            Err(_) => self.answers.recv_timeout(ORDER),
        };
        match answer {
            Ok(Ok(())) => Ok(()),
            Ok(Err(why)) => Err(BuildError::new(stage, why)),
            Err(RecvTimeoutError::Timeout) => {
                let seconds = patience.as_secs();
                Err(BuildError::new(
                    stage,
                    format!("QEMU gave no answer within {seconds} s"),
                ))
            }
            Err(RecvTimeoutError::Disconnected) => {
                let said = self.complaints.text();
                let hint = match said.contains("PVH") {
                    true => "; the kernel needs CONFIG_PVH=y, or give its bzImage",
                    false => "",
                };
                Err(BuildError::new(stage, format!("QEMU ended: {said}{hint}")))
            }
        }
    }
}

/// The emulator, if it is there.
fn program(emulator: &Emulator, arch: Arch) -> Result<PathBuf, BuildError> {
    std::fs::canonicalize(Path::new(&emulator.program)).map_err(|err| {
        let why = format!(
            "{}: {err}; install it (Debian and Ubuntu: apt-get install {})",
            emulator.program,
            arch.package()
        );
        BuildError::new("find the emulator", why)
    })
}

/// Guest memory that we, QEMU and our devices share.
fn memory(bytes: u64) -> io::Result<OwnedFd> {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC)?;
    ftruncate(&file, bytes)?;
    Ok(file)
}

fn pair() -> Result<(UnixStream, UnixStream), BuildError> {
    UnixStream::pair().map_err(|err| BuildError::new(CONNECT, err))
}

/// Bytes of a kernel that tell what it is.
const HEAD: usize = 0x240;

/// Refuses what is no kernel for the machine, which QEMU would boot into silence.
fn check_kernel(kernel: &OwnedFd, arch: Arch) -> Result<(), BuildError> {
    const STAGE: &str = "recognize the kernel";
    let mut head = [0; HEAD];
    let got = rustix::io::pread(kernel, &mut head, 0).map_err(|err| BuildError::new(STAGE, err))?;
    let head = head.get(..got).unwrap_or_default();
    match kernel_arch(head) {
        Some(found) if found == arch => Ok(()),
        Some(found) => Err(BuildError::new(
            STAGE,
            format!("it is one for {found:?}, and the machine is {arch:?}"),
        )),
        None => Err(BuildError::new(
            STAGE,
            "it is neither a bzImage, nor an ELF vmlinux, nor an arm64 Image",
        )),
    }
}

/// The architecture of a kernel: bzImage (Documentation/arch/x86/boot.rst), Image
/// (Documentation/arch/arm64/booting.rst), or ELF by its `e_machine`.
fn kernel_arch(head: &[u8]) -> Option<Arch> {
    let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(magic));
    match () {
        () if at(0x202, b"HdrS") => Some(Arch::X86_64),
        () if at(56, b"ARM\x64") => Some(Arch::Aarch64),
        () if at(0, b"\x7fELF") && at(18, &[62, 0]) => Some(Arch::X86_64),
        () if at(0, b"\x7fELF") && at(18, &[183, 0]) => Some(Arch::Aarch64),
        () => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_by_their_heads() {
        let mut head = vec![0; HEAD];
        assert_eq!(kernel_arch(&head), None);
        assert_eq!(kernel_arch(b"short"), None);
        head[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(kernel_arch(&head), Some(Arch::X86_64));
        let mut arm = vec![0; 64];
        arm[56..60].copy_from_slice(b"ARM\x64");
        assert_eq!(kernel_arch(&arm), Some(Arch::Aarch64));
    }
}
