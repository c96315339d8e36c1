//! Child processes with deadlines.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

/// Runs `command`, hands each line of its standard output to `line`, and kills it at the deadline.
pub(crate) fn follow(
    command: &mut Command,
    limit: Duration,
    mut line: impl FnMut(&str),
) -> anyhow::Result<ExitStatus> {
    let what = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {what}"))?;
    let out = child.stdout.take().context("the child has no output")?;
    let (lines, inbox) = mpsc::channel();
    // Ends with the child's output; the child is dead or has closed it when this function comes back.
    std::thread::spawn(move || {
        for line in BufReader::new(out).split(b'\n').map_while(Result::ok) {
            if lines.send(line).is_err() {
                return;
            }
        }
    });
    let deadline = Instant::now() + limit;
    loop {
        match inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(bytes) => line(String::from_utf8_lossy(&bytes).trim_end_matches('\r')),
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                child.kill().with_context(|| format!("cannot end {what}"))?;
                child.wait().with_context(|| format!("cannot wait for {what}"))?;
                bail!("{what} did not end within {} s and was killed", limit.as_secs());
            }
        }
    }
    child.wait().with_context(|| format!("cannot wait for {what}"))
}

/// Runs `command` and gives its standard output; its standard error is in the message when it fails.
pub(crate) fn output(command: &mut Command) -> anyhow::Result<String> {
    Ok(String::from_utf8_lossy(&bytes(command)?).into_owned())
}

/// As [`output`], for a program that writes something other than text.
pub(crate) fn bytes(command: &mut Command) -> anyhow::Result<Vec<u8>> {
    let what = describe(command);
    let out = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {what}"))?;
    if !out.status.success() {
        bail!("{what} failed: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(out.stdout)
}

/// Sends `input` through `command` and gives what comes out.
pub(crate) fn filter(command: &mut Command, input: &[u8]) -> anyhow::Result<Vec<u8>> {
    let what = describe(command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {what}"))?;
    let mut pipe = child.stdin.take().context("the child has no input")?;
    std::thread::scope(|scope| {
        // A child that stops reading fails by its status, which says more than the broken pipe.
        scope.spawn(move || drop(pipe.write_all(input)));
        let out = child
            .wait_with_output()
            .with_context(|| format!("cannot wait for {what}"))?;
        if !out.status.success() {
            bail!("{what} failed: {}", String::from_utf8_lossy(&out.stderr).trim());
        }
        Ok(out.stdout)
    })
}

fn describe(command: &Command) -> String {
    let arguments: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
    format!(
        "{} {}",
        command.get_program().to_string_lossy(),
        arguments.join(" ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_past_its_deadline_is_killed() {
        let err = follow(Command::new("sleep").arg("60"), Duration::from_millis(50), |_| {}).unwrap_err();
        assert!(err.to_string().contains("did not end within"), "{err}");
    }

    #[test]
    fn lines_and_status_arrive() {
        let mut seen = Vec::new();
        let status = follow(
            Command::new("sh").args(["-c", "printf 'a\\r\\nb'; exit 3"]),
            Duration::from_secs(10),
            |line| seen.push(line.to_owned()),
        )
        .unwrap();
        assert_eq!(status.code(), Some(3));
        assert_eq!(seen, ["a", "b"]);
    }
}
