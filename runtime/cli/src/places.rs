//! Where things are: the root directory and the configuration.

use std::path::PathBuf;

use anyhow::Context as _;
use caisson_sandbox::Runtime;
use caisson_sandbox::config::Config;

use crate::arguments::Global;
use crate::failure::Result;

/// Where root's containers are.
const ROOT: &str = "/run/caisson";

/// The containers below the root directory.
pub(crate) fn runtime(global: &Global) -> Result<Runtime> {
    Ok(Runtime::new(root(global)?))
}

fn root(global: &Global) -> Result<PathBuf> {
    if let Some(root) = &global.root {
        return Ok(root.clone());
    }
    if rustix::process::geteuid().is_root() {
        return Ok(PathBuf::from(ROOT));
    }
    let directory = std::env::var_os("XDG_RUNTIME_DIR")
        .filter(|path| !path.is_empty())
        .context("cannot tell where the containers are: XDG_RUNTIME_DIR is not set; set it or give --root")?;
    Ok(PathBuf::from(directory).join("caisson"))
}

/// The configuration, with what the environment overrides.
pub(crate) fn config(global: &Global) -> Result<Config> {
    let mut config = Config::read(global.config.as_deref())?;
    if let Some(kernel) = std::env::var_os("CAISSON_KERNEL") {
        config.kernel = PathBuf::from(kernel);
    }
    if let Some(initramfs) = std::env::var_os("CAISSON_INITRAMFS") {
        config.initramfs = PathBuf::from(initramfs);
    }
    Ok(config)
}
