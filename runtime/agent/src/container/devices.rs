//! What is in a container's `/dev` (runtime-spec, config-linux.md, "Default Devices").

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use caisson_wire::agent::{Failure, Stage};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use rustix::fs::{Dev, FileType, Gid, Mode, Uid, makedev};
use rustix::io::Errno;

use super::mounts;
use super::root_dir::RootDir;
use crate::failure::{At, failure_with};
use crate::sys::Reach;

/// Makes the default devices and links, and those that the configuration adds.
///
/// # Errors
/// Fails with the stage [`Stage::Devices`] and the device's path in the message.
pub(crate) fn populate(root: &RootDir, devices: &[LinuxDevice]) -> Result<(), Failure> {
    for (name, minor_of) in DEFAULT_NODES {
        let node = Node {
            path: Path::new("/dev").join(name),
            kind: FileType::CharacterDevice,
            device: makedev(minor_of.0, minor_of.1),
            mode: Mode::from_raw_mode(0o666),
            owner: (0, 0),
        };
        // One that the configuration describes itself is made once, as described.
        if !devices.iter().any(|device| *device.path() == node.path) {
            make(root, &node)?;
        }
    }
    for device in devices {
        make(root, &Node::of(device)?)?;
    }
    for (name, target) in LINKS {
        let path = Path::new("/dev").join(name);
        root.link(&path, target).at(Stage::Devices, || {
            format!("cannot create the link {}", path.display())
        })?;
    }
    let ptmx = Path::new("/dev/ptmx");
    // A node here would be of the guest's terminals rather than of the container's own.
    root.remove(ptmx)
        .and_then(|()| root.link(ptmx, "pts/ptmx"))
        .at(Stage::Devices, || "cannot create the link /dev/ptmx")
}

/// A device node to make.
#[derive(Debug, PartialEq)]
struct Node {
    path: PathBuf,
    kind: FileType,
    device: Dev,
    mode: Mode,
    owner: (u32, u32),
}

impl Node {
    fn of(device: &LinuxDevice) -> Result<Self, Failure> {
        let path = device.path().clone();
        let refuse = |what: &str| {
            let text = format!("cannot create the device {}: {what}", path.display());
            failure_with(Stage::Devices, Errno::INVAL, text)
        };
        let kind = match device.typ() {
            LinuxDeviceType::B => FileType::BlockDevice,
            LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
            LinuxDeviceType::P => FileType::Fifo,
            LinuxDeviceType::A => return Err(refuse("\"a\" is no type of a node")),
        };
        let number = |value: i64| u32::try_from(value).map_err(|_| refuse("its numbers are out of range"));
        let device_number = match kind {
            FileType::Fifo => 0,
            _ => makedev(number(device.major())?, number(device.minor())?),
        };
        Ok(Self {
            kind,
            device: device_number,
            mode: Mode::from_raw_mode(device.file_mode().unwrap_or(0o666) & 0o7777),
            owner: (device.uid().unwrap_or(0), device.gid().unwrap_or(0)),
            path,
        })
    }
}

fn make(root: &RootDir, node: &Node) -> Result<(), Failure> {
    let cannot = || format!("cannot create the device {}", node.path.display());
    let made = match root.node(&node.path, node.kind, node.mode, node.device) {
        // In a user namespace, or on a file system of the host, there are no nodes to make; the guest's own
        // can be bound instead, if it has it under the same name.
        Err(Errno::PERM | Errno::OPNOTSUPP) => return bind(root, node),
        other => other.at(Stage::Devices, cannot)?,
    };
    let fix = || -> rustix::io::Result<()> {
        let (uid, gid) = (Uid::from_raw(node.owner.0), Gid::from_raw(node.owner.1));
        rustix::fs::chownat(&made, "", Some(uid), Some(gid), rustix::fs::AtFlags::EMPTY_PATH)?;
        // The mode again, since mknod(2) has taken the umask away. `made` is no link: the node was opened
        // without following any.
        rustix::fs::chmod(
            format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&made)),
            node.mode,
        )
    };
    fix().at(Stage::Devices, cannot)
}

fn bind(root: &RootDir, node: &Node) -> Result<(), Failure> {
    let cannot = || format!("cannot bind the device {}", node.path.display());
    let source = mounts::clone_tree(&node.path, Reach::One).at(Stage::Devices, cannot)?;
    let stat = rustix::fs::fstat(&source).at(Stage::Devices, cannot)?;
    if FileType::from_raw_mode(stat.st_mode) != node.kind || stat.st_rdev != node.device {
        return Err(Errno::NODEV).at(Stage::Devices, cannot);
    }
    let target = root.file(&node.path).at(Stage::Devices, cannot)?;
    mounts::attach(source.as_fd(), target.as_fd()).at(Stage::Devices, cannot)
}

/// Name, major and minor number (Documentation/admin-guide/devices.txt).
const DEFAULT_NODES: [(&str, (u32, u32)); 6] = [
    ("null", (1, 3)),
    ("zero", (1, 5)),
    ("full", (1, 7)),
    ("random", (1, 8)),
    ("urandom", (1, 9)),
    ("tty", (5, 0)),
];

const LINKS: [(&str, &str); 4] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn device(json: &str) -> LinuxDevice {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_configured_device_keeps_its_numbers_mode_and_owner() {
        let node = Node::of(&device(
            r#"{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438, "uid": 1, "gid": 2}"#,
        ))
        .unwrap();
        assert_eq!(
            node,
            Node {
                path: "/dev/fuse".into(),
                kind: FileType::CharacterDevice,
                device: makedev(10, 229),
                mode: Mode::from_raw_mode(0o666),
                owner: (1, 2),
            }
        );
    }

    #[test]
    fn numbers_out_of_range_and_the_type_for_all_are_refused() {
        for json in [
            r#"{"path": "/dev/x", "type": "c", "major": -1, "minor": 0}"#,
            r#"{"path": "/dev/x", "type": "a", "major": 1, "minor": 1}"#,
        ] {
            assert_eq!(Node::of(&device(json)).unwrap_err().stage, Stage::Devices);
        }
    }
}
