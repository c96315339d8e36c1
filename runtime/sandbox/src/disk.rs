//! What is on disk, and what can be known from it alone.
//!
//! `<root>/<container>/container.json` says what a container is; `<root>/<sandbox>/sandbox.json` which
//! processes and which cgroup a sandbox has. A sandbox bears the id of its first container and shares its
//! directory. Each file is replaced whole, so a reader sees the state before or after a transition and
//! nothing between. The supervisor is the only writer once it runs; before that the creating client is.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use caisson_wire::agent::ExitStatus;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::cgroup::Placed;
use crate::id::ContainerId;
use crate::plan::HostHooks;
use crate::process::ProcessId;
use crate::proto::{SOCKET, Status};

const CONTAINER: &str = "container.json";
const SANDBOX: &str = "sandbox.json";
/// The supervisor's log.
const LOG: &str = "supervisor.log";
/// What the guest printed, newest last.
pub(crate) const CONSOLE: &str = "console.log";
/// What the vmm process wrote to its standard error.
pub(crate) const VMM_LOG: &str = "vmm.log";
/// Where the shared directory is mounted, in the supervisor's mount namespace only.
pub(crate) const SHARE: &str = "share";
/// Largest state file that is read, in bytes; they hold annotations, which a caller may make long.
const MOST_STATE: u64 = 32 << 20;

/// State that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file or directory cannot be used.
    #[error("cannot {verb} {}", path.display())]
    File {
        /// What was being done.
        verb: &'static str,
        /// To what.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The file holds something else than our state.
    #[error("{} is damaged; remove the container with \"delete --force\"", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
}

impl StateError {
    fn file(verb: &'static str, path: &Path, source: io::Error) -> Self {
        Self::File {
            verb,
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn kind(&self) -> Option<io::ErrorKind> {
        match self {
            Self::File { source, .. } => Some(source.kind()),
            Self::Damaged { .. } => None,
        }
    }
}

/// What is known of a container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ContainerRecord {
    pub(crate) id: ContainerId,
    pub(crate) sandbox: ContainerId,
    pub(crate) bundle: PathBuf,
    pub(crate) oci_version: String,
    pub(crate) annotations: BTreeMap<String, String>,
    /// RFC 3339.
    pub(crate) created: String,
    pub(crate) owner: u32,
    pub(crate) status: Status,
    /// Who creates it; `None` once that is over.
    pub(crate) creator: Option<ProcessId>,
    pub(crate) stand_in: Option<ProcessId>,
    pub(crate) exit: Option<ExitStatus>,
    /// What ended it, if not its own process.
    pub(crate) failure: Option<String>,
    pub(crate) hooks: HostHooks,
}

/// What is known of a sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SandboxRecord {
    pub(crate) id: ContainerId,
    pub(crate) supervisor: ProcessId,
    pub(crate) vmm: Option<ProcessId>,
    /// Stand-ins of containers and execs.
    pub(crate) stand_ins: Vec<ProcessId>,
    pub(crate) cgroup: Option<Placed>,
    /// What runs the guest, once it says so.
    pub(crate) machine: Option<String>,
    /// What ended the sandbox, if it was a failure.
    pub(crate) failure: Option<String>,
    /// Longest time a request to its agent may take.
    pub(crate) call_deadline: Duration,
}

/// The directory of one container or sandbox.
#[derive(Clone, Debug)]
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn of(root: &Path, id: &ContainerId) -> Self {
        Self(root.join(id.as_str()))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.0.join(LOG)
    }

    /// Makes the directory, and its parents; fails with `AlreadyExists` if it is there.
    pub(crate) fn claim(&self) -> Result<(), StateError> {
        let parent = self.0.parent().unwrap_or(Path::new("/"));
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)
            .map_err(|err| StateError::file("create", parent, err))?;
        DirBuilder::new()
            .mode(0o700)
            .create(&self.0)
            .map_err(|err| StateError::file("create", &self.0, err))
    }

    pub(crate) fn exists(&self) -> bool {
        self.0.is_dir()
    }

    pub(crate) fn read_container(&self) -> Result<ContainerRecord, StateError> {
        read(&self.0.join(CONTAINER))
    }

    pub(crate) fn read_sandbox(&self) -> Result<SandboxRecord, StateError> {
        read(&self.0.join(SANDBOX))
    }

    pub(crate) fn write_container(&self, record: &ContainerRecord) -> Result<(), StateError> {
        self.write(CONTAINER, record)
    }

    pub(crate) fn write_sandbox(&self, record: &SandboxRecord) -> Result<(), StateError> {
        self.write(SANDBOX, record)
    }

    fn write<T: Serialize>(&self, name: &str, value: &T) -> Result<(), StateError> {
        let temporary = self.0.join(format!("{name}.new"));
        let path = self.0.join(name);
        let written = || -> io::Result<()> {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?;
            file.write_all(&serde_json::to_vec(value)?)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(&self.0)?.sync_all()
        };
        written().map_err(|err| StateError::file("write", &path, err))
    }

    /// Removes what makes this a container, and leaves the sandbox that others may still use.
    pub(crate) fn forget_container(&self) -> Result<(), StateError> {
        self.remove_files(&[CONTAINER, &format!("{CONTAINER}.new")])
    }

    /// Removes the directory and every file that we make in it. Nothing is followed or removed recursively:
    /// whatever a mistake may have mounted or put here is not ours to delete.
    pub(crate) fn remove(&self) -> Result<(), StateError> {
        self.remove_files(&[
            SOCKET,
            LOG,
            CONSOLE,
            &older(CONSOLE),
            VMM_LOG,
            &older(VMM_LOG),
            &format!("{SANDBOX}.new"),
            &format!("{CONTAINER}.new"),
            SANDBOX,
            CONTAINER,
        ])?;
        let share = self.0.join(SHARE);
        gone(fs::remove_dir(&share)).map_err(|err| StateError::file("remove", &share, err))?;
        gone(fs::remove_dir(&self.0)).map_err(|err| StateError::file("remove", &self.0, err))
    }

    fn remove_files(&self, names: &[&str]) -> Result<(), StateError> {
        for name in names {
            let path = self.0.join(name);
            gone(fs::remove_file(&path)).map_err(|err| StateError::file("remove", &path, err))?;
        }
        Ok(())
    }
}

/// Where a bounded log's older part is.
pub(crate) fn older(name: &str) -> String {
    format!("{name}.1")
}

fn gone(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, StateError> {
    let bytes = || -> io::Result<Vec<u8>> {
        let file = File::open(path)?;
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(file, MOST_STATE), &mut bytes)?;
        Ok(bytes)
    };
    let bytes = bytes().map_err(|err| StateError::file("read", path, err))?;
    serde_json::from_slice(&bytes).map_err(|source| StateError::Damaged {
        path: path.to_owned(),
        source,
    })
}

impl ContainerRecord {
    /// The status as it is now: a container whose supervisor or creator has died is stopped.
    pub(crate) fn probe(&self, root: &Path) -> Status {
        if self.status == Status::Stopped {
            return Status::Stopped;
        }
        let supervised = Directory::of(root, &self.sandbox)
            .read_sandbox()
            .is_ok_and(|sandbox| sandbox.supervisor.is_alive());
        let being_created = self.creator.is_some_and(ProcessId::is_alive);
        match self.status {
            Status::Creating if being_created => Status::Creating,
            status if supervised && status != Status::Creating => status,
            _ => Status::Stopped,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(status: Status) -> ContainerRecord {
        ContainerRecord {
            id: "c".try_into().unwrap(),
            sandbox: "c".try_into().unwrap(),
            bundle: "/b".into(),
            oci_version: "1.2.0".to_owned(),
            annotations: BTreeMap::new(),
            created: String::new(),
            owner: 0,
            status,
            creator: None,
            stand_in: None,
            exit: None,
            failure: None,
            hooks: HostHooks::default(),
        }
    }

    fn sandbox(supervisor: ProcessId) -> SandboxRecord {
        SandboxRecord {
            id: "c".try_into().unwrap(),
            supervisor,
            vmm: None,
            stand_ins: Vec::new(),
            cgroup: None,
            machine: None,
            failure: None,
            call_deadline: Duration::ZERO,
        }
    }

    #[test]
    fn what_was_written_is_read_and_an_id_is_claimed_once() {
        let root = tempfile::tempdir().unwrap();
        let directory = Directory::of(root.path(), &"c".try_into().unwrap());
        directory.claim().unwrap();
        assert_eq!(
            directory.claim().unwrap_err().kind(),
            Some(io::ErrorKind::AlreadyExists)
        );
        directory.write_container(&record(Status::Created)).unwrap();
        assert_eq!(directory.read_container().unwrap(), record(Status::Created));
        directory.remove().unwrap();
        directory.remove().unwrap();
        assert!(!directory.exists());
    }

    #[test]
    fn removing_never_goes_below_the_shared_directory() {
        let root = tempfile::tempdir().unwrap();
        let directory = Directory::of(root.path(), &"c".try_into().unwrap());
        directory.claim().unwrap();
        let inside = directory.path().join(SHARE).join("precious");
        fs::create_dir_all(&inside).unwrap();
        assert!(directory.remove().is_err());
        assert!(inside.exists());
    }

    #[test]
    fn the_status_follows_from_the_files_and_from_who_is_alive() {
        let root = tempfile::tempdir().unwrap();
        let directory = Directory::of(root.path(), &"c".try_into().unwrap());
        directory.claim().unwrap();
        let alive = ProcessId::own().unwrap();
        let dead = ProcessId { start: 0, ..alive };
        for (status, creator, supervisor, want) in [
            (Status::Creating, Some(alive), None, Status::Creating),
            (Status::Creating, Some(dead), None, Status::Stopped),
            (Status::Creating, Some(dead), Some(alive), Status::Stopped),
            (Status::Created, None, Some(alive), Status::Created),
            (Status::Running, None, Some(alive), Status::Running),
            (Status::Paused, None, Some(alive), Status::Paused),
            (Status::Running, None, Some(dead), Status::Stopped),
            (Status::Running, None, None, Status::Stopped),
            (Status::Stopped, None, Some(alive), Status::Stopped),
        ] {
            let _ = fs::remove_file(directory.path().join(SANDBOX));
            if let Some(supervisor) = supervisor {
                directory.write_sandbox(&sandbox(supervisor)).unwrap();
            }
            let record = ContainerRecord {
                creator,
                ..record(status)
            };
            assert_eq!(
                record.probe(root.path()),
                want,
                "{status} {creator:?} {supervisor:?}"
            );
        }
    }
}
