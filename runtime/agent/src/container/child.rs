//! The process that becomes a container's program.
//!
//! The agent starts its own executable again with the word [`WORD`]. That process has a single thread, so it
//! may fork and change its credentials, which the agent with its threads may not. It enters and makes the
//! namespaces, forks once so that the child is in the PID namespace, and leaves; the child, adopted by the
//! agent, sets everything up step by step, says [`Report::Ready`], waits for [`Order::Go`] and becomes the
//! program. Whatever fails is reported with its stage over the socket, which closes itself on `execve`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;

use caisson_wire::agent::{Failure, Stage};
use caisson_wire::{Receiver, RecvError, Sender, channel};
use oci_spec::runtime::LinuxIdMapping;
use rustix::fs::{FileType, Gid, Mode, OFlags, Uid, makedev};
use rustix::mount::MountAttrFlags;
use rustix::process::PidfdFlags;
use rustix::thread::CapabilitySet;

use super::credentials::{self, Capabilities};
use super::devices;
use super::hooks::{self, State, Status};
use super::limits;
use super::message::{Job, Make, Order, Report, RootSource};
use super::mounts;
use super::namespaces::{self, Kind};
use super::program::{self, Program};
use super::root_dir::{RootDir, open_beneath};
use super::seccomp::Filter;
use super::sysctl;
use super::terminal::Terminal;
use crate::failure::{At, failure};
use crate::sys::{self, Forked, Reach, SingleThread};

/// First argument of the agent's executable that makes it run [`main`].
pub const WORD: &str = "container-init";
/// Largest message on the socket: a request from the control plane and what surrounds it.
pub(crate) const LIMIT: usize = caisson_wire::agent::TO_GUEST_LIMIT * 2;
/// Where a root file system is while it is put together.
pub(crate) const STAGING_DIR: &str = "/run/caisson/root";
/// Where the layers of one are.
pub(crate) const LAYERS_DIR: &str = "/run/caisson/layers";

/// Does the work of a process started with [`WORD`]; its standard input is the socket to the agent.
pub fn main() -> ExitCode {
    sys::reset_signals();
    // Before any namespace is entered: later, /proc may be a container's.
    let Ok(single) = SingleThread::check() else {
        return ExitCode::FAILURE;
    };
    let Ok(socket) = sys::stdio(0).and_then(sys::above_stdio) else {
        return ExitCode::FAILURE;
    };
    let Ok((agent, mut orders)) = channel(socket, LIMIT) else {
        return ExitCode::FAILURE;
    };
    match set_up(&single, &agent, &mut orders) {
        Ok(Done::Forked) => ExitCode::SUCCESS,
        Ok(Done::AgentGone) => ExitCode::FAILURE,
        Err(failed) => {
            // If the agent has gone there is nobody left to tell.
            drop(agent.send(&Report::Failed(failed)));
            ExitCode::from(127)
        }
    }
}

/// Why the process leaves without having failed.
enum Done {
    /// The child goes on.
    Forked,
    /// Nobody waits for the program any more.
    AgentGone,
}

fn set_up(single: &SingleThread, agent: &Sender, orders: &mut Receiver) -> Result<Done, Failure> {
    let Some((Order::Job(job), descriptors)) = next(orders)? else {
        return Ok(Done::AgentGone);
    };
    let mut descriptors = descriptors.into_iter();
    let pipes: Vec<OwnedFd> = if job.pipes {
        descriptors.by_ref().take(3).collect()
    } else {
        Vec::new()
    };
    own_streams(&job, &pipes)?;
    for (kind, namespace) in job.join.iter().zip(descriptors) {
        namespaces::enter(*kind, namespace.as_fd())?;
    }
    if let Done::AgentGone = make_namespaces(&job, agent, orders)? {
        return Ok(Done::AgentGone);
    }
    match sys::fork(single).at(Stage::Namespaces, || "cannot fork")? {
        Forked::Parent(pid) => {
            // The pid cannot be anybody else's: nobody but this process could reap the child.
            let process = rustix::process::Pid::from_raw(pid)
                .ok_or(rustix::io::Errno::SRCH)
                .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()))
                .at(Stage::Namespaces, || "cannot open the new process")?;
            agent
                .send_with(&Report::Forked { pid }, &[process.as_fd()])
                .map_err(|err| failure(Stage::Namespaces, err.to_string()))?;
            Ok(Done::Forked)
        }
        Forked::Child => become_program(*job, pipes, agent, orders),
    }
}

fn make_namespaces(job: &Job, agent: &Sender, orders: &mut Receiver) -> Result<Done, Failure> {
    let (user, others): (Vec<Kind>, Vec<Kind>) = job.unshare.iter().partition(|kind| **kind == Kind::User);
    if !user.is_empty() {
        namespaces::unshare(&user)?;
        let gone = |err: caisson_wire::SendError| failure(Stage::Namespaces, err.to_string());
        agent.send(&Report::MapIds).map_err(gone)?;
        let Some((Order::Mapped, _)) = next(orders)? else {
            return Ok(Done::AgentGone);
        };
    }
    if job.unshare.contains(&Kind::User) || job.join.contains(&Kind::User) {
        let cannot = || "cannot become root of the user namespace";
        rustix::thread::set_thread_groups(&[]).at(Stage::Namespaces, cannot)?;
        rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).at(Stage::Namespaces, cannot)?;
        rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).at(Stage::Namespaces, cannot)?;
    }
    namespaces::unshare(&others)?;
    Ok(Done::Forked)
}

fn become_program(
    job: Job,
    pipes: Vec<OwnedFd>,
    agent: &Sender,
    orders: &mut Receiver,
) -> Result<Done, Failure> {
    rustix::process::setsid().at(Stage::Stdio, || "cannot start a session")?;
    let mut kinds: Vec<Kind> = job.join.iter().chain(&job.unshare).copied().collect();
    kinds.sort();
    let (namespaces, terminal) = match &job.make {
        Some(make) => {
            // Opened before the root changes: what is at /proc later is the container's.
            let namespaces = namespaces::own(&kinds)?;
            (namespaces, make_container(&job, make)?)
        }
        None => {
            let root = current_root()?;
            kinds.clear();
            let terminal = (!job.pipes)
                .then(|| Terminal::make(&root, job.size))
                .transpose()?;
            (Vec::new(), terminal)
        }
    };
    if let Some(personality) = &job.personality {
        limits::set_personality(personality)?;
    }
    connect_streams(&pipes, terminal.as_ref())?;
    drop(pipes);
    program::enter_directory(job.process.cwd())?;

    // With `no_new_privs` the filter is the last thing before the program. Without, loading it takes
    // CAP_SYS_ADMIN, so that one capability is kept until then.
    let filter = job
        .seccomp
        .as_ref()
        .map(Filter::compile)
        .transpose()
        .map_err(|err| failure(Stage::Seccomp, err.to_string()))?;
    let no_new_privileges = job.process.no_new_privileges().unwrap_or(false);
    let capabilities = Capabilities::of(job.process.capabilities().as_ref());
    let kept = if filter.is_some() && !no_new_privileges {
        CapabilitySet::SYS_ADMIN
    } else {
        CapabilitySet::empty()
    };
    let gone = |err: caisson_wire::SendError| failure(Stage::Control, err.to_string());
    agent.send(&Report::LimitMe).map_err(gone)?;
    let Some((Order::Limited, _)) = next(orders)? else {
        return Ok(Done::AgentGone);
    };
    credentials::become_user(job.process.user(), capabilities, kept)?;
    let program = Program::find(&job.process)?;

    let borrowed: Vec<BorrowedFd<'_>> = namespaces
        .iter()
        .chain(terminal.as_ref().map(|terminal| &terminal.controlling))
        .map(AsFd::as_fd)
        .collect();
    agent
        .send_with(&Report::Ready { kinds }, &borrowed)
        .map_err(|err| failure(Stage::Control, err.to_string()))?;
    drop(borrowed);
    drop((namespaces, terminal));
    let Some((Order::Go, _)) = next(orders)? else {
        return Ok(Done::AgentGone);
    };

    if let Some(make) = &job.make
        && let Some(hooks) = make.spec.hooks()
    {
        let state = State::new(&make.spec, &job.container, Status::Created);
        hooks::run(
            "startContainer",
            hooks.start_container().as_deref().unwrap_or_default(),
            &state,
        )?;
    }
    if no_new_privileges {
        rustix::thread::set_no_new_privs(true).at(Stage::Credentials, || "cannot set no_new_privs")?;
        capabilities.settle()?;
    }
    if let Some(filter) = filter {
        filter
            .load()
            .at(Stage::Seccomp, || "cannot load the system-call filter")?;
    }
    if !no_new_privileges {
        capabilities.settle()?;
    }
    Err(program.execute())
}

/// Builds the container around this process, up to and including its root.
fn make_container(job: &Job, make: &Make) -> Result<Option<Terminal>, Failure> {
    let spec = &make.spec;
    let linux = spec.linux().as_ref();
    if job.unshare.contains(&Kind::Uts) {
        if let Some(name) = spec.hostname() {
            rustix::system::sethostname(name.as_bytes())
                .at(Stage::Namespaces, || format!("cannot set the host name {name:?}"))?;
        }
        if let Some(name) = spec.domainname() {
            rustix::system::setdomainname(name.as_bytes()).at(Stage::Namespaces, || {
                format!("cannot set the domain name {name:?}")
            })?;
        }
    }
    mounts::isolate()?;
    let root = stage_root(&make.root)?;
    let spec_mounts = spec.mounts().as_deref().unwrap_or_default();
    for mount in spec_mounts {
        mounts::mount(&root, mount)?;
    }
    if !mounts::binds_dev(spec_mounts) {
        devices::populate(
            &root,
            linux
                .and_then(|linux| linux.devices().as_deref())
                .unwrap_or_default(),
        )?;
    }
    let terminal = (!job.pipes)
        .then(|| Terminal::make(&root, job.size))
        .transpose()?;
    if let Some(terminal) = &terminal {
        terminal.bind_console(&root)?;
    }
    if let Some(hooks) = spec.hooks() {
        let state = State::new(spec, &job.container, Status::Creating);
        hooks::run(
            "createContainer",
            hooks.create_container().as_deref().unwrap_or_default(),
            &state,
        )?;
    }
    for (key, value) in linux
        .and_then(|linux| linux.sysctl().as_ref())
        .into_iter()
        .flatten()
    {
        sysctl::set(key, value)?;
    }
    if let Some(linux) = linux {
        for path in linux.readonly_paths().iter().flatten() {
            mounts::make_read_only(&root, Path::new(path))?;
        }
        for path in linux.masked_paths().iter().flatten() {
            mounts::mask(&root, Path::new(path))?;
        }
    }
    if spec
        .root()
        .as_ref()
        .and_then(|root| root.readonly())
        .unwrap_or(false)
    {
        mounts::make_root_read_only(&root)?;
    }
    mounts::pivot(&root)?;
    if let Some(name) = linux
        .and_then(|linux| linux.rootfs_propagation().as_deref())
        .filter(|name| !name.is_empty())
    {
        mounts::propagate_root(name)?;
    }
    Ok(terminal)
}

/// Puts the root file system together and attaches it to [`STAGING_DIR`].
fn stage_root(source: &RootSource) -> Result<RootDir, Failure> {
    let tree = match source {
        RootSource::Directory { base, path } => {
            let cannot = || format!("cannot open the root file system {path:?}");
            let found = open_beneath(Path::new(base), Path::new(path)).at(Stage::Root, cannot)?;
            mounts::clone_tree_of(found.as_fd(), Reach::Tree).at(Stage::Root, cannot)?
        }
        RootSource::Layers(disks) => stack_layers(disks)?,
    };
    let cannot = || format!("cannot attach the root file system to {STAGING_DIR}");
    let staging = rustix::fs::open(
        STAGING_DIR,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .at(Stage::Root, cannot)?;
    mounts::attach(tree.as_fd(), staging.as_fd()).at(Stage::Root, cannot)?;
    Ok(RootDir::new(tree))
}

/// An overlay of read-only disks, lowest first, under a writable layer in memory.
fn stack_layers(disks: &[(String, String)]) -> Result<OwnedFd, Failure> {
    let root = |failed: Failure| Failure {
        stage: Stage::Root,
        ..failed
    };
    let memory =
        mounts::create("tmpfs", Some(Path::new("tmpfs")), MountAttrFlags::empty(), &[]).map_err(root)?;
    let cannot = || format!("cannot attach the layers to {LAYERS_DIR}");
    let base = rustix::fs::open(
        LAYERS_DIR,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .at(Stage::Root, cannot)?;
    mounts::attach(memory.as_fd(), base.as_fd()).at(Stage::Root, cannot)?;
    let base = RootDir::new(memory);
    let directory = |name: &str| {
        base.directory(Path::new(name), super::root_dir::Links::Refuse)
            .at(Stage::Root, || format!("cannot create {LAYERS_DIR}/{name}"))
    };
    let mut lower = Vec::new();
    for (index, (device, kind)) in disks.iter().enumerate() {
        let name = index.to_string();
        let target = directory(&name)?;
        let read_only = [("ro".to_owned(), None)];
        let attr = MountAttrFlags::MOUNT_ATTR_RDONLY;
        let tree =
            mounts::create(kind, Some(Path::new(device)), attr, &read_only).map_err(|failed| Failure {
                message: format!("cannot mount layer {index} ({kind}): {}", failed.message),
                ..root(failed)
            })?;
        mounts::attach(tree.as_fd(), target.as_fd()).at(Stage::Root, cannot)?;
        lower.push(format!("{LAYERS_DIR}/{name}"));
    }
    directory("upper")?;
    directory("work")?;
    lower.reverse(); // overlayfs wants the topmost first
    let data = [
        ("lowerdir", lower.join(":")),
        ("upperdir", format!("{LAYERS_DIR}/upper")),
        ("workdir", format!("{LAYERS_DIR}/work")),
    ]
    .map(|(key, value)| (key.to_owned(), Some(value)));
    mounts::create(
        "overlay",
        Some(Path::new("overlay")),
        MountAttrFlags::empty(),
        &data,
    )
    .map_err(|failed| Failure {
        message: format!("cannot stack the layers: {}", failed.message),
        ..root(failed)
    })
}

/// Gives the process its standard streams.
fn connect_streams(pipes: &[OwnedFd], terminal: Option<&Terminal>) -> Result<(), Failure> {
    if let Some(terminal) = terminal {
        return terminal.take();
    }
    for (number, stream) in (0..).zip(pipes) {
        let cannot = || format!("cannot connect the standard stream {number}");
        // Not the guest's null device but the container's own, if that is one.
        let null = (!is_pipe(stream).at(Stage::Stdio, cannot)?)
            .then(|| rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).ok())
            .flatten()
            .filter(|null| rustix::fs::fstat(null).is_ok_and(|stat| stat.st_rdev == makedev(1, 3)));
        let stream = null.as_ref().unwrap_or(stream);
        sys::make_stdio(stream.as_fd(), number).at(Stage::Stdio, cannot)?;
    }
    Ok(())
}

/// Gives the pipes to the user that the process will be, so that another one than root can open
/// `/dev/stdout`, which is this very pipe. Comes before the user namespace, which pipes are not in.
fn own_streams(job: &Job, pipes: &[OwnedFd]) -> Result<(), Failure> {
    let user = job.process.user();
    let uid = outer_id(&job.uids, user.uid()).map(Uid::from_raw);
    let gid = outer_id(&job.gids, user.gid()).map(Gid::from_raw);
    for stream in pipes {
        let cannot = || "cannot give the standard streams to the user";
        if is_pipe(stream).at(Stage::Stdio, cannot)? {
            rustix::fs::fchown(stream, uid, gid).at(Stage::Stdio, cannot)?;
        }
    }
    Ok(())
}

fn is_pipe(stream: &OwnedFd) -> rustix::io::Result<bool> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(stream)?.st_mode) == FileType::Fifo)
}

/// An id of a user namespace with these mappings, as the guest sees it; without mappings it is the same.
fn outer_id(mappings: &[LinuxIdMapping], id: u32) -> Option<u32> {
    if mappings.is_empty() {
        return Some(id);
    }
    mappings.iter().find_map(|map| {
        let offset = id.checked_sub(map.container_id())?;
        (offset < map.size()).then(|| map.host_id().checked_add(offset))?
    })
}

fn current_root() -> Result<RootDir, Failure> {
    rustix::fs::open(
        "/",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map(RootDir::new)
    .at(Stage::Root, || "cannot open /")
}

/// The next order, or nothing once the agent has gone.
fn next(orders: &mut Receiver) -> Result<Option<(Order, Vec<OwnedFd>)>, Failure> {
    match orders.recv() {
        Ok(order) => Ok(Some(order)),
        Err(RecvError::Closed) => Ok(None),
        Err(err) => Err(failure(Stage::Control, err.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_mapped_out_of_a_user_namespace() {
        let mappings: Vec<LinuxIdMapping> = serde_json::from_str(
            r#"[{"containerID": 0, "hostID": 1000, "size": 1}, {"containerID": 1, "hostID": 100000, "size": 10}]"#,
        )
        .unwrap();
        for (id, want) in [
            (0, Some(1000)),
            (1, Some(100_000)),
            (10, Some(100_009)),
            (11, None),
        ] {
            assert_eq!(outer_id(&mappings, id), want, "{id}");
        }
        assert_eq!(outer_id(&[], 7), Some(7));
    }
}
