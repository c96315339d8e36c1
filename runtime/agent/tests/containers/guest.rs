//! A guest without a machine: the agent's server as PID 1 of new namespaces.

use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio as CommandStdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use caisson_agent::container::{self, Context, Events};
use caisson_agent::reaper::Reaper;
use caisson_agent::server::Server;
use caisson_agent::streams::Dial;
use caisson_wire::agent::{
    Call, Create, Exec, ExitStatus, FROM_GUEST_LIMIT, Failure, FromAgent, Reply, Request, Root, SHARE_DIR,
    Stdio, TO_GUEST_LIMIT, Target, Terminal, WindowSize,
};
use caisson_wire::{Receiver, Sender, channel};
use oci_spec::runtime::{Process, Spec};
use serde_json::{Value, json};

/// Longest wait for anything.
const LIMIT: Duration = Duration::from_secs(20);

/// What is missing on this machine, if anything.
pub(crate) fn requirements() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("root is needed to make containers".to_owned());
    }
    cgroup_root()?;
    busybox().map(drop)
}

/// The guest's side of the tests: PID 1 of the namespaces that [`Guest::new`] makes.
pub(crate) fn serve(args: Vec<String>) -> ExitCode {
    let [share, streams, cgroup] = &args[..] else {
        panic!("serve SHARE STREAMS CGROUP")
    };
    // A guest has no mount below this; the test's machine may have some.
    rustix::mount::mount_change(
        "/",
        rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC,
    )
    .expect("mounts can be made private");
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", "/run", "tmpfs", flags, None).expect("a tmpfs can be mounted");
    container::prepare().expect("directories can be made");
    rustix::mount::mount_bind_recursive(share.as_str(), SHARE_DIR).expect("the share can be bound");

    let socket: OwnedFd = rustix::io::dup(rustix::stdio::stdin()).expect("standard input is the socket");
    let second = socket.try_clone().expect("there are descriptors left");
    let (answers, _) = channel(socket, FROM_GUEST_LIMIT).expect("a channel");
    let (_, mut requests) = channel(second, TO_GUEST_LIMIT).expect("a channel");
    let reaper = Reaper::default();
    reaper.start().expect("a thread");
    let events = answers.clone();
    let context = Context {
        reaper,
        dial: Arc::new(Sockets(streams.into())),
        program: "/proc/self/exe".into(),
        cgroup: cgroup.into(),
        events: Events::new(move |event| drop(events.send(&event))),
        next: AtomicU64::new(0),
    };
    Server::new(context, answers).serve(&mut requests);
    ExitCode::SUCCESS
}

/// Ports as unix sockets in a directory.
#[derive(Debug)]
struct Sockets(PathBuf);

impl Dial for Sockets {
    fn dial(&self, port: u32) -> io::Result<OwnedFd> {
        Ok(UnixStream::connect(self.0.join(port.to_string()))?.into())
    }
}

/// A guest and the control plane's side of its connection.
pub(crate) struct Guest {
    process: Child,
    dir: tempfile::TempDir,
    cgroup: PathBuf,
    requests: Sender,
    messages: Receiver,
    /// Messages that came while another was waited for.
    early: Vec<FromAgent>,
    next_id: u64,
    next_port: u32,
}

impl Guest {
    /// Starts one, with a busybox root file system in its share.
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("streams")).unwrap();
        make_root(&dir.path().join("share/root"));
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("caisson-agent-test-{}-{number}", std::process::id());
        let cgroup = cgroup_root().unwrap().join(name);
        fs::create_dir(&cgroup).unwrap();

        let (ours, theirs) = UnixStream::pair().unwrap();
        let process = Command::new("unshare")
            .args([
                "--mount",
                "--net",
                "--uts",
                "--ipc",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
            ])
            .arg(std::env::current_exe().unwrap())
            .arg("serve")
            .args([
                dir.path().join("share"),
                dir.path().join("streams"),
                cgroup.clone(),
            ])
            .stdin(CommandStdio::from(OwnedFd::from(theirs)))
            .spawn()
            .unwrap();
        let second = ours.try_clone().unwrap();
        let (requests, _) = channel(ours.into(), TO_GUEST_LIMIT).unwrap();
        let (_, messages) = channel(second.into(), FROM_GUEST_LIMIT).unwrap();
        messages.set_timeout(Some(LIMIT)).unwrap();
        Self {
            process,
            dir,
            cgroup,
            requests,
            messages,
            early: Vec::new(),
            next_id: 1,
            next_port: 0x1_0000,
        }
    }

    /// A file of the shared directory, seen from the host.
    pub(crate) fn share(&self, path: &str) -> PathBuf {
        self.dir.path().join("share").join(path)
    }

    /// Sends a request without waiting for the answer.
    pub(crate) fn send(&mut self, call: Call) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.requests.send(&Request { id, call }).unwrap();
        id
    }

    /// Waits for the answer to a request.
    pub(crate) fn answer(&mut self, id: u64) -> Result<Reply, Failure> {
        let message =
            self.wait_for(|message| matches!(message, FromAgent::Answer { id: other, .. } if *other == id));
        let FromAgent::Answer { outcome, .. } = message else {
            unreachable!("filtered above")
        };
        outcome
    }

    /// Sends a request and waits for the answer.
    pub(crate) fn call(&mut self, call: Call) -> Result<Reply, Failure> {
        let id = self.send(call);
        self.answer(id)
    }

    /// Waits for the end of a process.
    pub(crate) fn exited(&mut self, container: &str, exec: Option<&str>) -> ExitStatus {
        let target = Target {
            container: container.to_owned(),
            exec: exec.map(str::to_owned),
        };
        let message = self.wait_for(
            |message| matches!(message, FromAgent::Exited { target: other, .. } if *other == target),
        );
        let FromAgent::Exited { status, .. } = message else {
            unreachable!("filtered above")
        };
        status
    }

    /// The messages that have come and that nobody has waited for.
    pub(crate) fn unclaimed(&self) -> &[FromAgent] {
        &self.early
    }

    fn wait_for(&mut self, wanted: impl Fn(&FromAgent) -> bool) -> FromAgent {
        if let Some(index) = self.early.iter().position(&wanted) {
            return self.early.remove(index);
        }
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            let (message, _) = self
                .messages
                .recv::<FromAgent>()
                .expect("the agent says something in time");
            if wanted(&message) {
                return message;
            }
            self.early.push(message);
        }
        panic!(
            "the agent did not say what was waited for; it said {:?}",
            self.early
        );
    }

    /// A port, and where the agent's connection to it arrives.
    pub(crate) fn port(&mut self) -> (u32, UnixListener) {
        self.next_port += 1;
        let path = self.dir.path().join("streams").join(self.next_port.to_string());
        (self.next_port, UnixListener::bind(path).unwrap())
    }

    /// Creates a container with all three streams.
    pub(crate) fn create(&mut self, id: &str, spec: Spec) -> Result<Streams, Failure> {
        self.create_joined(id, spec, &[])
    }

    /// Creates a container that joins namespaces of others, given as pairs of kind and container.
    pub(crate) fn create_joined(
        &mut self,
        id: &str,
        spec: Spec,
        join: &[(&str, &str)],
    ) -> Result<Streams, Failure> {
        let (stdio, ports) = self.stdio();
        self.call(Call::Create(Box::new(Create {
            container: id.to_owned(),
            root: Root::Share {
                path: "root".to_owned(),
            },
            spec,
            stdio,
            join: join
                .iter()
                .map(|(kind, id)| ((*kind).to_owned(), (*id).to_owned()))
                .collect(),
        })))?;
        Ok(ports.accept())
    }

    /// Creates a container with a terminal.
    pub(crate) fn create_with_terminal(
        &mut self,
        id: &str,
        spec: Spec,
        size: WindowSize,
    ) -> Result<UnixStream, Failure> {
        let (port, listener) = self.port();
        self.call(Call::Create(Box::new(Create {
            container: id.to_owned(),
            root: Root::Share {
                path: "root".to_owned(),
            },
            spec,
            stdio: Stdio {
                terminal: Some(Terminal { port, size }),
                ..Stdio::default()
            },
            join: Default::default(),
        })))?;
        Ok(accept(&listener))
    }

    pub(crate) fn start(&mut self, id: &str) -> Result<Reply, Failure> {
        self.call(Call::Start {
            container: id.to_owned(),
        })
    }

    pub(crate) fn exec(&mut self, id: &str, exec: &str, process: Process) -> Result<Streams, Failure> {
        let (stdio, ports) = self.stdio();
        self.call(Call::Exec(Box::new(Exec {
            container: id.to_owned(),
            exec: exec.to_owned(),
            process,
            stdio,
        })))?;
        Ok(ports.accept())
    }

    pub(crate) fn signal(
        &mut self,
        id: &str,
        exec: Option<&str>,
        signal: i32,
        all: bool,
    ) -> Result<Reply, Failure> {
        self.call(Call::Signal {
            target: Target {
                container: id.to_owned(),
                exec: exec.map(str::to_owned),
            },
            signal,
            all,
        })
    }

    pub(crate) fn delete(&mut self, id: &str) -> Result<Reply, Failure> {
        self.call(Call::Delete {
            container: id.to_owned(),
        })
    }

    /// Runs a container to its end: its output, its error output, how it ended.
    pub(crate) fn run(&mut self, id: &str, spec: Spec) -> (String, String, ExitStatus) {
        let streams = self.create(id, spec).unwrap();
        self.start(id).unwrap();
        let (out, err) = streams.finish();
        (out, err, self.exited(id, None))
    }

    /// The cgroups that containers have now.
    pub(crate) fn cgroups(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.cgroup).unwrap().flatten();
        entries
            .map(|entry| entry.path())
            .filter(|path| path.is_dir())
            .collect()
    }

    fn stdio(&mut self) -> (Stdio, Ports) {
        let [stdin, stdout, stderr] = [self.port(), self.port(), self.port()];
        let stdio = Stdio {
            stdin: Some(stdin.0),
            stdout: Some(stdout.0),
            stderr: Some(stderr.0),
            terminal: None,
        };
        (stdio, Ports([stdin.1, stdout.1, stderr.1]))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        drop(fs::write(self.cgroup.join("cgroup.kill"), "1"));
        // `--kill-child` takes PID 1 along, and PID 1 everything else.
        drop(self.process.kill());
        drop(self.process.wait());
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            for child in self.cgroups() {
                drop(fs::remove_dir(child));
            }
            if fs::remove_dir(&self.cgroup).is_ok() {
                return;
            }
            std::thread::yield_now();
        }
    }
}

struct Ports([UnixListener; 3]);

impl Ports {
    fn accept(self) -> Streams {
        let [stdin, stdout, stderr] = self.0.map(|listener| accept(&listener));
        Streams {
            stdin,
            stdout,
            stderr,
        }
    }
}

fn accept(listener: &UnixListener) -> UnixStream {
    listener.set_nonblocking(true).unwrap(); // the agent has connected before it answered
    let (stream, _) = listener.accept().expect("the agent has connected");
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

/// The host's ends of a process's streams.
pub(crate) struct Streams {
    pub(crate) stdin: UnixStream,
    pub(crate) stdout: UnixStream,
    pub(crate) stderr: UnixStream,
}

impl Streams {
    /// Ends the input and reads both outputs to their end.
    pub(crate) fn finish(self) -> (String, String) {
        drop(self.stdin);
        (text(self.stdout), text(self.stderr))
    }
}

/// What is read until the other side ends.
pub(crate) fn text(mut stream: UnixStream) -> String {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("the stream ends in time");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A configuration that runs `script` in a shell.
pub(crate) fn shell(script: &str) -> Value {
    json!({
        "ociVersion": "1.3.0",
        "root": {"path": "root"},
        "process": process(script),
        "hostname": "inside",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=64k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"},
                           {"type": "mount"}, {"type": "cgroup"}],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware", "/proc/no-such"],
            "readonlyPaths": ["/proc/sys", "/proc/irq"],
        },
    })
}

/// A process that runs `script` in a shell as root, with an engine's usual capabilities.
pub(crate) fn process(script: &str) -> Value {
    let usual = json!([
        "CAP_CHOWN",
        "CAP_KILL",
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_MKNOD",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_NET_BIND_SERVICE"
    ]);
    json!({
        "user": {"uid": 0, "gid": 0},
        "args": ["sh", "-c", script],
        "env": ["PATH=/bin"],
        "cwd": "/",
        "capabilities": {"bounding": usual, "effective": usual, "permitted": usual},
    })
}

/// A configuration from its JSON.
pub(crate) fn spec(json: Value) -> Spec {
    serde_json::from_value(json).unwrap()
}

fn make_root(root: &Path) {
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
    )
    .unwrap();
    let busybox = busybox().unwrap();
    fs::copy(&busybox, root.join("bin/busybox")).unwrap();
    let listed = Command::new(busybox).arg("--list").output().unwrap();
    for applet in String::from_utf8(listed.stdout).unwrap().lines() {
        if applet != "busybox" {
            drop(symlink("busybox", root.join("bin").join(applet)));
        }
    }
}

fn busybox() -> Result<PathBuf, String> {
    let found = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .map(PathBuf::from)
        .find(|path| path.exists());
    found.ok_or_else(|| "a static busybox is needed (Debian: busybox-static)".to_owned())
}

/// Where the unified hierarchy is mounted.
fn cgroup_root() -> Result<PathBuf, String> {
    fs::read_to_string("/proc/self/mounts")
        .unwrap_or_default()
        .lines()
        .find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (target, kind) = (fields.next()?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(target))
        })
        .ok_or_else(|| "a cgroup v2 hierarchy is needed".to_owned())
}
