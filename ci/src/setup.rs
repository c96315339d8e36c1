//! Installs what a command needs and nothing else; quick when all is there.

use std::process::Command;

use anyhow::{Context as _, bail};

/// Target of the agent: static, because nothing else is in the guest.
pub(crate) const STATIC_TARGET: &str = "x86_64-unknown-linux-musl";

/// Installs everything.
pub(crate) fn all() -> anyhow::Result<()> {
    components()?;
    static_target()?;
    busybox()
}

/// The formatter and the linter.
pub(crate) fn components() -> anyhow::Result<()> {
    for (component, probe) in [("rustfmt", "fmt"), ("clippy", "clippy")] {
        if !succeeds("cargo", &[probe, "--version"]) {
            install(&["component", "add", component])?;
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
    if std::path::Path::new(&directory).is_dir() {
        return Ok(());
    }
    install(&["target", "add", STATIC_TARGET])
}

/// A static busybox: the programs inside the containers of the tests.
pub(crate) fn busybox() -> anyhow::Result<()> {
    if std::path::Path::new("/bin/busybox").exists() || std::path::Path::new("/usr/bin/busybox").exists() {
        return Ok(());
    }
    for arguments in [
        ["update", "--quiet"].as_slice(),
        ["install", "--yes", "--quiet", "busybox-static"].as_slice(),
    ] {
        let status = Command::new("apt-get")
            .args(arguments)
            .status()
            .context("cannot run apt-get")?;
        if !status.success() {
            bail!(
                "apt-get {} failed; install the package busybox-static as root",
                arguments.join(" ")
            );
        }
    }
    Ok(())
}

fn install(arguments: &[&str]) -> anyhow::Result<()> {
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
