//! A machine that only tries what a confined process can do, and prints it on its console.

use std::fmt::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use caisson_devices::thread::{Role, Threads};
use caisson_devices::vsock::HostPorts;
use caisson_machine::{BuildError, Console, Machine, Setup};
use caisson_wire::vmm::{End, Usage};
use rustix::fs::{Mode, OFlags, openat};

pub(crate) fn build(mut setup: Setup) -> Result<Box<dyn Machine>, BuildError> {
    assert!(setup.threads.spawn(Role::Small, "early", || ()).is_err());
    if setup.launch.cmdline == "no build" {
        let cause = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
        return Err(BuildError::new("open /dev/kvm", Wrapped(cause)));
    }
    setup.console.write(b"building\n");
    let share = setup
        .launch
        .share
        .map(|fd| setup.descriptors.take(fd, "take the share").unwrap());
    Ok(Box::new(Fake {
        behaviour: setup.launch.cmdline,
        console: setup.console,
        ports: setup.ports,
        threads: setup.threads,
        ended: setup.ended,
        share,
    }))
}

#[derive(Debug, thiserror::Error)]
#[error("the device is forbidden")]
struct Wrapped(#[source] std::io::Error);

struct Fake {
    behaviour: String,
    console: Console,
    ports: Arc<dyn HostPorts>,
    threads: Threads,
    ended: Sender<End>,
    share: Option<OwnedFd>,
}

impl Machine for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn start(&mut self) -> Result<(), BuildError> {
        match self.behaviour.as_str() {
            "probe" => {
                let text = self.on(Role::Files, probe);
                self.print(&text);
                self.end(End::PowerOff);
            }
            "share" => {
                let share = self.share.take().unwrap();
                let text = self.on(Role::Files, move || files(&share));
                self.print(&text);
                self.end(End::PowerOff);
            }
            "nested" => {
                // A vCPU that activates a device: its worker may do more than the vCPU.
                let threads = self.threads.clone();
                let opened = self.on(Role::Vcpu, move || {
                    threads
                        .spawn(Role::Files, "files", || std::fs::read("/etc/passwd").is_err())
                        .unwrap()
                        .join()
                        .unwrap()
                });
                assert!(opened);
                self.end(End::Reset);
            }
            "twice" => {
                self.end(End::Crashed("vCPU 0 is lost".to_owned()));
                self.end(End::Reset);
            }
            "dial" => {
                let (host, guest) = UnixStream::pair().unwrap();
                assert!(self.ports.accept(1024, host));
                rustix::io::write(&guest, b"hello").unwrap();
            }
            "flood" => {
                let refused = (0..1000).any(|_| !self.ports.accept(1, UnixStream::pair().unwrap().0));
                self.print(&format!("refused: {refused}"));
            }
            "vcpu opens" => self.on(Role::Vcpu, || drop(std::fs::read("/etc/passwd"))),
            "vcpu executes" => self.on(Role::Vcpu, || {
                drop(std::process::Command::new("/bin/true").status());
            }),
            "control opens" => drop(std::fs::read("/etc/passwd")),
            "files makes code" => self.on(Role::Files, || {
                let flags = rustix::mm::MapFlags::PRIVATE;
                let prot = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::EXEC;
                // SAFETY: a new mapping, which nothing else uses.
                let _ = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), 4096, prot, flags) };
            }),
            "panic" => self.on(Role::Block, || panic!("a broken invariant")),
            _ => {}
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<(), BuildError> {
        Err(BuildError::new("pause vCPU 0", "it does not come out"))
    }

    fn resume(&mut self) -> Result<(), BuildError> {
        Ok(())
    }

    fn usage(&self) -> Usage {
        Usage {
            guest_resident: 1,
            vcpu_us: 2,
        }
    }
}

impl Fake {
    fn on<T: Send + 'static>(&self, role: Role, body: impl FnOnce() -> T + Send + 'static) -> T {
        self.threads.spawn(role, "probe", body).unwrap().join().unwrap()
    }

    fn print(&self, text: &str) {
        self.console.write(text.as_bytes());
    }

    fn end(&self, how: End) {
        self.ended.send(how).unwrap();
    }
}

/// What a thread that serves files, the one that may do most, sees of the world.
fn probe() -> String {
    let mut text = String::new();
    let directory = OFlags::RDONLY | OFlags::DIRECTORY;
    let root = rustix::fs::open("/", directory, Mode::empty()).map(rustix::fs::Dir::read_from);
    let names = match root {
        // Landlock may forbid even this.
        Err(err) => format!("{err}"),
        Ok(entries) => entries.unwrap().count().to_string(),
    };
    writeln!(text, "root: {names}").unwrap();
    writeln!(text, "passwd: {}", std::fs::read("/etc/passwd").is_err()).unwrap();
    let made = openat(rustix::fs::CWD, "/x", OFlags::CREATE | OFlags::WRONLY, Mode::RWXU);
    writeln!(text, "create: {}", made.is_err()).unwrap();
    let sets = rustix::thread::capabilities(None).unwrap();
    writeln!(text, "effective: {:?}", sets.effective).unwrap();
    writeln!(text, "permitted: {:?}", sets.permitted).unwrap();
    writeln!(text, "inheritable: {:?}", sets.inheritable).unwrap();
    text
}

fn files(share: &OwnedFd) -> String {
    let mut text = String::new();
    let read = |name: &str| {
        let file = openat(share, name, OFlags::RDONLY, Mode::empty())?;
        let mut bytes = [0; 64];
        let got = rustix::io::read(&file, &mut bytes)?;
        Ok::<_, rustix::io::Errno>(String::from_utf8_lossy(bytes.get(..got).unwrap()).into_owned())
    };
    writeln!(text, "file: {:?}", read("file")).unwrap();
    let mut late = read("late/file");
    for _ in 0..500 {
        if late.is_ok() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
        late = read("late/file");
    }
    writeln!(text, "late: {late:?}").unwrap();
    let made = openat(share, "late/new", OFlags::CREATE | OFlags::WRONLY, Mode::RWXU);
    let owned = made.and_then(|file| {
        let (uid, gid) = (
            rustix::fs::Uid::from_raw(1234),
            rustix::fs::Gid::from_raw(4_000_000_000),
        );
        rustix::fs::fchown(&file, Some(uid), Some(gid))
    });
    writeln!(text, "new: {owned:?}").unwrap();
    // Of another owner, and unreadable for others.
    writeln!(text, "private: {:?}", read("late/private")).unwrap();
    rustix::fs::mkdirat(share, "late/dir", Mode::RWXU).unwrap();
    let moved = rustix::fs::renameat(share, "late/new", share, "late/dir/new");
    writeln!(text, "rename: {moved:?}").unwrap();
    let node = rustix::fs::mknodat(
        share,
        "late/null",
        rustix::fs::FileType::CharacterDevice,
        Mode::RWXU,
        rustix::fs::makedev(1, 3),
    );
    writeln!(text, "node: {}", node.is_err()).unwrap();
    writeln!(text, "escape: {:?}", read("../../../../etc/passwd").is_err()).unwrap();
    text
}
