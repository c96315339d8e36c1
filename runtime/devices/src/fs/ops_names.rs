//! Operations on names and attributes: everything that is done without opening a file.

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, Uid, XattrFlags, chmodat,
    chownat, fgetxattr, fgetxattr_query, flistxattr, flistxattr_query, fremovexattr, fsetxattr, fstatvfs,
    ftruncate, linkat, mkdirat, mknodat, openat, readlinkat, renameat_with, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use super::abi::{
    AttrOut, BatchForgetIn, EntryOut, ForgetIn, ForgetOne, GETATTR_HANDLE, GetattrIn, GetxattrIn,
    GetxattrOut, LinkIn, MkdirIn, MknodIn, Rename2In, RenameIn, SetattrIn, SetxattrIn, StatfsOut, set,
};
use super::nodes::{kind, name, open_path, stat, text};
use super::ops_io::strip_privilege;
use super::server::{Caller, Reply, Server, number, take};

/// Most bytes of an extended attribute and of a list of them (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const XATTR: usize = 64 * 1024;
/// `UTIME_NOW` and `UTIME_OMIT` of `utimensat(2)`.
const NOW: i64 = 0x3fff_ffff;
const OMIT: i64 = 0x3fff_fffe;

impl Server {
    pub(super) fn lookup(&mut self, caller: Caller, bytes: &[u8]) -> Result<Reply, Errno> {
        let (name, _) = name(bytes)?;
        let (node, stat) = self.nodes.lookup(caller.node, name)?;
        Reply::of(self.entry(caller.node, node, &stat))
    }

    pub(super) fn forget(&mut self, caller: Caller, bytes: &[u8]) -> Result<Reply, Errno> {
        if let Ok((request, _)) = take::<ForgetIn>(bytes) {
            self.nodes.forget(caller.node, request.lookups.get());
        }
        Ok(Reply::Silent)
    }

    pub(super) fn forget_many(&mut self, bytes: &[u8]) -> Result<Reply, Errno> {
        if let Ok((request, mut rest)) = take::<BatchForgetIn>(bytes) {
            for _ in 0..request.count.get() {
                let Ok((one, more)) = take::<ForgetOne>(rest) else {
                    break;
                };
                self.nodes.forget(one.node.get(), one.lookups.get());
                rest = more;
            }
        }
        Ok(Reply::Silent)
    }

    pub(super) fn getattr(&mut self, caller: Caller, bytes: &[u8]) -> Result<Reply, Errno> {
        let (request, _): (GetattrIn, _) = take(bytes)?;
        let stat = if request.flags.get() & GETATTR_HANDLE != 0
            && let Some(handle) = self.handles.get(&request.handle.get())
        {
            stat(handle.file.as_fd())?
        } else {
            stat(self.nodes.path(caller.node)?.as_fd())?
        };
        Reply::of(AttrOut {
            attr_valid: Self::belief(caller.node).into(),
            attr: self.attr(&stat),
            ..AttrOut::default()
        })
    }

    pub(super) fn setattr(&mut self, caller: Caller, bytes: &[u8]) -> Result<Reply, Errno> {
        let (request, _): (SetattrIn, _) = take(bytes)?;
        let valid = request.valid.get();
        let has = |flag: u32| valid & flag != 0;
        let path = self.nodes.path(caller.node)?;
        let kind = self.nodes.kind(caller.node)?;
        if has(set::SIZE) {
            let size = i64::try_from(request.size.get()).map_err(|_| Errno::FBIG)?;
            let file = if has(set::HANDLE) {
                self.handle(request.handle.get())?.file.clone()
            } else if kind == FileType::RegularFile {
                self.reopen(path.as_fd(), kind, OFlags::WRONLY)?.into()
            } else {
                return Err(Errno::INVAL);
            };
            ftruncate(&file, size.cast_unsigned())?;
            if has(set::KILL_SUIDGID) {
                strip_privilege(&file)?;
            }
        }
        if has(set::UID | set::GID) {
            let uid = has(set::UID).then(|| Uid::from_raw(checked(request.uid.get())));
            let gid = has(set::GID).then(|| Gid::from_raw(checked(request.gid.get())));
            chownat(&path, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if has(set::MODE) {
            self.chmod(path.as_fd(), kind, request.mode.get())?;
        }
        if has(set::ATIME | set::MTIME) {
            let time = |set: u32, now: u32, seconds: u64, nanoseconds: u32| Timespec {
                tv_sec: seconds.cast_signed(),
                tv_nsec: match (has(set), has(now)) {
                    (false, _) => OMIT,
                    (true, true) => NOW,
                    // A value that means "now" or "leave" to the host is not a time.
                    (true, false) => i64::from(nanoseconds.min(999_999_999)),
                },
            };
            let times = Timestamps {
                last_access: time(
                    set::ATIME,
                    set::ATIME_NOW,
                    request.atime.get(),
                    request.atimensec.get(),
                ),
                last_modification: time(
                    set::MTIME,
                    set::MTIME_NOW,
                    request.mtime.get(),
                    request.mtimensec.get(),
                ),
            };
            utimensat(&path, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        let stat = stat(path.as_fd())?;
        Reply::of(AttrOut {
            attr_valid: Self::belief(caller.node).into(),
            attr: self.attr(&stat),
            ..AttrOut::default()
        })
    }

    /// Changes the mode through `/proc/self/fd`, which does not open the file. Links have no mode.
    fn chmod(&self, path: BorrowedFd<'_>, kind: FileType, mode: u32) -> Result<(), Errno> {
        if kind == FileType::Symlink {
            return Err(Errno::OPNOTSUPP);
        }
        let mode = Mode::from_raw_mode(mode & 0o7777);
        chmodat(&self.descriptors, number(path), mode, AtFlags::empty())
    }

    pub(super) fn readlink(&mut self, caller: Caller) -> Result<Reply, Errno> {
        let path = self.nodes.path(caller.node)?;
        Ok(Reply::Bytes(readlinkat(&path, c"", Vec::new())?.into_bytes()))
    }

    pub(super) fn symlink(&mut self, caller: Caller, bytes: &[u8]) -> Result<Reply, Errno> {
        let (name, rest) = name(bytes)?;
        let (target, _) = text(rest)?;
        let directory = self.nodes.path(caller.node)?;
        symlinkat(target, &directory, name)?;
        self.created(caller, directory.as_fd(), name, 0)
    }

    /// Makes a file that has no data: pipes and sockets are the guest kernel's own. A device would be the host's,
    /// but for 0:0, which is how overlayfs notes a deleted name.
    pub(super) fn mknod(&mut self, caller: Caller, bytes: &[u8]) -> Result<Reply, Errno> {
        let (request, rest): (MknodIn, _) = take(bytes)?;
        let (name, _) = name(rest)?;
        let mode = request.mode.get();
        let kind = match FileType::from_raw_mode(mode) {
            kind @ (FileType::RegularFile | FileType::Fifo | FileType::Socket) => kind,
            FileType::CharacterDevice if request.rdev.get() == 0 => FileType::CharacterDevice,
            FileType::CharacterDevice | FileType::BlockDevice => return Err(Errno::PERM),
            _ => return Err(Errno::INVAL),
        };
        let directory = self.nodes.path(caller.node)?;
        mknodat(&directory, name, kind, Mode::from_raw_mode(mode & 0o7777), 0)?;
        self.created(caller, directory.as_fd(), name, mode)
    }

    pub(super) fn mkdir(&mut self, caller: Caller, bytes: &[u8]) -> Result<Reply, Errno> {
        let (request, rest): (MkdirIn, _) = take(bytes)?;
        let (name, _) = name(rest)?;
        let mode = request.mode.get();
        let directory = self.nodes.path(caller.node)?;
        mkdirat(&directory, name, Mode::from_raw_mode(mode & 0o7777))?;
        self.created(caller, directory.as_fd(), name, mode)
    }

    fn created(
        &mut self,
        caller: Caller,
        directory: BorrowedFd<'_>,
        name: &CStr,
        mode: u32,
    ) -> Result<Reply, Errno> {
        let path = open_path(directory, name)?;
        let made = kind(&stat(path.as_fd())?);
        match self.adopt(caller, path, mode, Some(name)) {
            Ok((_, entry)) => Reply::of(entry),
            Err(error) => {
                let flags = if made == FileType::Directory {
                    AtFlags::REMOVEDIR
                } else {
                    AtFlags::empty()
                };
                let _gone = unlinkat(directory, name, flags);
                Err(error)
            }
        }
    }

    /// Gives a new file to whoever asked for it, with the mode asked for, and tells the guest of it.
    ///
    /// A group that the file has from its directory (set-group-ID) stays.
    pub(super) fn adopt(
        &mut self,
        caller: Caller,
        path: OwnedFd,
        mode: u32,
        name: Option<&CStr>,
    ) -> Result<(u64, EntryOut), Errno> {
        let before = stat(path.as_fd())?;
        let kind = kind(&before);
        let uid = (before.stx_uid != caller.uid).then(|| Uid::from_raw(checked(caller.uid)));
        let ours = rustix::process::getegid().as_raw();
        let inherited = before.stx_gid != ours || {
            let directory = self.nodes.path(caller.node)?;
            u32::from(stat(directory.as_fd())?.stx_mode) & 0o2000 != 0
        };
        let gid = (before.stx_gid != caller.gid && !inherited).then(|| Gid::from_raw(checked(caller.gid)));
        let mut after = before;
        if uid.is_some() || gid.is_some() {
            chownat(&path, c"", uid, gid, AtFlags::EMPTY_PATH)?;
            after = stat(path.as_fd())?;
        }
        // Giving away takes these bits off; a directory may have gained one on the way, which stays.
        let special = u32::from(before.stx_mode) | mode;
        let wanted = (u32::from(after.stx_mode) & 0o777) | (special & 0o7000);
        if kind != FileType::Symlink && wanted != u32::from(after.stx_mode) & 0o7777 {
            self.chmod(path.as_fd(), kind, wanted)?;
            after = stat(path.as_fd())?;
        }
        let node = self.nodes.know(path, &after, caller.node, name)?;
        Ok((node, self.entry(caller.node, node, &after)))
    }

    /// An `O_PATH` descriptor of an open file.
    pub(super) fn path_of(&self, file: &File) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        openat(&self.descriptors, number(file.as_fd()), flags, Mode::empty())
    }

    pub(super) fn unlink(&mut self, caller: Caller, bytes: &[u8], directory: bool) -> Result<Reply, Errno> {
        let (name, _) = name(bytes)?;
        let parent = self.nodes.path(caller.node)?;
        let known = self.nodes.known_at(parent.as_fd(), name);
        let flags = if directory {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        unlinkat(&parent, name, flags)?;
        if let Some(node) = known {
            self.nodes.lost(node, caller.node, name);
        }
        Ok(Reply::EMPTY)
    }

    pub(super) fn rename(&mut self, caller: Caller, bytes: &[u8], with_flags: bool) -> Result<Reply, Errno> {
        let (new_parent, flags, rest) = if with_flags {
            let (request, rest): (Rename2In, _) = take(bytes)?;
            (request.new_dir.get(), request.flags.get(), rest)
        } else {
            let (request, rest): (RenameIn, _) = take(bytes)?;
            (request.new_dir.get(), 0, rest)
        };
        let (old, rest) = name(rest)?;
        let (new, _) = name(rest)?;
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        if !known.contains(flags) {
            return Err(Errno::INVAL);
        }
        let from = self.nodes.path(caller.node)?;
        let to = self.nodes.path(new_parent)?;
        let source = self.nodes.known_at(from.as_fd(), old);
        let target = self.nodes.known_at(to.as_fd(), new);
        renameat_with(&from, old, &to, new, flags)?;
        if let Some(target) = target.filter(|target| Some(*target) != source) {
            if flags.contains(RenameFlags::EXCHANGE) {
                self.nodes.moved(target, caller.node, old);
            } else {
                self.nodes.lost(target, new_parent, new);
            }
        }
        if let Some(source) = source.filter(|source| Some(*source) != target) {
            self.nodes.moved(source, new_parent, new);
        }
        Ok(Reply::EMPTY)
    }

    pub(super) fn link(&mut self, caller: Caller, bytes: &[u8]) -> Result<Reply, Errno> {
        let (request, rest): (LinkIn, _) = take(bytes)?;
        let (name, _) = name(rest)?;
        let node = request.old_node.get();
        let path = self.nodes.path(node)?;
        let directory = self.nodes.path(caller.node)?;
        // By the descriptor's name: by the descriptor itself it takes a capability that we do not have.
        linkat(
            &self.descriptors,
            number(path.as_fd()),
            &directory,
            name,
            AtFlags::SYMLINK_FOLLOW,
        )?;
        self.nodes.moved(node, caller.node, name);
        self.nodes.count(node);
        let stat = stat(path.as_fd())?;
        Reply::of(self.entry(caller.node, node, &stat))
    }

    pub(super) fn statfs(&mut self, caller: Caller) -> Result<Reply, Errno> {
        let stat = fstatvfs(&self.nodes.path(caller.node)?)?;
        let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        Reply::of(StatfsOut {
            blocks: stat.f_blocks.into(),
            bfree: stat.f_bfree.into(),
            bavail: stat.f_bavail.into(),
            files: stat.f_files.into(),
            ffree: stat.f_ffree.into(),
            bsize: small(stat.f_bsize).into(),
            namelen: small(stat.f_namemax).into(),
            frsize: small(stat.f_frsize).into(),
            ..StatfsOut::default()
        })
    }

    /// A descriptor that attributes can be had from. Only files and directories have any that a guest may see.
    fn attributed(&mut self, node: u64) -> Result<File, Errno> {
        let kind = self.nodes.kind(node)?;
        let path = self.nodes.path(node)?;
        self.reopen(path.as_fd(), kind, OFlags::RDONLY)
    }

    pub(super) fn setxattr(&mut self, caller: Caller, bytes: &[u8]) -> Result<Reply, Errno> {
        let (request, rest): (SetxattrIn, _) = take(bytes)?;
        let (name, value) = text(rest)?;
        permit(name)?;
        if value.len() != request.size.get() as usize || value.len() > XATTR {
            return Err(Errno::INVAL);
        }
        let flags = XattrFlags::from_bits(request.flags.get()).ok_or(Errno::INVAL)?;
        fsetxattr(self.attributed(caller.node)?, name, value, flags)?;
        Ok(Reply::EMPTY)
    }

    pub(super) fn getxattr(&mut self, caller: Caller, bytes: &[u8]) -> Result<Reply, Errno> {
        let (request, rest): (GetxattrIn, _) = take(bytes)?;
        let (name, _) = text(rest)?;
        permit(name)?;
        let file = self.attributed(caller.node).map_err(|error| match error {
            Errno::OPNOTSUPP => Errno::NODATA,
            other => other,
        })?;
        if request.size.get() == 0 {
            return length(fgetxattr_query(&file, name)?);
        }
        let mut value = vec![0u8; (request.size.get() as usize).min(XATTR)];
        let len = fgetxattr(&file, name, value.as_mut_slice())?;
        value.truncate(len);
        Ok(Reply::Bytes(value))
    }

    pub(super) fn listxattr(&mut self, caller: Caller, bytes: &[u8]) -> Result<Reply, Errno> {
        let (request, _): (GetxattrIn, _) = take(bytes)?;
        let file = match self.attributed(caller.node) {
            Err(Errno::OPNOTSUPP) if request.size.get() == 0 => return length(0),
            Err(Errno::OPNOTSUPP) => return Ok(Reply::EMPTY),
            other => other?,
        };
        let mut names = vec![0u8; flistxattr_query(&file)?.min(XATTR)];
        let len = flistxattr(&file, names.as_mut_slice())?;
        names.truncate(len);
        let mut visible = Vec::with_capacity(len);
        for name in names.split_inclusive(|byte| *byte == 0) {
            if CStr::from_bytes_with_nul(name).is_ok_and(|name| permit(name).is_ok()) {
                visible.extend_from_slice(name);
            }
        }
        match request.size.get() as usize {
            0 => length(visible.len()),
            room if room < visible.len() => Err(Errno::RANGE),
            _ => Ok(Reply::Bytes(visible)),
        }
    }

    pub(super) fn removexattr(&mut self, caller: Caller, bytes: &[u8]) -> Result<Reply, Errno> {
        let (name, _) = text(bytes)?;
        permit(name)?;
        fremovexattr(self.attributed(caller.node)?, name)?;
        Ok(Reply::EMPTY)
    }
}

/// Attributes that are the guest's: a user's own, and file capabilities. Labels and access lists are the host's.
fn permit(name: &CStr) -> Result<(), Errno> {
    let name = name.to_bytes();
    if name.starts_with(b"user.") || name == b"security.capability" {
        Ok(())
    } else {
        Err(Errno::OPNOTSUPP)
    }
}

fn length(len: usize) -> Result<Reply, Errno> {
    Reply::of(GetxattrOut {
        size: u32::try_from(len).unwrap_or(u32::MAX).into(),
        ..GetxattrOut::default()
    })
}

/// An id as the host's calls take it, where all ones means "leave": nobody has that id.
fn checked(id: u32) -> u32 {
    if id == u32::MAX { 65534 } else { id }
}
