//! Users and groups by name and number.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};

/// Most bytes of a passwd or group file that are read.
const MOST: u64 = 4 << 20;

/// A user as OCI has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ids {
    pub(crate) uid: u32,
    pub(crate) gid: Option<u32>,
}

/// Reads `uid[:gid]`, numbers only.
pub(crate) fn numeric(text: &str) -> std::result::Result<Ids, String> {
    let (uid, gid) = match text.split_once(':') {
        Some((uid, gid)) => (uid, Some(gid)),
        None => (text, None),
    };
    let number = |text: &str| {
        text.parse()
            .map_err(|_| format!("{text:?} is no number; give a user as UID or UID:GID"))
    };
    Ok(Ids {
        uid: number(uid)?,
        gid: gid.map(number).transpose()?,
    })
}

/// Reads `user[:group]`, names being those of the root file system.
pub(crate) fn in_root(text: &str, root: &Path) -> Result<Ids> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let (uid, mut gid) = match user.parse() {
        Ok(uid) => (uid, None),
        Err(_) => {
            let passwd = read_in(root, "etc/passwd")
                .with_context(|| format!("cannot look user {user:?} up; give its number"))?;
            let Some((uid, gid)) = entry(&passwd, user) else {
                bail!("the root file system has no user {user:?}; see its /etc/passwd, or give a number");
            };
            (uid, gid)
        }
    };
    if let Some(group) = group {
        gid = Some(match group.parse() {
            Ok(gid) => gid,
            Err(_) => {
                let groups = read_in(root, "etc/group")
                    .with_context(|| format!("cannot look group {group:?} up; give its number"))?;
                let Some((gid, _)) = entry(&groups, group) else {
                    bail!(
                        "the root file system has no group {group:?}; see its /etc/group, or give a number"
                    );
                };
                gid
            }
        });
    }
    Ok(Ids { uid, gid })
}

/// The name of a user of the host, or the number if there is none.
pub(crate) fn name_of(uid: u32) -> String {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    passwd
        .lines()
        .find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
        })
        .unwrap_or_else(|| uid.to_string())
}

/// The two numbers of a name: uid and gid in passwd(5), gid in group(5).
fn entry(text: &str, name: &str) -> Option<(u32, Option<u32>)> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        if fields.next()? != name {
            return None;
        }
        let first = fields.nth(1)?.parse().ok()?;
        Some((first, fields.next().and_then(|field| field.parse().ok())))
    })
}

/// Reads a file of a root file system, whose links may not lead out of it.
fn read_in(root: &Path, path: &str) -> Result<String> {
    let directory = openat(
        CWD,
        root,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let file = openat2(
        &directory,
        path,
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
    .with_context(|| format!("cannot open /{path} in {}", root.display()))?;
    let mut text = String::new();
    File::from(file).take(MOST).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_numbers_or_names_of_the_root_file_system() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::fs::write(
            root.path().join("etc/passwd"),
            "root:x:0:0::/:\nweb:x:33:44::/:\nbad\n",
        )
        .unwrap();
        std::fs::write(root.path().join("etc/group"), "adm:x:4:\n").unwrap();
        for (text, want) in [
            ("5", Some((5, None))),
            ("5:6", Some((5, Some(6)))),
            ("web", Some((33, Some(44)))),
            ("web:adm", Some((33, Some(4)))),
            ("web:7", Some((33, Some(7)))),
            ("nobody", None),
            ("web:nogroup", None),
            ("bad", None),
        ] {
            let got = in_root(text, root.path()).ok().map(|ids| (ids.uid, ids.gid));
            assert_eq!(got, want, "{text}");
        }
    }

    #[test]
    fn a_link_out_of_the_root_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/../../etc/passwd", root.path().join("etc/passwd")).unwrap();
        assert!(in_root("root", root.path()).is_err());
    }

    #[test]
    fn exec_takes_numbers_only() {
        assert_eq!(numeric("1:2"), Ok(Ids { uid: 1, gid: Some(2) }));
        for text in ["", "root", "1:", ":1", "-1", "4294967296"] {
            assert!(numeric(text).is_err(), "{text}");
        }
    }
}
