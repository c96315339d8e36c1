//! A root directory with nothing in it.

use std::io;
use std::path::Path;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change,
    mount_move, mount_remount, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, chroot, pivot_root};

/// Where the new root is mounted first: a directory that every Linux system has.
const AT: &str = "/proc";

/// Makes an empty read-only tmpfs the root of this process's mount namespace, and takes all else away.
pub(super) fn enter_empty() -> io::Result<()> {
    enter(|| Ok(()))
}

/// Gives the calling process a mount namespace of its own whose root holds `paths` read-only, at their own
/// places, and a `/proc` that shows this process alone; nothing else.
///
/// For a child that is to become another program, between fork and exec of a process with one thread.
///
/// # Errors
/// Fails without `CAP_SYS_ADMIN`.
pub fn enter_with(paths: &[&Path]) -> io::Result<()> {
    super::sys::unshare_mounts()?;
    mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )?;
    let mut trees = Vec::new();
    for path in paths {
        // As a link is copied as one, `/lib` still means `/usr/lib` where that is so.
        match std::fs::symlink_metadata(path) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => {}
            Err(err) => return Err(err),
            Ok(found) if found.is_symlink() => trees.push((*path, Entry::Link(std::fs::read_link(path)?))),
            Ok(found) => {
                let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
                let tree = open_tree(CWD, *path, flags)?;
                trees.push((*path, Entry::Tree(tree, found.is_dir())));
            }
        }
    }
    enter(|| {
        for (path, entry) in trees {
            let inside = Path::new(".").join(path.strip_prefix("/").unwrap_or(path));
            if let Some(parent) = inside.parent() {
                std::fs::create_dir_all(parent)?;
            }
            match entry {
                Entry::Link(to) => std::os::unix::fs::symlink(to, &inside)?,
                Entry::Tree(tree, is_directory) => {
                    match is_directory {
                        true => std::fs::create_dir_all(&inside)?,
                        false => drop(std::fs::File::create(&inside)?),
                    }
                    move_mount(&tree, "", CWD, &inside, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
                    let flags =
                        MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
                    mount_remount(&inside, flags, "")?;
                }
            }
        }
        std::fs::create_dir("proc")?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
        // Linux before 5.8 knows no subset; all that is here is this PID namespace then.
        mount("proc", "proc", "proc", flags, c"subset=pid")
            .or_else(|_| mount("proc", "proc", "proc", flags, None))?;
        Ok(())
    })
}

enum Entry {
    Link(std::path::PathBuf),
    Tree(rustix::fd::OwnedFd, bool),
}

/// Mounts a tmpfs, lets `fill` work in it as the current directory, and makes it the root, read-only.
fn enter(fill: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("caisson", AT, "tmpfs", flags, c"mode=0555,size=64k,nr_inodes=64")?;
    chdir(AT)?;
    fill()?;
    match pivot_root(".", ".") {
        Ok(()) => unmount(".", UnmountFlags::DETACH)?,
        // The root of an initramfs cannot be exchanged; it is covered, and nothing leads below the cover.
        Err(Errno::INVAL) => {
            mount_move(".", "/")?;
            chroot(".")?;
        }
        Err(err) => return Err(err.into()),
    }
    chdir("/")?;
    mount_remount("/", flags | MountFlags::BIND | MountFlags::RDONLY, "")?;
    Ok(())
}
