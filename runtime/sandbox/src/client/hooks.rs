//! OCI hooks that run on the host: in the caller's namespaces, with the container's state on standard input.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use oci_spec::runtime::Hook;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::Serialize;

use super::error::HookError;
use crate::proto::Status;

/// Longest time a hook without a timeout of its own may take. The runtime specification sets no limit, and
/// some hooks load images or wait for networks; a limit there must be all the same.
const DEFAULT_LIMIT: Duration = Duration::from_secs(300);
/// Bytes of a failed hook's standard error that the message repeats.
const MOST_STDERR: u64 = 4096;

/// The state a hook gets (runtime-spec, runtime.md, "State").
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct HookState<'a> {
    pub(crate) oci_version: &'a str,
    pub(crate) id: &'a str,
    pub(crate) status: Status,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pid: Option<i32>,
    pub(crate) bundle: &'a Path,
    pub(crate) annotations: &'a BTreeMap<String, String>,
}

/// Runs the hooks of one list, in order; the first that fails ends it.
pub(crate) fn run(phase: &'static str, hooks: &[Hook], state: &HookState<'_>) -> Result<(), HookError> {
    for hook in hooks {
        run_one(phase, hook, state)?;
    }
    Ok(())
}

/// Runs the hooks of one list, all of them; failures are logged (runtime-spec, runtime.md, "Lifecycle":
/// errors of `poststart` and `poststop` hooks are warnings).
pub(crate) fn run_all(phase: &'static str, hooks: &[Hook], state: &HookState<'_>) {
    for hook in hooks {
        if let Err(err) = run_one(phase, hook, state) {
            tracing::warn!(error = %err, "a hook failed");
        }
    }
}

fn run_one(phase: &'static str, hook: &Hook, state: &HookState<'_>) -> Result<(), HookError> {
    let path = hook.path();
    let spawn = |source| HookError::Spawn {
        phase,
        path: path.clone(),
        source,
    };
    let limit = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok())
        .map_or(DEFAULT_LIMIT, Duration::from_secs);
    let document = serde_json::to_vec(state).map_err(|err| spawn(err.into()))?;
    // A file takes any amount without blocking the hook, and nobody has to read beside it.
    let said = rustix::fs::memfd_create(c"caisson-hook", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(|err| spawn(err.into()))?;
    let stderr = said.try_clone().map_err(spawn)?;
    let mut child = command(hook, stderr.into()).spawn().map_err(spawn)?;
    let ended = feed_and_wait(&mut child, &document, limit);
    if !matches!(ended, Ok(true)) {
        // It is ours and not reaped, so the signal cannot hit another process.
        let _ = child.kill();
    }
    let status = child.wait().map_err(spawn)?;
    if !ended.map_err(spawn)? {
        return Err(HookError::Deadline {
            phase,
            path: path.clone(),
            after: limit,
        });
    }
    if status.success() {
        return Ok(());
    }
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or_default()),
    };
    Err(HookError::Failed {
        phase,
        path: path.clone(),
        how,
        stderr: tail(&said.into()),
    })
}

fn command(hook: &Hook, stderr: Stdio) -> Command {
    let mut command = Command::new(hook.path());
    let mut arguments = hook.args().iter().flatten();
    if let Some(name) = arguments.next() {
        command.arg0(name); // execv(3): the first argument is the name
    }
    command.args(arguments).env_clear();
    for pair in hook.env().iter().flatten() {
        if let Some((name, value)) = pair.split_once('=') {
            command.env(name, value);
        }
    }
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(stderr);
    command
}

/// Gives the hook its state and waits; says whether it ended in time.
fn feed_and_wait(child: &mut Child, document: &[u8], limit: Duration) -> io::Result<bool> {
    let until = Instant::now() + limit;
    if let Some(stdin) = child.stdin.take() {
        let mut rest = document;
        rustix::io::ioctl_fionbio(&stdin, true)?;
        let mut stdin = std::fs::File::from(std::os::fd::OwnedFd::from(stdin));
        while !rest.is_empty() {
            match stdin.write(rest) {
                Ok(taken) => rest = rest.get(taken..).unwrap_or_default(),
                // A hook need not read its state.
                Err(err) if err.kind() == io::ErrorKind::BrokenPipe => break,
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                    if !ready(PollFd::new(&stdin, PollFlags::OUT), until)? {
                        return Ok(false);
                    }
                }
                Err(err) => return Err(err),
            }
        }
    }
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pidfd = pidfd_open(pid.ok_or(io::ErrorKind::InvalidData)?, PidfdFlags::empty())?;
    ready(PollFd::new(&pidfd, PollFlags::IN), until)
}

fn ready(source: PollFd<'_>, until: Instant) -> io::Result<bool> {
    let mut sources = [source];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut sources, Some(&timeout)) {
            Ok(count) => return Ok(count > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(err) => return Err(err.into()),
        }
    }
}

/// The end of what the hook wrote to standard error.
fn tail(said: &std::fs::File) -> String {
    let len = said.metadata().map_or(0, |metadata| metadata.len());
    let mut text = vec![0; usize::try_from(len.min(MOST_STDERR)).unwrap_or_default()];
    let read = said
        .read_at(&mut text, len.saturating_sub(MOST_STDERR))
        .unwrap_or_default();
    String::from_utf8_lossy(text.get(..read).unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::HookBuilder;

    fn hook(script: &str, timeout: Option<i64>) -> Hook {
        let builder = HookBuilder::default()
            .path("/bin/sh")
            .args(["sh", "-c", script].map(str::to_owned).to_vec())
            .env(vec!["GREETING=ahoy".to_owned()]);
        match timeout {
            Some(seconds) => builder.timeout(seconds),
            None => builder,
        }
        .build()
        .unwrap()
    }

    fn state(annotations: &BTreeMap<String, String>) -> HookState<'_> {
        HookState {
            oci_version: "1.2.0",
            id: "web",
            status: Status::Creating,
            pid: Some(42),
            bundle: Path::new("/bundle"),
            annotations,
        }
    }

    #[test]
    fn a_hook_gets_the_state_and_exactly_its_environment() {
        let out = tempfile::NamedTempFile::new().unwrap();
        let script = format!("cat > {0}; echo $GREETING $HOME >> {0}", out.path().display());
        run("prestart", &[hook(&script, None)], &state(&BTreeMap::new())).unwrap();
        assert_eq!(
            std::fs::read_to_string(out.path()).unwrap(),
            r#"{"ociVersion":"1.2.0","id":"web","status":"creating","pid":42,"bundle":"/bundle","annotations":{}}ahoy"#
                .to_owned()
                + "\n"
        );
    }

    #[test]
    fn a_failing_hook_is_named_with_what_it_said_and_ends_the_list() {
        let hooks = [
            hook("echo no such bridge >&2; exit 3", None),
            hook("exit 4", None),
        ];
        let err = run("createRuntime", &hooks, &state(&BTreeMap::new())).unwrap_err();
        assert_eq!(
            err.to_string(),
            "the createRuntime hook /bin/sh failed with exit code 3: no such bridge"
        );
    }

    #[test]
    fn a_hook_that_reads_nothing_and_hangs_is_killed_at_its_timeout() {
        let annotations = BTreeMap::from([("long".to_owned(), "x".repeat(1 << 20))]);
        let began = Instant::now();
        let err = run(
            "poststop",
            &[hook("exec sleep 60", Some(1))],
            &state(&annotations),
        )
        .unwrap_err();
        assert!(matches!(err, HookError::Deadline { .. }), "{err}");
        assert!(began.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_hook_without_a_program_says_which() {
        let missing = HookBuilder::default().path("/does/not/exist").build().unwrap();
        let err = run("poststart", &[missing], &state(&BTreeMap::new())).unwrap_err();
        assert_eq!(err.to_string(), "cannot run the poststart hook /does/not/exist");
    }
}
