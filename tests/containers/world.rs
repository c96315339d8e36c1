//! What the cases stand on: bundles, the `caisson` binary, deadlines, and the check that nothing is left.
//!
//! Three variables say what is tested: `CAISSON_BIN` is the binary, `CAISSON_KERNEL` and `CAISSON_INITRAMFS` are the
//! guest. `cargo xtask test containers` and `cargo xtask emulate` set them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Longest time one command may take; a boot under emulation inside emulation takes some 20 s.
pub(crate) const LIMIT: Duration = Duration::from_secs(150);
/// What the runtime promises for `delete`, and as much again for a machine that emulates a machine.
pub(crate) const PROMISED: Duration = Duration::from_secs(4);

/// A root directory of one case, with everything in it.
pub(crate) struct World {
    pub(crate) directory: tempfile::TempDir,
}

/// How a command ended, and what it wrote.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl World {
    pub(crate) fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("caisson-e2e").tempdir().unwrap();
        // Four guests at once, each emulated by an emulated processor, take their time.
        let patient = "boot_timeout_s = 120\ncall_timeout_s = 60\n";
        std::fs::write(directory.path().join("patient.toml"), patient).unwrap();
        Self { directory }
    }

    /// `caisson` with this world's root directory.
    pub(crate) fn caisson(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(needed("CAISSON_BIN"));
        command.arg("--root").arg(self.root()).args(arguments);
        command.env("CAISSON_CONFIG", self.directory.path().join("patient.toml"));
        command.stdin(Stdio::null());
        command
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    /// Runs `caisson` to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Outcome {
        finish(&mut self.caisson(arguments))
    }

    /// Runs `caisson`, which must succeed; gives its standard output.
    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let outcome = self.run(arguments);
        assert!(outcome.status.success(), "caisson {arguments:?}: {outcome:?}");
        outcome.stdout
    }

    /// A bundle that runs `script` in a shell, changed by `change`.
    pub(crate) fn bundle(&self, name: &str, script: &str, change: impl FnOnce(&mut Value)) -> String {
        self.bundle_of(name, &["sh", "-c", script], change)
    }

    pub(crate) fn bundle_of(&self, name: &str, args: &[&str], change: impl FnOnce(&mut Value)) -> String {
        let bundle = self.directory.path().join(name);
        make_rootfs(&bundle.join("rootfs"));
        let mut config = config(args);
        change(&mut config);
        std::fs::write(bundle.join("config.json"), config.to_string()).unwrap();
        bundle.to_str().unwrap().to_owned()
    }

    /// Runs `script` in a container of its own, to its end.
    pub(crate) fn run_script(&self, script: &str, change: impl FnOnce(&mut Value)) -> Outcome {
        let bundle = self.bundle("bundle", script, change);
        self.run(&["run", "--bundle", &bundle, "c"])
    }

    /// Creates and starts a container that lives until it is killed; its output goes nowhere.
    pub(crate) fn start_sleeper(&self, id: &str, change: impl FnOnce(&mut Value)) {
        let bundle = self.bundle(
            id,
            "trap 'exit 7' TERM; while :; do sleep 1 & wait $!; done",
            change,
        );
        let outcome = finish(
            self.caisson(&["run", "--detach", "--bundle", &bundle, id])
                .stdout(Stdio::null())
                .stderr(Stdio::null()),
        );
        assert!(outcome.status.success(), "{outcome:?}\n{}", self.logs(id));
    }

    /// The runtime's own log of a container, for messages of failing tests.
    pub(crate) fn logs(&self, id: &str) -> String {
        std::fs::read_dir(self.root().join(id))
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().contains("log"))
            .filter_map(|entry| std::fs::read_to_string(entry.path()).ok())
            .collect()
    }

    pub(crate) fn state(&self, id: &str) -> Value {
        serde_json::from_str(&self.ok(&["state", id])).unwrap()
    }

    /// Waits until `id` has `status`.
    pub(crate) fn await_status(&self, id: &str, status: &str) {
        eventually(&format!("{id} is {status}"), || {
            self.state(id)["status"] == status
        });
    }

    /// No process, mount or file of this world is left.
    pub(crate) fn assert_nothing_left(&self) {
        let path = self.root().to_str().unwrap().to_owned();
        eventually("no process is left", || processes_naming(&path).is_empty());
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&path), "a mount is left:\n{mounts}");
        let left: Vec<_> = std::fs::read_dir(self.root())
            .into_iter()
            .flatten()
            .flatten()
            .collect();
        assert!(left.is_empty(), "files are left: {left:?}");
    }
}

impl Drop for World {
    /// A case that failed leaves its containers behind; they are not to slow the others down.
    fn drop(&mut self) {
        let ids = std::fs::read_dir(self.root()).into_iter().flatten().flatten();
        for id in ids.filter_map(|entry| entry.file_name().into_string().ok()) {
            // The case has failed already, or has deleted it meanwhile.
            let _ = self
                .caisson(&["delete", "--force", &id])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
        }
    }
}

/// The value of a variable without which nothing can be tested.
pub(crate) fn needed(name: &str) -> String {
    std::env::var(name)
        .unwrap_or_else(|_| panic!("{name} is not set; run these tests with \"cargo xtask test containers\""))
}

/// Runs a command to its end; on the deadline it is killed and the test fails.
pub(crate) fn finish(command: &mut Command) -> Outcome {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let status = wait(child, LIMIT);
    Outcome {
        status: status.unwrap_or_else(|| {
            panic!(
                "{command:?} did not end within {LIMIT:?}; it wrote: {} {}",
                stdout.try_recv().unwrap_or_default(),
                stderr.try_recv().unwrap_or_default()
            )
        }),
        stdout: text(&stdout),
        stderr: text(&stderr),
    }
}

/// Waits for a child; `None` if it had to be killed.
pub(crate) fn wait(mut child: Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            return None;
        }
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

fn collect(stream: Option<impl std::io::Read + Send + 'static>) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    if let Some(mut stream) = stream {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            // What came before an error is worth seeing.
            let _ = stream.read_to_end(&mut bytes);
            // The test may have given up.
            let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
        });
    }
    receiver
}

fn text(from: &mpsc::Receiver<String>) -> String {
    from.recv_timeout(Duration::from_secs(10))
        .unwrap_or_else(|_| "<a process that was left behind still holds the stream>".to_owned())
}

/// Waits until `condition` holds.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "it never came to be that {what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// Pids of the processes with `text` on their command lines.
pub(crate) fn processes_naming(text: &str) -> Vec<i32> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            *pid != i32::try_from(std::process::id()).unwrap()
                && std::fs::read(format!("/proc/{pid}/cmdline"))
                    .is_ok_and(|line| String::from_utf8_lossy(&line).contains(text))
        })
        .collect()
}

/// The process below `parent` whose command line has `word` as its second word.
pub(crate) fn child_with_word(parent: i32, word: &str) -> Option<i32> {
    let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
    children.split_whitespace().find_map(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        (line.split(|byte| *byte == 0).nth(1)? == word.as_bytes()).then(|| pid.parse().ok())?
    })
}

pub(crate) fn kill(pid: i32, signal: rustix::process::Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal).unwrap();
}

/// A root file system with a static busybox and what a login needs.
fn make_rootfs(root: &Path) {
    for directory in ["bin", "dev", "etc", "proc", "sys", "tmp", "root", "home", "mnt"] {
        std::fs::create_dir_all(root.join(directory)).unwrap();
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .expect("busybox-static is installed");
    let program = root.join("bin/busybox");
    if program.exists() {
        return;
    }
    std::fs::copy(busybox, &program).unwrap();
    let list = Command::new(busybox).arg("--list").output().unwrap();
    for applet in String::from_utf8(list.stdout).unwrap().lines() {
        if applet != "busybox" {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
    }
    std::fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home:/bin/sh\n",
    )
    .unwrap();
    std::fs::write(root.join("etc/group"), "root:x:0:\nuser:x:1000:\n").unwrap();
}

/// What an engine would write for a plain container.
fn config(args: &[&str]) -> Value {
    let capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": args,
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true
        },
        "root": { "path": "rootfs", "readonly": false },
        "hostname": "caisson",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
              "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs",
              "options": ["nosuid", "noexec", "nodev", "ro"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
              "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] }
        ],
        "linux": {
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "namespaces": [
                { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }
            ],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware"],
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}
