//! The configuration file.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

/// Where the configuration file is looked for.
pub const DEFAULT_PATH: &str = "/etc/caisson/config.toml";
/// Where the guest's kernel and initramfs are looked for.
pub const DEFAULT_ASSETS: &str = "/usr/share/caisson";

/// Settings of the runtime, for all containers of a host.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's initial RAM file system.
    pub initramfs: PathBuf,
    /// Words added to the guest's kernel command line.
    pub kernel_parameters: String,
    /// Refuse to run where there is no usable hardware virtualization.
    pub require_hardware: bool,
    /// The emulator; found on `PATH` if not set.
    pub qemu: Option<PathBuf>,
    /// vCPUs of a sandbox whose containers have no processor limit.
    pub default_vcpus: u32,
    /// Memory in MiB of a sandbox whose containers have no memory limit.
    pub default_memory_mib: u64,
    /// Memory in MiB that the guest itself takes, added to the containers' limits.
    pub guest_overhead_mib: u64,
    /// Seconds from the machine's start until its agent must have answered. Emulated machines get four times as many.
    pub boot_timeout_s: u64,
    /// Seconds that the agent has for one request.
    pub call_timeout_s: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            kernel: Path::new(DEFAULT_ASSETS).join("vmlinux"),
            initramfs: Path::new(DEFAULT_ASSETS).join("initramfs.cpio"),
            kernel_parameters: String::new(),
            require_hardware: false,
            qemu: None,
            default_vcpus: 1,
            default_memory_mib: 512,
            guest_overhead_mib: 64,
            boot_timeout_s: 15,
            call_timeout_s: 15,
        }
    }
}

/// A configuration file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read the configuration file {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It is not what it should be; the cause names line, key and the keys there are.
    #[error("cannot understand the configuration file {}", path.display())]
    Toml {
        /// Which.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A number that makes no sense.
    #[error("cannot use the configuration file {}: {key} must be {range}", path.display())]
    Range {
        /// Which.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What it may be.
        range: &'static str,
    },
}

impl Config {
    /// Reads `path`, or, if none is given, [`DEFAULT_PATH`] if it exists.
    ///
    /// # Errors
    /// Fails if the file cannot be read, has an unknown key or a value out of range.
    pub fn read(path: Option<&Path>) -> Result<Self, ConfigError> {
        let (path, needed) = path.map_or((Path::new(DEFAULT_PATH), false), |path| (path, true));
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text, path),
            Err(err) if err.kind() == io::ErrorKind::NotFound && !needed => Ok(Self::default()),
            Err(source) => Err(ConfigError::File {
                path: path.to_owned(),
                source,
            }),
        }
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|source| ConfigError::Toml {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        let range = |key, range| ConfigError::Range {
            path: path.to_owned(),
            key,
            range,
        };
        if !(1..=MOST_VCPUS).contains(&config.default_vcpus) {
            return Err(range("default_vcpus", "from 1 to 32"));
        }
        if !(64..=MOST_MEMORY_MIB).contains(&config.default_memory_mib) {
            return Err(range("default_memory_mib", "from 64 to 1048576"));
        }
        if config.guest_overhead_mib > 4096 {
            return Err(range("guest_overhead_mib", "at most 4096"));
        }
        if !(1..=3600).contains(&config.boot_timeout_s) || !(1..=3600).contains(&config.call_timeout_s) {
            return Err(range("boot_timeout_s and call_timeout_s", "from 1 to 3600"));
        }
        Ok(config)
    }

    /// Longest time from the machine's start until its agent has answered.
    pub fn boot_deadline(&self, emulated: bool) -> Duration {
        Duration::from_secs(self.boot_timeout_s) * if emulated { 4 } else { 1 }
    }

    /// Longest time the agent has for one request.
    pub fn call_deadline(&self, emulated: bool) -> Duration {
        Duration::from_secs(self.call_timeout_s) * if emulated { 4 } else { 1 }
    }
}

/// Most vCPUs of a sandbox.
pub(crate) const MOST_VCPUS: u32 = 32;
/// Most memory of a sandbox, in MiB: 1 TiB, what 40 address bits cover.
pub(crate) const MOST_MEMORY_MIB: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_is_named_with_those_there_are() {
        let err = Config::parse("kernal = \"/x\"", Path::new("c.toml")).unwrap_err();
        let cause = std::error::Error::source(&err).unwrap().to_string();
        assert!(cause.contains("kernal") && cause.contains("`kernel`"), "{cause}");
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        for text in [
            "default_vcpus = 0",
            "default_vcpus = 33",
            "default_memory_mib = 1",
            "boot_timeout_s = 0",
        ] {
            assert!(
                matches!(
                    Config::parse(text, Path::new("c")),
                    Err(ConfigError::Range { .. })
                ),
                "{text}"
            );
        }
    }

    #[test]
    fn a_file_that_was_asked_for_must_exist() {
        assert!(matches!(
            Config::read(Some(Path::new("/nonexistent.toml"))),
            Err(ConfigError::File { .. })
        ));
    }

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(Config::parse("", Path::new("c")).unwrap(), Config::default());
    }
}
