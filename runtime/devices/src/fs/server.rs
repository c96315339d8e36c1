//! One FUSE session: requests in, replies out, whatever carries them.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, Statx, openat};
use rustix::io::Errno;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Limits;
use super::abi::{self, Attr, EntryOut, InHeader, InitIn, InitOut, OutHeader, ROOT, init, op};
use super::buffers::Buffers;
use super::nodes::Nodes;

/// Most bytes that one READ or WRITE moves: [`PAGES`] pages of 4 KiB.
const TRANSFER: u32 = 1 << 20;
const PAGES: u16 = 256;
/// Most bytes of arguments besides written data: the longest are an attribute of 64 KiB and a list of nodes to forget.
const ARGUMENTS: usize = 128 * 1024;
/// Seconds that the guest may believe what it was told: what the host changes shows after that at the latest.
const BELIEF: u64 = 1;

/// What became of a request.
pub(super) enum Outcome {
    /// The reply is in the buffers; its length.
    Done(u32),
    /// There is none.
    Silent,
    /// It takes long: whoever runs the job answers with [`finish`] under this number.
    Later(u64, Job),
}

/// The slow part of a request; needs neither the session nor the guest's memory.
pub(super) type Job = Box<dyn FnOnce() -> Result<Vec<u8>, Errno> + Send>;

/// What an operation has to say.
pub(super) enum Reply {
    Bytes(Vec<u8>),
    /// So many bytes are in the buffers already, behind the header.
    Filled(usize),
    Silent,
    Later(Job),
}

impl Reply {
    pub(super) fn of(body: impl IntoBytes + Immutable) -> Result<Self, Errno> {
        Ok(Self::Bytes(body.as_bytes().to_vec()))
    }

    pub(super) const EMPTY: Self = Self::Bytes(Vec::new());
}

/// Who asks, and about which node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caller {
    pub(super) node: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// A file that the guest has opened.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) node: u64,
    pub(super) file: Arc<File>,
    pub(super) writable: bool,
}

/// The server.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) root: Arc<OwnedFd>,
    /// `/proc/self/fd`: how an `O_PATH` descriptor becomes one that reads or writes.
    pub(super) descriptors: OwnedFd,
    pub(super) limits: Limits,
    pub(super) nodes: Nodes,
    pub(super) handles: HashMap<u64, Handle>,
    pub(super) next_handle: u64,
    started: bool,
}

impl Server {
    pub(super) fn new(root: OwnedFd, descriptors: OwnedFd, limits: Limits) -> Result<Self, Errno> {
        let root = Arc::new(root);
        Ok(Self {
            nodes: Nodes::new(root.clone(), limits)?,
            root,
            descriptors,
            limits,
            handles: HashMap::new(),
            next_handle: 1,
            started: false,
        })
    }

    /// Serves one request. Whatever it holds, there is an answer, or silence where the protocol has none.
    pub(super) fn serve(&mut self, mut input: Buffers<'_>, mut output: Buffers<'_>) -> Outcome {
        let mut header = InHeader::new_zeroed();
        if input.read(header.as_mut_bytes()).is_none() {
            return Outcome::Silent; // nobody to answer: not even the number of the request is there
        }
        let unique = header.unique.get();
        let body = (header.len.get() as usize).checked_sub(size_of::<InHeader>());
        let Some(body) = body.filter(|body| *body <= input.len()) else {
            return finish(&mut output, unique, Err(Errno::INVAL));
        };
        input.truncate(body);
        let reply = self.dispatch(&header, &mut input, &mut output);
        match reply {
            Ok(Reply::Silent) => Outcome::Silent,
            Ok(Reply::Later(job)) => Outcome::Later(unique, job),
            Ok(Reply::Filled(len)) => {
                // The operation has left the header's room free at the front, and given it back in `output`.
                let total = len.saturating_add(size_of::<OutHeader>());
                put_header(&mut output, unique, 0, total)
            }
            Ok(Reply::Bytes(bytes)) => finish(&mut output, unique, Ok(bytes)),
            Err(error) => finish(&mut output, unique, Err(error)),
        }
    }

    fn dispatch(
        &mut self,
        header: &InHeader,
        input: &mut Buffers<'_>,
        output: &mut Buffers<'_>,
    ) -> Result<Reply, Errno> {
        let caller = Caller {
            node: header.node.get(),
            uid: header.uid.get(),
            gid: header.gid.get(),
        };
        let opcode = header.opcode.get();
        if !self.started && opcode != op::INIT {
            return Err(Errno::IO);
        }
        if opcode == op::WRITE {
            return self.write(input);
        }
        if input.len() > ARGUMENTS {
            return Err(Errno::INVAL);
        }
        let mut bytes = vec![0; input.len()];
        input.read(&mut bytes).ok_or(Errno::INVAL)?;
        let bytes = bytes.as_slice();
        match opcode {
            op::INIT => self.init(bytes),
            op::DESTROY => self.reset().map(|()| Reply::EMPTY),
            op::LOOKUP => self.lookup(caller, bytes),
            op::FORGET => self.forget(caller, bytes),
            op::BATCH_FORGET => self.forget_many(bytes),
            op::GETATTR => self.getattr(caller, bytes),
            op::SETATTR => self.setattr(caller, bytes),
            op::READLINK => self.readlink(caller),
            op::SYMLINK => self.symlink(caller, bytes),
            op::MKNOD => self.mknod(caller, bytes),
            op::MKDIR => self.mkdir(caller, bytes),
            op::UNLINK => self.unlink(caller, bytes, false),
            op::RMDIR => self.unlink(caller, bytes, true),
            op::RENAME | op::RENAME2 => self.rename(caller, bytes, opcode == op::RENAME2),
            op::LINK => self.link(caller, bytes),
            op::OPEN => self.open(caller, bytes),
            op::CREATE => self.create(caller, bytes),
            op::TMPFILE => self.tmpfile(caller, bytes),
            op::READ => self.read(bytes, output),
            op::STATFS => self.statfs(caller),
            op::RELEASE | op::RELEASEDIR => self.release(bytes),
            op::FSYNC | op::FSYNCDIR => self.fsync(bytes),
            op::SETXATTR => self.setxattr(caller, bytes),
            op::GETXATTR => self.getxattr(caller, bytes),
            op::LISTXATTR => self.listxattr(caller, bytes),
            op::REMOVEXATTR => self.removexattr(caller, bytes),
            op::OPENDIR => self.opendir(caller),
            op::READDIR | op::READDIRPLUS => self.readdir(caller, bytes, output, opcode == op::READDIRPLUS),
            op::FALLOCATE => self.fallocate(bytes),
            op::LSEEK => self.lseek(bytes),
            op::COPY_FILE_RANGE => self.copy_file_range(bytes),
            op::SYNCFS => self.syncfs(),
            op::INTERRUPT => Ok(Reply::Silent), // nothing here waits for long that could be cut short
            op::IOCTL => Err(Errno::NOTTY),
            // ACCESS: the guest checks permissions itself. FLUSH: nothing is held back from the host's file.
            // GETLK and SETLK: locks are the guest's own. The driver stops asking after the first of these.
            _ => Err(Errno::NOSYS),
        }
    }

    /// Starts a session: the guest knows nothing any more.
    fn init(&mut self, bytes: &[u8]) -> Result<Reply, Errno> {
        let (request, _): (InitIn, _) = take(bytes)?;
        if request.major.get() < abi::MAJOR
            || (request.major.get() == abi::MAJOR && request.minor.get() < abi::OLDEST_MINOR)
        {
            return Err(Errno::PROTO);
        }
        self.reset()?;
        self.started = request.major.get() == abi::MAJOR;
        let ours = init::ASYNC_READ
            | init::ATOMIC_O_TRUNC
            | init::BIG_WRITES
            | init::AUTO_INVAL_DATA
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::ASYNC_DIO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES
            | init::HANDLE_KILLPRIV_V2;
        Reply::of(InitOut {
            major: abi::MAJOR.into(),
            minor: abi::MINOR.into(),
            max_readahead: request.max_readahead,
            flags: (ours & request.flags.get()).into(),
            max_background: 64.into(),
            congestion_threshold: 48.into(),
            max_write: TRANSFER.into(),
            time_gran: 1.into(),
            max_pages: PAGES.into(),
            ..InitOut::default()
        })
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.started = false;
        self.handles.clear();
        self.nodes = Nodes::new(self.root.clone(), self.limits)?;
        Ok(())
    }

    /// Opens the file that an `O_PATH` descriptor stands for, if that does no more than opening it.
    pub(super) fn reopen(&self, path: BorrowedFd<'_>, kind: FileType, flags: OFlags) -> Result<File, Errno> {
        if !matches!(kind, FileType::RegularFile | FileType::Directory) {
            return Err(Errno::OPNOTSUPP);
        }
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = openat(&self.descriptors, number(path), flags, Mode::empty())?;
        Ok(File::from(file))
    }

    pub(super) fn handle(&self, number: u64) -> Result<&Handle, Errno> {
        self.handles.get(&number).ok_or(Errno::BADF)
    }

    /// Gives an open file a number.
    pub(super) fn keep(&mut self, handle: Handle) -> Result<u64, Errno> {
        self.room_for_handle()?;
        let number = self.next_handle;
        self.next_handle = self.next_handle.saturating_add(1);
        self.handles.insert(number, handle);
        Ok(number)
    }

    pub(super) fn room_for_handle(&self) -> Result<(), Errno> {
        if self.handles.len() >= self.limits.handles {
            return Err(Errno::NFILE);
        }
        Ok(())
    }

    pub(super) fn attr(&mut self, stat: &Statx) -> Attr {
        let device = (stat.stx_dev_major, stat.stx_dev_minor);
        Attr {
            ino: self.nodes.ino(device, stat.stx_ino).into(),
            size: stat.stx_size.into(),
            blocks: stat.stx_blocks.into(),
            atime: stat.stx_atime.tv_sec.cast_unsigned().into(),
            mtime: stat.stx_mtime.tv_sec.cast_unsigned().into(),
            ctime: stat.stx_ctime.tv_sec.cast_unsigned().into(),
            atimensec: stat.stx_atime.tv_nsec.into(),
            mtimensec: stat.stx_mtime.tv_nsec.into(),
            ctimensec: stat.stx_ctime.tv_nsec.into(),
            mode: u32::from(stat.stx_mode).into(),
            nlink: stat.stx_nlink.into(),
            uid: stat.stx_uid.into(),
            gid: stat.stx_gid.into(),
            rdev: device_number(stat.stx_rdev_major, stat.stx_rdev_minor).into(),
            blksize: stat.stx_blksize.into(),
            flags: 0.into(),
        }
    }

    /// Names directly below the root are asked for each time: a mount may appear there (a container is added).
    pub(super) fn entry(&mut self, parent: u64, node: u64, stat: &Statx) -> EntryOut {
        EntryOut {
            node: node.into(),
            entry_valid: if parent == ROOT { 0 } else { BELIEF }.into(),
            attr_valid: BELIEF.into(),
            attr: self.attr(stat),
            ..EntryOut::default()
        }
    }

    /// As long as [`Server::entry`], for a node alone.
    pub(super) fn belief(node: u64) -> u64 {
        if node == ROOT { 0 } else { BELIEF }
    }
}

/// Puts a reply into the buffers. One that does not fit becomes an error that does.
pub(super) fn finish(output: &mut Buffers<'_>, unique: u64, reply: Result<Vec<u8>, Errno>) -> Outcome {
    let (error, mut body) = match reply {
        Ok(body) => (0, body),
        Err(error) => (error.raw_os_error().saturating_neg(), Vec::new()),
    };
    let room = output.len().saturating_sub(size_of::<OutHeader>());
    let error = if body.len() > room {
        body.clear();
        Errno::IO.raw_os_error().saturating_neg()
    } else {
        error
    };
    let total = body.len().saturating_add(size_of::<OutHeader>());
    let outcome = put_header(output, unique, error, total);
    if matches!(outcome, Outcome::Done(_)) && output.write(&body).is_none() {
        return Outcome::Silent;
    }
    outcome
}

fn put_header(output: &mut Buffers<'_>, unique: u64, error: i32, total: usize) -> Outcome {
    let total = u32::try_from(total).unwrap_or(u32::MAX);
    let header = OutHeader {
        len: total.into(),
        error: error.into(),
        unique: unique.into(),
    };
    match output.write(header.as_bytes()) {
        Some(()) => Outcome::Done(total),
        None => Outcome::Silent, // no room for a reply: none was wanted
    }
}

/// A structure from the front of `bytes`, and the rest.
pub(super) fn take<T: FromBytes + Immutable + KnownLayout + Unaligned>(
    bytes: &[u8],
) -> Result<(T, &[u8]), Errno> {
    T::read_from_prefix(bytes).map_err(|_| Errno::INVAL)
}

/// The name of a descriptor in `/proc/self/fd`.
pub(super) fn number(fd: BorrowedFd<'_>) -> String {
    use std::os::fd::AsRawFd;
    fd.as_fd().as_raw_fd().to_string()
}

/// A device number as the protocol has it: the kernel's `new_encode_dev`.
fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & !0xff) << 12)
}
