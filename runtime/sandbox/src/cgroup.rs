//! The host cgroup of a sandbox: every process of it, on cgroup v1, hybrid and v2 hosts.
//!
//! Plain files only. A controller that the host does not have is skipped, with a debug event; limits also
//! apply inside the guest. What was made here is removed again, and nothing else is; processes are killed
//! through a cgroup only if it was made here.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::plan::CgroupPlan;
use crate::process::ProcessId;

/// Controllers of cgroup v1 whose hierarchies we join: those with our limits, and those engines read.
const V1_CONTROLLERS: [&str; 6] = ["memory", "cpu", "cpuacct", "cpuset", "blkio", "pids"];
/// Controllers of cgroup v2 that are delegated down to the sandbox's cgroup, as far as they are there.
const V2_CONTROLLERS: [&str; 5] = ["memory", "cpu", "cpuset", "io", "pids"];
/// How long to wait until a cgroup's last process has left it.
const REMOVAL_LIMIT: Duration = Duration::from_secs(1);
/// Pause between two attempts to remove a cgroup; the kernel offers no event on cgroup v1.
const REMOVAL_PAUSE: Duration = Duration::from_millis(5);

/// A cgroup that could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The path is empty or climbs.
    #[error("cgroup path {0:?} is not a path below the hierarchy; give one without \"..\"")]
    Path(String),
    /// The kernel's table of mounts cannot be read.
    #[error("cannot find where cgroups are mounted")]
    Mounts(#[source] io::Error),
    /// No hierarchy can hold the sandbox.
    #[error("no cgroup hierarchy is mounted; mount one on /sys/fs/cgroup, or configure no cgroup")]
    None,
    /// A directory or file of the cgroup cannot be used.
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
}

/// Where a sandbox is placed: enough to remove it from another process. It is written down before anything is
/// made, so a crash leaves nothing unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Placed {
    leaves: Vec<Leaf>,
    /// Parents that were made for it, deepest first.
    parents: Vec<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Leaf {
    mount: PathBuf,
    path: PathBuf,
    kind: Kind,
    /// Whether it was made here; one that was there before is joined and left alone.
    made: bool,
}

/// What a hierarchy is like.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Kind {
    /// Cgroup v1, with these of its controllers that matter here.
    V1(Vec<String>),
    V2,
}

/// One mounted hierarchy.
#[derive(Debug, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    kind: Kind,
}

impl Placed {
    /// Decides where the sandbox goes; makes nothing.
    pub(crate) fn plan(plan: &CgroupPlan) -> Result<Self, CgroupError> {
        let table = fs::read_to_string("/proc/self/mountinfo").map_err(CgroupError::Mounts)?;
        Self::plan_in(plan, hierarchies(&table))
    }

    fn plan_in(plan: &CgroupPlan, hierarchies: Vec<Hierarchy>) -> Result<Self, CgroupError> {
        let relative = relative(&plan.path)?;
        if hierarchies.is_empty() {
            return Err(CgroupError::None);
        }
        let mut placed = Self::default();
        for Hierarchy { mount, kind } in hierarchies {
            let path = mount.join(&relative);
            let missing: Vec<&Path> = path.ancestors().take_while(|path| !path.exists()).collect();
            let made = !missing.is_empty();
            let parents = missing.into_iter().skip(1).map(Path::to_owned);
            placed.parents.extend(parents);
            placed.leaves.push(Leaf {
                mount,
                path,
                kind,
                made,
            });
        }
        Ok(placed)
    }

    /// Makes the cgroup and sets its limits.
    pub(crate) fn create(&mut self, plan: &CgroupPlan) -> Result<(), CgroupError> {
        let mut usable = Vec::new();
        for leaf in &self.leaves {
            if leaf.create(plan)? {
                usable.push(leaf.clone());
            }
        }
        self.leaves = usable;
        Ok(())
    }

    /// Puts a process into the cgroup; one that has ended meanwhile is no error.
    pub(crate) fn add(&self, pid: i32) -> Result<(), CgroupError> {
        for leaf in &self.leaves {
            let path = leaf.path.join("cgroup.procs");
            match fs::write(&path, pid.to_string()) {
                Err(err) if err.raw_os_error() != Some(libc::ESRCH) => {
                    return Err(file("add a process to", &path, err));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Kills every process in the cgroups that were made for the sandbox, except the caller.
    pub(crate) fn kill(&self) {
        let own = rustix::process::getpid().as_raw_nonzero().get();
        for leaf in self.leaves.iter().filter(|leaf| leaf.made) {
            let members = || pids(&leaf.path.join("cgroup.procs"));
            if !members().contains(&own) && fs::write(leaf.path.join("cgroup.kill"), "1").is_ok() {
                continue;
            }
            for pid in members().into_iter().filter(|pid| *pid != own) {
                // Named by its start time first and looked up again after, it is the process in the cgroup.
                if let Ok(process) = ProcessId::of(pid)
                    && members().contains(&pid)
                {
                    process.kill();
                }
            }
        }
    }

    /// Removes what was made; what is gone already is no error.
    pub(crate) fn remove(&self) -> Result<(), CgroupError> {
        let until = Instant::now() + REMOVAL_LIMIT;
        for leaf in self.leaves.iter().filter(|leaf| leaf.made) {
            while let Err(err) = fs::remove_dir(&leaf.path) {
                match err.kind() {
                    io::ErrorKind::NotFound => break,
                    io::ErrorKind::ResourceBusy if Instant::now() < until => {
                        std::thread::sleep(REMOVAL_PAUSE)
                    }
                    _ => return Err(file("remove", &leaf.path, err)),
                }
            }
        }
        for parent in &self.parents {
            // Others may have come to live there since; then it is theirs.
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }
}

impl Leaf {
    /// Makes it, and says whether this hierarchy can hold the sandbox.
    fn create(&self, plan: &CgroupPlan) -> Result<bool, CgroupError> {
        let below = self.path.strip_prefix(&self.mount).unwrap_or(&self.path);
        let mut at = self.mount.clone();
        for component in below.components() {
            if self.kind == Kind::V2 {
                delegate(&at);
            }
            let parent = at.clone();
            at.push(component);
            match fs::create_dir(&at) {
                Ok(()) => {}
                Err(err) if err.kind() == io::ErrorKind::AlreadyExists => continue,
                // A hierarchy that is mounted read-only here cannot hold the sandbox; another may.
                Err(err) if err.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                    tracing::debug!(path = %at.display(), "skipped a read-only cgroup hierarchy");
                    return Ok(false);
                }
                Err(err) => return Err(file("create", &at, err)),
            }
            if matches!(&self.kind, Kind::V1(controllers) if controllers.iter().any(|name| name == "cpuset"))
            {
                // A new cpuset of cgroup v1 is empty and takes no process until it has both.
                inherit(&parent, &at, "cpuset.cpus")?;
                inherit(&parent, &at, "cpuset.mems")?;
            }
        }
        let limits = match self.kind {
            Kind::V1(_) => limits_v1(plan),
            Kind::V2 => limits_v2(plan),
        };
        for (name, value) in limits {
            limit(&self.path.join(name), &value)?;
        }
        Ok(true)
    }
}

fn file(verb: &'static str, path: &Path, source: io::Error) -> CgroupError {
    CgroupError::File {
        verb,
        path: path.to_owned(),
        source,
    }
}

fn relative(path: &str) -> Result<PathBuf, CgroupError> {
    let mut clean = PathBuf::new();
    for component in Path::new(path).components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => clean.push(name),
            Component::ParentDir | Component::Prefix(_) => return Err(CgroupError::Path(path.to_owned())),
        }
    }
    if clean.as_os_str().is_empty() {
        return Err(CgroupError::Path(path.to_owned()));
    }
    Ok(clean)
}

/// The hierarchies of a mount table (proc(5), "/proc/pid/mountinfo"), each once.
fn hierarchies(table: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in table.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let Some(mount) = left.split(' ').nth(4).map(unescape) else {
            continue;
        };
        let mut right = right.split(' ');
        let kind = match (right.next(), right.nth(1)) {
            (Some("cgroup2"), _) => Kind::V2,
            (Some("cgroup"), Some(options)) => Kind::V1(
                options
                    .split(',')
                    .filter(|option| V1_CONTROLLERS.contains(option))
                    .map(str::to_owned)
                    .collect(),
            ),
            _ => continue,
        };
        if kind != Kind::V1(Vec::new()) && !found.iter().any(|known| known.kind == kind) {
            found.push(Hierarchy { mount, kind });
        }
    }
    found
}

/// The table writes space, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let mut path = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        path.push_str(before);
        match after
            .get(..3)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok())
        {
            Some(byte) => {
                path.push(byte.into());
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                path.push('\\');
                rest = after;
            }
        }
    }
    path.push_str(rest);
    path.into()
}

/// Lets the children of a v2 cgroup have the controllers it has itself.
fn delegate(parent: &Path) {
    let available = fs::read_to_string(parent.join("cgroup.controllers")).unwrap_or_default();
    for controller in V2_CONTROLLERS {
        // A parent with processes of its own refuses; then there is no such limit on the host.
        if available.split_ascii_whitespace().any(|name| name == controller)
            && let Err(err) = fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}"))
        {
            tracing::debug!(path = %parent.display(), controller, error = %err, "could not delegate a controller");
        }
    }
}

fn inherit(parent: &Path, child: &Path, name: &str) -> Result<(), CgroupError> {
    let from = parent.join(name);
    let value = fs::read_to_string(&from).map_err(|err| file("read", &from, err))?;
    let to = child.join(name);
    let present = fs::read_to_string(&to).unwrap_or_default();
    if present.trim().is_empty() && !value.trim().is_empty() {
        fs::write(&to, value.trim()).map_err(|err| file("write", &to, err))?;
    }
    Ok(())
}

fn limits_v1(plan: &CgroupPlan) -> Vec<(&'static str, String)> {
    let mut limits = Vec::new();
    if let Some(bytes) = plan.memory {
        limits.push(("memory.limit_in_bytes", bytes.to_string()));
    }
    if let Some((quota, period)) = plan.cpu {
        limits.push(("cpu.cfs_period_us", period.to_string()));
        limits.push(("cpu.cfs_quota_us", quota.to_string()));
    }
    if let Some(shares) = plan.shares {
        limits.push(("cpu.shares", shares.to_string()));
    }
    if let Some((cpus, mems)) = &plan.cpuset {
        limits.push(("cpuset.cpus", cpus.clone()));
        limits.push(("cpuset.mems", mems.clone()));
    }
    limits
}

fn limits_v2(plan: &CgroupPlan) -> Vec<(&'static str, String)> {
    let mut limits = Vec::new();
    if let Some(bytes) = plan.memory {
        limits.push(("memory.max", bytes.to_string()));
    }
    if let Some((quota, period)) = plan.cpu {
        let quota = u64::try_from(quota).map_or("max".to_owned(), |quota| quota.to_string());
        limits.push(("cpu.max", format!("{quota} {period}")));
    }
    if let Some(shares) = plan.shares {
        limits.push(("cpu.weight", weight(shares).to_string()));
    }
    if let Some((cpus, mems)) = &plan.cpuset {
        limits.push(("cpuset.cpus", cpus.clone()));
        limits.push(("cpuset.mems", mems.clone()));
    }
    limits
}

/// The v2 weight (1 to 10000) of v1 shares (2 to 262144), linear as OCI runtimes have it; 0 is the default.
fn weight(shares: u64) -> u64 {
    if shares == 0 {
        return 100;
    }
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

/// Writes a limit where the hierarchy has it.
fn limit(path: &Path, value: &str) -> Result<(), CgroupError> {
    if value.is_empty() {
        return Ok(());
    }
    if !path.exists() {
        tracing::debug!(path = %path.display(), "skipped a limit that this hierarchy does not have");
        return Ok(());
    }
    fs::write(path, value).map_err(|err| file("set", path, err))
}

fn pids(path: &Path) -> Vec<i32> {
    fs::read_to_string(path)
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
30 23 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
34 30 0:30 / /sys/fs/cgroup/with\\040space rw - cgroup cgroup rw,memory
35 30 0:30 / /elsewhere rw - cgroup cgroup rw,memory
36 30 0:31 / /sys/fs/cgroup/freezer rw shared:3 - cgroup cgroup rw,freezer
";

    #[test]
    fn a_hybrid_host_has_each_hierarchy_once() {
        assert_eq!(
            hierarchies(HYBRID),
            [
                Hierarchy {
                    mount: "/sys/fs/cgroup/unified".into(),
                    kind: Kind::V2,
                },
                Hierarchy {
                    mount: "/sys/fs/cgroup/cpu,cpuacct".into(),
                    kind: Kind::V1(vec!["cpu".to_owned(), "cpuacct".to_owned()]),
                },
                Hierarchy {
                    mount: "/sys/fs/cgroup/with space".into(),
                    kind: Kind::V1(vec!["memory".to_owned()]),
                },
            ]
        );
    }

    #[test]
    fn shares_become_weights() {
        for (shares, want) in [
            (0, 100),
            (2, 1),
            (1024, 39),
            (262_144, 10_000),
            (u64::MAX, 10_000),
        ] {
            assert_eq!(weight(shares), want, "{shares}");
        }
    }

    #[test]
    fn paths_that_climb_or_name_the_root_are_refused() {
        for path in ["", "/", ".", "../x", "/a/../../b"] {
            assert!(relative(path).is_err(), "{path}");
        }
        assert_eq!(relative("/a/./b/").unwrap(), Path::new("a/b"));
    }

    #[test]
    fn a_plan_becomes_files_of_either_version() {
        let plan = CgroupPlan {
            path: "/x".to_owned(),
            memory: Some(1 << 30),
            cpu: Some((-1, 100_000)),
            shares: Some(1024),
            cpuset: Some(("0-1".to_owned(), "0".to_owned())),
        };
        assert_eq!(
            limits_v2(&plan)
                .into_iter()
                .map(|(k, v)| format!("{k}={v}"))
                .collect::<Vec<_>>(),
            [
                "memory.max=1073741824",
                "cpu.max=max 100000",
                "cpu.weight=39",
                "cpuset.cpus=0-1",
                "cpuset.mems=0"
            ]
        );
        assert_eq!(
            limits_v1(&plan)
                .into_iter()
                .map(|(k, v)| format!("{k}={v}"))
                .collect::<Vec<_>>(),
            [
                "memory.limit_in_bytes=1073741824",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=-1",
                "cpu.shares=1024",
                "cpuset.cpus=0-1",
                "cpuset.mems=0"
            ]
        );
    }

    #[test]
    fn what_was_made_is_removed_and_what_was_there_stays() {
        // Ordinary directories show which are made and removed; limits are skipped where no file is.
        let mount = tempfile::tempdir().unwrap();
        fs::create_dir(mount.path().join("there")).unwrap();
        let place = |path: &str| {
            let plan = CgroupPlan {
                path: path.to_owned(),
                memory: Some(1),
                ..CgroupPlan::default()
            };
            let hierarchy = Hierarchy {
                mount: mount.path().to_owned(),
                kind: Kind::V1(vec!["memory".to_owned()]),
            };
            let mut placed = Placed::plan_in(&plan, vec![hierarchy]).unwrap();
            placed.create(&plan).unwrap();
            placed
        };

        let deep = place("there/a/b");
        assert!(mount.path().join("there/a/b").is_dir());
        deep.remove().unwrap();
        deep.remove().unwrap();
        assert!(!mount.path().join("there/a").exists());

        place("there").remove().unwrap();
        assert!(mount.path().join("there").is_dir());
    }
}
