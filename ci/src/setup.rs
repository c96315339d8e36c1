//! Installs what a command needs and nothing else; quick when all is there.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, bail};

/// Target of the agent: static, because nothing else is in the guest.
pub(crate) const STATIC_TARGET: &str = "x86_64-unknown-linux-musl";

/// Installs everything.
pub(crate) fn all() -> anyhow::Result<()> {
    components()?;
    static_target()?;
    busybox()?;
    guest_tools()?;
    kernel_build_tools()?;
    qemu()
}

/// The formatter and the linter.
pub(crate) fn components() -> anyhow::Result<()> {
    for (component, probe) in [("rustfmt", "fmt"), ("clippy", "clippy")] {
        if !succeeds("cargo", &[probe, "--version"]) {
            rustup(&["component", "add", component])?;
        }
    }
    Ok(())
}

/// The standard library of [`STATIC_TARGET`].
pub(crate) fn static_target() -> anyhow::Result<()> {
    let listed = Command::new("rustc")
        .args(["--print", "target-libdir", "--target", STATIC_TARGET])
        .output()
        .context("cannot run rustc; install Rust with rustup")?;
    let directory = String::from_utf8_lossy(&listed.stdout).trim().to_owned();
    if Path::new(&directory).is_dir() {
        return Ok(());
    }
    rustup(&["target", "add", STATIC_TARGET])
}

/// A static busybox: the programs inside the containers of the tests and the emulated host.
pub(crate) fn busybox() -> anyhow::Result<()> {
    packages(&[("/usr/bin/busybox", "busybox-static")])
}

/// What unpacks the distribution's kernels.
pub(crate) fn guest_tools() -> anyhow::Result<()> {
    packages(&[
        ("/usr/bin/lz4", "lz4"),
        ("/usr/bin/zstd", "zstd"),
        ("/usr/bin/xz", "xz-utils"),
    ])
}

/// What builds our own kernel.
pub(crate) fn kernel_build_tools() -> anyhow::Result<()> {
    packages(&[
        ("/usr/bin/make", "make"),
        ("/usr/bin/gcc", "gcc"),
        ("/usr/bin/strip", "binutils"),
        ("/usr/bin/flex", "flex"),
        ("/usr/bin/bison", "bison"),
        ("/usr/bin/bc", "bc"),
        ("/usr/bin/perl", "perl"),
        ("/usr/include/libelf.h", "libelf-dev"), // objtool
    ])
}

/// The emulator, for the emulated host and for machines without usable virtualization.
pub(crate) fn qemu() -> anyhow::Result<()> {
    packages(&[("/usr/bin/qemu-system-x86_64", "qemu-system-x86")])
}

/// The runtime that benchmarks compare with.
pub(crate) fn runc() -> anyhow::Result<()> {
    packages(&[("/usr/sbin/runc", "runc")])
}

/// Installs the packages whose file is missing.
fn packages(wanted: &[(&str, &str)]) -> anyhow::Result<()> {
    let missing: Vec<_> = wanted
        .iter()
        .filter(|(file, _)| !Path::new(file).exists())
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    println!("installing {}", missing.join(", "));
    apt_get(&["--quiet", "update"], &missing)?;
    let mut install = vec![
        "--quiet",
        "--quiet",
        "--yes",
        "--no-install-recommends",
        "install",
    ];
    install.extend(&missing);
    apt_get(&install, &missing)
}

fn apt_get(arguments: &[&str], packages: &[&str]) -> anyhow::Result<()> {
    let out = Command::new("apt-get")
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .output()
        .context("cannot run apt-get")?;
    if !out.status.success() {
        bail!(
            "apt-get {} failed: {}; install {} as root",
            arguments.join(" "),
            String::from_utf8_lossy(&out.stderr).trim(),
            packages.join(" ")
        );
    }
    Ok(())
}

fn rustup(arguments: &[&str]) -> anyhow::Result<()> {
    let what = arguments.join(" ");
    let status = Command::new("rustup")
        .args(arguments)
        .status()
        .with_context(|| format!("cannot run rustup {what}"))?;
    if !status.success() {
        bail!("rustup {what} failed; run it by hand to see why");
    }
    Ok(())
}

fn succeeds(program: &str, arguments: &[&str]) -> bool {
    Command::new(program)
        .args(arguments)
        .output()
        .is_ok_and(|out| out.status.success())
}
