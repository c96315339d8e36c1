//! Namespaces: which a container gets, which it joins, and how they are kept.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use caisson_wire::agent::{Failure, Stage};
use oci_spec::runtime::{Linux, LinuxNamespaceType};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};
use serde::{Deserialize, Serialize};

use crate::failure::{At, failure};
use crate::sys;

/// A kind of namespace that a container may have of its own.
///
/// The order is that of entering: the user namespace first, since it gives the rights to enter the others
/// that it owns, and the mount namespace last, since it changes what paths mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// User and group ids.
    User,
    /// Process ids.
    Pid,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Host and domain name.
    Uts,
    /// The cgroup tree that is visible.
    Cgroup,
    /// Boot-time and monotonic clocks.
    Time,
    /// Mounts.
    Mount,
}

impl Kind {
    /// Name below `/proc/PID/ns` of the namespace that children of the process get.
    fn file(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Pid => "pid",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Cgroup => "cgroup",
            Self::Time => "time",
            Self::Mount => "mnt",
        }
    }

    fn link_type(self) -> LinkNameSpaceType {
        match self {
            Self::User => LinkNameSpaceType::User,
            Self::Pid => LinkNameSpaceType::ProcessID,
            Self::Ipc => LinkNameSpaceType::InterProcessCommunication,
            Self::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
            Self::Cgroup => LinkNameSpaceType::ControlGroup,
            Self::Time => LinkNameSpaceType::Time,
            Self::Mount => LinkNameSpaceType::Mount,
        }
    }

    fn unshare_flag(self) -> UnshareFlags {
        match self {
            Self::User => UnshareFlags::NEWUSER,
            Self::Pid => UnshareFlags::NEWPID,
            Self::Ipc => UnshareFlags::NEWIPC,
            Self::Uts => UnshareFlags::NEWUTS,
            Self::Cgroup => UnshareFlags::NEWCGROUP,
            Self::Time => UnshareFlags::NEWTIME,
            Self::Mount => UnshareFlags::NEWNS,
        }
    }

    /// The kind that OCI calls `typ`; the network is the sandbox's and has none.
    fn of(typ: LinuxNamespaceType) -> Option<Self> {
        match typ {
            LinuxNamespaceType::Mount => Some(Self::Mount),
            LinuxNamespaceType::Cgroup => Some(Self::Cgroup),
            LinuxNamespaceType::Uts => Some(Self::Uts),
            LinuxNamespaceType::Ipc => Some(Self::Ipc),
            LinuxNamespaceType::User => Some(Self::User),
            LinuxNamespaceType::Pid => Some(Self::Pid),
            LinuxNamespaceType::Time => Some(Self::Time),
            LinuxNamespaceType::Network => None,
        }
    }

    /// The kind that OCI calls `name`, where `Some(None)` is the network.
    fn named(name: &str) -> Option<Option<Self>> {
        LinuxNamespaceType::try_from(name).ok().map(Self::of)
    }
}

/// Descriptors of a container's namespaces, held from its creation on, so that nothing is looked up by a
/// pid that might belong to somebody else by then.
#[derive(Debug, Default)]
pub(crate) struct Namespaces(BTreeMap<Kind, Arc<OwnedFd>>);

impl Namespaces {
    /// The namespaces `kinds`, whose descriptors come in the same order.
    pub(crate) fn new(kinds: Vec<Kind>, descriptors: impl IntoIterator<Item = OwnedFd>) -> Self {
        Self(
            kinds
                .into_iter()
                .zip(descriptors.into_iter().map(Arc::new))
                .collect(),
        )
    }

    /// The namespace of one kind.
    pub(crate) fn get(&self, kind: Kind) -> Option<Arc<OwnedFd>> {
        self.0.get(&kind).cloned()
    }

    /// All of them in the order of entering.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Kind, BorrowedFd<'_>)> {
        self.0.iter().map(|(kind, fd)| (*kind, fd.as_fd()))
    }
}

/// Which namespaces a container makes and which it enters.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Choice {
    /// New ones.
    pub(crate) unshare: Vec<Kind>,
    /// Those of other containers, by the container's id.
    pub(crate) join: BTreeMap<Kind, String>,
}

/// Reads the choice from a configuration and the containers it joins.
///
/// A container always has a mount namespace of its own, since it has a root of its own. A `network` entry
/// means the sandbox's network, which is where every process of the guest is.
///
/// # Errors
/// Fails for a namespace given by path, which names nothing in the guest, and for an unknown kind.
pub(crate) fn choose(linux: Option<&Linux>, join: &BTreeMap<String, String>) -> Result<Choice, Failure> {
    let mut choice = Choice::default();
    for (name, container) in join {
        match Kind::named(name) {
            Some(Some(kind)) => {
                choice.join.insert(kind, container.clone());
            }
            Some(None) => {}
            None => {
                return Err(failure(
                    Stage::Namespaces,
                    format!("cannot join a namespace of the unknown kind {name:?}"),
                ));
            }
        }
    }
    let entries = linux
        .and_then(|linux| linux.namespaces().as_deref())
        .unwrap_or_default();
    for entry in entries {
        let Some(kind) = Kind::of(entry.typ()) else {
            continue;
        };
        if choice.join.contains_key(&kind) || choice.unshare.contains(&kind) {
            continue;
        }
        if let Some(path) = entry.path().as_ref().filter(|path| !path.as_os_str().is_empty()) {
            return Err(failure(
                Stage::Namespaces,
                format!(
                    "cannot join the {} namespace {}: it is not one of this sandbox",
                    kind.file(),
                    path.display()
                ),
            ));
        }
        choice.unshare.push(kind);
    }
    if !choice.join.contains_key(&Kind::Mount) && !choice.unshare.contains(&Kind::Mount) {
        choice.unshare.push(Kind::Mount);
    }
    choice.unshare.sort();
    Ok(choice)
}

/// Enters a namespace. For [`Kind::Pid`] and [`Kind::Time`] it is the children that are in it.
///
/// # Errors
/// As setns(2).
pub(crate) fn enter(kind: Kind, namespace: BorrowedFd<'_>) -> Result<(), Failure> {
    rustix::thread::move_into_link_name_space(namespace, Some(kind.link_type())).at(Stage::Namespaces, || {
        format!("cannot join a {} namespace", kind.file())
    })
}

/// Makes new namespaces of these kinds.
///
/// # Errors
/// As unshare(2).
pub(crate) fn unshare(kinds: &[Kind]) -> Result<(), Failure> {
    let flags = kinds
        .iter()
        .fold(UnshareFlags::empty(), |flags, kind| flags | kind.unshare_flag());
    sys::unshare(flags).at(Stage::Namespaces, || {
        let names: Vec<_> = kinds.iter().map(|kind| kind.file()).collect();
        format!("cannot create the namespaces {}", names.join(", "))
    })
}

/// Descriptors of this process's own namespaces of these kinds.
///
/// # Errors
/// Fails if `/proc` is not the agent's.
pub(crate) fn own(kinds: &[Kind]) -> Result<Vec<OwnedFd>, Failure> {
    kinds
        .iter()
        .map(|kind| {
            File::open(format!("/proc/self/ns/{}", kind.file()))
                .map(OwnedFd::from)
                .at(Stage::Namespaces, || {
                    format!("cannot open the {} namespace", kind.file())
                })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linux(namespaces: &str) -> Linux {
        serde_json::from_str(&format!("{{\"namespaces\": {namespaces}}}")).unwrap()
    }

    #[test]
    fn the_network_is_the_sandbox_and_the_mount_namespace_always_new() {
        let linux = linux(r#"[{"type": "network"}, {"type": "pid"}, {"type": "uts"}]"#);
        let choice = choose(Some(&linux), &BTreeMap::new()).unwrap();
        assert_eq!(choice.unshare, [Kind::Pid, Kind::Uts, Kind::Mount]);
        assert!(choice.join.is_empty());
    }

    #[test]
    fn a_joined_namespace_is_not_made() {
        let linux = linux(r#"[{"type": "pid", "path": "/proc/7/ns/pid"}, {"type": "mount"}]"#);
        let join = BTreeMap::from([
            ("pid".to_owned(), "web".to_owned()),
            ("network".to_owned(), "web".to_owned()),
        ]);
        let choice = choose(Some(&linux), &join).unwrap();
        assert_eq!(choice.unshare, [Kind::Mount]);
        assert_eq!(choice.join, BTreeMap::from([(Kind::Pid, "web".to_owned())]));
    }

    #[test]
    fn a_path_that_names_nothing_in_the_sandbox_is_refused() {
        let linux = linux(r#"[{"type": "ipc", "path": "/proc/7/ns/ipc"}]"#);
        let failed = choose(Some(&linux), &BTreeMap::new()).unwrap_err();
        assert_eq!(failed.stage, Stage::Namespaces);
        assert!(failed.message.contains("/proc/7/ns/ipc"), "{}", failed.message);
    }

    #[test]
    fn an_unknown_kind_is_refused() {
        let join = BTreeMap::from([("mood".to_owned(), "web".to_owned())]);
        assert!(choose(None, &join).is_err());
    }
}
