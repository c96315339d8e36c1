//! Archives in the "newc" format, the one that the kernel unpacks as its first file system.
//!
//! Layout of headers: Documentation/driver-api/early-userspace/buffer-format.rst of the Linux kernel 6.12.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path};

use anyhow::{Context as _, bail};

/// An archive being written.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    entries: u32,
}

/// One header's variable fields.
#[derive(Debug, Default)]
struct Header {
    mode: u32,
    device: (u32, u32),
}

impl Archive {
    /// Adds a file, and the directories above it.
    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> anyhow::Result<()> {
        self.entry(
            path,
            &Header {
                mode: S_IFREG | mode,
                device: (0, 0),
            },
            content,
        )
    }

    /// Adds a character device.
    pub(crate) fn character_device(
        &mut self,
        path: &str,
        mode: u32,
        major: u32,
        minor: u32,
    ) -> anyhow::Result<()> {
        self.entry(
            path,
            &Header {
                mode: S_IFCHR | mode,
                device: (major, minor),
            },
            &[],
        )
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, path: &str, target: &str) -> anyhow::Result<()> {
        self.entry(
            path,
            &Header {
                mode: S_IFLNK | 0o777,
                device: (0, 0),
            },
            target.as_bytes(),
        )
    }

    /// Adds a directory, and those above it.
    pub(crate) fn directory(&mut self, path: &str) -> anyhow::Result<()> {
        let mut built = String::new();
        for part in parts(path)? {
            if !built.is_empty() {
                built.push('/');
            }
            built.push_str(part);
            if self.directories.insert(built.clone()) {
                self.raw(
                    &built,
                    &Header {
                        mode: S_IFDIR | 0o755,
                        device: (0, 0),
                    },
                    &[],
                )?;
            }
        }
        Ok(())
    }

    /// Adds a file or a whole directory of the host. Links stay links; other kinds are refused.
    pub(crate) fn tree(&mut self, source: &Path, path: &str) -> anyhow::Result<()> {
        let data =
            fs::symlink_metadata(source).with_context(|| format!("cannot read {}", source.display()))?;
        if data.is_dir() {
            self.directory(path)?;
            let mut names: Vec<_> = fs::read_dir(source)
                .with_context(|| format!("cannot list {}", source.display()))?
                .collect::<Result<_, _>>()?;
            names.sort_by_key(fs::DirEntry::file_name);
            for name in names {
                let base = name.file_name();
                let base = base.to_str().context("a file name is not UTF-8")?;
                self.tree(&name.path(), &format!("{path}/{base}"))?;
            }
            Ok(())
        } else if data.is_symlink() {
            let target = fs::read_link(source)?;
            self.link(path, target.to_str().context("a link's target is not UTF-8")?)
        } else if data.is_file() {
            let content = fs::read(source).with_context(|| format!("cannot read {}", source.display()))?;
            self.file(path, data.permissions().mode() & 0o7777, &content)
        } else {
            bail!("{} is neither a file nor a directory", source.display());
        }
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> anyhow::Result<Vec<u8>> {
        self.raw("TRAILER!!!", &Header::default(), &[])?;
        Ok(self.bytes)
    }

    fn entry(&mut self, path: &str, header: &Header, content: &[u8]) -> anyhow::Result<()> {
        let parts = parts(path)?;
        let Some((_, above)) = parts.split_last() else {
            bail!("an entry of an archive needs a name");
        };
        self.directory(&above.join("/"))?;
        self.raw(&parts.join("/"), header, content)
    }

    fn raw(&mut self, name: &str, header: &Header, content: &[u8]) -> anyhow::Result<()> {
        let size =
            u32::try_from(content.len()).with_context(|| format!("{name} is too large for an archive"))?;
        let name_size = u32::try_from(name.len() + 1)?;
        self.entries += 1;
        let (major, minor) = header.device;
        let links = 1;
        let fields = [
            self.entries,
            header.mode,
            0, // owner
            0, // group
            links,
            0, // time of change: none, so that the same inputs give the same archive
            size,
            0, // device that holds the file
            0,
            major,
            minor,
            name_size,
            0, // checksum: not in this format
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

fn parts(path: &str) -> anyhow::Result<Vec<&str>> {
    Path::new(path)
        .components()
        .filter(|part| !matches!(part, Component::RootDir | Component::CurDir))
        .map(|part| match part {
            Component::Normal(name) => name.to_str().context("a path is not UTF-8"),
            _ => bail!("{path} leads out of the archive"),
        })
        .collect()
}

/// File types, inode(7).
const S_IFREG: u32 = 0o100_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFLNK: u32 = 0o120_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_its_directories_first_and_a_trailer_last() {
        let mut archive = Archive::default();
        archive.file("/lib/a/x", 0o755, b"hello").unwrap();
        archive.file("lib/y", 0o644, b"").unwrap();
        archive.character_device("dev/console", 0o600, 5, 1).unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let at = |name: &str| text.find(name).unwrap();
        assert!(at("lib\0") < at("lib/a\0") && at("lib/a\0") < at("lib/a/x\0"));
        assert!(at("lib/y\0") < at("dev/console\0") && at("dev/console\0") < at("TRAILER!!!\0"));
        assert_eq!(text.matches("lib\0").count(), 1);
        assert!(text.starts_with("07070100000001000041ed"));
    }

    #[test]
    fn a_path_that_leads_out_is_refused() {
        assert!(Archive::default().file("../x", 0o644, b"").is_err());
        assert!(Archive::default().file("/", 0o644, b"").is_err());
    }
}
