//! The parts of the test.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use crate::{lint, setup};

/// One part: its name, what it does, and how.
struct Part {
    name: &'static str,
    what: &'static str,
    run: fn(&Path) -> anyhow::Result<Count>,
}

/// Tests that ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    passed: u64,
    failed: u64,
}

const PARTS: [Part; 3] = [
    Part {
        name: "lint",
        what: "formatting, clippy with warnings as errors, dependency direction, names, sizes",
        run: |root| lint::run(root).map(|()| Count::default()),
    },
    Part {
        name: "unit",
        what: "every test of every crate; some make namespaces and mounts and need root and busybox",
        run: |root| cargo(root, &["test", "--workspace", "--no-fail-fast"], UNIT_LIMIT),
    },
    Part {
        name: "static",
        what: "builds the agent as the guest gets it: one static file",
        run: |root| {
            setup::static_target()?;
            let build = [
                "build",
                "-p",
                "caisson-agent",
                "--profile",
                "fast",
                "--target",
                setup::STATIC_TARGET,
            ];
            cargo(root, &build, BUILD_LIMIT)
        },
    },
];

/// Longest time the unit tests may take, builds included.
const UNIT_LIMIT: Duration = Duration::from_secs(40 * 60);
/// Longest time one build may take.
const BUILD_LIMIT: Duration = Duration::from_secs(20 * 60);

/// Prints the parts.
pub(crate) fn list() {
    for part in &PARTS {
        println!("{:8} {}", part.name, part.what);
    }
}

/// Runs the named parts, or all; the last line counts the tests.
pub(crate) fn run(root: &Path, names: &[String]) -> anyhow::Result<()> {
    if let Some(unknown) = names
        .iter()
        .find(|name| PARTS.iter().all(|part| part.name != **name))
    {
        bail!("no part {unknown:?}; \"cargo xtask test --list\" shows those there are");
    }
    setup::components()?;
    let mut total = Count::default();
    let mut rows = Vec::new();
    for part in PARTS
        .iter()
        .filter(|part| names.is_empty() || names.iter().any(|name| name == part.name))
    {
        println!("== {}: {}", part.name, part.what);
        let begun = Instant::now();
        let outcome = (part.run)(root);
        let word = match &outcome {
            Ok(Count { failed: 0, .. }) => "ok",
            _ => "FAILED",
        };
        rows.push(format!(
            "{:8} {word:6} {:5} s",
            part.name,
            begun.elapsed().as_secs()
        ));
        match outcome {
            Ok(count) => {
                total.passed += count.passed;
                total.failed += count.failed;
            }
            Err(err) => {
                println!("{}: {err:#}", part.name);
                total.failed += 1;
            }
        }
    }
    for row in rows {
        println!("{row}");
    }
    println!("{} passed, {} failed", total.passed, total.failed);
    if total.failed > 0 {
        bail!("the test failed");
    }
    Ok(())
}

/// Runs cargo, shows what it prints and counts the tests in it.
fn cargo(root: &Path, arguments: &[&str], limit: Duration) -> anyhow::Result<Count> {
    let what = arguments.join(" ");
    let mut child = Command::new("cargo")
        .args(arguments)
        .current_dir(root)
        .env("CAISSON_NEED", "root")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let out = child.stdout.take().context("cargo has no output")?;
    let (lines, inbox) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            if lines.send(line).is_err() {
                return;
            }
        }
    });
    let deadline = Instant::now() + limit;
    let mut count = Count::default();
    loop {
        match inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                println!("{line}");
                if let Some(found) = parse_result(&line) {
                    count.passed += found.passed;
                    count.failed += found.failed;
                }
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                child.kill().context("cannot end cargo")?;
                child.wait().context("cannot wait for cargo")?;
                bail!(
                    "cargo {what} did not end within {} minutes and was killed",
                    limit.as_secs() / 60
                );
            }
        }
    }
    let status = child.wait().context("cannot wait for cargo")?;
    reader
        .join()
        .map_err(|_| anyhow::anyhow!("the reader of cargo's output failed"))?;
    if !status.success() && count.failed == 0 {
        bail!("cargo {what} failed");
    }
    Ok(count)
}

/// Reads the closing line of a test binary.
fn parse_result(line: &str) -> Option<Count> {
    let rest = line.strip_prefix("test result: ")?;
    let number = |word: &str| -> Option<u64> {
        let before = rest.split(word).next()?.trim_end();
        before
            .rsplit([' ', '.'])
            .find(|text| !text.is_empty())?
            .parse()
            .ok()
    };
    Some(Count {
        passed: number(" passed")?,
        failed: number(" failed")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted() {
        let line = "test result: FAILED. 52 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 2.15s";
        assert_eq!(
            parse_result(line),
            Some(Count {
                passed: 52,
                failed: 1
            })
        );
        assert_eq!(parse_result("test wire::a_frame ... ok"), None);
    }

    #[test]
    fn an_unknown_part_is_named() {
        let err = run(Path::new("."), &["nonsense".to_owned()])
            .unwrap_err()
            .to_string();
        assert!(err.starts_with("no part \"nonsense\""), "{err}");
    }

    #[test]
    fn part_names_are_distinct() {
        let mut names: Vec<_> = PARTS.iter().map(|part| part.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), PARTS.len());
    }
}
