//! Reading a bundle: `config.json`, and nothing that it names.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Process, Spec};
use serde::de::DeserializeOwned;

/// Largest `config.json` that is read, in bytes. Engines write some 10 KiB; a long seccomp profile makes 100.
const CONFIG_LIMIT: u64 = 4 << 20;
/// Major version of the runtime specification that is understood.
const MAJOR: &str = "1";

/// A bundle whose configuration was read.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// Its directory, absolute.
    pub path: PathBuf,
    /// Its configuration, as given.
    pub spec: Spec,
}

/// A bundle that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The directory is not there.
    #[error("cannot open bundle {}; give the directory that holds config.json with --bundle", path.display())]
    Directory {
        /// Where it was looked for.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file is not there or cannot be read.
    #[error("cannot read {}{}", path.display(), if source.kind() == io::ErrorKind::NotFound { "; \"caisson spec\" writes one" } else { "" })]
    File {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file is far larger than any configuration.
    #[error("cannot read {}: it is over {} MiB", path.display(), CONFIG_LIMIT >> 20)]
    TooLong {
        /// Which.
        path: PathBuf,
    },
    /// A file is not what it should be.
    #[error("cannot understand {}", path.display())]
    Json {
        /// Which.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// The configuration is of another specification.
    #[error("ociVersion {version:?} is not supported; this runtime understands version {MAJOR}.x.y")]
    Version {
        /// As given.
        version: String,
    },
}

impl Bundle {
    /// Reads the configuration in `directory`.
    ///
    /// # Errors
    /// Fails if the directory or the file is missing, too large, no JSON of the right shape, or of another major
    /// version of the specification.
    pub fn read(directory: &Path) -> Result<Self, BundleError> {
        let path = directory
            .canonicalize()
            .map_err(|source| BundleError::Directory {
                path: directory.to_owned(),
                source,
            })?;
        let spec: Spec = read_json(&path.join("config.json"))?;
        let version = spec.version();
        if version.split('.').next() != Some(MAJOR) {
            return Err(BundleError::Version {
                version: version.clone(),
            });
        }
        Ok(Self { path, spec })
    }
}

/// Reads the process of `exec --process FILE`.
///
/// # Errors
/// Fails if the file is missing, too large, or no process.
pub fn read_process(path: &Path) -> Result<Process, BundleError> {
    read_json(path)
}

/// Reads a JSON file of any shape that is given on the command line; `-` is standard input.
///
/// # Errors
/// Fails if the file is missing, too large, or of another shape.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, BundleError> {
    let file = |source| BundleError::File {
        path: path.to_owned(),
        source,
    };
    let mut text = Vec::new();
    let source: Box<dyn io::Read> = if path == Path::new("-") {
        Box::new(io::stdin())
    } else {
        Box::new(File::open(path).map_err(file)?)
    };
    source
        .take(CONFIG_LIMIT + 1)
        .read_to_end(&mut text)
        .map_err(file)?;
    if text.len() as u64 > CONFIG_LIMIT {
        return Err(BundleError::TooLong {
            path: path.to_owned(),
        });
    }
    serde_json::from_slice(&text).map_err(|source| BundleError::Json {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(config: &str) -> Result<Bundle, BundleError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        Bundle::read(dir.path())
    }

    #[test]
    fn what_is_wrong_with_a_bundle_is_said() {
        let missing = Bundle::read(Path::new("/nonexistent/bundle")).unwrap_err();
        assert!(
            missing
                .to_string()
                .starts_with("cannot open bundle /nonexistent/bundle; give"),
            "{missing}"
        );

        let empty = tempfile::tempdir().unwrap();
        let no_config = Bundle::read(empty.path()).unwrap_err();
        assert!(
            no_config
                .to_string()
                .ends_with("config.json; \"caisson spec\" writes one"),
            "{no_config}"
        );

        for (config, want) in [
            ("{", "cannot understand "),
            (r#"{"ociVersion": 1}"#, "cannot understand "),
            (
                r#"{"ociVersion": "2.0.0"}"#,
                "ociVersion \"2.0.0\" is not supported",
            ),
            (r#"{"ociVersion": ""}"#, "ociVersion \"\" is not supported"),
        ] {
            let err = bundle(config).unwrap_err().to_string();
            assert!(err.starts_with(want), "{config}: {err}");
        }
    }

    #[test]
    fn newer_minor_versions_are_accepted() {
        for version in ["1.0.0", "1.2.1", "1.3.0-rc.1"] {
            assert!(
                bundle(&format!(r#"{{"ociVersion": "{version}"}}"#)).is_ok(),
                "{version}"
            );
        }
    }

    #[test]
    fn a_huge_configuration_is_not_read_whole() {
        let config = " ".repeat(usize::try_from(CONFIG_LIMIT).unwrap() + 2);
        assert!(matches!(bundle(&config), Err(BundleError::TooLong { .. })));
    }
}
