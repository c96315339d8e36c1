//! The parts of the test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::emulate::Emulation;
use crate::guest::{Arch, Choice};
use crate::{build, child, emulate, guest, lint, setup};

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

impl Count {
    fn add(&mut self, found: Option<Self>) {
        let found = found.unwrap_or_default();
        self.passed += found.passed;
        self.failed += found.failed;
    }
}

const PARTS: [Part; 7] = [
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
    Part {
        name: "guest",
        what: "prepares the guest of the distribution's kernel and boots it under QEMU up to the agent",
        run: guest,
    },
    Part {
        name: "emulate",
        what: "tests that need a real /dev/kvm, on an emulated host that has one",
        run: emulate,
    },
    Part {
        name: "containers",
        what: "the caisson binary as its users drive it, on this machine: over QEMU where KVM is of no use",
        run: containers,
    },
    Part {
        name: "kvm",
        what: "the same over KVM, inside the emulated host",
        run: containers_over_kvm,
    },
];

/// Integration tests (`tests/NAME.rs` or `tests/NAME/main.rs`) that run on the emulated host.
const IN_EMULATED_HOST: &[&str] = &["conformance"];

/// Longest time the unit tests may take, builds included.
const UNIT_LIMIT: Duration = Duration::from_secs(40 * 60);
/// Longest time one build may take.
const BUILD_LIMIT: Duration = Duration::from_secs(20 * 60);

/// Longest time of all tests of containers on one machine.
const CONTAINERS_LIMIT: Duration = Duration::from_secs(14 * 60);
/// Longest time of one program on the emulated host.
const EMULATED_LIMIT: Duration = Duration::from_secs(5 * 60);

/// The names of all parts.
pub(crate) fn names() -> Vec<&'static str> {
    PARTS.iter().map(|part| part.name).collect()
}

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
            Ok(count) => total.add(Some(count)),
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
    let mut count = Count::default();
    let mut command = Command::new("cargo");
    command
        .args(arguments)
        .current_dir(root)
        .env("CAISSON_NEED", "root");
    let status = child::follow(&mut command, limit, |line| {
        println!("{line}");
        count.add(parse_result(line));
    })?;
    if !status.success() && count.failed == 0 {
        bail!("cargo {what} failed");
    }
    Ok(count)
}

/// Both kernels and what goes with them; a boot of each up to the agent's search for its host.
fn guest(root: &Path) -> anyhow::Result<Count> {
    let mut count = Count::default();
    for assets in guest::prepare(root, Choice::Distro, Arch::X86_64)? {
        println!("{}", assets.directory.display());
        guest::boot_check(&assets)?;
        count.passed += 1;
    }
    Ok(count)
}

/// Runs the tests that need a real `/dev/kvm` where there is one for certain.
fn emulate(root: &Path) -> anyhow::Result<Count> {
    let mut count = Count::default();
    for program in static_tests(root, "caisson-tests", IN_EMULATED_HOST)? {
        let emulation = Emulation {
            arch: Arch::X86_64,
            memory: 2048,
            smp: 1, // with two, the emulated host stopped in 3 of 7 runs
            file: Vec::new(),
            env: vec![("CAISSON_NEED".to_owned(), "kvm,hardware".to_owned())],
            timeout: EMULATED_LIMIT.as_secs(),
            command: vec![program.display().to_string(), "--test-threads=1".to_owned()],
        };
        println!("in the emulated host: {}", program.display());
        count.add(Some(in_emulated_host(&emulation)?));
    }
    Ok(count)
}

/// Runs tests in the emulated host, a second time if the host itself stopped: its emulation does so now and then,
/// whatever runs in it. A test that failed has failed.
fn in_emulated_host(emulation: &Emulation) -> anyhow::Result<Count> {
    let attempt = || {
        let mut count = Count::default();
        let code = emulate::run(emulation, |line| {
            println!("{line}");
            count.add(parse_result(line));
        })?;
        if code != 0 && count.failed == 0 {
            bail!("the tests left with status {code}");
        }
        Ok(count)
    };
    attempt().or_else(|err| {
        println!("the emulated host stopped, once more: {err:#}");
        attempt()
    })
}

/// What the tests of containers drive: the static binary, and the guest.
struct Subject {
    tests: PathBuf,
    binary: PathBuf,
    assets: guest::Assets,
}

impl Subject {
    fn prepare(root: &Path) -> anyhow::Result<Self> {
        setup::busybox()?;
        setup::qemu()?;
        let tests = static_tests(root, "caisson-tests", &["containers"])?;
        Ok(Self {
            tests: tests
                .into_iter()
                .next()
                .context("there are no tests of containers")?,
            binary: build::caisson(root)?,
            assets: guest::prepare_one(root, Choice::Distro)?,
        })
    }
}

fn containers(root: &Path) -> anyhow::Result<Count> {
    let subject = Subject::prepare(root)?;
    let mut count = Count::default();
    let mut tests = Command::new(&subject.tests);
    tests
        .env("CAISSON_BIN", &subject.binary)
        .env("CAISSON_KERNEL", subject.assets.kernel())
        .env("CAISSON_INITRAMFS", subject.assets.initramfs());
    let status = child::follow(&mut tests, CONTAINERS_LIMIT, |line| {
        println!("{line}");
        count.add(parse_result(line));
    })?;
    if !status.success() && count.failed == 0 {
        bail!("the tests of containers left with {status}");
    }
    Ok(count)
}

fn containers_over_kvm(root: &Path) -> anyhow::Result<Count> {
    let subject = Subject::prepare(root)?;
    let emulation = Emulation {
        arch: Arch::X86_64,
        memory: 3072,
        smp: 1,
        file: vec![
            (subject.binary, "/caisson".to_owned()),
            (subject.assets.kernel(), "/kernel".to_owned()),
            (subject.assets.initramfs(), "/initramfs".to_owned()),
        ],
        env: [
            ("CAISSON_NEED", "kvm,hardware"),
            ("CAISSON_BIN", "/caisson"),
            ("CAISSON_KERNEL", "/kernel"),
            ("CAISSON_INITRAMFS", "/initramfs"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into(),
        timeout: CONTAINERS_LIMIT.as_secs(),
        command: vec![subject.tests.display().to_string(), "--test-threads=1".to_owned()],
    };
    in_emulated_host(&emulation)
}

/// Builds the named integration tests of `package` as static programs, leaving out those it does not have.
fn static_tests(root: &Path, package: &str, names: &[&str]) -> anyhow::Result<Vec<PathBuf>> {
    setup::static_target()?;
    let names: Vec<_> = names
        .iter()
        .filter(|name| {
            let tests = root.join("tests").join(name);
            tests.with_extension("rs").exists() || tests.join("main.rs").exists()
        })
        .collect();
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let mut command = Command::new("cargo");
    command
        .args(["test", "--no-run", "--package", package, "--message-format=json"])
        .args(["--target", setup::STATIC_TARGET])
        .current_dir(root);
    for name in &names {
        command.args(["--test", name]);
    }
    let mut programs = Vec::new();
    let status = child::follow(&mut command, BUILD_LIMIT, |line| {
        let message: Value = serde_json::from_str(line).unwrap_or_default();
        if let Some(program) = message.pointer("/executable").and_then(Value::as_str) {
            programs.push(PathBuf::from(program));
        }
        if let Some(text) = message.pointer("/message/rendered").and_then(Value::as_str) {
            print!("{text}");
        }
    })?;
    if !status.success() || programs.len() != names.len() {
        bail!("the tests of {package} do not build for {}", setup::STATIC_TARGET);
    }
    Ok(programs)
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
