//! Paths inside a container's root file system, none of which can lead out of it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, Dev, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// The root directory of a container under construction.
///
/// Every path is resolved by the kernel as if this were `/` (openat2(2), `RESOLVE_IN_ROOT`): links in the
/// image, absolute ones too, stay inside.
#[derive(Debug)]
pub(crate) struct RootDir(OwnedFd);

/// Whether links may occur in a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Links {
    /// Followed, inside the root.
    Follow,
    /// An error.
    Refuse,
}

impl RootDir {
    /// The root directory that `fd` refers to.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Opens what is at `path`, for use as the object of other calls only.
    ///
    /// # Errors
    /// As openat2(2).
    pub(crate) fn find(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        self.open(path, OFlags::PATH, Links::Follow)
    }

    /// Opens `path`, with `flags` added to `O_CLOEXEC`.
    ///
    /// # Errors
    /// As openat2(2).
    pub(crate) fn open(&self, path: &Path, flags: OFlags, links: Links) -> rustix::io::Result<OwnedFd> {
        let mut resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        if links == Links::Refuse {
            resolve |= ResolveFlags::NO_SYMLINKS;
        }
        openat2(self.0.as_fd(), path, flags, resolve)
    }

    /// The directory at `path`, made with everything above it if it is missing.
    ///
    /// # Errors
    /// Fails if something on the way is no directory, or cannot be made.
    pub(crate) fn directory(&self, path: &Path, links: Links) -> rustix::io::Result<OwnedFd> {
        let mut built = PathBuf::new();
        let mut last = self.open(Path::new("/"), OFlags::PATH | OFlags::DIRECTORY, links)?;
        for component in path.components() {
            let Component::Normal(name) = component else {
                if component == Component::ParentDir {
                    return Err(Errno::INVAL); // would mean something else once a link is on the way
                }
                continue;
            };
            built.push(name);
            let flags = OFlags::PATH | OFlags::DIRECTORY;
            last = match self.open(&built, flags, links) {
                Err(Errno::NOENT) => {
                    match rustix::fs::mkdirat(&last, name, Mode::from_raw_mode(0o755)) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(err) => return Err(err),
                    }
                    self.open(&built, flags, links)?
                }
                other => other?,
            };
        }
        Ok(last)
    }

    /// The file or other non-directory at `path`, made as an empty file if it is missing.
    ///
    /// # Errors
    /// Fails if a directory on the way cannot be made, or the file.
    pub(crate) fn file(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        match self.find(path) {
            Err(Errno::NOENT) => {}
            other => return other,
        }
        let (parent, name) = self.parent(path)?;
        match rustix::fs::openat(
            &parent,
            &name,
            OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
            Mode::from_raw_mode(0o644),
        ) {
            Ok(_) | Err(Errno::EXIST) => self.find(path),
            Err(err) => Err(err),
        }
    }

    /// Makes a device node or FIFO; one that is there already and is the same is kept.
    ///
    /// # Errors
    /// Fails if the node cannot be made, or something else is in its place.
    pub(crate) fn node(
        &self,
        path: &Path,
        kind: FileType,
        mode: Mode,
        device: Dev,
    ) -> rustix::io::Result<OwnedFd> {
        let (parent, name) = self.parent(path)?;
        match rustix::fs::mknodat(&parent, &name, kind, mode, device) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(err) => return Err(err),
        }
        let node = openat2(
            parent.as_fd(),
            &name,
            OFlags::PATH | OFlags::NOFOLLOW,
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
        )?;
        let stat = rustix::fs::fstat(&node)?;
        let same = FileType::from_raw_mode(stat.st_mode) == kind
            && (kind == FileType::Fifo || stat.st_rdev == device);
        if same { Ok(node) } else { Err(Errno::EXIST) }
    }

    /// Makes a symbolic link, unless something is there.
    ///
    /// # Errors
    /// As symlinkat(2).
    pub(crate) fn link(&self, path: &Path, target: &str) -> rustix::io::Result<()> {
        let (parent, name) = self.parent(path)?;
        match rustix::fs::symlinkat(target, &parent, &name) {
            Err(Errno::EXIST) => Ok(()),
            other => other,
        }
    }

    /// Removes a file that is no directory; a missing one is fine.
    ///
    /// # Errors
    /// As unlinkat(2).
    pub(crate) fn remove(&self, path: &Path) -> rustix::io::Result<()> {
        let (parent, name) = self.parent(path)?;
        match rustix::fs::unlinkat(&parent, &name, AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(()),
            other => other,
        }
    }

    /// The directory that holds the last component of `path`, made if it is missing, and that component.
    fn parent(&self, path: &Path) -> rustix::io::Result<(OwnedFd, PathBuf)> {
        let name = path.file_name().ok_or(Errno::INVAL)?;
        let parent = path.parent().ok_or(Errno::INVAL)?;
        Ok((self.directory(parent, Links::Follow)?, name.into()))
    }
}

impl AsFd for RootDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Opens a path that was given relative to `base` and stays below it.
///
/// # Errors
/// As openat2(2); `EXDEV` for a path that leads out.
pub(crate) fn open_beneath(base: &Path, path: &Path) -> io::Result<OwnedFd> {
    let base = rustix::fs::open(
        base,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    Ok(openat2(
        base.as_fd(),
        path,
        OFlags::PATH,
        ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
    )?)
}

/// openat2(2), tried again when a rename elsewhere kept the kernel from proving that the path stays inside.
fn openat2(
    base: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    resolve: ResolveFlags,
) -> rustix::io::Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC;
    for _ in 0..ATTEMPTS {
        match rustix::fs::openat2(base, path, flags, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
    Err(Errno::AGAIN)
}

/// openat2(2) says to retry `EAGAIN`; a container that renames without pause must not hold us for ever.
const ATTEMPTS: u32 = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn root() -> (tempfile::TempDir, RootDir) {
        let dir = tempfile::tempdir().unwrap();
        let fd = rustix::fs::open(dir.path(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        (dir, RootDir::new(fd))
    }

    #[test]
    fn missing_directories_are_made() {
        let (dir, root) = root();
        root.directory(Path::new("/a/b/c"), Links::Refuse).unwrap();
        assert!(dir.path().join("a/b/c").is_dir());
    }

    #[test]
    fn an_absolute_link_is_followed_inside_the_root() {
        let (dir, root) = root();
        fs::create_dir_all(dir.path().join("etc")).unwrap();
        symlink("/etc", dir.path().join("link")).unwrap();
        root.file(Path::new("/link/made-here")).unwrap();
        assert!(dir.path().join("etc/made-here").is_file());
        assert!(!Path::new("/etc/made-here").exists());
    }

    #[test]
    fn a_link_that_climbs_stays_inside_the_root() {
        let (dir, root) = root();
        symlink("../../../../../..", dir.path().join("up")).unwrap();
        root.directory(Path::new("/up/made"), Links::Follow).unwrap();
        assert!(dir.path().join("made").is_dir());
    }

    #[test]
    fn a_link_is_refused_where_none_may_be() {
        let (dir, root) = root();
        fs::create_dir(dir.path().join("real")).unwrap();
        symlink("real", dir.path().join("proc")).unwrap();
        assert_eq!(
            root.directory(Path::new("/proc"), Links::Refuse).unwrap_err(),
            Errno::LOOP
        );
    }

    #[test]
    fn parent_components_are_refused() {
        let (_dir, root) = root();
        assert_eq!(
            root.directory(Path::new("/a/../../b"), Links::Follow)
                .unwrap_err(),
            Errno::INVAL
        );
    }

    #[test]
    fn a_source_cannot_lead_out_of_its_base() {
        let (dir, _root) = root();
        symlink("/etc", dir.path().join("out")).unwrap();
        assert!(open_beneath(dir.path(), Path::new("out/passwd")).is_err());
        assert!(open_beneath(dir.path(), Path::new("..")).is_err());
        open_beneath(dir.path(), Path::new("")).unwrap();
    }

    #[test]
    fn a_file_in_place_of_a_node_is_an_error() {
        let (dir, root) = root();
        fs::write(dir.path().join("null"), "").unwrap();
        assert_eq!(
            root.node(
                Path::new("/null"),
                FileType::CharacterDevice,
                Mode::from_raw_mode(0o666),
                rustix::fs::makedev(1, 3)
            )
            .unwrap_err(),
            Errno::EXIST
        );
    }
}
