//! From descriptors to a guest memory with a kernel in it.

use std::fs::File;
use std::io::{self, ErrorKind, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;

use caisson_arch_x86_64::BootRegs;
use caisson_arch_x86_64::boot::{BootImage, HEAD, Handover};
use caisson_arch_x86_64::layout::Layout;
use caisson_devices::virtio::{GuestAddress, Memory};
use caisson_machine::BuildError;
use vm_memory::Bytes as _;

/// What is booted.
#[derive(Debug)]
pub(crate) struct Kernel<'a> {
    pub(crate) image: File,
    pub(crate) initramfs: File,
    /// Words of the plan, after our own.
    pub(crate) words: &'a str,
    pub(crate) vcpus: u32,
}

impl Kernel<'_> {
    /// Puts everything into `memory` and says how the first processor enters it.
    ///
    /// The files are read straight into the guest's memory.
    pub(crate) fn load(mut self, memory: &Memory, layout: &Layout) -> Result<BootRegs, BuildError> {
        let image_len = length(&self.image).map_err(|cause| BuildError::new(READ_KERNEL, cause))?;
        let mut head = vec![0; HEAD];
        let len = read_head(&self.image, &mut head).map_err(|cause| BuildError::new(READ_KERNEL, cause))?;
        head.truncate(len);
        let image = BootImage::parse(&head, image_len, layout)
            .map_err(|cause| BuildError::new("load the kernel", cause))?;
        for segment in &image.segments {
            copy(&mut self.image, segment.bytes.clone(), memory, segment.at)
                .map_err(|cause| BuildError::new(READ_KERNEL, cause))?;
        }
        let len = length(&self.initramfs).map_err(|cause| BuildError::new(READ_INITRAMFS, cause))?;
        if len == 0 {
            return Err(BuildError::new(READ_INITRAMFS, "the file is empty"));
        }
        let initramfs = image
            .place_initramfs(layout, len)
            .map_err(|cause| BuildError::new("load the initramfs", cause))?;
        copy(&mut self.initramfs, 0..len, memory, initramfs.start)
            .map_err(|cause| BuildError::new(READ_INITRAMFS, cause))?;
        let handover = Handover {
            cmdline: &command_line(self.words),
            initramfs,
            vcpus: self.vcpus,
        };
        let tables = image
            .handover(layout, &handover)
            .map_err(|cause| BuildError::new("set up the kernel's parameters", cause))?;
        for (at, bytes) in tables {
            memory
                .write_slice(&bytes, GuestAddress(at))
                .map_err(|cause| BuildError::new("set up the kernel's parameters", cause))?;
        }
        Ok(image.boot_regs())
    }
}

const READ_KERNEL: &str = "read the kernel";
const READ_INITRAMFS: &str = "read the initramfs";

/// What every guest of this machine is told, and why:
///
/// * `console=ttyS0 quiet`: the serial port is for panics, each of its bytes is an exit; `8250.nr_uarts=1`: nor
///   look for three more;
/// * `panic=-1 reboot=a`: a panic restarts at once, by the ACPI register, which ends the machine with a report;
/// * `tsc=reliable no_timer_check`: the clock comes from the hypervisor, there is nothing to check it against;
/// * `rdinit=/init`: the agent, and nothing else if it is missing.
///
/// Mitigations stay as the kernel chooses: processes of one guest need not trust each other.
const OWN_WORDS: &str =
    "console=ttyS0 quiet 8250.nr_uarts=1 panic=-1 reboot=a tsc=reliable no_timer_check rdinit=/init";

fn command_line(words: &str) -> String {
    match words.trim() {
        "" => OWN_WORDS.to_owned(),
        words => format!("{OWN_WORDS} {words}"),
    }
}

fn length(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if metadata.is_file() {
        return Ok(metadata.len());
    }
    Err(io::Error::new(
        ErrorKind::InvalidInput,
        "it is not a regular file",
    ))
}

fn read_head(file: &File, head: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(room) = head.get_mut(filled..).filter(|room| !room.is_empty()) {
        match file.read_at(room, filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Reads `bytes` of `file` to `at`. A file that has become shorter is an error, never an endless loop.
fn copy(file: &mut File, bytes: std::ops::Range<u64>, memory: &Memory, at: u64) -> io::Result<()> {
    file.seek(SeekFrom::Start(bytes.start))?;
    let mut done = 0;
    let len = bytes.end - bytes.start;
    while done < len {
        let left = usize::try_from(len - done).map_err(io::Error::other)?;
        let count = memory
            .read_volatile_from(GuestAddress(at + done), file, left)
            .map_err(io::Error::other)?;
        if count == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        done += count as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plans_words_come_last() {
        assert!(command_line(" debug ").ends_with(" rdinit=/init debug"));
        assert_eq!(command_line(""), OWN_WORDS);
    }
}
