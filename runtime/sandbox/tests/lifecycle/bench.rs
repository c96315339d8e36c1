//! What the cases stand on: a runner, plans, a client process, and the check that nothing is left.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use caisson_sandbox::client::{
    CreateOrder, ExecOrder, Executed, Force, GuestFailure, Place, Runtime, StdioChoice,
};
use caisson_sandbox::plan::{ContainerPlan, HostHooks, MachineChoice, NetworkNamespace, SandboxPlan};
use caisson_sandbox::{ContainerId, Status};
use caisson_wire::agent;
use oci_spec::runtime::{Process, ProcessBuilder, SpecBuilder};
use serde::{Deserialize, Serialize};

/// Longest time one case may take.
const CASE_LIMIT: Duration = Duration::from_secs(60);
/// Longest time anything in a case may take that is not about time.
pub(crate) const SOON: Duration = Duration::from_secs(10);
/// What the runtime promises after a process of it was killed.
pub(crate) const PROMISED: Duration = Duration::from_secs(2);

pub(crate) type Case = (&'static str, fn());

/// Runs the cases whose names contain `filter`.
pub(crate) fn run_all(filter: Option<&str>, cases: &[Case]) -> ExitCode {
    // What a client leaves to be inherited comes here, as it would to an engine's monitor.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
    let (mut passed, mut failed) = (0, Vec::new());
    let chosen = cases
        .iter()
        .filter(|(name, _)| filter.is_none_or(|filter| name.contains(filter)));
    for (name, case) in chosen {
        let began = Instant::now();
        let (done, outcome) = mpsc::channel();
        let case = *case;
        std::thread::spawn(move || done.send(std::panic::catch_unwind(case).is_ok()));
        let verdict = match outcome.recv_timeout(CASE_LIMIT) {
            Ok(true) => "ok",
            Ok(false) => "FAILED",
            Err(_) => "WENT SILENT",
        };
        println!("test {name} ... {verdict} ({} ms)", began.elapsed().as_millis());
        if verdict == "ok" {
            passed += 1;
        } else {
            failed.push(name);
        }
    }
    let word = if failed.is_empty() { "ok" } else { "FAILED" };
    println!("test result: {word}. {passed} passed; {} failed", failed.len());
    if failed.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("failed: {failed:?}");
    ExitCode::FAILURE
}

/// A root directory of one case, and ids that no other case has.
pub(crate) struct World {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) runtime: Runtime,
    tag: String,
}

/// A client process's order, as it gets it on its command line.
#[derive(Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) verb: Verb,
    pub(crate) root: PathBuf,
    pub(crate) id: ContainerId,
    pub(crate) sandbox: Option<Box<SandboxPlan>>,
    pub(crate) join: Option<ContainerId>,
    pub(crate) container: Option<ContainerPlan>,
    pub(crate) process: Option<Process>,
    pub(crate) console: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Verb {
    Create,
    Run,
    Exec,
    ExecDetached,
}

/// How a client process ended, and what was written.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::below(&std::env::temp_dir())
    }

    pub(crate) fn below(parent: &Path) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let directory = tempfile::Builder::new()
            .prefix("caisson-test")
            .tempdir_in(parent)
            .unwrap();
        Self {
            runtime: Runtime::new(directory.path().join("root")),
            directory,
            tag: format!(
                "t{}-{}",
                std::process::id(),
                COUNT.fetch_add(1, Ordering::Relaxed)
            ),
        }
    }

    pub(crate) fn id(&self, name: &str) -> ContainerId {
        format!("{}-{name}", self.tag).parse().unwrap()
    }

    /// A sandbox whose machine behaves as `mode` says.
    pub(crate) fn sandbox(&self, id: &ContainerId, mode: &str) -> SandboxPlan {
        let file = self.directory.path().join("kernel");
        std::fs::write(&file, "kernel").unwrap();
        SandboxPlan {
            id: id.to_string(),
            machine: MachineChoice::Native,
            vcpus: 1,
            memory: 64 << 20,
            kernel: file.clone(),
            initramfs: file,
            cmdline: mode.to_owned(),
            setup: agent::Setup::default(),
            netns: None,
            cgroup: None,
            confine: false,
            boot_deadline: Duration::from_secs(2),
            call_deadline: Duration::from_secs(1),
        }
    }

    pub(crate) fn container(&self, id: &ContainerId, arguments: &[&str]) -> ContainerPlan {
        let spec = SpecBuilder::default()
            .process(process(arguments))
            .build()
            .unwrap();
        ContainerPlan {
            id: id.to_string(),
            bundle: self.directory.path().to_owned(),
            oci_version: "1.2.0".to_owned(),
            annotations: BTreeMap::from([("purpose".to_owned(), "test".to_owned())]),
            create: agent::Create {
                container: id.to_string(),
                root: agent::Root::Share {
                    path: "rootfs".to_owned(),
                },
                spec,
                stdio: agent::Stdio::default(),
                join: BTreeMap::new(),
            },
            binds: Vec::new(),
            hooks: HostHooks::default(),
            terminal: false,
            netns: NetworkNamespace::Caller,
        }
    }

    pub(crate) fn order(&self, verb: Verb, name: &str, mode: &str, arguments: &[&str]) -> Order {
        let id = self.id(name);
        let exec = matches!(verb, Verb::Exec | Verb::ExecDetached);
        Order {
            verb,
            root: self.runtime.root().to_owned(),
            sandbox: (!exec).then(|| Box::new(self.sandbox(&id, mode))),
            join: None,
            container: (!exec).then(|| self.container(&id, arguments)),
            process: exec.then(|| process(arguments)),
            console: None,
            id,
        }
    }

    /// Creates a container that runs until it gets a signal; gives the stand-in's pid.
    pub(crate) fn created(&self, name: &str, mode: &str) -> i32 {
        let outcome = self.order(Verb::Create, name, mode, &["sleep"]).run();
        assert!(outcome.status.success(), "{outcome:?} {}", self.log(name));
        self.runtime.state(&self.id(name)).unwrap().pid
    }

    /// The same, started.
    pub(crate) fn started(&self, name: &str, mode: &str) -> i32 {
        let pid = self.created(name, mode);
        self.runtime.start(&self.id(name)).unwrap();
        pid
    }

    pub(crate) fn log(&self, name: &str) -> String {
        let path = self
            .runtime
            .root()
            .join(self.id(name).as_str())
            .join("supervisor.log");
        std::fs::read_to_string(path).unwrap_or_default()
    }

    pub(crate) fn status(&self, name: &str) -> Status {
        self.runtime.state(&self.id(name)).unwrap().status
    }

    /// A process of a sandbox, from its record: "supervisor", "vmm".
    pub(crate) fn pid_of(&self, name: &str, role: &str) -> i32 {
        self.try_pid_of(name, role).unwrap()
    }

    pub(crate) fn try_pid_of(&self, name: &str, role: &str) -> Option<i32> {
        let path = self
            .runtime
            .root()
            .join(self.id(name).as_str())
            .join("sandbox.json");
        let record: serde_json::Value = serde_json::from_slice(&std::fs::read(path).ok()?).unwrap();
        record[role]["pid"].as_i64()?.try_into().ok()
    }

    pub(crate) fn delete(&self, name: &str, force: Force) {
        self.runtime.delete(&self.id(name), force).unwrap();
    }

    /// Checks that no process and no file is left of this world; killed processes may take a moment.
    pub(crate) fn assert_nothing_left(&self) {
        eventually("every process has ended", || self.processes().is_empty());
        let left: Vec<_> = std::fs::read_dir(self.runtime.root())
            .map(|entries| entries.map(|entry| entry.unwrap().path()).collect())
            .unwrap_or_default();
        assert!(left.is_empty(), "files are left: {left:?}");
    }

    /// Processes of this world that run: their command lines name its ids.
    pub(crate) fn processes(&self) -> Vec<String> {
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        entries
            .filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok())
            .filter(|entry| entry.file_name().to_string_lossy() != std::process::id().to_string())
            .filter_map(|entry| std::fs::read_to_string(entry.path().join("cmdline")).ok())
            .filter(|line| line.contains(&format!("{}-", self.tag)))
            .collect()
    }
}

impl Order {
    pub(crate) fn spawn(&self, stdin: Stdio) -> Child {
        Command::new("/proc/self/exe")
            .args(["client", &serde_json::to_string(self).unwrap()])
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Runs the client and whatever shares its streams to the end.
    pub(crate) fn run(&self) -> Outcome {
        if matches!(self.verb, Verb::Create | Verb::ExecDetached) {
            // The stand-in keeps the streams, so only the client itself can be waited for.
            let status = Command::new("/proc/self/exe")
                .args(["client", &serde_json::to_string(self).unwrap()])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .unwrap();
            return Outcome {
                status,
                stdout: String::new(),
                stderr: String::new(),
            };
        }
        finish(self.spawn(Stdio::null()), b"")
    }
}

/// Gives a child its input, and waits for its end and that of its output.
pub(crate) fn finish(mut child: Child, input: &[u8]) -> Outcome {
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input).unwrap();
    }
    let (mut stdout, mut stderr) = (String::new(), String::new());
    child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    Outcome {
        status: child.wait().unwrap(),
        stdout,
        stderr,
    }
}

/// A client process: one call, its error as text, its status as the container's.
pub(crate) fn client(arguments: &[OsString]) -> ExitCode {
    let order: Order = serde_json::from_str(arguments[0].to_str().unwrap()).unwrap();
    match carry_out(order) {
        Ok(code) => ExitCode::from(code),
        Err((text, guest)) => {
            eprint!("{text}");
            match guest {
                Some(agent::Failure { errno: Some(2), .. }) => ExitCode::from(127),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

type Failed = (String, Option<agent::Failure>);

fn carry_out(order: Order) -> Result<u8, Failed> {
    let runtime = Runtime::new(&order.root);
    let stdio = match order.console {
        Some(path) => StdioChoice::ConsoleSocket(path),
        None => StdioChoice::Inherit,
    };
    if let Some(process) = order.process {
        let detach = order.verb == Verb::ExecDetached;
        let order_of = ExecOrder {
            exec: None,
            process,
            stdio,
            detach,
        };
        return match runtime.exec(&order.id, order_of).map_err(failed)? {
            Executed::Detached { .. } => Ok(0),
            Executed::Attached(process) => Ok(process
                .wait()
                .map_err(|err| (err.to_string(), None))?
                .shell_code()),
        };
    }
    let create = CreateOrder {
        place: match order.join {
            Some(id) => Place::Join(id),
            None => Place::New(order.sandbox.unwrap()),
        },
        container: order.container.unwrap(),
        stdio,
    };
    if order.verb == Verb::Create {
        runtime.create(create).map_err(failed)?;
        return Ok(0);
    }
    let process = runtime.run(create).map_err(failed)?;
    let status = process.wait().map_err(|err| (err.to_string(), None))?;
    runtime
        .delete(&order.id, Force::No)
        .map_err(|err| (chain(&err), None))?;
    Ok(status.shell_code())
}

fn failed<E: std::error::Error + GuestFailure>(err: E) -> Failed {
    (chain(&err), err.guest().cloned())
}

pub(crate) fn chain(err: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(err.source(), |err| err.source());
    causes.fold(err.to_string(), |text, cause| format!("{text}: {cause}"))
}

pub(crate) fn process(arguments: &[&str]) -> Process {
    ProcessBuilder::default()
        .args(
            arguments
                .iter()
                .map(|text| (*text).to_owned())
                .collect::<Vec<_>>(),
        )
        .cwd("/")
        .build()
        .unwrap()
}

/// Waits, with a limit, until `holds`.
pub(crate) fn eventually(what: &str, holds: impl Fn() -> bool) {
    within(SOON, what, holds);
}

pub(crate) fn within(limit: Duration, what: &str, holds: impl Fn() -> bool) {
    let until = Instant::now() + limit;
    while !holds() {
        assert!(Instant::now() < until, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Sends a signal; a process that has just ended by itself is as good.
pub(crate) fn kill(pid: i32, signal: i32) {
    let signal = rustix::process::Signal::from_named_raw(signal).unwrap();
    match rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(err) => panic!("cannot signal {pid}: {err}"),
    }
}

pub(crate) fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Waits for an inherited child, as an engine's monitor does; gives its wait status.
pub(crate) fn reap(pid: i32, limit: Duration) -> ExitStatus {
    use rustix::process::{Pid, WaitOptions, waitpid};
    let until = Instant::now() + limit;
    loop {
        if let Some((_, status)) = waitpid(Pid::from_raw(pid), WaitOptions::NOHANG).unwrap() {
            return ExitStatus::from_raw(status.as_raw());
        }
        assert!(
            Instant::now() < until,
            "process {pid} did not end within {limit:?}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}
