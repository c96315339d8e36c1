//! The guest's first file system: the agent, the modules it loads, a console, nothing else.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};

use super::cpio::Archive;
use super::modules::Module;
use crate::{child, setup};

/// Builds the agent as one static file.
pub(crate) fn agent(root: &Path) -> anyhow::Result<Vec<u8>> {
    setup::static_target()?;
    let mut build = Command::new("cargo");
    build.current_dir(root).args([
        "build",
        "--quiet",
        "--package",
        "caisson-agent",
        "--profile",
        "fast",
        "--target",
        setup::STATIC_TARGET,
    ]);
    let status = child::follow(&mut build, BUILD_LIMIT, |line| println!("{line}"))?;
    if !status.success() {
        bail!("the agent does not build");
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), Into::into);
    let path = target
        .join(setup::STATIC_TARGET)
        .join("fast")
        .join("caisson-agent");
    fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// Writes the archive.
pub(crate) fn write(agent: &[u8], modules: &[Module]) -> anyhow::Result<Vec<u8>> {
    let mut archive = Archive::default();
    archive.file("init", 0o755, agent)?;
    // Open before /dev is mounted, so that the agent's first words are seen.
    archive.character_device("dev/console", 0o600, 5, 1)?;
    add_modules(&mut archive, modules)?;
    archive.finish()
}

/// Adds `modules` and the list of them that the first process follows.
pub(crate) fn add_modules(archive: &mut Archive, modules: &[Module]) -> anyhow::Result<()> {
    let mut list = String::new();
    for module in modules {
        let path = format!("modules/{}.ko", module.name);
        archive.file(&path, 0o644, &module.content)?;
        list.push_str(&path);
        list.push('\n');
    }
    archive.file("modules.list", 0o644, list.as_bytes())
}

const BUILD_LIMIT: Duration = Duration::from_secs(20 * 60);
