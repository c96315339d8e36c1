//! The guest's kernel and initramfs: whether they are there, and of which architecture.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use caisson_sandbox::config::{Config, DEFAULT_PATH};

/// ELF header: `e_machine` (elf(5)).
const EM_X86_64: u16 = 62;
const EM_AARCH64: u16 = 183;
/// Where a bzImage has its magic (Linux, Documentation/arch/x86/boot.rst, "header").
const BZIMAGE_MAGIC: (usize, &[u8]) = (0x202, b"HdrS");
/// Where an arm64 `Image` has its magic (Linux, Documentation/arch/arm64/booting.rst).
const IMAGE_MAGIC: (usize, &[u8]) = (56, b"ARM\x64");
/// Enough of a kernel to tell what it is.
const HEAD: u64 = 0x300;

/// Fails if a guest cannot be started for want of its files.
pub(crate) fn require(config: &Config) -> Result<()> {
    kernel(&config.kernel)?;
    initramfs(&config.initramfs)
}

/// The architecture of the kernel at `path`; fails if that is not this machine's.
pub(crate) fn kernel(path: &Path) -> Result<&'static str> {
    let head = head(path).with_context(|| missing("kernel", path))?;
    let own = std::env::consts::ARCH;
    match architecture(&head) {
        Some(arch) if arch == own => Ok(arch),
        Some(arch) => bail!(
            "the guest's kernel {} is for {arch}, and this machine is {own}; {}",
            path.display(),
            remedy("kernel")
        ),
        None => bail!(
            "the guest's kernel {} is neither an ELF vmlinux, a bzImage nor an arm64 Image; {}",
            path.display(),
            remedy("kernel")
        ),
    }
}

/// Fails if the initramfs at `path` cannot be read or is empty.
pub(crate) fn initramfs(path: &Path) -> Result<()> {
    let head = head(path).with_context(|| missing("initramfs", path))?;
    if head.is_empty() {
        bail!(
            "the guest's initramfs {} is empty; {}",
            path.display(),
            remedy("initramfs")
        );
    }
    Ok(())
}

fn missing(what: &str, path: &Path) -> String {
    format!(
        "cannot read the guest's {what} {} ({})",
        path.display(),
        remedy(what)
    )
}

fn remedy(what: &str) -> String {
    format!(
        "make one with \"cargo xtask guest\", or set \"{what}\" in {DEFAULT_PATH} or CAISSON_{}",
        what.to_uppercase()
    )
}

fn head(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut head = Vec::new();
    file.take(HEAD).read_to_end(&mut head)?;
    Ok(head)
}

fn architecture(head: &[u8]) -> Option<&'static str> {
    let has = |(at, magic): (usize, &[u8])| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    if has((0, b"\x7fELF")) {
        let machine = head.get(18..20).and_then(|bytes| bytes.try_into().ok());
        return match machine.map(u16::from_le_bytes) {
            Some(EM_X86_64) => Some("x86_64"),
            Some(EM_AARCH64) => Some("aarch64"),
            _ => None,
        };
    }
    if has(BZIMAGE_MAGIC) {
        return Some("x86_64");
    }
    has(IMAGE_MAGIC).then_some("aarch64")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_apart_by_their_headers() {
        let at = |offset: usize, magic: &[u8]| {
            let mut head = vec![0; 0x300];
            head[offset..offset + magic.len()].copy_from_slice(magic);
            head
        };
        let mut elf = at(0, b"\x7fELF");
        elf[18] = 183;
        for (head, want) in [
            (at(0x202, b"HdrS"), Some("x86_64")),
            (at(56, b"ARM\x64"), Some("aarch64")),
            (elf, Some("aarch64")),
            (at(0, b"\x7fELF"), None),
            (b"\x7fELF".to_vec(), None),
            (vec![], None),
        ] {
            assert_eq!(architecture(&head), want);
        }
    }

    #[test]
    fn a_missing_file_says_how_to_get_it() {
        let text = format!("{:#}", kernel(Path::new("/nonexistent/vmlinux")).unwrap_err());
        for part in [
            "/nonexistent/vmlinux",
            "cargo xtask guest",
            "CAISSON_KERNEL",
            "No such file",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
