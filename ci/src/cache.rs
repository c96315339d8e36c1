//! What takes long to make and can be made again: kernels, initial RAM file systems, package lists.
//!
//! An entry is a directory named after the hash of all that went into it. It appears whole or not at all, so
//! that two commands at once, or one that is killed, leave nothing half made. Entries that nobody used for
//! [`KEEP`] go when a new one is made.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use sha2::{Digest as _, Sha256};

/// The directory of all entries.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    root: PathBuf,
}

impl Cache {
    /// `$CAISSON_CACHE`, else `caisson` in `$XDG_CACHE_HOME`, else in `~/.cache`.
    pub(crate) fn open() -> anyhow::Result<Self> {
        let root = locate(|name| std::env::var_os(name))
            .context("cannot choose a cache directory: set CAISSON_CACHE, XDG_CACHE_HOME or HOME")?;
        fs::create_dir_all(&root).with_context(|| format!("cannot make {}", root.display()))?;
        Ok(Self { root })
    }

    /// A directory that is not an entry: it changes and stays.
    pub(crate) fn state(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.root.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }

    /// The entry `name`-`key` of `family`, made by `make` in an empty directory if it is not there.
    pub(crate) fn entry(
        &self,
        family: &str,
        name: &str,
        key: &Key,
        make: impl FnOnce(&Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<PathBuf> {
        let family = self.state(family)?;
        let path = family.join(format!("{name}-{}", key.hex()));
        if path.is_dir() {
            // The time of last use; an entry that cannot be touched is merely made again some day.
            if let Ok(directory) = fs::File::open(&path) {
                drop(directory.set_modified(SystemTime::now()));
            }
            return Ok(path);
        }
        prune(&family)?;
        let partial = tempfile::Builder::new()
            .prefix(PARTIAL)
            .tempdir_in(&family)
            .with_context(|| format!("cannot make a directory in {}", family.display()))?;
        make(partial.path())?;
        match fs::rename(partial.path(), &path) {
            Ok(()) => drop(partial.keep()), // it has another name now
            Err(_) if path.is_dir() => {}   // somebody else was first, with the same content
            Err(err) => {
                return Err(err).with_context(|| format!("cannot put {} in place", path.display()));
            }
        }
        Ok(path)
    }
}

/// The hash of an entry's inputs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Key(Sha256);

impl Key {
    /// Adds an input. Lengths are part of the hash, so that no two lists of inputs look the same.
    pub(crate) fn with(mut self, input: impl AsRef<[u8]>) -> Self {
        let input = input.as_ref();
        self.0.update(input.len().to_le_bytes());
        self.0.update(input);
        self
    }

    fn hex(&self) -> String {
        self.0
            .clone()
            .finalize()
            .iter()
            .take(8)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

fn locate(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name: &str| {
        variable(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    set("CAISSON_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|path| path.join("caisson")))
        .or_else(|| set("HOME").map(|path| path.join(".cache/caisson")))
}

/// Removes what nobody used for long.
fn prune(family: &Path) -> anyhow::Result<()> {
    let now = SystemTime::now();
    for entry in fs::read_dir(family).with_context(|| format!("cannot list {}", family.display()))? {
        let entry = entry?;
        let unused = entry
            .metadata()
            .and_then(|data| data.modified())
            .ok()
            .and_then(|used| now.duration_since(used).ok());
        let unfinished = entry.file_name().to_string_lossy().starts_with(PARTIAL);
        let keep = if unfinished { ABANDONED } else { KEEP };
        if unused.is_some_and(|age| age > keep)
            && let Err(err) = fs::remove_dir_all(entry.path())
            && err.kind() != std::io::ErrorKind::NotFound
        {
            bail!("cannot remove {}: {err}", entry.path().display());
        }
    }
    Ok(())
}

const PARTIAL: &str = ".partial-";
/// After which time somebody who was making an entry must have been killed.
const ABANDONED: Duration = Duration::from_secs(6 * 60 * 60);
/// How long an unused entry stays.
const KEEP: Duration = Duration::from_secs(14 * 24 * 60 * 60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_specific_variable_chooses_the_place() {
        let place = |set: &[(&str, &str)]| {
            locate(|name| {
                set.iter()
                    .find(|(key, _)| *key == name)
                    .map(|(_, value)| value.into())
            })
        };
        assert_eq!(
            place(&[("CAISSON_CACHE", "/a"), ("HOME", "/h")]),
            Some("/a".into())
        );
        assert_eq!(
            place(&[("XDG_CACHE_HOME", "/x"), ("HOME", "/h")]),
            Some("/x/caisson".into())
        );
        assert_eq!(
            place(&[("CAISSON_CACHE", ""), ("HOME", "/h")]),
            Some("/h/.cache/caisson".into())
        );
        assert_eq!(place(&[]), None);
    }

    #[test]
    fn an_entry_is_made_once_and_never_half() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache {
            root: directory.path().to_owned(),
        };
        let key = Key::default().with("inputs");
        cache.entry("f", "n", &key, |_| bail!("no disk")).unwrap_err();
        let made = cache
            .entry("f", "n", &key, |path| Ok(fs::write(path.join("x"), "1")?))
            .unwrap();
        assert_eq!(fs::read(made.join("x")).unwrap(), b"1");
        let again = cache.entry("f", "n", &key, |_| bail!("made twice")).unwrap();
        assert_eq!(made, again);
        assert_eq!(fs::read_dir(directory.path().join("f")).unwrap().count(), 1);
    }

    #[test]
    fn keys_tell_lists_of_inputs_apart() {
        let key = |inputs: &[&str]| {
            inputs
                .iter()
                .fold(Key::default(), |key, input| key.with(input))
                .hex()
        };
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
        assert_eq!(key(&["a"]), key(&["a"]));
    }
}
