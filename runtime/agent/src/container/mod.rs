//! Containers, as the agent sees them.
//!
//! [`Container`] is the agent's side: the cgroup, the processes, the pinned namespaces. The other side is
//! [`child`], the process that builds the container around itself. They talk in [`message`]s.

mod cgroup;
mod child;
mod copy_up;
mod credentials;
mod device_filter;
mod devices;
mod hooks;
mod layers;
mod limits;
mod message;
mod mount_options;
mod mounts;
mod namespaces;
mod oom;
mod process;
mod processes;
mod program;
mod resources;
mod root_dir;
mod seccomp;
mod sysctl;
mod terminal;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use caisson_wire::agent::{
    Create, Exec, ExitStatus, Failure, FromAgent, ProcessInfo, SHARE_DIR, Stage, Stats, Target, WindowSize,
};
use oci_spec::runtime::{Hook, Linux, LinuxIdMapping, LinuxPersonality, LinuxResources, LinuxSeccomp, Spec};
use rustix::io::Errno;

use self::cgroup::Cgroup;
use self::message::{Job, Make};
pub(crate) use self::namespaces::Kind;
use self::namespaces::Namespaces;
use self::oom::OomWatch;
use self::process::{Launch, Process, Streams};
use crate::failure::{At, failure, failure_with};
use crate::reaper::Reaper;
use crate::streams::Dial;

pub(crate) use self::cgroup::delegate as delegate_cgroups;
pub use self::child::{WORD as CHILD_WORD, main as child_main};
pub(crate) use self::sysctl::set as set_sysctl;

/// What making containers needs from the agent.
#[derive(Debug)]
pub struct Context {
    /// Collects the processes.
    pub reaper: Reaper,
    /// Connects the streams.
    pub dial: Arc<dyn Dial>,
    /// The agent's executable, which is started again for every process.
    pub program: PathBuf,
    /// The cgroup below which containers get theirs.
    pub cgroup: PathBuf,
    /// Takes the events.
    pub events: Events,
    /// Numbers the cgroups.
    pub next: AtomicU64,
}

/// Where events go: the control connection, or a test.
#[derive(Clone)]
pub struct Events(Arc<dyn Fn(FromAgent) + Send + Sync>);

impl Events {
    /// Events are given to `take`, from any thread.
    pub fn new(take: impl Fn(FromAgent) + Send + Sync + 'static) -> Self {
        Self(Arc::new(take))
    }

    pub(crate) fn send(&self, event: FromAgent) {
        (self.0)(event);
    }
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

/// Makes the directories in which containers are put together.
///
/// # Errors
/// As mkdir(2).
pub fn prepare() -> Result<(), Failure> {
    for directory in [child::STAGING_DIR, child::LAYERS_DIR, SHARE_DIR] {
        std::fs::create_dir_all(directory).at(Stage::Setup, || format!("cannot create {directory}"))?;
    }
    Ok(())
}

/// The namespaces of every container that exists, for those that join them.
pub(crate) type Joined = HashMap<String, Arc<Namespaces>>;

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    id: String,
    /// Before the cgroup in this order: dropped, it lets go of what keeps the cgroup busy.
    init: Process,
    execs: HashMap<String, Process>,
    started: bool,
    namespaces: Arc<Namespaces>,
    seccomp: Option<LinuxSeccomp>,
    personality: Option<LinuxPersonality>,
    uids: Vec<LinuxIdMapping>,
    gids: Vec<LinuxIdMapping>,
    hooks_limit: Duration,
    oom: Option<(OomWatch, OwnedFd)>,
    cgroup: Arc<Cgroup>,
}

impl Container {
    /// Makes a container, up to and not including `execve` of its process. The end of that process is held
    /// back until [`Container::release`].
    ///
    /// # Errors
    /// Fails with the stage that was reached; nothing is left then.
    pub(crate) fn create(context: &Context, request: Create, joined: &Joined) -> Result<Self, Failure> {
        let Create {
            container: id,
            root,
            spec,
            stdio,
            join,
        } = request;
        let linux = spec.linux().as_ref();
        let process = spec
            .process()
            .clone()
            .ok_or_else(|| failure(Stage::Request, "the configuration has no process"))?;
        let choice = namespaces::choose(linux, &join)?;
        let (join, descriptors) = find_joined(&choice.join, joined)?;
        let root = layers::source(&root)?;
        let resources = linux.and_then(|linux| linux.resources().clone());
        let number = context.next.fetch_add(1, Ordering::Relaxed);
        let cgroup = Arc::new(Cgroup::create(&context.cgroup, &format!("container-{number}"))?);
        if let Some(resources) = &resources {
            cgroup.limit(resources)?;
        }
        let seccomp = linux.and_then(|linux| linux.seccomp().clone());
        let personality = linux.and_then(|linux| linux.personality().clone());
        let hooks_limit = hooks_limit(&spec, |hooks| hooks.create_container());
        let start_limit = hooks_limit_of_start(&spec);
        let streams = Streams::connect(&*context.dial, &stdio)?;
        let ids = |pick: fn(&Linux) -> &Option<Vec<LinuxIdMapping>>| {
            let maps = choice.unshare.contains(&Kind::User);
            let listed = linux.filter(|_| maps).and_then(|linux| pick(linux).clone());
            listed.unwrap_or_default()
        };
        let (uids, gids) = (ids(Linux::uid_mappings), ids(Linux::gid_mappings));
        let make = Make {
            root,
            spec: spec.clone(),
        };
        let oom = OomWatch::start(&cgroup, &id, &context.events);
        let job = Job {
            container: id.clone(),
            pipes: streams.are_pipes(),
            size: streams.size(),
            join,
            unshare: choice.unshare,
            seccomp: seccomp.clone(),
            personality: personality.clone(),
            process,
            uids: uids.clone(),
            gids: gids.clone(),
            make: Some(Box::new(make)),
        };
        let target = Target {
            container: id.clone(),
            exec: None,
        };
        let launch = Launch {
            context,
            cgroup: &cgroup,
            job,
            descriptors,
            streams,
            limit: SET_UP_LIMIT.saturating_add(hooks_limit),
            ended: exit_report(context, target, oom.as_ref()),
        };
        let (init, namespaces) = launch.run()?;
        // Now that the container's own disks are mounted. The process waits, so it has opened nothing since.
        if let Err(failed) = cgroup.filter_devices(resources.as_ref()) {
            context.reaper.forget(init.pid());
            return Err(failed); // the process goes with its cgroup
        }
        Ok(Self {
            id,
            init,
            execs: HashMap::new(),
            started: false,
            namespaces: Arc::new(namespaces),
            seccomp,
            personality,
            uids,
            gids,
            hooks_limit: start_limit,
            oom,
            cgroup,
        })
    }

    /// The namespaces, for other containers to join.
    pub(crate) fn namespaces(&self) -> Arc<Namespaces> {
        Arc::clone(&self.namespaces)
    }

    /// Pid of the container's process.
    pub(crate) fn pid(&self) -> i32 {
        self.init.pid()
    }

    /// Lets the process become its program. Its end is held back until [`Container::release`].
    ///
    /// # Errors
    /// Fails if it has been started or has ended, if a hook fails, or if the program cannot be run.
    pub(crate) fn start(&mut self, context: &Context) -> Result<(), Failure> {
        if self.started {
            return Err(failure(Stage::Request, "the container has been started"));
        }
        context.reaper.hold(self.init.pid());
        self.started = true;
        self.init.go(SET_UP_LIMIT.saturating_add(self.hooks_limit))
    }

    /// Runs one more process. Its end is held back until [`Container::release`].
    ///
    /// # Errors
    /// Fails with the stage that was reached.
    pub(crate) fn exec(&mut self, context: &Context, request: Exec) -> Result<i32, Failure> {
        let Exec {
            container,
            exec,
            process,
            stdio,
        } = request;
        if !self.started || self.init.has_ended() {
            return Err(failure(Stage::Request, "the container is not running"));
        }
        self.execs.retain(|_, process| !process.has_ended());
        if self.execs.contains_key(&exec) {
            return Err(failure(
                Stage::Request,
                format!("there is a process {exec:?} already"),
            ));
        }
        if self.execs.len() >= MOST_EXECS {
            return Err(failure(
                Stage::Request,
                format!("there are {MOST_EXECS} processes already"),
            ));
        }
        let streams = Streams::connect(&*context.dial, &stdio)?;
        let (join, descriptors) = self
            .namespaces
            .iter()
            .map(|(kind, fd)| Ok((kind, fd.try_clone_to_owned()?)))
            .collect::<std::io::Result<(Vec<_>, Vec<_>)>>()
            .at(Stage::Namespaces, || "cannot pass the namespaces on")?;
        let target = Target {
            container,
            exec: Some(exec.clone()),
        };
        let launch = Launch {
            context,
            cgroup: &self.cgroup,
            job: Job {
                container: self.id.clone(),
                pipes: streams.are_pipes(),
                size: streams.size(),
                join,
                unshare: Vec::new(),
                seccomp: self.seccomp.clone(),
                personality: self.personality.clone(),
                process,
                uids: self.uids.clone(),
                gids: self.gids.clone(),
                make: None,
            },
            descriptors,
            streams,
            limit: SET_UP_LIMIT,
            ended: exit_report(context, target, self.oom.as_ref()),
        };
        let (mut process, _) = launch.run()?;
        if let Err(failed) = process.go(SET_UP_LIMIT) {
            context.reaper.forget(process.pid());
            return Err(failed);
        }
        let pid = process.pid();
        self.execs.insert(exec, process);
        Ok(pid)
    }

    /// Sends a signal to one process, or to all of the container.
    ///
    /// # Errors
    /// Fails if there is no such process any more (`ESRCH`) or no such signal.
    pub(crate) fn signal(&self, exec: Option<&str>, signal: i32, all: bool) -> Result<(), Failure> {
        let cannot = || format!("cannot send signal {signal}");
        if !all {
            return self.process(exec)?.signal(signal).at(Stage::Control, cannot);
        }
        if signal == libc::SIGKILL && self.cgroup.kill().is_ok() {
            return Ok(());
        }
        for pid in self.cgroup.processes() {
            match crate::sys::kill(pid, signal) {
                Err(err) if err.raw_os_error() == Some(libc::ESRCH) => {}
                other => other.at(Stage::Control, cannot)?,
            }
        }
        Ok(())
    }

    /// Changes the size of a process's terminal.
    ///
    /// # Errors
    /// Fails if it has none.
    pub(crate) fn resize(&self, exec: Option<&str>, size: WindowSize) -> Result<(), Failure> {
        self.process(exec)?.resize(size)
    }

    /// Freezes or thaws every process.
    ///
    /// # Errors
    /// Fails if that does not happen within a time limit.
    pub(crate) fn freeze(&self, frozen: bool) -> Result<(), Failure> {
        self.cgroup.freeze(frozen)
    }

    /// Changes the limits.
    ///
    /// # Errors
    /// Fails if the kernel refuses one; those before it are set.
    pub(crate) fn update(&self, resources: &LinuxResources) -> Result<(), Failure> {
        self.cgroup.limit(resources)?;
        if resources.devices().is_some() {
            self.cgroup.filter_devices(Some(resources))?;
        }
        Ok(())
    }

    /// The process table.
    pub(crate) fn processes(&self) -> Vec<ProcessInfo> {
        processes::list(&self.cgroup.processes())
    }

    /// What the container uses.
    pub(crate) fn stats(&self) -> Stats {
        resources::stats(&self.cgroup)
    }

    /// Ends whatever is left and removes the cgroup. The rest goes with the last descriptor.
    ///
    /// # Errors
    /// Fails if the container runs, or its processes cannot be killed; then it is still there.
    pub(crate) fn delete(&self) -> Result<(), Failure> {
        if self.started && !self.init.has_ended() {
            return Err(failure_with(
                Stage::Request,
                Errno::BUSY,
                "the container is running",
            ));
        }
        drop(self.init.signal(libc::SIGKILL));
        self.cgroup.remove()
    }

    /// Lets the ends of the container's processes be reported.
    pub(crate) fn release(context: &Context, pid: i32) {
        context.reaper.release(pid);
    }

    fn process(&self, exec: Option<&str>) -> Result<&Process, Failure> {
        match exec {
            None => Ok(&self.init),
            Some(exec) => self.execs.get(exec).ok_or_else(|| {
                failure_with(
                    Stage::Control,
                    Errno::SRCH,
                    format!("there is no process {exec:?}"),
                )
            }),
        }
    }
}

/// Reports the end of a process, and before it what killed it.
fn exit_report(
    context: &Context,
    target: Target,
    oom: Option<&(OomWatch, OwnedFd)>,
) -> Box<dyn FnOnce(ExitStatus) + Send> {
    let events = context.events.clone();
    let oom = oom.map(|(watch, _)| watch.clone());
    Box::new(move |status| {
        if let Some(oom) = oom {
            oom.look();
        }
        events.send(FromAgent::Exited { target, status });
    })
}

fn find_joined(join: &BTreeMap<Kind, String>, joined: &Joined) -> Result<(Vec<Kind>, Vec<OwnedFd>), Failure> {
    let mut kinds = Vec::new();
    let mut descriptors = Vec::new();
    for (kind, container) in join {
        let namespaces = joined.get(container).ok_or_else(|| {
            failure(
                Stage::Namespaces,
                format!("cannot join the container {container:?}: there is none"),
            )
        })?;
        // What the other one has not of its own is the guest's, and so is ours already.
        if let Some(namespace) = namespaces.get(*kind) {
            kinds.push(*kind);
            let copy = namespace
                .as_fd()
                .try_clone_to_owned()
                .at(Stage::Namespaces, || "cannot pass a namespace on")?;
            descriptors.push(copy);
        }
    }
    Ok((kinds, descriptors))
}

fn hooks_limit(spec: &Spec, pick: fn(&oci_spec::runtime::Hooks) -> &Option<Vec<Hook>>) -> Duration {
    let hooks = spec
        .hooks()
        .as_ref()
        .and_then(|hooks| pick(hooks).as_deref())
        .unwrap_or_default();
    hooks
        .iter()
        .map(hooks::time_limit)
        .fold(Duration::ZERO, Duration::saturating_add)
}

fn hooks_limit_of_start(spec: &Spec) -> Duration {
    hooks_limit(spec, |hooks| hooks.start_container())
}

/// Longest time to set a process up, hooks not counted: mounts wait for the host's file server.
const SET_UP_LIMIT: Duration = Duration::from_secs(30);
/// Most additional processes of one container at a time.
const MOST_EXECS: usize = 1024;
