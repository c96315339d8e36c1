//! A user namespace: root of it has no power over anything that belongs to the host's.

use std::io;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::{read, write};
use rustix::pipe::pipe;

use super::sys::{Child, unshare_user};

/// `/proc/self`, opened while there is a `/proc`, and the ids that this process's own namespace has.
#[derive(Debug)]
pub(super) struct Identity {
    process: rustix::fd::OwnedFd,
    uids: String,
    gids: String,
}

impl Identity {
    /// Reads which ids there are.
    pub(super) fn open() -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            process: openat(CWD, "/proc/self", flags, Mode::empty())?,
            uids: identity(&std::fs::read_to_string("/proc/self/uid_map")?),
            gids: identity(&std::fs::read_to_string("/proc/self/gid_map")?),
        })
    }

    /// Enters a user namespace that maps each id to itself: files keep their owners, while every capability
    /// is now one over this namespace and the files of the ids it maps.
    ///
    /// Only a process outside may write the maps (user_namespaces(7)), so a child of this one does.
    pub(super) fn enter(&self) -> io::Result<()> {
        let (entered, go) = pipe()?;
        let mut go = Some(go);
        let child = Child::run(|| {
            go.take();
            if read(&entered, &mut [0; 1])? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            for (file, map) in [("uid_map", &self.uids), ("gid_map", &self.gids)] {
                let file = openat(
                    &self.process,
                    file,
                    OFlags::WRONLY | OFlags::CLOEXEC,
                    Mode::empty(),
                )?;
                write(&file, map.as_bytes())?; // one write, or none (user_namespaces(7))
            }
            Ok(())
        })?;
        let outcome = unshare_user();
        if outcome.is_ok()
            && let Some(go) = &go
        {
            write(go, b"x")?;
        }
        drop(go);
        let mapped = child.finish();
        outcome?;
        mapped
    }
}

/// The map of each id to itself for the ids that a map names on its inside.
fn identity(map: &str) -> String {
    map.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let (inside, _, count) = (words.next()?, words.next()?, words.next()?);
            Some(format!("{inside} {inside} {count}\n"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_map_to_themselves_whatever_they_are_outside() {
        let map = "         0          0 4294967295\n";
        assert_eq!(identity(map), "0 0 4294967295\n");
        assert_eq!(identity("0 1000 1\n1 100000 65536\n"), "0 0 1\n1 1 65536\n");
    }
}
