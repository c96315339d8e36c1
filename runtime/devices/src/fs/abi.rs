//! The FUSE protocol as virtio-fs carries it: structures and numbers of `linux/fuse.h`, version 7.37.
//!
//! Little-endian throughout, as every guest of ours is and virtio 1.2 (section 5.11.6.1) leaves to the driver.

use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `FUSE_KERNEL_VERSION`.
pub(super) const MAJOR: u32 = 7;
/// What this server speaks: `FUSE_KERNEL_MINOR_VERSION` of Linux 6.1.
pub(super) const MINOR: u32 = 37;
/// The oldest that it speaks to: the first of virtio-fs, Linux 5.4.
pub(super) const OLDEST_MINOR: u32 = 31;
/// `FUSE_ROOT_ID`.
pub(super) const ROOT: u64 = 1;

/// Declares structures of the protocol: all are plain bytes.
macro_rules! wire {
    ($($(#[$doc:meta])* struct $name:ident { $($field:ident: $kind:ty),* $(,)? })*) => { $(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub(super) struct $name { $(pub(super) $field: $kind),* }
    )* };
}

wire! {
    /// `fuse_in_header`.
    struct InHeader {
        len: U32, opcode: U32, unique: U64, node: U64, uid: U32, gid: U32, pid: U32,
        total_extlen: U16, padding: U16,
    }
    /// `fuse_out_header`.
    struct OutHeader { len: U32, error: I32, unique: U64 }
    /// `fuse_init_in`, up to what came with 7.36; older drivers send only the first four fields.
    struct InitIn { major: U32, minor: U32, max_readahead: U32, flags: U32 }
    /// `fuse_init_out`.
    struct InitOut {
        major: U32, minor: U32, max_readahead: U32, flags: U32, max_background: U16,
        congestion_threshold: U16, max_write: U32, time_gran: U32, max_pages: U16, map_alignment: U16,
        flags2: U32, unused: [U32; 7],
    }
    /// `fuse_attr`.
    struct Attr {
        ino: U64, size: U64, blocks: U64, atime: U64, mtime: U64, ctime: U64, atimensec: U32,
        mtimensec: U32, ctimensec: U32, mode: U32, nlink: U32, uid: U32, gid: U32, rdev: U32,
        blksize: U32, flags: U32,
    }
    /// `fuse_entry_out`.
    struct EntryOut {
        node: U64, generation: U64, entry_valid: U64, attr_valid: U64, entry_valid_nsec: U32,
        attr_valid_nsec: U32, attr: Attr,
    }
    /// `fuse_attr_out`.
    struct AttrOut { attr_valid: U64, attr_valid_nsec: U32, dummy: U32, attr: Attr }
    /// `fuse_forget_in`.
    struct ForgetIn { lookups: U64 }
    /// `fuse_forget_one`.
    struct ForgetOne { node: U64, lookups: U64 }
    /// `fuse_batch_forget_in`.
    struct BatchForgetIn { count: U32, dummy: U32 }
    /// `fuse_getattr_in`.
    struct GetattrIn { flags: U32, dummy: U32, handle: U64 }
    /// `fuse_setattr_in`.
    struct SetattrIn {
        valid: U32, padding: U32, handle: U64, size: U64, lock_owner: U64, atime: U64, mtime: U64,
        ctime: U64, atimensec: U32, mtimensec: U32, ctimensec: U32, mode: U32, unused4: U32, uid: U32,
        gid: U32, unused5: U32,
    }
    /// `fuse_mknod_in`.
    struct MknodIn { mode: U32, rdev: U32, umask: U32, padding: U32 }
    /// `fuse_mkdir_in`.
    struct MkdirIn { mode: U32, umask: U32 }
    /// `fuse_rename_in`.
    struct RenameIn { new_dir: U64 }
    /// `fuse_rename2_in`.
    struct Rename2In { new_dir: U64, flags: U32, padding: U32 }
    /// `fuse_link_in`.
    struct LinkIn { old_node: U64 }
    /// `fuse_open_in`.
    struct OpenIn { flags: U32, open_flags: U32 }
    /// `fuse_create_in`.
    struct CreateIn { flags: U32, mode: U32, umask: U32, open_flags: U32 }
    /// `fuse_open_out`.
    struct OpenOut { handle: U64, flags: U32, padding: U32 }
    /// `fuse_release_in`.
    struct ReleaseIn { handle: U64, flags: U32, release_flags: U32, lock_owner: U64 }
    /// `fuse_read_in`.
    struct ReadIn {
        handle: U64, offset: U64, size: U32, read_flags: U32, lock_owner: U64, flags: U32, padding: U32,
    }
    /// `fuse_write_in`.
    struct WriteIn {
        handle: U64, offset: U64, size: U32, write_flags: U32, lock_owner: U64, flags: U32, padding: U32,
    }
    /// `fuse_write_out`.
    struct WriteOut { size: U32, padding: U32 }
    /// `fuse_statfs_out`.
    struct StatfsOut {
        blocks: U64, bfree: U64, bavail: U64, files: U64, ffree: U64, bsize: U32, namelen: U32,
        frsize: U32, padding: U32, spare: [U32; 6],
    }
    /// `fuse_fsync_in`.
    struct FsyncIn { handle: U64, flags: U32, padding: U32 }
    /// `fuse_setxattr_in`, without what `FUSE_SETXATTR_EXT` would add.
    struct SetxattrIn { size: U32, flags: U32 }
    /// `fuse_getxattr_in`.
    struct GetxattrIn { size: U32, padding: U32 }
    /// `fuse_getxattr_out`.
    struct GetxattrOut { size: U32, padding: U32 }
    /// `fuse_fallocate_in`.
    struct FallocateIn { handle: U64, offset: U64, length: U64, mode: U32, padding: U32 }
    /// `fuse_lseek_in`.
    struct LseekIn { handle: U64, offset: U64, whence: U32, padding: U32 }
    /// `fuse_lseek_out`.
    struct LseekOut { offset: U64 }
    /// `fuse_copy_file_range_in`.
    struct CopyIn {
        handle_in: U64, offset_in: U64, node_out: U64, handle_out: U64, offset_out: U64, len: U64, flags: U64,
    }
    /// `fuse_dirent`, before its name.
    struct Dirent { ino: U64, off: U64, namelen: U32, kind: U32 }
}

/// `fuse_opcode`.
pub(super) mod op {
    pub(in super::super) const LOOKUP: u32 = 1;
    pub(in super::super) const FORGET: u32 = 2;
    pub(in super::super) const GETATTR: u32 = 3;
    pub(in super::super) const SETATTR: u32 = 4;
    pub(in super::super) const READLINK: u32 = 5;
    pub(in super::super) const SYMLINK: u32 = 6;
    pub(in super::super) const MKNOD: u32 = 8;
    pub(in super::super) const MKDIR: u32 = 9;
    pub(in super::super) const UNLINK: u32 = 10;
    pub(in super::super) const RMDIR: u32 = 11;
    pub(in super::super) const RENAME: u32 = 12;
    pub(in super::super) const LINK: u32 = 13;
    pub(in super::super) const OPEN: u32 = 14;
    pub(in super::super) const READ: u32 = 15;
    pub(in super::super) const WRITE: u32 = 16;
    pub(in super::super) const STATFS: u32 = 17;
    pub(in super::super) const RELEASE: u32 = 18;
    pub(in super::super) const FSYNC: u32 = 20;
    pub(in super::super) const SETXATTR: u32 = 21;
    pub(in super::super) const GETXATTR: u32 = 22;
    pub(in super::super) const LISTXATTR: u32 = 23;
    pub(in super::super) const REMOVEXATTR: u32 = 24;
    pub(in super::super) const INIT: u32 = 26;
    pub(in super::super) const OPENDIR: u32 = 27;
    pub(in super::super) const READDIR: u32 = 28;
    pub(in super::super) const RELEASEDIR: u32 = 29;
    pub(in super::super) const FSYNCDIR: u32 = 30;
    pub(in super::super) const CREATE: u32 = 35;
    pub(in super::super) const INTERRUPT: u32 = 36;
    pub(in super::super) const DESTROY: u32 = 38;
    pub(in super::super) const IOCTL: u32 = 39;
    pub(in super::super) const BATCH_FORGET: u32 = 42;
    pub(in super::super) const FALLOCATE: u32 = 43;
    pub(in super::super) const READDIRPLUS: u32 = 44;
    pub(in super::super) const RENAME2: u32 = 45;
    pub(in super::super) const LSEEK: u32 = 46;
    pub(in super::super) const COPY_FILE_RANGE: u32 = 47;
    pub(in super::super) const SYNCFS: u32 = 50;
    pub(in super::super) const TMPFILE: u32 = 51;
}

/// Flags of `FUSE_INIT`.
pub(super) mod init {
    pub(in super::super) const ASYNC_READ: u32 = 1 << 0;
    pub(in super::super) const ATOMIC_O_TRUNC: u32 = 1 << 3;
    pub(in super::super) const BIG_WRITES: u32 = 1 << 5;
    pub(in super::super) const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub(in super::super) const DO_READDIRPLUS: u32 = 1 << 13;
    pub(in super::super) const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub(in super::super) const ASYNC_DIO: u32 = 1 << 15;
    pub(in super::super) const PARALLEL_DIROPS: u32 = 1 << 18;
    pub(in super::super) const MAX_PAGES: u32 = 1 << 22;
    pub(in super::super) const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
}

/// `FATTR_*`: which fields of [`SetattrIn`] count.
pub(super) mod set {
    pub(in super::super) const MODE: u32 = 1 << 0;
    pub(in super::super) const UID: u32 = 1 << 1;
    pub(in super::super) const GID: u32 = 1 << 2;
    pub(in super::super) const SIZE: u32 = 1 << 3;
    pub(in super::super) const ATIME: u32 = 1 << 4;
    pub(in super::super) const MTIME: u32 = 1 << 5;
    pub(in super::super) const HANDLE: u32 = 1 << 6;
    pub(in super::super) const ATIME_NOW: u32 = 1 << 7;
    pub(in super::super) const MTIME_NOW: u32 = 1 << 8;
    pub(in super::super) const KILL_SUIDGID: u32 = 1 << 11;
}

/// `FUSE_GETATTR_FH`.
pub(super) const GETATTR_HANDLE: u32 = 1 << 0;
/// `FOPEN_KEEP_CACHE`.
pub(super) const OPEN_KEEP_CACHE: u32 = 1 << 1;
/// `FUSE_OPEN_KILL_SUIDGID`.
pub(super) const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// `FUSE_WRITE_KILL_SUIDGID`.
pub(super) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `FUSE_FSYNC_FDATASYNC`.
pub(super) const FSYNC_DATA: u32 = 1 << 0;

/// Access flags of `open(2)` as the guest sends them; they differ between architectures only in what is not here.
pub(super) mod open {
    pub(in super::super) const ACCESS: u32 = 0o3;
    pub(in super::super) const WRITE_ONLY: u32 = 0o1;
    pub(in super::super) const READ_WRITE: u32 = 0o2;
    pub(in super::super) const EXCLUSIVE: u32 = 0o200;
    pub(in super::super) const TRUNCATE: u32 = 0o1000;
    pub(in super::super) const APPEND: u32 = 0o2000;
    pub(in super::super) const DSYNC: u32 = 0o10000;
    pub(in super::super) const SYNC: u32 = 0o4010000;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_of_the_header_file() {
        let sizes = [
            (size_of::<InHeader>(), 40),
            (size_of::<OutHeader>(), 16),
            (size_of::<InitOut>(), 64),
            (size_of::<Attr>(), 88),
            (size_of::<EntryOut>(), 128),
            (size_of::<AttrOut>(), 104),
            (size_of::<SetattrIn>(), 88),
            (size_of::<ReadIn>(), 40),
            (size_of::<WriteIn>(), 40),
            (size_of::<StatfsOut>(), 80),
            (size_of::<CopyIn>(), 56),
            (size_of::<Dirent>(), 24),
        ];
        for (ours, theirs) in sizes {
            assert_eq!(ours, theirs);
        }
    }
}
