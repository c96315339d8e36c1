//! The distribution's cloud kernel: downloaded, unpacked, its ELF file taken out of the boot image.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, bail};

use super::Kernel;
use super::apt::Apt;
use crate::cache::{Cache, Key};
use crate::child;

/// The newest one there is: from backports where the sources have them.
pub(crate) fn newest(cache: &Cache, apt: &Apt) -> anyhow::Result<Kernel> {
    prepare(cache, apt, apt.newest())
}

/// The one of the release itself.
pub(crate) fn stable(cache: &Cache, apt: &Apt) -> anyhow::Result<Kernel> {
    prepare(cache, apt, apt.stable())
}

fn prepare(cache: &Cache, apt: &Apt, suite: &str) -> anyhow::Result<Kernel> {
    let newest = apt.find("linux-image-cloud-amd64", suite)?;
    let image = newest
        .depends
        .iter()
        .find(|name| name.starts_with("linux-image-"))
        .context("linux-image-cloud-amd64 names no kernel")?;
    let package = apt.find(image, suite)?;
    let release = image.trim_start_matches("linux-image-").to_owned();
    let key = Key::default()
        .with(&package.name)
        .with(&package.version)
        .with(RECIPE);
    let directory = cache.entry("kernels", "x86_64-distro", &key, |target| {
        println!("taking {} {} from {suite}", package.name, package.version);
        let tree = tempfile::tempdir_in(target)?;
        apt.unpack(&package, tree.path())?;
        let image = tree.path().join(format!("boot/vmlinuz-{release}"));
        let vmlinuz = fs::read(&image).with_context(|| format!("cannot read {}", image.display()))?;
        let vmlinux = elf_of_bzimage(&vmlinuz)
            .with_context(|| format!("cannot take the ELF file out of {}", image.display()))?;
        fs::write(target.join("vmlinux"), vmlinux)?;
        fs::write(target.join("vmlinuz"), vmlinuz)?;
        let modules = ["lib/modules", "usr/lib/modules"]
            .map(|place| tree.path().join(place).join(&release))
            .into_iter()
            .find(|path| path.is_dir())
            .context("the package has no modules")?;
        fs::rename(modules, target.join("modules")).context("cannot move the modules")
    })?;
    Ok(Kernel {
        directory,
        release,
        name: "distro",
    })
}

/// Takes the kernel's ELF file out of a bzImage.
///
/// Documentation/arch/x86/boot.rst of the Linux kernel 6.12: the setup header's `setup_sects`, `header`,
/// `payload_offset` and `payload_length`.
fn elf_of_bzimage(image: &[u8]) -> anyhow::Result<Vec<u8>> {
    let word = |at: usize| -> anyhow::Result<usize> {
        let bytes = image
            .get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .context("the file ends in its header")?;
        Ok(usize::try_from(u32::from_le_bytes(bytes))?)
    };
    if image.get(0x202..0x206) != Some(b"HdrS") {
        bail!("not a bzImage");
    }
    let sectors = match image.get(0x1f1).copied().unwrap_or_default() {
        0 => 4, // what very old headers mean
        sectors => usize::from(sectors),
    };
    let begin = (sectors + 1) * 512 + word(0x248)?;
    let payload = image
        .get(begin..begin + word(0x24c)?)
        .context("the payload lies outside of the file")?;
    let (body, length) = payload
        .split_at_checked(payload.len().saturating_sub(4))
        .context("no payload")?;
    let length = usize::try_from(u32::from_le_bytes(length.try_into()?))?;
    let (program, arguments, input): (_, &[&str], _) = match payload {
        [0x02, 0x21, 0x4c, 0x18, ..] => ("lz4", &["-dc"], body),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", &["-dc"], body),
        [0xfd, b'7', b'z', b'X', ..] => ("xz", &["-dc"], body),
        [0x1f, 0x8b, ..] => ("gzip", &["-dc"], payload), // its own trailer ends with the length
        _ => bail!("the payload is compressed in an unknown way"),
    };
    let vmlinux = child::filter(Command::new(program).args(arguments), input)?;
    if vmlinux.len() != length {
        bail!("the payload has {} bytes and says {length}", vmlinux.len());
    }
    if !vmlinux.starts_with(b"\x7fELF") {
        bail!("the payload is no ELF file");
    }
    Ok(vmlinux)
}

/// Changes when the same package is to give something else.
const RECIPE: &str = "1";

#[cfg(test)]
mod tests {
    use super::*;

    /// An image with `payload` behind one sector of set-up.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    #[test]
    fn the_payload_of_an_image_is_unpacked() {
        let payload = child::filter(Command::new("gzip").arg("-c"), b"\x7fELF and so on").unwrap();
        assert_eq!(elf_of_bzimage(&image(&payload)).unwrap(), b"\x7fELF and so on");
    }

    #[test]
    fn a_broken_image_is_an_error() {
        assert!(elf_of_bzimage(b"").is_err());
        assert!(elf_of_bzimage(&image(b"")).is_err());
        assert!(elf_of_bzimage(&image(b"????????")).is_err());
        let mut cut = image(&[0x1f, 0x8b, 0, 0, 0, 0, 0, 0]);
        cut.truncate(1026);
        assert!(elf_of_bzimage(&cut).is_err());
    }
}
