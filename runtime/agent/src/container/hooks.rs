//! OCI hooks that run in the guest: `createContainer` and `startContainer`.

use std::io::{Seek, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use caisson_wire::agent::{Failure, Stage};
use oci_spec::runtime::{Hook, Spec};
use serde::Serialize;

use crate::failure::{At, failure};

/// The state that a hook reads from its standard input (runtime-spec, runtime.md, "State").
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct State<'a> {
    oci_version: &'a str,
    id: &'a str,
    status: Status,
    pid: u32,
    bundle: String,
    annotations: std::collections::BTreeMap<&'a str, &'a str>,
}

/// How far a container is.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    /// Not everything is set up.
    Creating,
    /// Everything is, and the program does not run yet.
    Created,
}

impl<'a> State<'a> {
    /// The state of the container whose process this is.
    pub(crate) fn new(spec: &'a Spec, id: &'a str, status: Status) -> Self {
        Self {
            oci_version: spec.version(),
            id,
            status,
            pid: std::process::id(),
            bundle: spec
                .root()
                .as_ref()
                .and_then(|root| root.path().parent())
                .map(|path| path.display().to_string())
                .unwrap_or_default(),
            annotations: spec
                .annotations()
                .iter()
                .flatten()
                .map(|(key, value)| (key.as_str(), value.as_str()))
                .collect(),
        }
    }
}

/// Runs the hooks one after the other, in the namespaces of this process.
///
/// # Errors
/// Fails if one cannot be started, ends with another code than 0, or exceeds its time limit; the ones after
/// it do not run.
pub(crate) fn run(name: &str, hooks: &[Hook], state: &State<'_>) -> Result<(), Failure> {
    if hooks.is_empty() {
        return Ok(());
    }
    let input = serde_json::to_vec(state)
        .map_err(|err| failure(Stage::Hooks, format!("cannot encode the state for hooks: {err}")))?;
    hooks.iter().try_for_each(|hook| run_one(name, hook, &input))
}

fn run_one(name: &str, hook: &Hook, input: &[u8]) -> Result<(), Failure> {
    let path = hook.path().display();
    let limit = time_limit(hook);
    let mut command = Command::new(hook.path());
    if let Some((zeroth, rest)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(zeroth).args(rest);
    }
    command.env_clear();
    for entry in hook.env().iter().flatten() {
        if let Some((key, value)) = entry.split_once('=') {
            command.env(key, value);
        }
    }
    let cannot = || format!("cannot run the {name} hook {path}");
    // A file rather than a pipe: nobody has to stay and write for as long as the hook does not read.
    let state =
        rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC).at(Stage::Hooks, cannot)?;
    let mut state = std::fs::File::from(state);
    state
        .write_all(input)
        .and_then(|()| state.rewind())
        .at(Stage::Hooks, cannot)?;
    let mut child = command
        .stdin(state)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .at(Stage::Hooks, cannot)?;
    match wait(&mut child, limit).at(Stage::Hooks, || format!("cannot wait for the {name} hook {path}"))? {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(failure(
            Stage::Hooks,
            format!("the {name} hook {path} failed: {status}"),
        )),
        None => Err(failure(
            Stage::Hooks,
            format!("the {name} hook {path} took longer than {} s", limit.as_secs()),
        )),
    }
}

/// Longest time that a hook may take.
pub(crate) fn time_limit(hook: &Hook) -> Duration {
    hook.timeout()
        .and_then(|seconds| u64::try_from(seconds).ok())
        .filter(|seconds| *seconds > 0)
        .map_or(DEFAULT_LIMIT, |seconds| Duration::from_secs(seconds.min(LONGEST)))
}

/// Waits until the child has ended, or kills it and its group at the limit.
fn wait(child: &mut Child, limit: Duration) -> std::io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    let pid = rustix::process::Pid::from_child(child);
    let process = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if left.is_zero() {
            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        let timeout = rustix::event::Timespec::try_from(left).unwrap_or_default();
        let mut ended = [rustix::event::PollFd::new(&process, rustix::event::PollFlags::IN)];
        match rustix::event::poll(&mut ended, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(err) => return Err(err.into()),
        }
    }
}

/// For a hook that states no limit: nothing in a guest may hold a container's creation for ever.
const DEFAULT_LIMIT: Duration = Duration::from_secs(30);
/// A day: longer limits would be none, and would overflow sums.
const LONGEST: u64 = 24 * 60 * 60;
