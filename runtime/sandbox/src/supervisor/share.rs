//! The directory that the guest sees, built of mounts that no other process of the host sees.
//!
//! **Invariant: no mount of ours is ever visible on the host.** The supervisor enters a mount namespace of its
//! own, to which the host's later changes come and from which none goes, before it mounts anything. When its
//! processes end, the kernel takes the mounts away; there is nothing to clean up.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, mkdirat, openat2, statat};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change,
    move_mount, open_tree, unmount,
};

use crate::plan::Bind;

/// Bytes the share's own tmpfs may hold: names and empty files to mount on.
const SIZE: &std::ffi::CStr = c"mode=0700,size=4m";

/// A bind that cannot be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShareError {
    #[error("cannot make a mount namespace; the supervisor must run as root")]
    Namespace(#[source] io::Error),
    #[error("cannot mount the shared directory at {}", path.display())]
    Mount {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the target {0:?} is not a plain path below the shared directory")]
    Target(String),
    #[error("cannot share {} with the guest: cannot {verb}", source_path.display())]
    Bind {
        source_path: PathBuf,
        verb: &'static str,
        #[source]
        source: io::Error,
    },
}

/// The shared directory.
#[derive(Debug)]
pub(crate) struct Share {
    path: PathBuf,
    /// As the guest has it: the top is read-only, so that nobody but us makes or moves a place to mount on.
    directory: OwnedFd,
    /// The same file system once more, attached nowhere, to make those places through.
    writable: OwnedFd,
}

/// Enters a mount namespace of this process's own. For a process with one thread.
pub(crate) fn enter_private_mounts() -> Result<(), ShareError> {
    crate::sys::unshare_mounts().map_err(ShareError::Namespace)?;
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", flags).map_err(|err| ShareError::Namespace(err.into()))
}

impl Share {
    /// Mounts an empty shared directory at `path`, which is made if need be.
    pub(crate) fn create(path: &Path) -> Result<Self, ShareError> {
        let make = || -> io::Result<(OwnedFd, OwnedFd)> {
            match mkdirat(CWD, path, Mode::RWXU) {
                Err(rustix::io::Errno::EXIST) | Ok(()) => {}
                Err(err) => return Err(err.into()),
            }
            let flags = MountFlags::NOSUID | MountFlags::NODEV;
            mount(c"caisson", path, c"tmpfs", flags, SIZE)?;
            // Shared with the vmm process's namespace alone: both are below the change to slaves.
            mount_change(path, MountPropagationFlags::SHARED)?;
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let writable = open_tree(CWD, path, flags)?;
            let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
            let directory = rustix::fs::open(path, flags, Mode::empty())?;
            crate::sys::make_read_only(&directory, false)?;
            Ok((directory, writable))
        };
        let (directory, writable) = make().map_err(|source| ShareError::Mount {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
            directory,
            writable,
        })
    }

    /// The directory, open, for the vmm process. What is bound later appears below it.
    pub(crate) fn directory(&self) -> io::Result<OwnedFd> {
        self.directory.try_clone()
    }

    /// Binds what a container needs, in order; on an error nothing of it stays.
    pub(crate) fn bind_all(&self, binds: &[Bind]) -> Result<(), ShareError> {
        for (done, bind) in binds.iter().enumerate() {
            if let Err(err) = self.bind(bind) {
                self.unbind_all(binds.iter().take(done).map(|bind| bind.target.as_str()));
                return Err(err);
            }
        }
        Ok(())
    }

    /// Takes binds away again, the last first. Whatever uses one keeps it until it is closed.
    pub(crate) fn unbind_all<'a>(&self, targets: impl DoubleEndedIterator<Item = &'a str>) {
        for target in targets.rev() {
            let Ok(target) = plain(target) else { continue };
            let path = self.path.join(&target);
            if let Err(err) = unmount(&path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                tracing::warn!(path = %path.display(), error = %err, "could not take a shared directory away");
            }
        }
    }

    fn bind(&self, bind: &Bind) -> Result<(), ShareError> {
        let failed = |verb| {
            move |err: rustix::io::Errno| ShareError::Bind {
                source_path: bind.source.clone(),
                verb,
                source: err.into(),
            }
        };
        let target = plain(&bind.target)?;
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        if bind.recursive {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let tree = open_tree(CWD, &bind.source, flags).map_err(failed("open it"))?;
        if bind.read_only {
            crate::sys::make_read_only(&tree, bind.recursive).map_err(|err| ShareError::Bind {
                source_path: bind.source.clone(),
                verb: "make it read-only",
                source: err,
            })?;
        }
        let stat = statat(&tree, c"", AtFlags::EMPTY_PATH).map_err(failed("look at it"))?;
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let at = self
            .make_target(&target, is_directory)
            .map_err(failed("make its place"))?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&tree, c"", &at, c"", flags).map_err(failed("mount it"))
    }

    /// Makes the directory or file to mount on, and its parents, and opens it: below the share and never
    /// through a link. A target below an earlier bind must be there already.
    fn make_target(&self, target: &Path, is_directory: bool) -> rustix::io::Result<OwnedFd> {
        let beneath = |root: &OwnedFd, path: &Path, flags| {
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
            openat2(
                root,
                path,
                flags | OFlags::PATH | OFlags::CLOEXEC,
                Mode::empty(),
                resolve,
            )
        };
        if let Ok(there) = beneath(&self.directory, target, OFlags::empty()) {
            return Ok(there);
        }
        let mut parent = PathBuf::new();
        let mut open = beneath(&self.writable, Path::new("."), OFlags::DIRECTORY)?;
        let names: Vec<_> = target.components().collect();
        let Some((last, parents)) = names.split_last() else {
            return Err(rustix::io::Errno::INVAL);
        };
        for name in parents {
            make(mkdirat(&open, name.as_os_str(), Mode::RWXU))?;
            parent.push(name);
            open = beneath(&self.writable, &parent, OFlags::DIRECTORY)?;
        }
        if is_directory {
            make(mkdirat(&open, last.as_os_str(), Mode::RWXU))?;
        } else {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            make(rustix::fs::openat(&open, last.as_os_str(), flags, Mode::RUSR).map(drop))?;
        }
        beneath(&self.directory, target, OFlags::empty())
    }
}

fn make(outcome: rustix::io::Result<()>) -> rustix::io::Result<()> {
    match outcome {
        Err(rustix::io::Errno::EXIST) => Ok(()),
        other => other,
    }
}

/// A path of plain names below the share.
fn plain(target: &str) -> Result<PathBuf, ShareError> {
    let path = Path::new(target);
    let is_plain = path.components().all(|name| matches!(name, Component::Normal(_)));
    if target.is_empty() || !is_plain {
        return Err(ShareError::Target(target.to_owned()));
    }
    Ok(path.components().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn bind(source: &Path, target: &str, read_only: bool) -> Bind {
        Bind {
            source: source.to_owned(),
            target: target.to_owned(),
            read_only,
            recursive: true,
        }
    }

    /// Each test's thread gets a mount namespace of its own.
    fn share(at: &Path) -> Share {
        enter_private_mounts().unwrap();
        Share::create(at).unwrap()
    }

    #[test]
    fn what_is_bound_appears_below_the_directory_and_nowhere_on_the_host() {
        let home = tempfile::tempdir().unwrap();
        let source = tempfile::tempdir().unwrap();
        fs::write(source.path().join("file"), "content").unwrap();
        let at = home.path().join("share");
        let (bound, checked) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let share = share(&at);
                share.bind_all(&[bind(source.path(), "c/rootfs", false)]).unwrap();
                assert_eq!(fs::read_to_string(at.join("c/rootfs/file")).unwrap(), "content");
                bound.wait();
                checked.wait();
            });
            bound.wait();
            let outside = fs::read_dir(&at).unwrap().count();
            checked.wait();
            assert_eq!(outside, 0);
        });
    }

    #[test]
    fn the_guest_cannot_make_places_of_its_own_beside_the_binds() {
        let home = tempfile::tempdir().unwrap();
        let source = tempfile::tempdir().unwrap();
        let at = home.path().join("share");
        let share = share(&at);
        share.bind_all(&[bind(source.path(), "c/rootfs", false)]).unwrap();
        assert!(fs::create_dir(at.join("x")).is_err());
        assert!(fs::rename(at.join("c"), at.join("d")).is_err());
        fs::create_dir(at.join("c/rootfs/x")).unwrap();
        share.unbind_all(["c/rootfs"].into_iter());
        assert_eq!(fs::read_dir(at.join("c/rootfs")).unwrap().count(), 0);
    }

    #[test]
    fn a_read_only_bind_takes_no_write_and_a_file_can_be_bound() {
        let home = tempfile::tempdir().unwrap();
        let source = tempfile::tempdir().unwrap();
        fs::write(source.path().join("file"), "content").unwrap();
        let at = home.path().join("share");
        let share = share(&at);
        let file = source.path().join("file");
        share
            .bind_all(&[bind(source.path(), "ro", true), bind(&file, "etc/one", false)])
            .unwrap();
        let err = fs::write(at.join("ro/file"), "x").unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::ReadOnlyFilesystem);
        fs::write(at.join("etc/one"), "changed").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "changed");
    }

    #[test]
    fn a_failing_bind_takes_those_before_it_away() {
        let home = tempfile::tempdir().unwrap();
        let source = tempfile::tempdir().unwrap();
        fs::write(source.path().join("file"), "content").unwrap();
        let at = home.path().join("share");
        let share = share(&at);
        let missing = source.path().join("missing");
        let err = share.bind_all(&[bind(source.path(), "a", false), bind(&missing, "b", false)]);
        assert!(
            matches!(err, Err(ShareError::Bind { verb: "open it", .. })),
            "{err:?}"
        );
        assert!(!at.join("a/file").exists());
    }

    #[test]
    fn a_target_never_leads_outside_nor_through_a_link() {
        let home = tempfile::tempdir().unwrap();
        let source = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/tmp", source.path().join("link")).unwrap();
        let share = share(&home.path().join("share"));
        for target in ["", "/etc", "../x", "a/../../x", "./a"] {
            assert!(
                share.bind(&bind(source.path(), target, false)).is_err(),
                "{target}"
            );
        }
        share.bind(&bind(source.path(), "c", false)).unwrap();
        assert!(share.bind(&bind(source.path(), "c/link/x", false)).is_err());
        assert!(!source.path().join("x").exists());
    }
}
