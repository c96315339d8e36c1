//! The bundle of `run --rootfs`: made up, and gone with the container.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use caisson_sandbox::ContainerId;
use oci_spec::runtime::Spec;

/// Where such bundles are, below the root directory: no container can have this id.
const BUNDLES: &str = "@bundles";

/// A bundle that is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct RunBundle {
    path: PathBuf,
    kept: bool,
}

impl RunBundle {
    /// Writes the bundle of the container `id`.
    pub(crate) fn create(root: &Path, id: &ContainerId, spec: &Spec) -> Result<Self> {
        let path = root.join(BUNDLES).join(id.as_str());
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("cannot create {}", path.display()))?;
        let bundle = Self { path, kept: false };
        let config = bundle.path.join("config.json");
        std::fs::write(&config, serde_json::to_vec(spec)?)
            .with_context(|| format!("cannot write {}", config.display()))?;
        Ok(bundle)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves it to `delete`.
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for RunBundle {
    fn drop(&mut self) {
        if !self.kept
            && let Err(err) = remove_at(&self.path)
        {
            tracing::warn!("cannot remove {}: {err}", self.path.display());
        }
    }
}

/// Removes the bundle that was made up for a container, if one was.
pub(crate) fn remove(root: &Path, id: &ContainerId) -> Result<()> {
    let path = root.join(BUNDLES).join(id.as_str());
    remove_at(&path).with_context(|| format!("cannot remove {}", path.display()))
}

/// Removes only what is made here.
fn remove_at(path: &Path) -> io::Result<()> {
    let gone = |outcome: io::Result<()>| match outcome {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    gone(std::fs::remove_file(path.join("config.json")))?;
    gone(std::fs::remove_dir(path))?;
    if let Some(parent) = path.parent() {
        // Other containers may have theirs in it.
        let _ = std::fs::remove_dir(parent);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_of_a_bundle() {
        let root = tempfile::tempdir().unwrap();
        let id = ContainerId::try_from("a").unwrap();
        let bundle = RunBundle::create(root.path(), &id, &Spec::default()).unwrap();
        assert!(bundle.path().join("config.json").exists());
        drop(bundle);
        RunBundle::create(root.path(), &id, &Spec::default())
            .unwrap()
            .keep();
        remove(root.path(), &id).unwrap();
        remove(root.path(), &id).unwrap();
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
