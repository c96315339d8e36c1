//! What the guest knows by number: files, and how to get at them again.
//!
//! A node is an inode of the host that the guest has looked up and not forgotten. Few of them hold a descriptor:
//! with more than [`Limits::open_nodes`], the least recently used gives its up and is found again by its parent
//! and name, if what is there then is the same inode. A node that lost its name keeps its descriptor.
//! No descriptor here was opened for reading or writing: all are `O_PATH`, which no special file notices.

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags, openat2, statx};
use rustix::io::Errno;

use super::Limits;
use super::abi::ROOT;

/// Longest chain of parents that is followed to find a node again.
const DEPTH: usize = 4096;
/// Most bytes of a name (`NAME_MAX`).
const NAME: usize = 255;

/// An inode of the host, while it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    device: (u32, u32),
    ino: u64,
}

impl Key {
    pub(super) fn of(stat: &Statx) -> Self {
        Self {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
        }
    }
}

/// What tells that a file's contents have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    size: u64,
    changed: (i64, u32),
}

impl Stamp {
    pub(super) fn of(stat: &Statx) -> Self {
        Self {
            size: stat.stx_size,
            changed: (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
        }
    }
}

#[derive(Debug)]
struct Node {
    key: Key,
    kind: FileType,
    lookups: u64,
    parent: u64,
    name: CString,
    path: Option<Arc<OwnedFd>>,
    /// It has no name that we know of: its descriptor cannot be had again.
    nameless: bool,
    used: bool,
    /// It has a place in [`Nodes::clock`].
    clocked: bool,
    stamp: Option<Stamp>,
}

/// The table.
#[derive(Debug)]
pub(super) struct Nodes {
    nodes: HashMap<u64, Node>,
    by_key: HashMap<Key, u64>,
    devices: HashMap<(u32, u32), u64>,
    next: u64,
    open: usize,
    /// Nodes that could give up their descriptor, in the order of their last chance.
    clock: VecDeque<u64>,
    limits: Limits,
}

impl Nodes {
    /// A table of which the guest knows the root only.
    pub(super) fn new(root: Arc<OwnedFd>, limits: Limits) -> Result<Self, Errno> {
        let stat = stat(root.as_fd())?;
        let key = Key::of(&stat);
        let mut table = Self {
            nodes: HashMap::new(),
            by_key: HashMap::from([(key, ROOT)]),
            devices: HashMap::new(),
            next: ROOT + 1,
            open: 0,
            clock: VecDeque::new(),
            limits,
        };
        let node = Node {
            key,
            kind: FileType::Directory,
            lookups: 1,
            parent: ROOT,
            name: CString::default(),
            path: Some(root),
            nameless: true,
            used: true,
            clocked: false,
            stamp: None,
        };
        table.nodes.insert(ROOT, node);
        Ok(table)
    }

    /// Nodes known to the guest, its root included.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Descriptors held, but for the root's.
    #[cfg(test)]
    pub(super) fn open(&self) -> usize {
        self.open
    }

    /// What sort of file a node is; that never changes.
    pub(super) fn kind(&self, id: u64) -> Result<FileType, Errno> {
        Ok(self.nodes.get(&id).ok_or(Errno::STALE)?.kind)
    }

    pub(super) fn stamp(&mut self, id: u64) -> Option<&mut Option<Stamp>> {
        Some(&mut self.nodes.get_mut(&id)?.stamp)
    }

    /// An `O_PATH` descriptor of the node.
    pub(super) fn path(&mut self, id: u64) -> Result<Arc<OwnedFd>, Errno> {
        let mut missing = Vec::new();
        let mut at = id;
        let mut path = loop {
            let node = self.nodes.get_mut(&at).ok_or(Errno::STALE)?;
            node.used = true;
            if let Some(path) = &node.path {
                break path.clone();
            }
            if missing.len() >= DEPTH {
                return Err(Errno::STALE);
            }
            missing.push(at);
            at = node.parent;
        };
        for id in missing.into_iter().rev() {
            let node = self.nodes.get(&id).ok_or(Errno::STALE)?;
            let found = open_path(path.as_fd(), &node.name).map_err(|error| match error {
                Errno::NOENT | Errno::NOTDIR => Errno::STALE,
                other => other,
            })?;
            let stat = stat(found.as_fd())?;
            if Key::of(&stat) != node.key || kind(&stat) != node.kind {
                return Err(Errno::STALE);
            }
            path = Arc::new(found);
            self.keep(id, path.clone())?;
        }
        Ok(path)
    }

    /// Looks up `name` in `parent` and counts that the guest knows it.
    pub(super) fn lookup(&mut self, parent: u64, name: &CStr) -> Result<(u64, Statx), Errno> {
        let directory = self.path(parent)?;
        let path = open_path(directory.as_fd(), name)?;
        let stat = stat(path.as_fd())?;
        Ok((self.know(path, &stat, parent, Some(name))?, stat))
    }

    /// Counts that the guest knows the file of `path`; without a name it lives as long as the guest knows it.
    pub(super) fn know(
        &mut self,
        path: OwnedFd,
        stat: &Statx,
        parent: u64,
        name: Option<&CStr>,
    ) -> Result<u64, Errno> {
        let (key, kind) = (Key::of(stat), kind(stat));
        let known = self.by_key.get(&key).copied();
        let known = known.filter(|id| self.nodes.get(id).is_some_and(|node| node.kind == kind));
        if let Some(id) = known {
            if self.nodes.get(&id).is_some_and(|node| node.path.is_none()) {
                self.keep(id, Arc::new(path))?;
            }
            self.count(id);
            if let Some(name) = name {
                self.moved(id, parent, name);
            }
            return Ok(id);
        }
        if self.nodes.len() >= self.limits.nodes {
            return Err(Errno::NFILE);
        }
        let id = self.next;
        let node = Node {
            key,
            kind,
            lookups: 1,
            parent,
            name: name.map(CStr::to_owned).unwrap_or_default(),
            path: None,
            nameless: name.is_none(),
            used: true,
            clocked: false,
            stamp: None,
        };
        self.nodes.insert(id, node);
        if let Err(error) = self.keep(id, Arc::new(path)) {
            self.nodes.remove(&id);
            return Err(error);
        }
        self.next = self.next.saturating_add(1);
        self.by_key.insert(key, id);
        Ok(id)
    }

    /// Counts that the guest was told of a node once more.
    pub(super) fn count(&mut self, id: u64) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.lookups = node.lookups.saturating_add(1);
        }
    }

    /// The guest forgets `lookups` of the times it was told of a node.
    pub(super) fn forget(&mut self, id: u64, lookups: u64) {
        let Some(node) = self.nodes.get_mut(&id).filter(|_| id != ROOT) else {
            return;
        };
        node.lookups = node.lookups.saturating_sub(lookups);
        if node.lookups > 0 {
            return;
        }
        if let Some(node) = self.nodes.remove(&id) {
            if node.path.is_some() {
                self.open = self.open.saturating_sub(1);
            }
            if self.by_key.get(&node.key) == Some(&id) {
                self.by_key.remove(&node.key);
            }
        }
    }

    /// The node that `name` in `directory` is, if the guest knows it. It has its descriptor from then on, so
    /// that it survives the loss of that name.
    pub(super) fn known_at(&mut self, directory: BorrowedFd<'_>, name: &CStr) -> Option<u64> {
        let path = open_path(directory, name).ok()?;
        let id = *self.by_key.get(&Key::of(&stat(path.as_fd()).ok()?))?;
        if self.nodes.get(&id)?.path.is_none() {
            self.keep(id, Arc::new(path)).ok()?;
        }
        Some(id)
    }

    /// `name` in `parent` is not this node's any more.
    pub(super) fn lost(&mut self, id: u64, parent: u64, name: &CStr) {
        if let Some(node) = self.nodes.get_mut(&id)
            && node.parent == parent
            && *node.name == *name
            && node.path.is_some()
        {
            node.nameless = true;
        }
    }

    /// This node is to be found as `name` in `parent`.
    pub(super) fn moved(&mut self, id: u64, parent: u64, name: &CStr) {
        let Some(node) = self.nodes.get_mut(&id).filter(|_| id != ROOT) else {
            return;
        };
        if node.parent != parent || *node.name != *name {
            (node.parent, node.name) = (parent, name.to_owned());
        }
        node.nameless = false;
        if !std::mem::replace(&mut node.clocked, true) {
            self.clock.push_back(id);
        }
    }

    /// The number that the guest sees: unique over all the file systems below the root.
    pub(super) fn ino(&mut self, device: (u32, u32), ino: u64) -> u64 {
        let next = (self.devices.len() as u64).min(0xffff);
        let index = match self.devices.get(&device) {
            Some(index) => *index,
            None if next < 0xffff => *self.devices.entry(device).or_insert(next),
            None => next,
        };
        ino ^ (index << 48)
    }

    /// One node of each file system that holds a descriptor: where `syncfs` reaches everything in use.
    pub(super) fn file_systems(&self) -> Vec<Arc<OwnedFd>> {
        let mut seen = HashMap::new();
        for node in self.nodes.values() {
            let syncable = matches!(node.kind, FileType::Directory | FileType::RegularFile);
            if let Some(path) = node.path.as_ref().filter(|_| syncable) {
                seen.entry(node.key.device).or_insert_with(|| path.clone());
            }
        }
        seen.into_values().take(64).collect()
    }

    fn keep(&mut self, id: u64, path: Arc<OwnedFd>) -> Result<(), Errno> {
        while self.open >= self.limits.open_nodes {
            self.close_one()?;
        }
        if self.clock.len() > self.open.saturating_mul(2).saturating_add(64) {
            let nodes = &self.nodes; // forgotten ones left their places behind
            self.clock.retain(|id| nodes.contains_key(id));
        }
        if let Some(node) = self.nodes.get_mut(&id) {
            node.path = Some(path);
            self.open = self.open.saturating_add(1);
            if !node.nameless && !std::mem::replace(&mut node.clocked, true) {
                self.clock.push_back(id);
            }
        }
        Ok(())
    }

    /// Closes the descriptor of a node that was not used since its last chance.
    fn close_one(&mut self) -> Result<(), Errno> {
        while let Some(id) = self.clock.pop_front() {
            let Some(node) = self.nodes.get_mut(&id) else {
                continue;
            };
            node.clocked = false;
            if node.nameless || node.path.is_none() {
                continue;
            }
            if std::mem::take(&mut node.used) {
                node.clocked = true;
                self.clock.push_back(id);
                continue;
            }
            node.path = None;
            self.open = self.open.saturating_sub(1);
            return Ok(());
        }
        Err(Errno::NFILE)
    }
}

/// Opens one name without following anything and without touching what is there.
pub(super) fn open_path(directory: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    openat2(
        directory,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
        BENEATH,
    )
}

/// How a name is resolved: within its directory, into a mount if one is there, through no link.
pub(super) const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_SYMLINKS);

pub(super) fn stat(file: BorrowedFd<'_>) -> Result<Statx, Errno> {
    statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)
}

pub(super) fn kind(stat: &Statx) -> FileType {
    FileType::from_raw_mode(u32::from(stat.stx_mode))
}

/// The first name in `bytes`, checked, and what follows it.
pub(super) fn name(bytes: &[u8]) -> Result<(&CStr, &[u8]), Errno> {
    let (name, rest) = text(bytes)?;
    match name.to_bytes() {
        b"" | b"." | b".." => Err(Errno::INVAL),
        long if long.len() > NAME => Err(Errno::NAMETOOLONG),
        slashed if slashed.contains(&b'/') => Err(Errno::INVAL),
        _ => Ok((name, rest)),
    }
}

/// The first string in `bytes` and what follows it.
pub(super) fn text(bytes: &[u8]) -> Result<(&CStr, &[u8]), Errno> {
    let text = CStr::from_bytes_until_nul(bytes).map_err(|_| Errno::INVAL)?;
    let rest = bytes
        .get(text.count_bytes().saturating_add(1)..)
        .unwrap_or_default();
    Ok((text, rest))
}
