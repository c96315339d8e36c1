//! Fills a new tmpfs with what it is about to cover (the mount option `tmpcopyup`).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Uid};

/// Copies what is in the directory `from` into the directory `to`: files, directories, links and nodes with
/// their owners and modes.
///
/// # Errors
/// Fails if something cannot be read or made, or the tree is deeper than 64 directories.
pub(crate) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let stat = rustix::fs::fstat(from)?;
    let to = directory(to, c".")?;
    rustix::fs::fchown(
        &to,
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
    )?;
    rustix::fs::fchmod(&to, Mode::from_raw_mode(stat.st_mode))?;
    copy_entries(directory(from, c".")?, to.as_fd(), DEEPEST)
}

fn copy_entries(from: OwnedFd, to: BorrowedFd<'_>, depth: u32) -> io::Result<()> {
    let depth = depth
        .checked_sub(1)
        .ok_or_else(|| io::Error::other("the directories are nested too deeply"))?;
    for entry in Dir::read_from(&from)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let stat = rustix::fs::statat(&from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let mode = Mode::from_raw_mode(stat.st_mode);
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                rustix::fs::mkdirat(to, name, mode)?;
                copy_entries(
                    directory(from.as_fd(), name)?,
                    directory(to, name)?.as_fd(),
                    depth,
                )?;
            }
            FileType::RegularFile => {
                let flags = OFlags::CLOEXEC | OFlags::NOFOLLOW;
                let source = rustix::fs::openat(&from, name, flags | OFlags::RDONLY, Mode::empty())?;
                let flags = flags | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                let target = rustix::fs::openat(to, name, flags, mode)?;
                io::copy(&mut std::fs::File::from(source), &mut std::fs::File::from(target))?;
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(&from, name, Vec::new())?;
                rustix::fs::symlinkat(target, to, name)?;
            }
            kind => rustix::fs::mknodat(to, name, kind, mode, stat.st_rdev)?,
        }
        rustix::fs::chownat(
            to,
            name,
            Some(Uid::from_raw(stat.st_uid)),
            Some(Gid::from_raw(stat.st_gid)),
            AtFlags::SYMLINK_NOFOLLOW,
        )?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
            // After chown, which clears the set-user-id bits.
            rustix::fs::chmodat(to, name, mode, AtFlags::empty())?;
        }
    }
    Ok(())
}

fn directory(base: BorrowedFd<'_>, name: &std::ffi::CStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::openat(base, name, flags, Mode::empty())?)
}

const DEEPEST: u32 = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn a_tree_is_copied_with_its_modes_and_links() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(from.path().join("d")).unwrap();
        fs::write(from.path().join("d/f"), "text").unwrap();
        fs::set_permissions(from.path().join("d/f"), fs::Permissions::from_mode(0o640)).unwrap();
        symlink("d/f", from.path().join("l")).unwrap();

        let (a, b) = (
            fs::File::open(from.path()).unwrap(),
            fs::File::open(to.path()).unwrap(),
        );
        copy(a.as_fd(), b.as_fd()).unwrap();

        assert_eq!(fs::read_to_string(to.path().join("l")).unwrap(), "text");
        let mode = fs::metadata(to.path().join("d/f")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o640);
    }
}
