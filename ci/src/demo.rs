//! `cargo xtask demo`: from a clone to a container in a VM of its own, with the time of each stage.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use crate::{build, bundle, guest, setup};

/// What the container runs: it shows where it is.
const SCRIPT: &str = "echo \"kernel   $(uname -sr), up $(cut -d' ' -f1 /proc/uptime) s\"; \
    echo \"pid 1    $(tr '\\0' ' ' < /proc/1/cmdline | cut -c1-40)\"; \
    echo \"memory   $(grep MemTotal /proc/meminfo | tr -s ' ' | cut -d' ' -f2-)\"; \
    echo mounts; cut -d' ' -f1-3 /proc/mounts | sed 's/^/  /'";

/// Runs the demonstration.
pub(crate) fn run(root: &Path, kernel: guest::Choice) -> anyhow::Result<()> {
    let mut stages = Vec::new();
    timed(&mut stages, "install what is missing", || {
        setup::static_target()?;
        setup::busybox()?;
        setup::qemu()?;
        setup::guest_tools()
    })?;
    let binary = timed(&mut stages, "build caisson", || build::caisson(root))?;
    let assets = timed(&mut stages, "prepare the guest", || {
        guest::prepare_one(root, kernel)
    })?;
    let directory = tempfile::tempdir().context("cannot make a directory")?;
    let at = directory.path().join("bundle");
    timed(&mut stages, "make a bundle", || bundle::make(&at, SCRIPT, None))?;

    println!("host     Linux {}", release());
    let caisson = |arguments: &[&str]| {
        let mut command = Command::new(&binary);
        command
            .arg("--root")
            .arg(directory.path().join("root"))
            .args(arguments);
        command
            .env("CAISSON_KERNEL", assets.kernel())
            .env("CAISSON_INITRAMFS", assets.initramfs());
        command
    };
    let begun = Instant::now();
    let status = caisson(&["--debug", "create", "--bundle"])
        .arg(&at)
        .arg("demo")
        .status()?;
    if !status.success() {
        bail!("the container was not created; what is above says why");
    }
    let created = begun.elapsed();
    let log = log_of(&directory.path().join("root/demo"));
    succeed(caisson(&["start", "demo"]))?;
    let ended = wait(&caisson, Duration::from_secs(30));
    let code = succeed(caisson(&["delete", "--force", "demo"]));
    stages.push(("create: boot the VM and set the container up", created));
    stages.push(("start until the container's end", begun.elapsed() - created));
    println!("stages of creation, from the supervisor's log");
    println!("{log}");
    println!("time of each step");
    for (name, time) in stages {
        println!("  {:>8.3} s  {name}", time.as_secs_f64());
    }
    println!(
        "The same by hand: CAISSON_KERNEL={} CAISSON_INITRAMFS={} {} run --bundle DIR NAME",
        assets.kernel().display(),
        assets.initramfs().display(),
        binary.display()
    );
    ended.and(code)
}

fn wait(caisson: &dyn Fn(&[&str]) -> Command, limit: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        let out = caisson(&["state", "demo"]).output()?;
        if String::from_utf8_lossy(&out.stdout).contains("\"stopped\"") {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("the container did not end within {} s", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn succeed(mut command: Command) -> anyhow::Result<()> {
    let status = command.status()?;
    if !status.success() {
        bail!("{command:?} failed");
    }
    Ok(())
}

/// The lines of a sandbox's log that say how far it came.
fn log_of(directory: &Path) -> String {
    let text = std::fs::read_to_string(directory.join("supervisor.log")).unwrap_or_default();
    text.lines()
        .map(|line| format!("  {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}

fn release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn timed<T>(
    stages: &mut Vec<(&'static str, Duration)>,
    name: &'static str,
    run: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let begun = Instant::now();
    let outcome = run().with_context(|| format!("cannot {name}"));
    stages.push((name, begun.elapsed()));
    outcome
}
