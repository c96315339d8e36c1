//! Building the binaries as they are shipped: static.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

use crate::setup;

/// Builds the host binary; gives its path.
pub(crate) fn caisson(root: &Path) -> anyhow::Result<PathBuf> {
    package(root, "caisson", "caisson")
}

/// Builds this program as one static file, to run inside an emulated host.
pub(crate) fn xtask(root: &Path) -> anyhow::Result<PathBuf> {
    package(root, "caisson-ci", "xtask")
}

fn package(root: &Path, package: &str, binary: &str) -> anyhow::Result<PathBuf> {
    setup::static_target()?;
    let status = Command::new("cargo")
        .args([
            "build",
            "--quiet",
            "--profile",
            "fast",
            "--target",
            setup::STATIC_TARGET,
            "-p",
            package,
        ])
        .current_dir(root)
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("cargo could not build {package}");
    }
    Ok(root
        .join("target")
        .join(setup::STATIC_TARGET)
        .join("fast")
        .join(binary))
}
