//! The options of an OCI mount (runtime-spec, config.md, "Mounts"; mount(8)), sorted by what they act on.

use rustix::mount::MountAttrFlags as Attr;

use crate::sys::{MountAttr, Reach};

/// Options of one mount.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// Whether the source is a file or directory to bind, and whether mounts below it come along.
    pub(crate) bind: Option<Reach>,
    /// Attributes of the mount itself.
    pub(crate) attr: MountAttr,
    /// Attributes of the mount and of all below it.
    pub(crate) tree_attr: MountAttr,
    /// Propagation changes in the order given.
    pub(crate) propagation: Vec<(u64, Reach)>,
    /// Whether a tmpfs starts as a copy of what it covers.
    pub(crate) copy_up: bool,
    /// Parameters of the file system: `key`, or `key=value`.
    pub(crate) data: Vec<(String, Option<String>)>,
    /// Options that mean something which is not done here.
    pub(crate) unsupported: Vec<String>,
}

impl Options {
    /// Sorts the options; where two contradict each other, the later one wins.
    pub(crate) fn parse<'a>(options: impl IntoIterator<Item = &'a str>) -> Self {
        let mut parsed = Self::default();
        for option in options {
            parsed.add(option);
        }
        parsed
    }

    /// Whether the mount is read-only.
    pub(crate) fn read_only(&self) -> bool {
        self.attr.set & u64::from(Attr::MOUNT_ATTR_RDONLY.bits()) != 0
    }

    /// The attributes as fsmount(2) takes them.
    pub(crate) fn fsmount_attr(&self) -> Attr {
        Attr::from_bits_retain(u32::try_from(self.attr.set).unwrap_or_default())
    }

    fn add(&mut self, option: &str) {
        if let Some((_, bind)) = BINDS.iter().find(|(name, _)| *name == option) {
            self.bind = Some(*bind);
        } else if let Some((_, change)) = PROPAGATIONS.iter().find(|(name, _)| *name == option) {
            self.propagation.push(*change);
        } else if let Some((_, change)) = ATTRIBUTES.iter().find(|(name, _)| *name == option) {
            change.apply(&mut self.attr);
        } else if let Some((_, change)) = option
            .strip_prefix('r')
            .and_then(|rest| ATTRIBUTES.iter().find(|(name, _)| *name == rest))
        {
            change.apply(&mut self.tree_attr);
        } else if option == "tmpcopyup" {
            self.copy_up = true;
        } else if UNSUPPORTED.contains(&option) {
            self.unsupported.push(option.to_owned());
        } else if !option.is_empty() && !IGNORED.contains(&option) && !option.starts_with("x-") {
            self.data.push(match option.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (option.to_owned(), None),
            });
        }
    }
}

/// What an attribute option does.
#[derive(Clone, Copy)]
enum Change {
    Set(Attr),
    Clear(Attr),
    /// The access-time modes exclude one another and are changed as a field.
    Atime(Attr),
}

impl Change {
    fn apply(self, attr: &mut MountAttr) {
        let (set, clear) = match self {
            Self::Set(flag) => (flag, flag),
            Self::Clear(flag) => (Attr::empty(), flag),
            Self::Atime(mode) => (mode, Attr::MOUNT_ATTR__ATIME),
        };
        let (set, clear) = (u64::from(set.bits()), u64::from(clear.bits()));
        attr.set = attr.set & !clear | set;
        // mount_setattr(2) refuses to clear a flag only partly, and clearing a flag that is set is harmless.
        attr.clear |= clear;
        if let Self::Set(_) = self {
            attr.clear &= !set;
        }
    }
}

const BINDS: [(&str, Reach); 2] = [("bind", Reach::One), ("rbind", Reach::Tree)];

const PROPAGATIONS: [(&str, (u64, Reach)); 8] = [
    ("private", (libc::MS_PRIVATE, Reach::One)),
    ("rprivate", (libc::MS_PRIVATE, Reach::Tree)),
    ("shared", (libc::MS_SHARED, Reach::One)),
    ("rshared", (libc::MS_SHARED, Reach::Tree)),
    ("slave", (libc::MS_SLAVE, Reach::One)),
    ("rslave", (libc::MS_SLAVE, Reach::Tree)),
    ("unbindable", (libc::MS_UNBINDABLE, Reach::One)),
    ("runbindable", (libc::MS_UNBINDABLE, Reach::Tree)),
];

/// The propagation that OCI's `rootfsPropagation` names.
pub(crate) fn propagation(name: &str) -> Option<(u64, Reach)> {
    PROPAGATIONS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, change)| *change)
}

/// Each also exists with an `r` before it, for the whole tree.
const ATTRIBUTES: [(&str, Change); 19] = [
    ("ro", Change::Set(Attr::MOUNT_ATTR_RDONLY)),
    ("rw", Change::Clear(Attr::MOUNT_ATTR_RDONLY)),
    ("nosuid", Change::Set(Attr::MOUNT_ATTR_NOSUID)),
    ("suid", Change::Clear(Attr::MOUNT_ATTR_NOSUID)),
    ("nodev", Change::Set(Attr::MOUNT_ATTR_NODEV)),
    ("dev", Change::Clear(Attr::MOUNT_ATTR_NODEV)),
    ("noexec", Change::Set(Attr::MOUNT_ATTR_NOEXEC)),
    ("exec", Change::Clear(Attr::MOUNT_ATTR_NOEXEC)),
    ("nodiratime", Change::Set(Attr::MOUNT_ATTR_NODIRATIME)),
    ("diratime", Change::Clear(Attr::MOUNT_ATTR_NODIRATIME)),
    ("nosymfollow", Change::Set(Attr::MOUNT_ATTR_NOSYMFOLLOW)),
    ("symfollow", Change::Clear(Attr::MOUNT_ATTR_NOSYMFOLLOW)),
    ("noatime", Change::Atime(Attr::MOUNT_ATTR_NOATIME)),
    ("relatime", Change::Atime(Attr::MOUNT_ATTR_RELATIME)),
    ("strictatime", Change::Atime(Attr::MOUNT_ATTR_STRICTATIME)),
    ("atime", Change::Atime(Attr::MOUNT_ATTR_RELATIME)),
    ("norelatime", Change::Atime(Attr::MOUNT_ATTR_STRICTATIME)),
    ("nostrictatime", Change::Atime(Attr::MOUNT_ATTR_RELATIME)),
    ("nonoatime", Change::Atime(Attr::MOUNT_ATTR_RELATIME)),
];

/// Without effect: the kernel's defaults by name, and words for the programs that read fstab.
const IGNORED: [&str; 14] = [
    "defaults",
    "async",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "nofail",
    "_netdev",
    "loud",
    "silent",
    "nolazytime",
    "nomand",
    "noiversion",
];

const UNSUPPORTED: [&str; 2] = ["idmap", "ridmap"];

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Options {
        Options::parse(options.iter().copied())
    }

    fn bits(flags: Attr) -> u64 {
        flags.bits().into()
    }

    #[test]
    fn options_are_sorted_by_what_they_act_on() {
        let options = parse(&[
            "rbind",
            "ro",
            "rnosuid",
            "rslave",
            "tmpcopyup",
            "size=64k",
            "gid=5",
            "newinstance",
        ]);
        assert_eq!(options.bind, Some(Reach::Tree));
        assert_eq!(options.attr.set, bits(Attr::MOUNT_ATTR_RDONLY));
        assert_eq!(options.tree_attr.set, bits(Attr::MOUNT_ATTR_NOSUID));
        assert_eq!(options.propagation, [(libc::MS_SLAVE, Reach::Tree)]);
        assert!(options.copy_up && options.read_only());
        assert_eq!(
            options.data,
            [
                ("size".to_owned(), Some("64k".to_owned())),
                ("gid".to_owned(), Some("5".to_owned())),
                ("newinstance".to_owned(), None),
            ]
        );
    }

    #[test]
    fn the_later_of_two_contradicting_options_wins() {
        for (given, set, clear) in [
            (["ro", "rw"], Attr::empty(), Attr::MOUNT_ATTR_RDONLY),
            (["rw", "ro"], Attr::MOUNT_ATTR_RDONLY, Attr::empty()),
            (
                ["noatime", "strictatime"],
                Attr::MOUNT_ATTR_STRICTATIME,
                Attr::MOUNT_ATTR__ATIME,
            ),
            (
                ["strictatime", "relatime"],
                Attr::empty(),
                Attr::MOUNT_ATTR__ATIME,
            ),
        ] {
            let attr = parse(&given).attr;
            assert_eq!((attr.set, attr.clear), (bits(set), bits(clear)), "{given:?}");
        }
    }

    #[test]
    fn every_attribute_exists_for_the_whole_tree_too() {
        for (name, _) in ATTRIBUTES {
            let recursive = format!("r{name}");
            let (one, tree) = (parse(&[name]), parse(&[&recursive]));
            assert_eq!(one.attr, tree.tree_attr, "{name}");
            assert!(tree.data.is_empty(), "{recursive}");
        }
    }

    #[test]
    fn defaults_mean_nothing() {
        assert_eq!(
            parse(&["defaults", "nofail", "x-systemd.automount", ""]),
            Options::default()
        );
    }
}
