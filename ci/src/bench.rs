//! `cargo xtask bench`: times and memory, as ratios against peers in one run.
//!
//! The clock runs on the host, from the start of the command until the first byte that the container's process has
//! written arrives: an upper bound of the time to its first instruction. Peers take turns, so that a slow moment of
//! the machine hits all of them. Nothing here is asserted.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use crate::{build, bundle, emulate, guest, setup};

/// What is measured.
#[derive(Debug)]
pub(crate) struct Subject {
    /// The `caisson` binary.
    pub(crate) binary: PathBuf,
    /// The guest.
    pub(crate) kernel: PathBuf,
    /// The guest.
    pub(crate) initramfs: PathBuf,
}

/// The memory of the container of the memory measurements, in bytes.
const MEMORY: u64 = 256 << 20;
/// Longest time one start may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Builds everything, measures on this machine, and, if told to, inside the emulated host over its KVM.
pub(crate) fn run(root: &Path, runs: usize, kernel: guest::Choice, emulated: bool) -> anyhow::Result<()> {
    setup::static_target()?;
    setup::busybox()?;
    setup::qemu()?;
    setup::runc()?;
    let binary = build::caisson(root)?;
    let assets = guest::prepare_one(root, kernel)?;
    let subject = Subject {
        binary,
        kernel: assets.kernel(),
        initramfs: assets.initramfs(),
    };
    println!("== on this machine");
    here(&subject, runs)?;
    println!(
        "\nsize of the binary        {:>9.2} MiB",
        mebibytes(&subject.binary)?
    );
    println!(
        "size of the initramfs     {:>9.2} MiB",
        mebibytes(&subject.initramfs)?
    );
    println!(
        "size of the kernel        {:>9.2} MiB",
        mebibytes(&subject.kernel)?
    );
    if emulated {
        println!("\n== in the emulated host, over KVM");
        inside(root, &subject, runs)?;
    }
    Ok(())
}

/// Measures what `subject` is, on the machine that this runs on.
pub(crate) fn here(subject: &Subject, runs: usize) -> anyhow::Result<()> {
    let directory = tempfile::tempdir().context("cannot make a directory")?;
    let at = directory.path().join("bundle");
    bundle::make(&at, "echo x", None)?;
    let root = directory.path().join("root");
    let mut caisson = Vec::new();
    let mut runc = Vec::new();
    let mut qemu = Vec::new();
    for number in 0..runs {
        let id = format!("bench{number}");
        let mut command = subject.command(&root);
        command.args(["run", "--bundle"]).arg(&at).arg(&id);
        caisson.push(first_byte(&mut command).context("cannot run caisson")?);
        if found("runc") {
            let mut command = Command::new("runc");
            command
                .args(["run", "--bundle"])
                .arg(&at)
                .arg(format!("caisson-{id}"));
            // A machine may refuse what runc needs; then there is no peer to show.
            runc.extend(first_byte(&mut command).ok());
        }
        if found("qemu-system-x86_64") {
            qemu.push(first_byte(&mut plain_qemu(subject)).context("cannot run QEMU")?);
        }
    }
    println!("time from the command to the first byte of the container's process, {runs} runs");
    let base = row("caisson run", &mut caisson, None);
    row("runc run", &mut runc, base);
    row("QEMU, the same kernel to its first process", &mut qemu, base);
    memory(subject, directory.path())
}

impl Subject {
    fn command(&self, root: &Path) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .arg("--root")
            .arg(root)
            .env("CAISSON_KERNEL", &self.kernel)
            .env("CAISSON_INITRAMFS", &self.initramfs)
            .stdin(Stdio::null());
        command
    }
}

/// QEMU without any of ours: the kernel alone, until it looks for its first process.
fn plain_qemu(subject: &Subject) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-accel",
            "tcg,thread=multi",
            "-M",
            "q35",
            "-cpu",
            "max,-cx16",
            "-m",
            "512",
            "-nodefaults",
        ])
        .args(["-display", "none", "-no-reboot", "-serial", "stdio", "-kernel"])
        .arg(&subject.kernel)
        // Nothing to run: the panic says that the kernel has come as far as its first process.
        .args([
            "-append",
            "console=ttyS0 quiet panic=-1 no_timer_check tsc=reliable",
        ])
        .stdin(Stdio::null());
    command
}

/// The time until the command writes its first byte; it is then ended.
fn first_byte(command: &mut Command) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    let mut child = Ended(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?);
    let mut stdout = child.0.stdout.take().context("no output")?;
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let came = stdout.read(&mut [0; 1]).is_ok_and(|count| count == 1);
        // Nobody waits any more after the limit.
        let _ = sender.send(came.then(|| begun.elapsed()));
        // Whoever still writes is not to be held up.
        let _ = std::io::copy(&mut stdout, &mut std::io::sink());
    });
    match receiver.recv_timeout(LIMIT) {
        Ok(Some(time)) => {
            child.finish();
            Ok(time)
        }
        Ok(None) => bail!("it ended without a word"),
        Err(_) => bail!("it said nothing within {} s", LIMIT.as_secs()),
    }
}

/// A child that does not outlive its measurement.
struct Ended(Child);

impl Ended {
    /// Gives it time to end by itself.
    fn finish(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline && matches!(self.0.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        // Fails if it has ended, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Prints a row and gives its median in seconds.
fn row(name: &str, times: &mut [Duration], base: Option<f64>) -> Option<f64> {
    times.sort_unstable();
    let (Some(least), Some(median), Some(most)) = (times.first(), times.get(times.len() / 2), times.last())
    else {
        println!("  {name:44} not here");
        return None;
    };
    let median = median.as_secs_f64();
    let ratio = base.map_or_else(String::new, |base| {
        format!("  caisson takes {:.2} times as long", base / median)
    });
    println!(
        "  {name:44} median {median:8.3} s  ({:.3} to {:.3}){ratio}",
        least.as_secs_f64(),
        most.as_secs_f64()
    );
    Some(median)
}

/// Host memory of all our processes, and what the guest takes of its own.
fn memory(subject: &Subject, directory: &Path) -> anyhow::Result<()> {
    let at = directory.join("sleeper");
    bundle::make(&at, "sleep 1000", Some(MEMORY))?;
    let root = directory.join("root");
    let status = subject
        .command(&root)
        .args(["run", "--detach", "--bundle"])
        .arg(&at)
        .arg("sleeper")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    if !status.success() {
        bail!("the container of the memory measurement did not start");
    }
    let free = subject
        .command(&root)
        .args(["exec", "sleeper", "free", "-k"])
        .output()?;
    println!("\nmemory with a container of {} MiB", MEMORY >> 20);
    let mut total = 0;
    for (name, pid) in family(&root)? {
        let kib = pss(pid);
        total += kib;
        println!("  {name:44} {:8.2} MiB", as_mebibytes(kib));
    }
    println!(
        "  {:44} {:8.2} MiB, guest memory included",
        "all processes (PSS)",
        as_mebibytes(total)
    );
    for line in String::from_utf8_lossy(&free.stdout).lines() {
        println!("  in the guest: {line}");
    }
    let status = subject
        .command(&root)
        .args(["delete", "--force", "sleeper"])
        .status()?;
    if !status.success() {
        bail!("the container of the memory measurement was not deleted");
    }
    Ok(())
}

/// The processes that have the root directory on their command lines, and their children.
fn family(root: &Path) -> anyhow::Result<Vec<(String, u32)>> {
    let root = root.to_string_lossy().into_owned();
    let mut processes: Vec<(u32, u32, String)> = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let parent = stat
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.split(' ').nth(1)?.parse().ok())
            .unwrap_or(0);
        processes.push((pid, parent, line));
    }
    let mut found: Vec<u32> = processes
        .iter()
        .filter(|(pid, _, line)| line.contains(&root) && *pid != std::process::id())
        .map(|(pid, ..)| *pid)
        .collect();
    loop {
        let more: Vec<u32> = processes
            .iter()
            .filter(|(pid, parent, _)| found.contains(parent) && !found.contains(pid))
            .map(|(pid, ..)| *pid)
            .collect();
        if more.is_empty() {
            break;
        }
        found.extend(more);
    }
    // A stand-in is a child of whoever created it and names its container only.
    found.extend(
        processes
            .iter()
            .filter(|(pid, _, line)| line.contains(" stand-in sleeper") && !found.contains(pid))
            .map(|(pid, ..)| *pid)
            .collect::<Vec<_>>(),
    );
    Ok(processes
        .into_iter()
        .filter(|(pid, ..)| found.contains(pid))
        .map(|(pid, _, line)| (line.split(' ').take(2).collect::<Vec<_>>().join(" "), pid))
        .collect())
}

/// Proportional set size in KiB.
fn pss(pid: u32) -> u64 {
    std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))
        .unwrap_or_default()
        .lines()
        .find_map(|line| line.strip_prefix("Pss:")?.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

#[expect(clippy::cast_precision_loss, reason = "shown with two digits")]
fn as_mebibytes(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

fn mebibytes(file: &Path) -> anyhow::Result<f64> {
    let length = std::fs::metadata(file)
        .with_context(|| format!("cannot look at {}", file.display()))?
        .len();
    Ok(as_mebibytes(length / 1024))
}

fn found(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|directory| directory.join(program).exists()))
}

/// Runs [`here`] inside the emulated host.
fn inside(root: &Path, subject: &Subject, runs: usize) -> anyhow::Result<()> {
    let program = build::xtask(root)?;
    let emulation = emulate::Emulation {
        arch: guest::Arch::X86_64,
        memory: 3072,
        smp: 1,
        file: vec![
            (subject.binary.clone(), IN_HOST.0.to_owned()),
            (subject.kernel.clone(), IN_HOST.1.to_owned()),
            (subject.initramfs.clone(), IN_HOST.2.to_owned()),
        ],
        env: Vec::new(),
        timeout: 1800,
        command: vec![
            program.display().to_string(),
            "bench".to_owned(),
            "--here".to_owned(),
            "--runs".to_owned(),
            runs.to_string(),
        ],
    };
    match emulate::run(&emulation, |line| println!("{line}"))? {
        0 => Ok(()),
        code => bail!("the measurement in the emulated host left with status {code}"),
    }
}

/// Where binary, kernel and initramfs lie in the emulated host.
const IN_HOST: (&str, &str, &str) = ("/caisson", "/kernel", "/initramfs");

impl Subject {
    /// What lies in the emulated host.
    pub(crate) fn in_host() -> Self {
        Self {
            binary: IN_HOST.0.into(),
            kernel: IN_HOST.1.into(),
            initramfs: IN_HOST.2.into(),
        }
    }
}
