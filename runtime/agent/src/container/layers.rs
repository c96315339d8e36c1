//! Where a root file system comes from, in terms of the guest.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use caisson_wire::agent::{Failure, Root, SHARE_DIR, Stage};

use super::message::RootSource;
use crate::failure::failure;

/// Finds the root file system that the control plane names.
///
/// # Errors
/// Fails if a disk does not appear in time.
pub(crate) fn source(root: &Root) -> Result<RootSource, Failure> {
    match root {
        Root::Share { path } => Ok(RootSource::Directory {
            base: SHARE_DIR.to_owned(),
            path: path.clone(),
        }),
        Root::Layers { disks } if disks.is_empty() => Err(failure(Stage::Root, "there are no layers")),
        Root::Layers { disks } => disks
            .iter()
            .map(|(serial, kind)| Ok((wait_for_disk(serial)?, kind.clone())))
            .collect::<Result<_, _>>()
            .map(RootSource::Layers),
    }
}

/// The device of the disk with this serial number. A disk that was plugged in just now takes its time.
fn wait_for_disk(serial: &str) -> Result<String, Failure> {
    let deadline = Instant::now() + DISK_LIMIT;
    loop {
        if let Some(name) = find_disk(Path::new("/sys/block"), serial) {
            return Ok(format!("/dev/{name}"));
        }
        if Instant::now() >= deadline {
            return Err(failure(
                Stage::Root,
                format!("there is no disk with the serial number {serial:?}"),
            ));
        }
        std::thread::sleep(DISK_PAUSE);
    }
}

fn find_disk(blocks: &Path, serial: &str) -> Option<String> {
    fs::read_dir(blocks).ok()?.flatten().find_map(|entry| {
        let found = fs::read_to_string(entry.path().join("serial")).ok()?;
        let name = entry.file_name().into_string().ok()?;
        (found.trim_end() == serial && !serial.is_empty()).then_some(name)
    })
}

/// Longest time until a disk is there.
const DISK_LIMIT: Duration = Duration::from_secs(5);
/// sysfs cannot be waited for; this is the time between two looks.
const DISK_PAUSE: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_found_by_its_whole_serial_number() {
        let dir = tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", "layer-10\n"), ("vdb", "layer-1\n"), ("vdc", "")] {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("serial"), serial).unwrap();
        }
        fs::create_dir(dir.path().join("loop0")).unwrap();
        assert_eq!(find_disk(dir.path(), "layer-1").as_deref(), Some("vdb"));
        assert_eq!(find_disk(dir.path(), "layer-2"), None);
        assert_eq!(find_disk(dir.path(), ""), None);
    }
}
