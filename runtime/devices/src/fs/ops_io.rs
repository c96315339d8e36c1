//! Operations on open files: their data, directories, space.

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{
    FallocateFlags, FileType, Mode, OFlags, RawDir, SeekFrom, copy_file_range, fallocate, fchmod, seek,
    syncfs,
};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::abi::{
    CopyIn, CreateIn, Dirent, EntryOut, FSYNC_DATA, FallocateIn, FsyncIn, LseekIn, LseekOut, OPEN_KEEP_CACHE,
    OPEN_KILL_SUIDGID, OpenIn, OpenOut, OutHeader, ReadIn, ReleaseIn, WRITE_KILL_SUIDGID, WriteIn, WriteOut,
    open,
};
use super::buffers::Buffers;
use super::nodes::{Stamp, name, stat};
use super::server::{Caller, Handle, Reply, Server, take};

/// Most bytes of one directory reply.
const DIRECTORY: usize = 64 * 1024;
/// Most bytes that one COPY_FILE_RANGE moves; the guest asks again for the rest.
const COPY: u64 = 64 << 20;

impl Server {
    pub(super) fn open(&mut self, caller: Caller, bytes: &[u8]) -> Result<Reply, Errno> {
        let (request, _): (OpenIn, _) = take(bytes)?;
        let kill = request.open_flags.get() & OPEN_KILL_SUIDGID != 0;
        Reply::of(self.open_node(caller.node, request.flags.get(), kill)?)
    }

    fn open_node(&mut self, node: u64, flags: u32, kill: bool) -> Result<OpenOut, Errno> {
        self.room_for_handle()?;
        let kind = self.nodes.kind(node)?;
        match kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::NXIO), // the guest's own business; it never asks
        }
        let path = self.nodes.path(node)?;
        let file = self.reopen(path.as_fd(), kind, host_flags(flags))?;
        if kill && flags & open::TRUNCATE != 0 {
            strip_privilege(&file)?;
        }
        let now = Stamp::of(&stat(file.as_fd())?);
        let stamp = self.nodes.stamp(node).ok_or(Errno::STALE)?;
        let unchanged = stamp.replace(now) == Some(now);
        let handle = self.keep(Handle {
            node,
            file: Arc::new(file),
            writable: flags & open::ACCESS != 0,
        })?;
        Ok(OpenOut {
            handle: handle.into(),
            flags: if unchanged { OPEN_KEEP_CACHE } else { 0 }.into(),
            ..OpenOut::default()
        })
    }

    /// Creates and opens. What exists already is opened as any file is, so that no special file is touched.
    pub(super) fn create(&mut self, caller: Caller, bytes: &[u8]) -> Result<Reply, Errno> {
        let (request, rest): (CreateIn, _) = take(bytes)?;
        let (name, _) = name(rest)?;
        self.room_for_handle()?;
        let flags = request.flags.get();
        let directory = self.nodes.path(caller.node)?;
        let created = rustix::fs::openat2(
            &directory,
            name,
            (host_flags(flags) & !OFlags::TRUNC) | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW,
            Mode::from_raw_mode(request.mode.get() & 0o7777),
            super::nodes::BENEATH,
        );
        let file = match created {
            Err(Errno::EXIST) if flags & open::EXCLUSIVE == 0 => {
                let (node, stat) = self.nodes.lookup(caller.node, name)?;
                let kill = request.open_flags.get() & OPEN_KILL_SUIDGID != 0;
                let opened = match self.open_node(node, flags, kill) {
                    Ok(opened) => opened,
                    Err(error) => {
                        self.nodes.forget(node, 1);
                        return Err(error);
                    }
                };
                // What it was before it may have been cut.
                let fresh = self
                    .nodes
                    .path(node)
                    .and_then(|path| super::nodes::stat(path.as_fd()));
                let entry = self.entry(caller.node, node, &fresh.unwrap_or(stat));
                return Ok(Reply::Bytes(pair(&entry, &opened)));
            }
            other => File::from(other?),
        };
        let path = self.path_of(&file)?;
        let known = self.adopt(caller, path, request.mode.get(), Some(name));
        let (node, entry) = match known {
            Ok(known) => known,
            Err(error) => {
                let _gone = rustix::fs::unlinkat(&directory, name, rustix::fs::AtFlags::empty());
                return Err(error);
            }
        };
        self.opened(node, file, flags, &entry)
    }

    pub(super) fn tmpfile(&mut self, caller: Caller, bytes: &[u8]) -> Result<Reply, Errno> {
        let (request, _): (CreateIn, _) = take(bytes)?;
        self.room_for_handle()?;
        let flags = request.flags.get();
        if flags & open::ACCESS == 0 {
            return Err(Errno::INVAL);
        }
        let directory = self.nodes.path(caller.node)?;
        let excl = if flags & open::EXCLUSIVE == 0 {
            OFlags::empty()
        } else {
            OFlags::EXCL
        };
        let file = rustix::fs::openat(
            &directory,
            c".",
            (host_flags(flags) & !OFlags::TRUNC) | OFlags::TMPFILE | OFlags::CLOEXEC | excl,
            Mode::from_raw_mode(request.mode.get() & 0o7777),
        )?;
        let file = File::from(file);
        let path = self.path_of(&file)?;
        let (node, entry) = self.adopt(caller, path, request.mode.get(), None)?;
        self.opened(node, file, flags, &entry)
    }

    fn opened(&mut self, node: u64, file: File, flags: u32, entry: &EntryOut) -> Result<Reply, Errno> {
        let handle = self.keep(Handle {
            node,
            file: Arc::new(file),
            writable: flags & open::ACCESS != 0,
        })?;
        let opened = OpenOut {
            handle: handle.into(),
            ..OpenOut::default()
        };
        Ok(Reply::Bytes(pair(entry, &opened)))
    }

    /// The guest closes a file. What it wrote is what it knows: its cache stays good for the next opening.
    pub(super) fn release(&mut self, bytes: &[u8]) -> Result<Reply, Errno> {
        let (request, _): (ReleaseIn, _) = take(bytes)?;
        let handle = self.handles.remove(&request.handle.get()).ok_or(Errno::BADF)?;
        if handle.writable
            && let Ok(now) = stat(handle.file.as_fd())
            && let Some(stamp) = self.nodes.stamp(handle.node)
        {
            *stamp = Some(Stamp::of(&now));
        }
        Ok(Reply::EMPTY)
    }

    pub(super) fn read(&mut self, bytes: &[u8], output: &mut Buffers<'_>) -> Result<Reply, Errno> {
        let (request, _): (ReadIn, _) = take(bytes)?;
        let handle = self.handle(request.handle.get())?;
        let mut room = output.split_behind(size_of::<OutHeader>()).ok_or(Errno::INVAL)?;
        room.truncate(request.size.get() as usize);
        let file = handle.file.as_fd();
        seek(file, SeekFrom::Start(signed(request.offset.get())?))?;
        Ok(Reply::Filled(room.fill(file)?))
    }

    pub(super) fn write(&mut self, input: &mut Buffers<'_>) -> Result<Reply, Errno> {
        let mut request = WriteIn::default();
        input.read(request.as_mut_bytes()).ok_or(Errno::INVAL)?;
        let size = request.size.get() as usize;
        if size != input.len() {
            return Err(Errno::INVAL);
        }
        let handle = self.handle(request.handle.get())?;
        let file = handle.file.as_fd();
        seek(file, SeekFrom::Start(signed(request.offset.get())?))?;
        let written = input.drain(file)?;
        if request.write_flags.get() & WRITE_KILL_SUIDGID != 0 && written > 0 {
            strip_privilege(&handle.file)?;
        }
        Reply::of(WriteOut {
            size: u32::try_from(written).unwrap_or(u32::MAX).into(),
            ..WriteOut::default()
        })
    }

    pub(super) fn fsync(&mut self, bytes: &[u8]) -> Result<Reply, Errno> {
        let (request, _): (FsyncIn, _) = take(bytes)?;
        let file = self.handle(request.handle.get())?.file.clone();
        let data_only = request.flags.get() & FSYNC_DATA != 0;
        Ok(Reply::Later(Box::new(move || {
            match data_only {
                true => rustix::fs::fdatasync(&file)?,
                false => rustix::fs::fsync(&file)?,
            }
            Ok(Vec::new())
        })))
    }

    /// Everything is in the host's own cache already; what is in use is written through from there.
    pub(super) fn syncfs(&mut self) -> Result<Reply, Errno> {
        let mut files = Vec::new();
        for path in self.nodes.file_systems() {
            let kind = super::nodes::kind(&stat(path.as_fd())?);
            files.extend(self.reopen(path.as_fd(), kind, OFlags::RDONLY));
        }
        Ok(Reply::Later(Box::new(move || {
            for file in files {
                syncfs(&file)?;
            }
            Ok(Vec::new())
        })))
    }

    pub(super) fn fallocate(&mut self, bytes: &[u8]) -> Result<Reply, Errno> {
        let (request, _): (FallocateIn, _) = take(bytes)?;
        let file = self.handle(request.handle.get())?.file.clone();
        let (offset, length) = (signed(request.offset.get())?, signed(request.length.get())?);
        let mode = FallocateFlags::from_bits_retain(request.mode.get());
        Ok(Reply::Later(Box::new(move || {
            fallocate(&file, mode, offset, length)?;
            Ok(Vec::new())
        })))
    }

    /// Finds data and holes; the other origins are the guest's own arithmetic.
    pub(super) fn lseek(&mut self, bytes: &[u8]) -> Result<Reply, Errno> {
        let (request, _): (LseekIn, _) = take(bytes)?;
        let file = &self.handle(request.handle.get())?.file;
        let offset = signed(request.offset.get())?;
        let offset = match request.whence.get() {
            3 => seek(file, SeekFrom::Data(offset))?,
            4 => seek(file, SeekFrom::Hole(offset))?,
            _ => return Err(Errno::INVAL),
        };
        Reply::of(LseekOut {
            offset: offset.into(),
        })
    }

    pub(super) fn copy_file_range(&mut self, bytes: &[u8]) -> Result<Reply, Errno> {
        let (request, _): (CopyIn, _) = take(bytes)?;
        if request.flags.get() != 0 {
            return Err(Errno::INVAL);
        }
        let from = self.handle(request.handle_in.get())?.file.clone();
        let to = self.handle(request.handle_out.get())?.file.clone();
        let mut offset_in = signed(request.offset_in.get())?;
        let mut offset_out = signed(request.offset_out.get())?;
        let len = usize::try_from(request.len.get().min(COPY)).map_err(|_| Errno::INVAL)?;
        Ok(Reply::Later(Box::new(move || {
            let done = copy_file_range(&from, Some(&mut offset_in), &to, Some(&mut offset_out), len)?;
            let size = u32::try_from(done).map_err(|_| Errno::OVERFLOW)?;
            let reply = WriteOut {
                size: size.into(),
                ..WriteOut::default()
            };
            Ok(reply.as_bytes().to_vec())
        })))
    }

    pub(super) fn opendir(&mut self, caller: Caller) -> Result<Reply, Errno> {
        self.room_for_handle()?;
        let kind = self.nodes.kind(caller.node)?;
        if kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let path = self.nodes.path(caller.node)?;
        let file = self.reopen(path.as_fd(), kind, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let handle = self.keep(Handle {
            node: caller.node,
            file: Arc::new(file),
            writable: false,
        })?;
        Reply::of(OpenOut {
            handle: handle.into(),
            ..OpenOut::default()
        })
    }

    /// Reads a directory from the place that the last entry's `off` names; with `plus`, looks each name up as well.
    pub(super) fn readdir(
        &mut self,
        caller: Caller,
        bytes: &[u8],
        output: &Buffers<'_>,
        plus: bool,
    ) -> Result<Reply, Errno> {
        let (request, _): (ReadIn, _) = take(bytes)?;
        let file = self.handle(request.handle.get())?.file.clone();
        let device = stat(file.as_fd())?;
        let device = (device.stx_dev_major, device.stx_dev_minor);
        let room = output.len().saturating_sub(size_of::<OutHeader>());
        let size = room.min(request.size.get() as usize).min(DIRECTORY);
        seek(&file, SeekFrom::Start(signed(request.offset.get())?))?;
        let mut buffer =
            vec![MaybeUninit::<u8>::uninit(); (size / if plus { 5 } else { 1 }).clamp(1024, 32 * 1024)];
        let mut entries = RawDir::new(file.as_fd(), &mut buffer);
        let mut reply = Vec::new();
        while let Some(found) = entries.next() {
            let found = match found {
                Ok(found) => found,
                Err(_) if !reply.is_empty() => break,
                Err(error) => return Err(error),
            };
            let text = found.file_name();
            let head = size_of::<Dirent>() + if plus { size_of::<EntryOut>() } else { 0 };
            let len = head.saturating_add(text.count_bytes());
            let padded = len.next_multiple_of(8);
            if reply.len().saturating_add(padded) > size {
                break;
            }
            let dots = matches!(text.to_bytes(), b"." | b"..");
            if plus {
                // An entry without a node is a name alone: a name that is gone again, or a table that is full.
                let known = if dots {
                    None
                } else {
                    self.nodes.lookup(caller.node, text).ok()
                };
                let entry = known.map(|(node, stat)| self.entry(caller.node, node, &stat));
                let entry = entry.unwrap_or_default();
                reply.extend_from_slice(entry.as_bytes());
            }
            let dirent = Dirent {
                ino: self.nodes.ino(device, found.ino()).into(),
                off: found.next_entry_cookie().into(),
                namelen: u32::try_from(text.count_bytes()).unwrap_or(0).into(),
                kind: (found.file_type().as_raw_mode() >> 12).into(),
            };
            reply.extend_from_slice(dirent.as_bytes());
            reply.extend_from_slice(text.to_bytes());
            reply.resize(reply.len().saturating_add(padded.saturating_sub(len)), 0);
        }
        Ok(Reply::Bytes(reply))
    }
}

/// Takes set-user-ID and set-group-ID away, as a write by somebody without privilege does.
pub(super) fn strip_privilege(file: &File) -> Result<(), Errno> {
    let mode = u32::from(stat(file.as_fd())?.stx_mode);
    let group = if mode & 0o010 == 0 { 0 } else { 0o2000 }; // without group execution it means something else
    let kept = mode & !(0o4000 | group) & 0o7777;
    if kept != mode & 0o7777 {
        fchmod(file, Mode::from_raw_mode(kept))?;
    }
    Ok(())
}

/// What of the guest's flags concerns the host. `O_DIRECT` does not: it is about the guest's cache, and the host's
/// alignment rules are not known there.
fn host_flags(flags: u32) -> OFlags {
    let mut host = match flags & open::ACCESS {
        open::WRITE_ONLY => OFlags::WRONLY,
        open::READ_WRITE => OFlags::RDWR,
        _ => OFlags::RDONLY,
    };
    host.set(OFlags::TRUNC, flags & open::TRUNCATE != 0);
    host.set(OFlags::APPEND, flags & open::APPEND != 0);
    host.set(OFlags::DSYNC, flags & open::DSYNC != 0);
    host.set(OFlags::SYNC, flags & open::SYNC == open::SYNC);
    host | OFlags::CLOEXEC
}

/// Offsets and lengths of files have 63 bits.
fn signed(value: u64) -> Result<u64, Errno> {
    i64::try_from(value).map(|_| value).map_err(|_| Errno::INVAL)
}

fn pair(entry: &EntryOut, opened: &OpenOut) -> Vec<u8> {
    [entry.as_bytes(), opened.as_bytes()].concat()
}
