//! A container's mounts, made with the descriptor-based mount calls.
//!
//! A mount point is found once, inside the root, and the mount is moved onto that very directory
//! (move_mount(2)), so nothing can be exchanged between the check and the mount.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use caisson_wire::agent::{Failure, SHARE_DIR, Stage};
use oci_spec::runtime::Mount;
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use super::copy_up;
use super::mount_options::{self, Options};
use super::root_dir::{Links, RootDir, open_beneath};
use crate::failure::{At, failure, failure_with};
use crate::sys::{MountAttr, Reach, mount_setattr};

/// Keeps this mount namespace's changes to itself.
///
/// # Errors
/// As mount(2).
pub(crate) fn isolate() -> Result<(), Failure> {
    let root = open_path(Path::new("/")).at(Stage::Mounts, || "cannot open /")?;
    let private = MountAttr {
        propagation: libc::MS_PRIVATE,
        ..MountAttr::default()
    };
    mount_setattr(root.as_fd(), Reach::Tree, &private).at(Stage::Mounts, || "cannot make the mounts private")
}

/// Mounts what `mount` describes below `root`.
///
/// # Errors
/// Fails with the stage [`Stage::Mounts`] and the mount's destination in the message.
pub(crate) fn mount(root: &RootDir, mount: &Mount) -> Result<(), Failure> {
    let destination = mount.destination();
    let options = Options::parse(mount.options().iter().flatten().map(String::as_str));
    let mapped = mount.uid_mappings().is_some() || mount.gid_mappings().is_some();
    if mapped || !options.unsupported.is_empty() {
        return Err(failure_with(
            Stage::Mounts,
            Errno::OPNOTSUPP,
            format!(
                "cannot mount {}: mounts with id mappings are not supported",
                destination.display()
            ),
        ));
    }
    let kind = mount.typ().as_deref().unwrap_or("none");
    let source = mount.source().as_deref();
    let tree = if options.bind.is_some() || kind == "bind" {
        let source = source.ok_or_else(|| {
            failure(
                Stage::Mounts,
                format!("the bind mount {} has no source", destination.display()),
            )
        })?;
        let tree = clone_tree(source, options.bind.unwrap_or(Reach::One)).at(Stage::Mounts, || {
            format!("cannot bind {} to {}", source.display(), destination.display())
        })?;
        set_attr(tree.as_fd(), Reach::One, &options.attr, destination)?;
        tree
    } else {
        new_file_system(kind, source, &options, destination)?
    };
    let cannot = || format!("cannot make the mount point {}", destination.display());
    let target = if is_directory(tree.as_fd()).at(Stage::Mounts, cannot)? {
        // A link in place of /proc or /sys would send what is trusted to be there elsewhere.
        let links = if matches!(kind, "proc" | "sysfs") {
            Links::Refuse
        } else {
            Links::Follow
        };
        root.directory(destination, links)
    } else {
        root.file(destination)
    }
    .at(Stage::Mounts, cannot)?;
    if options.copy_up {
        copy_up::copy(target.as_fd(), tree.as_fd()).at(Stage::Mounts, || {
            format!("cannot copy {} up", destination.display())
        })?;
    }
    attach(tree.as_fd(), target.as_fd()).at(Stage::Mounts, || {
        format!("cannot mount {}", destination.display())
    })?;
    set_attr(tree.as_fd(), Reach::Tree, &options.tree_attr, destination)?;
    for (propagation, reach) in options.propagation {
        set_propagation(tree.as_fd(), propagation, reach, destination)?;
    }
    Ok(())
}

/// A new file system as a mount that is not attached yet.
fn new_file_system(
    kind: &str,
    source: Option<&Path>,
    options: &Options,
    destination: &Path,
) -> Result<OwnedFd, Failure> {
    let attr = options.fsmount_attr();
    let result = match kind {
        // The guest has only the unified hierarchy, whatever the configuration expects, and its parameters
        // belong to the hierarchy rather than to this mount.
        "cgroup" | "cgroup2" => create("cgroup2", Some(Path::new("cgroup")), attr, &[]),
        _ => {
            let mut data = options.data.clone();
            // For a block device "read-only" is a property of the file system, not only of the mount.
            if options.read_only() && source.is_some_and(|source| source.starts_with("/dev/")) {
                data.push(("ro".to_owned(), None));
            }
            create(kind, source, attr, &data)
        }
    };
    let shared = match kind {
        "cgroup" | "cgroup2" => Path::new("/sys/fs/cgroup"),
        "sysfs" => Path::new("/sys"),
        _ => Path::new(""),
    };
    match result {
        // Without a cgroup namespace of its own, or without rights over the network namespace, a container
        // cannot have a new instance; then it sees the guest's.
        Err(err)
            if matches!(err.errno, Some(libc::EPERM | libc::EBUSY)) && !shared.as_os_str().is_empty() =>
        {
            let tree = clone_tree(shared, Reach::Tree).at(Stage::Mounts, || {
                format!("cannot bind {} to {}", shared.display(), destination.display())
            })?;
            set_attr(tree.as_fd(), Reach::One, &options.attr, destination)?;
            Ok(tree)
        }
        Err(err) => Err(Failure {
            message: format!(
                "cannot mount {kind} at {}: {}",
                destination.display(),
                err.message
            ),
            ..err
        }),
        Ok(tree) => Ok(tree),
    }
}

/// Creates a file-system instance and a mount of it, attached nowhere.
///
/// # Errors
/// As fsopen(2), fsconfig(2) and fsmount(2); the message says what the file system said, if anything.
pub(crate) fn create(
    kind: &str,
    source: Option<&Path>,
    attr: MountAttrFlags,
    data: &[(String, Option<String>)],
) -> Result<OwnedFd, Failure> {
    use rustix::mount::{fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen};
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).at(Stage::Mounts, || {
        format!("the kernel has no file system {kind:?}")
    })?;
    let configure = || {
        if let Some(source) = source {
            fsconfig_set_string(&context, "source", source)?;
        }
        for (key, value) in data {
            match value {
                Some(value) => fsconfig_set_string(&context, key.as_str(), value.as_str())?,
                None => fsconfig_set_flag(&context, key.as_str())?,
            }
        }
        fsconfig_create(&context)?;
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attr)
    };
    configure().map_err(|errno: Errno| {
        let said = complaint(context.as_fd());
        let cause = crate::failure::plain(&errno.into());
        let message = if said.is_empty() {
            cause
        } else {
            format!("{cause} ({said})")
        };
        failure_with(Stage::Mounts, errno, message)
    })
}

/// What the file system has to say about its failure (fsopen(2): the context is readable).
fn complaint(context: BorrowedFd<'_>) -> String {
    let mut buffer = [0; 512];
    let mut lines = Vec::new();
    while lines.len() < 8 {
        let Ok(count) = rustix::io::read(context, &mut buffer) else {
            break;
        };
        let line = String::from_utf8_lossy(buffer.get(..count).unwrap_or_default()).into_owned();
        // "e " marks an error; warnings and notes do not explain it.
        if let Some(text) = line.strip_prefix("e ") {
            lines.push(text.trim().to_owned());
        }
        if count == 0 {
            break;
        }
    }
    lines.join("; ")
}

/// A copy of the mounts at `source`, attached nowhere.
///
/// Below the shared directory a path is followed only within it, since containers write there.
///
/// # Errors
/// As openat2(2) and open_tree(2).
pub(crate) fn clone_tree(source: &Path, reach: Reach) -> io::Result<OwnedFd> {
    let found = match source.strip_prefix(SHARE_DIR) {
        Ok(rest) => open_beneath(Path::new(SHARE_DIR), rest)?,
        Err(_) => open_path(source)?,
    };
    clone_tree_of(found.as_fd(), reach)
}

/// A copy of the mounts at an open file, attached nowhere.
///
/// # Errors
/// As open_tree(2).
pub(crate) fn clone_tree_of(source: BorrowedFd<'_>, reach: Reach) -> io::Result<OwnedFd> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if reach == Reach::Tree {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(rustix::mount::open_tree(source, "", flags)?)
}

/// Attaches a mount to what `target` refers to.
///
/// # Errors
/// As move_mount(2).
pub(crate) fn attach(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::mount::move_mount(
        tree,
        "",
        target,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )?)
}

/// Hides `path`, if it is there: a directory under an empty one, anything else under `/dev/null`.
///
/// # Errors
/// As the mount calls.
pub(crate) fn mask(root: &RootDir, path: &Path) -> Result<(), Failure> {
    let cannot = || format!("cannot mask {}", path.display());
    let target = match root.find(path) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        other => other.at(Stage::Mounts, cannot)?,
    };
    let cover = if is_directory(target.as_fd()).at(Stage::Mounts, cannot)? {
        let data = [("nr_inodes".to_owned(), Some("1".to_owned()))];
        create(
            "tmpfs",
            Some(Path::new("tmpfs")),
            MountAttrFlags::MOUNT_ATTR_RDONLY,
            &data,
        )?
    } else {
        clone_tree(Path::new("/dev/null"), Reach::One).at(Stage::Mounts, cannot)?
    };
    attach(cover.as_fd(), target.as_fd()).at(Stage::Mounts, cannot)
}

/// Makes `path`, if it is there, and everything mounted below it read-only.
///
/// # Errors
/// As the mount calls.
pub(crate) fn make_read_only(root: &RootDir, path: &Path) -> Result<(), Failure> {
    let cannot = || format!("cannot make {} read-only", path.display());
    let target = match root.find(path) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        other => other.at(Stage::Mounts, cannot)?,
    };
    let tree = clone_tree_of(target.as_fd(), Reach::Tree).at(Stage::Mounts, cannot)?;
    let read_only = MountAttr::set(MountAttrFlags::MOUNT_ATTR_RDONLY);
    mount_setattr(tree.as_fd(), Reach::Tree, &read_only).at(Stage::Mounts, cannot)?;
    attach(tree.as_fd(), target.as_fd()).at(Stage::Mounts, cannot)
}

/// Makes the root mount itself read-only, and nothing below it.
///
/// # Errors
/// As mount_setattr(2).
pub(crate) fn make_root_read_only(root: &RootDir) -> Result<(), Failure> {
    let read_only = MountAttr::set(MountAttrFlags::MOUNT_ATTR_RDONLY);
    mount_setattr(root.as_fd(), Reach::One, &read_only)
        .at(Stage::Mounts, || "cannot make the root file system read-only")
}

/// Makes `root` the root of this mount namespace and lets go of everything else in it.
///
/// # Errors
/// As pivot_root(2).
pub(crate) fn pivot(root: &RootDir) -> Result<(), Failure> {
    let old = open_path(Path::new("/")).at(Stage::Root, || "cannot open /")?;
    let steps = || -> rustix::io::Result<()> {
        rustix::process::fchdir(root)?;
        // With both names the same, the old root ends up mounted over the new one (pivot_root(2), NOTES).
        rustix::process::pivot_root(".", ".")?;
        rustix::process::fchdir(&old)?;
        rustix::mount::unmount(".", UnmountFlags::DETACH)?;
        rustix::process::chdir("/")
    };
    steps().at(Stage::Root, || "cannot make the root file system the root")
}

/// Applies OCI's `rootfsPropagation` to the root of this mount namespace.
///
/// # Errors
/// Fails for an unknown word, and as mount_setattr(2).
pub(crate) fn propagate_root(name: &str) -> Result<(), Failure> {
    let (propagation, reach) = mount_options::propagation(name).ok_or_else(|| {
        failure_with(
            Stage::Root,
            Errno::INVAL,
            format!("unknown root propagation {name:?}"),
        )
    })?;
    let root = open_path(Path::new("/")).at(Stage::Root, || "cannot open /")?;
    set_propagation(root.as_fd(), propagation, reach, Path::new("/"))
}

/// Whether the configuration binds something to `/dev`, so that it is not ours to fill.
pub(crate) fn binds_dev(mounts: &[Mount]) -> bool {
    mounts.iter().any(|mount| {
        let is_bind = mount.typ().as_deref() == Some("bind")
            || mount
                .options()
                .iter()
                .flatten()
                .any(|option| option == "bind" || option == "rbind");
        is_bind
            && mount
                .destination()
                .components()
                .eq(PathBuf::from("/dev").components())
    })
}

fn set_attr(tree: BorrowedFd<'_>, reach: Reach, attr: &MountAttr, at: &Path) -> Result<(), Failure> {
    if *attr == MountAttr::default() {
        return Ok(());
    }
    mount_setattr(tree, reach, attr).at(Stage::Mounts, || {
        format!("cannot set the attributes of the mount {}", at.display())
    })
}

fn set_propagation(tree: BorrowedFd<'_>, propagation: u64, reach: Reach, at: &Path) -> Result<(), Failure> {
    let attr = MountAttr {
        propagation,
        ..MountAttr::default()
    };
    mount_setattr(tree, reach, &attr).at(Stage::Mounts, || {
        format!("cannot set the propagation of the mount {}", at.display())
    })
}

fn is_directory(fd: BorrowedFd<'_>) -> rustix::io::Result<bool> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode) == FileType::Directory)
}

fn open_path(path: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}
