//! The server against bytes of a driver, friendly and not, on a throw-away directory.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::VolatileSlice;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::abi::*;
use super::buffers::Buffers;
use super::server::{Outcome, Server, finish};
use super::{Limits, own_descriptors};

const LIMITS: Limits = Limits {
    open_nodes: 64,
    nodes: 4096,
    handles: 64,
};

struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("caisson-fs-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

struct Guest {
    server: Server,
    root: Directory,
    uid: u32,
    gid: u32,
}

type Answer = Result<Vec<u8>, i32>;

impl Guest {
    fn new() -> Self {
        Self::with(LIMITS)
    }

    fn with(limits: Limits) -> Self {
        let root = Directory::new();
        let file = fs::File::open(&root.0).unwrap();
        let mut guest = Self {
            server: Server::new(file.into(), own_descriptors().unwrap(), limits).unwrap(),
            root,
            uid: 0,
            gid: 0,
        };
        let hello = InitIn {
            major: 7.into(),
            minor: 37.into(),
            flags: u32::MAX.into(),
            ..InitIn::default()
        };
        guest.ask(op::INIT, 0, hello.as_bytes()).unwrap();
        guest
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root.0.join(name)
    }

    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Answer {
        let header = InHeader {
            len: u32::try_from(40 + body.len()).unwrap().into(),
            opcode: opcode.into(),
            unique: 7.into(),
            node: node.into(),
            uid: self.uid.into(),
            gid: self.gid.into(),
            ..InHeader::default()
        };
        let request = [header.as_bytes(), body].concat();
        self.raw(&request).expect("an answer")
    }

    /// Asks with `request` as it is, in pieces; `None` if there is no answer.
    fn raw(&mut self, request: &[u8]) -> Option<Answer> {
        let mut input = request.to_vec();
        let mut room = vec![0u8; 1 << 17];
        let len = {
            let (front, back) = input.split_at_mut(request.len() / 3);
            let (first, rest) = room.split_at_mut(7);
            let input = Buffers::new(vec![VolatileSlice::from(front), VolatileSlice::from(back)]);
            let output = vec![VolatileSlice::from(first), VolatileSlice::from(rest)];
            match self.server.serve(input, Buffers::new(output.clone())) {
                Outcome::Done(len) => len,
                Outcome::Silent => return None,
                Outcome::Later(unique, job) => match finish(&mut Buffers::new(output), unique, job()) {
                    Outcome::Done(len) => len,
                    _ => panic!("a slow request had no room for its answer"),
                },
            }
        };
        let (header, body) = OutHeader::read_from_prefix(&room[..len as usize]).unwrap();
        assert_eq!(header.len.get(), len);
        assert_eq!(header.unique.get(), 7);
        Some(match header.error.get() {
            0 => Ok(body.to_vec()),
            error => Err(-error),
        })
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<EntryOut, i32> {
        self.ask(op::LOOKUP, parent, &text(name))
            .map(|bytes| front(&bytes))
    }

    fn mkdir(&mut self, parent: u64, name: &str, mode: u32) -> Result<EntryOut, i32> {
        let request = MkdirIn {
            mode: mode.into(),
            ..MkdirIn::default()
        };
        self.ask(op::MKDIR, parent, &joined(&request, &text(name)))
            .map(|bytes| front(&bytes))
    }

    fn create(&mut self, parent: u64, name: &str, mode: u32, flags: u32) -> Result<(EntryOut, u64), i32> {
        let request = CreateIn {
            mode: (0o100_000 | mode).into(),
            flags: flags.into(),
            ..CreateIn::default()
        };
        let bytes = self.ask(op::CREATE, parent, &joined(&request, &text(name)))?;
        let opened: OpenOut = front(&bytes[128..]);
        Ok((front(&bytes), opened.handle.get()))
    }

    fn open(&mut self, node: u64, flags: u32) -> Result<OpenOut, i32> {
        let request = OpenIn {
            flags: flags.into(),
            ..OpenIn::default()
        };
        self.ask(op::OPEN, node, request.as_bytes())
            .map(|bytes| front(&bytes))
    }

    fn read(&mut self, handle: u64, offset: u64, size: u32) -> Answer {
        let request = ReadIn {
            handle: handle.into(),
            offset: offset.into(),
            size: size.into(),
            ..ReadIn::default()
        };
        self.ask(op::READ, 0, request.as_bytes())
    }

    fn write(&mut self, handle: u64, offset: u64, data: &[u8], flags: u32) -> Result<u32, i32> {
        let request = WriteIn {
            handle: handle.into(),
            offset: offset.into(),
            size: u32::try_from(data.len()).unwrap().into(),
            write_flags: flags.into(),
            ..WriteIn::default()
        };
        let bytes = self.ask(op::WRITE, 0, &joined(&request, data))?;
        Ok(front::<WriteOut>(&bytes).size.get())
    }

    fn names(&mut self, node: u64, plus: bool, size: u32) -> Vec<String> {
        let opened: OpenOut = front(&self.ask(op::OPENDIR, node, &[0; 8]).unwrap());
        let (mut names, mut offset) = (Vec::new(), 0u64);
        loop {
            let request = ReadIn {
                handle: opened.handle,
                offset: offset.into(),
                size: size.into(),
                ..ReadIn::default()
            };
            let opcode = if plus { op::READDIRPLUS } else { op::READDIR };
            let bytes = self.ask(opcode, node, request.as_bytes()).unwrap();
            if bytes.is_empty() {
                break;
            }
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let skip = if plus { 128 } else { 0 };
                let dirent: Dirent = front(&rest[skip..]);
                let len = dirent.namelen.get() as usize;
                names.push(String::from_utf8(rest[skip + 24..skip + 24 + len].to_vec()).unwrap());
                offset = dirent.off.get();
                rest = &rest[(skip + 24 + len).next_multiple_of(8)..];
            }
        }
        let release = ReleaseIn {
            handle: opened.handle,
            ..ReleaseIn::default()
        };
        self.ask(op::RELEASEDIR, node, release.as_bytes()).unwrap();
        names.retain(|name| name != "." && name != "..");
        names.sort();
        names
    }

    fn rename(&mut self, old: (u64, &str), new: (u64, &str), flags: u32) -> Answer {
        let request = Rename2In {
            new_dir: new.0.into(),
            flags: flags.into(),
            ..Rename2In::default()
        };
        let names = [text(old.1), text(new.1)].concat();
        self.ask(op::RENAME2, old.0, &joined(&request, &names))
    }

    fn setattr(&mut self, node: u64, request: SetattrIn) -> Result<AttrOut, i32> {
        self.ask(op::SETATTR, node, request.as_bytes())
            .map(|bytes| front(&bytes))
    }

    fn getattr(&mut self, node: u64) -> Result<AttrOut, i32> {
        self.ask(op::GETATTR, node, &[0; 16]).map(|bytes| front(&bytes))
    }
}

fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}

fn joined(front: &(impl IntoBytes + Immutable), back: &[u8]) -> Vec<u8> {
    [front.as_bytes(), back].concat()
}

fn front<T: FromBytes + Immutable + KnownLayout + Unaligned>(bytes: &[u8]) -> T {
    T::read_from_prefix(bytes).unwrap().0
}

const RDWR: u32 = 2;
const EEXIST: i32 = 17;
const EINVAL: i32 = 22;
const ENOENT: i32 = 2;
const EPERM: i32 = 1;
const ESTALE: i32 = 116;
const ENFILE: i32 = 23;

#[test]
fn data_written_comes_back_and_is_on_the_host() {
    let mut guest = Guest::new();
    let (entry, handle) = guest.create(ROOT, "file", 0o640, RDWR).unwrap();
    assert_eq!(guest.write(handle, 3, b"hello", 0).unwrap(), 5);
    assert_eq!(guest.read(handle, 0, 100).unwrap(), b"\0\0\0hello");
    assert_eq!(guest.read(handle, 100, 100).unwrap(), b"");
    assert_eq!(fs::read(guest.path("file")).unwrap(), b"\0\0\0hello");
    assert_eq!(guest.getattr(entry.node.get()).unwrap().attr.size.get(), 8);
}

#[test]
fn large_transfers_cross_buffers() {
    let mut guest = Guest::new();
    let data: Vec<u8> = (0..100_000u32)
        .map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1])
        .collect();
    let (_, handle) = guest.create(ROOT, "file", 0o600, RDWR).unwrap();
    assert_eq!(guest.write(handle, 0, &data, 0).unwrap(), 100_000);
    assert_eq!(guest.read(handle, 0, 100_000).unwrap(), data);
}

#[test]
fn links_lead_nowhere() {
    let mut guest = Guest::new();
    symlink("/etc", guest.path("out")).unwrap();
    symlink("..", guest.path("up")).unwrap();
    for name in ["out", "up"] {
        let node = guest.lookup(ROOT, name).unwrap().node.get();
        assert_eq!(guest.lookup(node, "passwd").unwrap_err(), 20); // ENOTDIR: the link itself
        assert!(guest.open(node, 0).is_err());
        assert!(guest.ask(op::OPENDIR, node, &[0; 8]).is_err());
    }
    let node = guest.lookup(ROOT, "out").unwrap().node.get();
    assert_eq!(guest.ask(op::READLINK, node, &[]).unwrap(), b"/etc");
    assert!(guest.create(ROOT, "out", 0o600, RDWR).is_err());
}

#[test]
fn names_are_names() {
    let mut guest = Guest::new();
    fs::create_dir(guest.path("a")).unwrap();
    fs::write(guest.path("a/b"), b"").unwrap();
    for name in ["", ".", "..", "a/b", "/", "../x"] {
        assert_eq!(guest.lookup(ROOT, name).unwrap_err(), EINVAL, "{name:?}");
        assert_eq!(guest.mkdir(ROOT, name, 0o755).unwrap_err(), EINVAL, "{name:?}");
        assert_eq!(
            guest.create(ROOT, name, 0o644, RDWR).unwrap_err(),
            EINVAL,
            "{name:?}"
        );
        assert_eq!(guest.ask(op::UNLINK, ROOT, &text(name)).unwrap_err(), EINVAL);
        assert_eq!(guest.rename((ROOT, "a"), (ROOT, name), 0).unwrap_err(), EINVAL);
    }
    assert_eq!(guest.lookup(ROOT, &"x".repeat(256)).unwrap_err(), 36);
    assert_eq!(guest.ask(op::LOOKUP, ROOT, b"no-end").unwrap_err(), EINVAL);
}

#[test]
fn pipes_and_devices_are_never_opened() {
    let mut guest = Guest::new();
    let mode = |mode: u32, rdev: u32| MknodIn {
        mode: mode.into(),
        rdev: rdev.into(),
        ..MknodIn::default()
    };
    let fifo = joined(&mode(0o010_644, 0), &text("fifo"));
    let entry: EntryOut = front(&guest.ask(op::MKNOD, ROOT, &fifo).unwrap());
    assert!(fs::metadata(guest.path("fifo")).unwrap().file_type().is_fifo());
    let node = entry.node.get();
    assert!(guest.open(node, 0).is_err()); // and does not wait for a writer
    assert!(guest.create(ROOT, "fifo", 0o644, RDWR).is_err());
    let size = SetattrIn {
        valid: set::SIZE.into(),
        ..SetattrIn::default()
    };
    assert!(guest.setattr(node, size).is_err());
    let chmod = SetattrIn {
        valid: set::MODE.into(),
        mode: 0o600.into(),
        ..SetattrIn::default()
    };
    assert_eq!(guest.setattr(node, chmod).unwrap().attr.mode.get(), 0o010_600);
    for kind in [0o020_000, 0o060_000] {
        let device = joined(&mode(kind | 0o666, 0x103), &text("device"));
        assert_eq!(guest.ask(op::MKNOD, ROOT, &device).unwrap_err(), EPERM);
    }
    let whiteout = joined(&mode(0o020_000, 0), &text("whiteout"));
    guest.ask(op::MKNOD, ROOT, &whiteout).unwrap();
}

#[test]
fn few_descriptors_serve_many_files() {
    let mut guest = Guest::with(Limits {
        open_nodes: 8,
        ..LIMITS
    });
    let mut deep = ROOT;
    for level in 0..20 {
        deep = guest.mkdir(deep, &format!("d{level}"), 0o755).unwrap().node.get();
    }
    let nodes: Vec<u64> = (0..100)
        .map(|n| {
            let (entry, handle) = guest.create(deep, &format!("f{n}"), 0o644, RDWR).unwrap();
            guest.write(handle, 0, &[n], 0).unwrap();
            let release = ReleaseIn {
                handle: handle.into(),
                ..ReleaseIn::default()
            };
            guest.ask(op::RELEASE, 0, release.as_bytes()).unwrap();
            entry.node.get()
        })
        .collect();
    assert!(guest.server.nodes.open() <= 8);
    guest.rename((ROOT, "d0"), (ROOT, "moved"), 0).unwrap();
    for (n, node) in nodes.iter().enumerate() {
        let opened = guest.open(*node, 0).unwrap();
        assert_eq!(
            guest.read(opened.handle.get(), 0, 9).unwrap(),
            [u8::try_from(n).unwrap()]
        );
        let release = ReleaseIn {
            handle: opened.handle,
            ..ReleaseIn::default()
        };
        guest.ask(op::RELEASE, 0, release.as_bytes()).unwrap();
    }
    assert!(guest.server.nodes.open() <= 8);
    let top = fs::read_dir(&guest.root.0).unwrap().count();
    assert_eq!(top, 1);
}

#[test]
fn a_file_that_was_swapped_on_the_host_is_not_taken_for_the_old_one() {
    let mut guest = Guest::with(Limits {
        open_nodes: 2,
        ..LIMITS
    });
    fs::write(guest.path("a"), b"old").unwrap();
    let node = guest.lookup(ROOT, "a").unwrap().node.get();
    for n in 0..8 {
        guest.mkdir(ROOT, &format!("d{n}"), 0o755).unwrap();
    }
    fs::write(guest.path("b"), b"new").unwrap();
    fs::rename(guest.path("b"), guest.path("a")).unwrap();
    assert_eq!(guest.getattr(node).unwrap_err(), ESTALE);
    let again = guest.lookup(ROOT, "a").unwrap().node.get();
    assert_ne!(again, node);
}

#[test]
fn an_unlinked_file_lives_until_it_is_forgotten() {
    let mut guest = Guest::with(Limits {
        open_nodes: 4,
        ..LIMITS
    });
    let (entry, handle) = guest.create(ROOT, "gone", 0o644, RDWR).unwrap();
    let node = entry.node.get();
    guest.ask(op::UNLINK, ROOT, &text("gone")).unwrap();
    for n in 0..16 {
        guest.mkdir(ROOT, &format!("d{n}"), 0o755).unwrap();
    }
    guest.write(handle, 0, b"still", 0).unwrap();
    assert_eq!(guest.getattr(node).unwrap().attr.nlink.get(), 0);
    assert_eq!(guest.getattr(node).unwrap().attr.size.get(), 5);
    let known = guest.server.nodes.len();
    let forget = ForgetIn { lookups: 1.into() };
    let header = InHeader {
        len: 48.into(),
        opcode: op::FORGET.into(),
        node: node.into(),
        ..InHeader::default()
    };
    assert!(guest.raw(&joined(&header, forget.as_bytes())).is_none());
    assert_eq!(guest.server.nodes.len(), known - 1);
    assert_eq!(guest.getattr(node).unwrap_err(), ESTALE);
}

#[test]
fn what_a_guest_can_hold_is_bounded() {
    let mut guest = Guest::with(Limits {
        open_nodes: 4,
        nodes: 10,
        handles: 3,
    });
    let made: Vec<_> = (0..20)
        .map(|n| guest.mkdir(ROOT, &format!("d{n}"), 0o755))
        .collect();
    assert_eq!(made.iter().filter(|made| made.is_ok()).count(), 9);
    assert_eq!(made.last().unwrap().as_ref().unwrap_err(), &ENFILE);
    let opened: Vec<_> = (0..5).map(|_| guest.ask(op::OPENDIR, ROOT, &[0; 8])).collect();
    assert_eq!(opened.iter().filter(|opened| opened.is_ok()).count(), 3);
    assert_eq!(opened.last().unwrap().as_ref().unwrap_err(), &ENFILE);
}

#[test]
fn new_files_belong_to_the_caller_and_to_a_set_group_id_directory_s_group() {
    let mut guest = Guest::new();
    let plain = guest.mkdir(ROOT, "plain", 0o777).unwrap();
    fs::create_dir(guest.path("shared")).unwrap();
    std::os::unix::fs::chown(guest.path("shared"), None, Some(50)).unwrap();
    fs::set_permissions(guest.path("shared"), fs::Permissions::from_mode(0o2777)).unwrap();
    let shared = guest.lookup(ROOT, "shared").unwrap();
    (guest.uid, guest.gid) = (1000, 1001);
    let (file, _) = guest.create(plain.node.get(), "f", 0o4755, RDWR).unwrap();
    let owner = |entry: &EntryOut| (entry.attr.uid.get(), entry.attr.gid.get(), entry.attr.mode.get());
    assert_eq!(owner(&file), (1000, 1001, 0o104_755));
    let (file, _) = guest.create(shared.node.get(), "f", 0o644, RDWR).unwrap();
    assert_eq!(owner(&file), (1000, 50, 0o100_644));
    let directory = guest.mkdir(shared.node.get(), "d", 0o755).unwrap();
    assert_eq!(owner(&directory), (1000, 50, 0o042_755));
    let meta = fs::metadata(guest.path("shared/d")).unwrap();
    assert_eq!((meta.uid(), meta.gid(), meta.mode()), (1000, 50, 0o042_755));
}

#[test]
fn a_write_without_privilege_takes_set_user_id_off() {
    let mut guest = Guest::new();
    let (entry, handle) = guest.create(ROOT, "f", 0o6755, RDWR).unwrap();
    guest.write(handle, 0, b"x", 0).unwrap();
    assert_eq!(
        guest.getattr(entry.node.get()).unwrap().attr.mode.get(),
        0o106_755
    );
    guest.write(handle, 0, b"x", WRITE_KILL_SUIDGID).unwrap();
    assert_eq!(
        guest.getattr(entry.node.get()).unwrap().attr.mode.get(),
        0o100_755
    );
}

#[test]
fn attributes_are_set() {
    let mut guest = Guest::new();
    let (entry, handle) = guest.create(ROOT, "f", 0o644, RDWR).unwrap();
    let node = entry.node.get();
    let attr = guest
        .setattr(
            node,
            SetattrIn {
                valid: (set::MODE | set::UID | set::GID | set::SIZE | set::ATIME | set::MTIME).into(),
                mode: 0o600.into(),
                uid: 5.into(),
                gid: 6.into(),
                size: (5u64 << 32).into(),
                atime: 10.into(),
                mtime: 20.into(),
                mtimensec: 30.into(),
                ..SetattrIn::default()
            },
        )
        .unwrap()
        .attr;
    assert_eq!(
        (attr.mode.get(), attr.uid.get(), attr.gid.get()),
        (0o100_600, 5, 6)
    );
    assert_eq!(
        (attr.atime.get(), attr.mtime.get(), attr.mtimensec.get()),
        (10, 20, 30)
    );
    assert_eq!(attr.size.get(), 5 << 32);
    guest.write(handle, 4 << 32, b"data", 0).unwrap();
    let seek = |whence: u32| LseekIn {
        handle: handle.into(),
        whence: whence.into(),
        ..LseekIn::default()
    };
    let data = guest.ask(op::LSEEK, node, seek(3).as_bytes()).unwrap();
    assert_eq!(front::<LseekOut>(&data).offset.get(), 4 << 32);
    assert_eq!(
        guest.ask(op::LSEEK, node, seek(0).as_bytes()).unwrap_err(),
        EINVAL
    );
}

#[test]
fn renames_keep_their_promises() {
    let mut guest = Guest::new();
    let (a, _) = guest.create(ROOT, "a", 0o644, RDWR).unwrap();
    let (b, _) = guest.create(ROOT, "b", 0o644, RDWR).unwrap();
    assert_eq!(guest.rename((ROOT, "a"), (ROOT, "b"), 1).unwrap_err(), EEXIST);
    guest.rename((ROOT, "a"), (ROOT, "b"), 2).unwrap();
    assert_eq!(guest.lookup(ROOT, "a").unwrap().node, b.node);
    assert_eq!(guest.lookup(ROOT, "b").unwrap().node, a.node);
    guest.rename((ROOT, "a"), (ROOT, "b"), 0).unwrap();
    assert_eq!(guest.lookup(ROOT, "a").unwrap_err(), ENOENT);
    assert_eq!(guest.getattr(a.node.get()).unwrap().attr.nlink.get(), 0);
    assert_eq!(guest.rename((ROOT, "b"), (ROOT, "c"), 0x80).unwrap_err(), EINVAL);
}

#[test]
fn hard_links_are_one_file() {
    let mut guest = Guest::new();
    let (entry, _) = guest.create(ROOT, "a", 0o644, RDWR).unwrap();
    let link = joined(&LinkIn { old_node: entry.node }, &text("b"));
    let linked: EntryOut = front(&guest.ask(op::LINK, ROOT, &link).unwrap());
    assert_eq!((linked.node, linked.attr.nlink.get()), (entry.node, 2));
    symlink("target", guest.path("s")).unwrap();
    let node = guest.lookup(ROOT, "s").unwrap().node;
    let link = joined(&LinkIn { old_node: node }, &text("t"));
    guest.ask(op::LINK, ROOT, &link).unwrap();
    assert!(fs::symlink_metadata(guest.path("t")).unwrap().is_symlink());
}

#[test]
fn directories_are_listed_whole_in_any_size() {
    let mut guest = Guest::new();
    let directory = guest.mkdir(ROOT, "d", 0o755).unwrap().node.get();
    let want: Vec<String> = (0..300).map(|n| format!("name-{n:03}")).collect();
    for name in &want {
        fs::write(guest.path("d").join(name), b"").unwrap();
    }
    for (plus, size) in [(false, 300), (false, 4096), (true, 400), (true, 65536)] {
        assert_eq!(guest.names(directory, plus, size), want);
    }
}

#[test]
fn extended_attributes_are_the_guest_s_own_kind_only() {
    let mut guest = Guest::new();
    let (entry, _) = guest.create(ROOT, "f", 0o644, RDWR).unwrap();
    let node = entry.node.get();
    let put = |name: &str, value: &[u8]| {
        let head = SetxattrIn {
            size: u32::try_from(value.len()).unwrap().into(),
            ..SetxattrIn::default()
        };
        joined(&head, &[text(name), value.to_vec()].concat())
    };
    let get = |size: u32, name: &str| {
        joined(
            &GetxattrIn {
                size: size.into(),
                ..GetxattrIn::default()
            },
            &text(name),
        )
    };
    assert_eq!(
        guest
            .ask(op::SETXATTR, node, &put("trusted.x", b"1"))
            .unwrap_err(),
        95
    );
    assert_eq!(
        guest
            .ask(op::SETXATTR, node, &put("security.selinux", b"1"))
            .unwrap_err(),
        95
    );
    if guest.ask(op::SETXATTR, node, &put("user.x", b"value")) == Err(95) {
        return; // the file system of the temporary directory has none
    }
    assert_eq!(
        guest.ask(op::GETXATTR, node, &get(64, "user.x")).unwrap(),
        b"value"
    );
    let size: GetxattrOut = front(&guest.ask(op::GETXATTR, node, &get(0, "user.x")).unwrap());
    assert_eq!(size.size.get(), 5);
    assert_eq!(guest.ask(op::GETXATTR, node, &get(2, "user.x")).unwrap_err(), 34);
    assert_eq!(guest.ask(op::LISTXATTR, node, &get(64, "")).unwrap(), b"user.x\0");
    guest.ask(op::REMOVEXATTR, node, &text("user.x")).unwrap();
    assert_eq!(guest.ask(op::GETXATTR, node, &get(64, "user.x")).unwrap_err(), 61);
}

#[test]
fn lengths_are_checked() {
    let mut guest = Guest::new();
    let (_, handle) = guest.create(ROOT, "f", 0o644, RDWR).unwrap();
    let mut header = InHeader {
        len: u32::MAX.into(),
        opcode: op::GETATTR.into(),
        unique: 7.into(),
        node: ROOT.into(),
        ..InHeader::default()
    };
    assert_eq!(guest.raw(header.as_bytes()).unwrap().unwrap_err(), EINVAL);
    header.len = 3.into();
    assert_eq!(guest.raw(header.as_bytes()).unwrap().unwrap_err(), EINVAL);
    assert!(guest.raw(&[1, 2, 3]).is_none());
    let write = WriteIn {
        handle: handle.into(),
        size: u32::MAX.into(),
        ..WriteIn::default()
    };
    assert_eq!(guest.ask(op::WRITE, 0, write.as_bytes()).unwrap_err(), EINVAL);
    assert_eq!(guest.write(handle, u64::MAX, b"x", 0).unwrap_err(), EINVAL);
    assert_eq!(guest.read(handle, 0, u32::MAX).unwrap(), b"");
    assert_eq!(guest.read(99, 0, 1).unwrap_err(), 9);
    assert_eq!(
        guest.ask(op::GETATTR, ROOT, &vec![0; 1 << 18]).unwrap_err(),
        EINVAL
    );
    assert_eq!(guest.ask(9999, ROOT, &[]).unwrap_err(), 38);
}

#[test]
fn noise_neither_stops_the_server_nor_leaves_the_directory() {
    let mut guest = Guest::new();
    let inside = Directory::new();
    fs::write(inside.0.join("kept"), b"kept").unwrap();
    symlink(&inside.0, guest.path("out")).unwrap();
    let mut state = 0x1234_5678_9abc_def1u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..20_000 {
        let len = usize::try_from(random() % 160).unwrap();
        let mut bytes: Vec<u8> = (0..len).map(|_| random().to_le_bytes()[3]).collect();
        if random() % 4 != 0 {
            // Closer to a request: small numbers where numbers are, names at the end.
            for byte in &mut bytes {
                if random() % 3 != 0 {
                    *byte = random().to_le_bytes()[5] % 4;
                }
            }
            bytes.extend_from_slice(b"out\0kept\0");
            let mut header = InHeader::new_zeroed();
            header.len = u32::try_from(40 + bytes.len()).unwrap().into();
            header.opcode = u32::try_from(random() % 54).unwrap().into();
            header.node = (random() % 8).into();
            header.unique = 7.into();
            if matches!(header.opcode.get(), op::INIT | op::DESTROY | op::SYNCFS) {
                continue; // these end the session, or are slow
            }
            bytes = joined(&header, &bytes);
        } else if let Some(unique) = bytes.get_mut(8..16) {
            unique.copy_from_slice(&7u64.to_le_bytes());
        }
        let _answer = guest.raw(&bytes);
    }
    assert_eq!(fs::read(inside.0.join("kept")).unwrap(), b"kept");
    assert_eq!(fs::read_dir(&inside.0).unwrap().count(), 1);
    assert!(guest.getattr(ROOT).is_ok());
}
