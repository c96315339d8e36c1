//! From an OCI configuration to a plan: every decision, no side effect but looking.
//!
//! The configuration is hostile: it may come from an engine that passes on what its user wrote. What would
//! reach the host is bound into the shared directory by us; everything else is for the guest's agent, which gets
//! the configuration with each path as the guest sees it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use caisson_wire::agent::{Create, Root, SHARE_DIR, Setup, Stdio};
use oci_spec::runtime::{Hooks, LinuxNamespaceType, Mount, Spec};

use crate::bundle::Bundle;
use crate::config::{Config, MOST_MEMORY_MIB, MOST_VCPUS};
use crate::id::ContainerId;
use crate::plan::{Bind, ContainerPlan, HostHooks, MachineChoice, NetworkNamespace, SandboxPlan};

/// Prefix of the annotations that are ours; an unknown one below it is an error.
const PREFIX: &str = "io.caisson.";
/// Annotation: number of vCPUs.
const VCPUS: &str = "io.caisson.vcpus";
/// Annotation: memory of the sandbox in MiB.
const MEMORY_MIB: &str = "io.caisson.memory-mib";
/// Most mounts of one container; Linux's own default limit is 100,000 a namespace (fs.mount-max).
const MOST_MOUNTS: usize = 4096;
/// Least memory a guest boots in, in MiB.
const LEAST_MEMORY_MIB: u64 = 64;
/// One MiB in bytes.
const MIB: u64 = 1 << 20;

/// A configuration that cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// There is nothing to run.
    #[error("config.json has no process; add \"process\" with \"args\"")]
    NoProcess,
    /// There is nothing to run.
    #[error("process.args in config.json is empty; name the program to run")]
    NoArgs,
    /// A directory that is not absolute.
    #[error("process.cwd {0:?} in config.json is not an absolute path")]
    Cwd(PathBuf),
    /// There is no root file system.
    #[error("config.json has no root; add \"root\" with the \"path\" of the root file system")]
    NoRoot,
    /// The root file system is not there.
    #[error("cannot use root file system {}", path.display())]
    Root {
        /// Where it was looked for.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The root file system is no directory.
    #[error("root file system {} is not a directory", .0.display())]
    RootKind(PathBuf),
    /// A mount's target is not absolute.
    #[error("mount destination {0:?} is not an absolute path")]
    Destination(PathBuf),
    /// A bind mount's source is not there.
    #[error("cannot use source {} of the mount at {}", path.display(), destination.display())]
    Source {
        /// The source.
        path: PathBuf,
        /// Where it was to be mounted.
        destination: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A bind mount without a source.
    #[error("the bind mount at {} has no source", .0.display())]
    NoSource(PathBuf),
    /// Too many mounts.
    #[error("config.json has {0} mounts; the limit is {MOST_MOUNTS}")]
    Mounts(usize),
    /// An annotation of ours that does not exist.
    #[error("unknown annotation {0:?}; those of this runtime are {VCPUS:?} and {MEMORY_MIB:?}")]
    Annotation(String),
    /// An annotation of ours with a value that makes no sense.
    #[error("annotation {key} has value {value:?}; it must be {range}")]
    AnnotationValue {
        /// Which.
        key: &'static str,
        /// As given.
        value: String,
        /// What it may be.
        range: String,
    },
    /// A limit that makes no sense.
    #[error(
        "memory limit {0} in config.json is not possible: a limit is -1 or at least 1 MiB, and at most {MOST_MEMORY_MIB} MiB"
    )]
    Memory(i64),
    /// A limit that makes no sense.
    #[error(
        "CPU quota {quota} with period {period} in config.json is not possible: a period is from 1000 to 1000000 microseconds, a quota at least 1000"
    )]
    Cpu {
        /// As given, in microseconds.
        quota: i64,
        /// As given, in microseconds.
        period: u64,
    },
}

/// Plans a container.
///
/// # Errors
/// Fails if the configuration names what is not there or cannot be.
pub fn plan_container(id: &ContainerId, bundle: &Bundle) -> Result<ContainerPlan, PlanError> {
    let mut spec = bundle.spec.clone();
    let process = spec.process().as_ref().ok_or(PlanError::NoProcess)?;
    if process
        .args()
        .as_ref()
        .is_none_or(|args| args.first().is_none_or(String::is_empty))
    {
        return Err(PlanError::NoArgs);
    }
    if !process.cwd().is_absolute() {
        return Err(PlanError::Cwd(process.cwd().clone()));
    }
    let terminal = process.terminal().unwrap_or(false);
    let annotations: BTreeMap<String, String> = spec
        .annotations()
        .clone()
        .unwrap_or_default()
        .into_iter()
        .collect();
    Size::from_annotations(&annotations)?;

    let mut binds = vec![root_bind(id, bundle)?];
    let mounts = spec.mounts().clone().unwrap_or_default();
    if mounts.len() > MOST_MOUNTS {
        return Err(PlanError::Mounts(mounts.len()));
    }
    let mut guest_mounts = Vec::with_capacity(mounts.len());
    for mount in mounts {
        guest_mounts.push(guest_mount(id, bundle, mount, &mut binds)?);
    }
    spec.set_mounts(Some(guest_mounts));
    let hooks = host_hooks(&mut spec);
    let netns = network_namespace(&spec);
    for_the_guest(&mut spec);
    Ok(ContainerPlan {
        id: id.to_string(),
        bundle: bundle.path.clone(),
        oci_version: spec.version().clone(),
        annotations,
        create: Create {
            container: id.to_string(),
            root: Root::Share {
                path: format!("{id}/rootfs"),
            },
            spec,
            stdio: Stdio::default(),
            join: BTreeMap::new(),
        },
        binds,
        hooks,
        terminal,
        netns,
    })
}

/// Plans the sandbox for its first container.
///
/// # Errors
/// Fails if the container's limits or annotations make no machine.
pub fn plan_sandbox(
    id: &ContainerId,
    bundle: &Bundle,
    config: &Config,
    machine: MachineChoice,
) -> Result<SandboxPlan, PlanError> {
    let spec = &bundle.spec;
    let size = Size::of(spec, config)?;
    let emulated = matches!(machine, MachineChoice::Qemu { .. });
    let hostname = spec
        .hostname()
        .clone()
        .unwrap_or_else(|| id.as_str().chars().take(63).collect());
    Ok(SandboxPlan {
        id: id.to_string(),
        machine,
        vcpus: size.vcpus,
        memory: size.memory_mib * MIB,
        kernel: config.kernel.clone(),
        initramfs: config.initramfs.clone(),
        cmdline: config.kernel_parameters.clone(),
        setup: Setup {
            version: caisson_wire::VERSION,
            hostname,
            share: true,
            ..Setup::default()
        },
        netns: None,
        cgroup: None,
        confine: true,
        boot_deadline: config.boot_deadline(emulated),
        call_deadline: config.call_deadline(emulated),
    })
}

/// How large a sandbox is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Size {
    vcpus: u32,
    memory_mib: u64,
}

impl Size {
    /// Limits and what the guest itself takes; annotations override.
    fn of(spec: &Spec, config: &Config) -> Result<Self, PlanError> {
        let (vcpus, memory_mib) = Self::from_annotations(
            &spec
                .annotations()
                .clone()
                .unwrap_or_default()
                .into_iter()
                .collect(),
        )?;
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let limit = resources
            .and_then(|all| all.memory().as_ref())
            .and_then(oci_spec::runtime::LinuxMemory::limit);
        let limit_mib = match limit {
            None | Some(-1 | 0) => None,
            Some(bytes) => Some(
                u64::try_from(bytes)
                    .ok()
                    .map(|bytes| bytes.div_ceil(MIB))
                    .filter(|mib| (1..=MOST_MEMORY_MIB).contains(mib) && bytes >= 1 << 20)
                    .ok_or(PlanError::Memory(bytes))?,
            ),
        };
        let cpu = resources.and_then(|all| all.cpu().as_ref());
        let quota = cpu
            .and_then(oci_spec::runtime::LinuxCpu::quota)
            .filter(|quota| *quota > 0);
        let period = cpu
            .and_then(oci_spec::runtime::LinuxCpu::period)
            .filter(|period| *period > 0)
            .unwrap_or(100_000);
        let by_quota = match quota {
            None => None,
            Some(quota) => Some(
                u64::try_from(quota)
                    .ok()
                    .filter(|quota| *quota >= 1000 && (1000..=1_000_000).contains(&period))
                    .map(|quota| u32::try_from(quota.div_ceil(period)).unwrap_or(u32::MAX))
                    .ok_or(PlanError::Cpu { quota, period })?,
            ),
        };
        Ok(Self {
            vcpus: vcpus
                .or(by_quota)
                .unwrap_or(config.default_vcpus)
                .clamp(1, MOST_VCPUS),
            memory_mib: memory_mib
                .or(limit_mib.map(|mib| mib + config.guest_overhead_mib))
                .unwrap_or(config.default_memory_mib)
                .clamp(LEAST_MEMORY_MIB, MOST_MEMORY_MIB),
        })
    }

    /// What our annotations say; an unknown or senseless one is an error.
    fn from_annotations(
        annotations: &BTreeMap<String, String>,
    ) -> Result<(Option<u32>, Option<u64>), PlanError> {
        let (mut vcpus, mut memory) = (None, None);
        for (key, value) in annotations.iter().filter(|(key, _)| key.starts_with(PREFIX)) {
            let bad = |key, range| PlanError::AnnotationValue {
                key,
                value: value.clone(),
                range,
            };
            match key.as_str() {
                VCPUS => {
                    let number = value.parse().ok().filter(|n| (1..=MOST_VCPUS).contains(n));
                    vcpus =
                        Some(number.ok_or_else(|| bad(VCPUS, format!("a number from 1 to {MOST_VCPUS}")))?);
                }
                MEMORY_MIB => {
                    let number = value
                        .parse()
                        .ok()
                        .filter(|n| (LEAST_MEMORY_MIB..=MOST_MEMORY_MIB).contains(n));
                    let range = || format!("a number from {LEAST_MEMORY_MIB} to {MOST_MEMORY_MIB}");
                    memory = Some(number.ok_or_else(|| bad(MEMORY_MIB, range()))?);
                }
                _ => return Err(PlanError::Annotation(key.clone())),
            }
        }
        Ok((vcpus, memory))
    }
}

fn root_bind(id: &ContainerId, bundle: &Bundle) -> Result<Bind, PlanError> {
    let root = bundle.spec.root().as_ref().ok_or(PlanError::NoRoot)?;
    let path = bundle.path.join(root.path());
    let kind = fs::metadata(&path).map_err(|source| PlanError::Root {
        path: path.clone(),
        source,
    })?;
    if !kind.is_dir() {
        return Err(PlanError::RootKind(path));
    }
    Ok(Bind {
        source: path,
        target: format!("{id}/rootfs"),
        read_only: root.readonly().unwrap_or(false),
        recursive: true,
    })
}

/// The mount as the guest sees it; what comes from the host is added to `binds`.
fn guest_mount(
    id: &ContainerId,
    bundle: &Bundle,
    mut mount: Mount,
    binds: &mut Vec<Bind>,
) -> Result<Mount, PlanError> {
    let destination = mount.destination().clone();
    if !destination.is_absolute() {
        return Err(PlanError::Destination(destination));
    }
    let options = mount.options().clone().unwrap_or_default();
    let has = |word: &str| options.iter().any(|option| option == word);
    let is_bind = mount.typ().as_deref() == Some("bind") || has("bind") || has("rbind");
    if !is_bind {
        return Ok(mount);
    }
    if destination == Path::new("/dev/shm") {
        // Shared memory is the guest's kernel's: a file shared with the host cannot carry it.
        mount.set_typ(Some("tmpfs".to_owned()));
        mount.set_source(Some(PathBuf::from("shm")));
        mount.set_options(Some(
            ["nosuid", "nodev", "noexec", "mode=1777"]
                .map(str::to_owned)
                .to_vec(),
        ));
        return Ok(mount);
    }
    let source = mount
        .source()
        .clone()
        .ok_or_else(|| PlanError::NoSource(destination.clone()))?;
    let path = bundle.path.join(source);
    fs::metadata(&path).map_err(|source| PlanError::Source {
        path: path.clone(),
        destination,
        source,
    })?;
    let target = format!("{id}/mounts/{}", binds.len());
    mount.set_source(Some(Path::new(SHARE_DIR).join(&target)));
    binds.push(Bind {
        source: path,
        target,
        read_only: has("ro") || has("rro"),
        recursive: has("rbind"),
    });
    Ok(mount)
}

/// Takes the hooks that run on the host out of the configuration; the others stay for the guest.
fn host_hooks(spec: &mut Spec) -> HostHooks {
    let Some(hooks) = spec.hooks().clone() else {
        return HostHooks::default();
    };
    let mut guest = Hooks::default();
    guest.set_create_container(hooks.create_container().clone());
    guest.set_start_container(hooks.start_container().clone());
    spec.set_hooks(Some(guest));
    let prestart = hooks.prestart().clone().unwrap_or_default();
    HostHooks {
        prestart,
        create_runtime: hooks.create_runtime().clone().unwrap_or_default(),
        poststart: hooks.poststart().clone().unwrap_or_default(),
        poststop: hooks.poststop().clone().unwrap_or_default(),
    }
}

fn network_namespace(spec: &Spec) -> NetworkNamespace {
    let namespaces = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref());
    let network = namespaces.and_then(|all| all.iter().find(|one| one.typ() == LinuxNamespaceType::Network));
    match network.map(|namespace| namespace.path().clone()) {
        None => NetworkNamespace::Caller,
        Some(None) => NetworkNamespace::New,
        Some(Some(path)) => NetworkNamespace::Path(path),
    }
}

/// Removes what only means something on the host: paths of host namespaces and of the host's cgroup.
fn for_the_guest(spec: &mut Spec) {
    let Some(linux) = spec.linux_mut() else {
        return;
    };
    linux.set_cgroups_path(None);
    if let Some(namespaces) = linux.namespaces_mut() {
        for namespace in namespaces {
            namespace.set_path(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn bundle(change: impl FnOnce(&mut Value)) -> (tempfile::TempDir, Bundle) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        let mut config = json!({
            "ociVersion": "1.0.2",
            "process": {"cwd": "/", "args": ["true"], "user": {"uid": 0, "gid": 0}},
            "root": {"path": "rootfs"},
            "linux": {"namespaces": [{"type": "pid"}]},
        });
        change(&mut config);
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let bundle = Bundle::read(dir.path()).unwrap();
        (dir, bundle)
    }

    fn id() -> ContainerId {
        ContainerId::try_from("web").unwrap()
    }

    fn plan(change: impl FnOnce(&mut Value)) -> Result<ContainerPlan, PlanError> {
        let (_dir, bundle) = bundle(change);
        plan_container(&id(), &bundle)
    }

    fn size(change: impl FnOnce(&mut Value)) -> Result<(u32, u64), PlanError> {
        let (_dir, bundle) = bundle(change);
        Size::of(&bundle.spec, &Config::default()).map(|size| (size.vcpus, size.memory_mib))
    }

    #[test]
    fn what_cannot_be_run_is_refused_in_a_sentence() {
        for (change, want) in [
            (json!({"process": null}), "config.json has no process"),
            (
                json!({"process": {"cwd": "/", "args": [], "user": {"uid": 0, "gid": 0}}}),
                "process.args in config.json is empty",
            ),
            (
                json!({"process": {"cwd": "x", "args": ["a"], "user": {"uid": 0, "gid": 0}}}),
                "process.cwd \"x\"",
            ),
            (json!({"root": null}), "config.json has no root"),
            (
                json!({"root": {"path": "missing"}}),
                "cannot use root file system ",
            ),
            (json!({"root": {"path": "config.json"}}), "root file system "),
            (
                json!({"mounts": [{"destination": "data", "type": "tmpfs"}]}),
                "mount destination \"data\"",
            ),
            (
                json!({"mounts": [{"destination": "/d", "type": "bind"}]}),
                "the bind mount at /d has no source",
            ),
            (
                json!({"mounts": [{"destination": "/d", "type": "bind", "source": "/nonexistent"}]}),
                "cannot use source /nonexistent",
            ),
            (
                json!({"annotations": {"io.caisson.turbo": "1"}}),
                "unknown annotation \"io.caisson.turbo\"",
            ),
            (
                json!({"annotations": {"io.caisson.vcpus": "many"}}),
                "annotation io.caisson.vcpus has value \"many\"",
            ),
        ] {
            let result = plan(|config| {
                for (key, value) in change.as_object().unwrap() {
                    match value {
                        Value::Null => drop(config.as_object_mut().unwrap().remove(key)),
                        value => config[key] = value.clone(),
                    }
                }
            });
            let err = result.unwrap_err().to_string();
            assert!(err.starts_with(want), "{change}: {err}");
        }
    }

    #[test]
    fn a_bind_mount_becomes_a_path_in_the_share() {
        let plan = plan(|config| {
            config["mounts"] = json!([
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/data", "source": "rootfs", "options": ["rbind", "ro"]},
            ]);
        })
        .unwrap();
        assert_eq!(plan.binds.len(), 2);
        assert_eq!(plan.binds[1].target, "web/mounts/1");
        assert!(plan.binds[1].read_only && plan.binds[1].recursive);
        let mounts = plan.create.spec.mounts().as_ref().unwrap();
        assert_eq!(
            mounts[1].source().as_deref(),
            Some(Path::new("/run/caisson/share/web/mounts/1"))
        );
        assert_eq!(mounts[0].source().as_deref(), Some(Path::new("proc")));
    }

    #[test]
    fn shared_memory_stays_in_the_guest() {
        let plan = plan(|config| {
            config["mounts"] = json!([{"destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["bind"]}]);
        })
        .unwrap();
        assert_eq!(plan.binds.len(), 1, "only the root");
        assert_eq!(
            plan.create.spec.mounts().as_ref().unwrap()[0].typ().as_deref(),
            Some("tmpfs")
        );
    }

    #[test]
    fn host_paths_of_namespaces_do_not_reach_the_guest() {
        let plan = plan(|config| {
            config["linux"] =
                json!({"cgroupsPath": "/x", "namespaces": [{"type": "network", "path": "/run/netns/a"}]});
        })
        .unwrap();
        assert_eq!(plan.netns, NetworkNamespace::Path("/run/netns/a".into()));
        let linux = plan.create.spec.linux().clone().unwrap();
        assert_eq!(linux.cgroups_path(), &None);
        assert_eq!(linux.namespaces().as_ref().unwrap()[0].path(), &None);
    }

    #[test]
    fn hooks_are_split_between_host_and_guest() {
        let plan = plan(|config| {
            config["hooks"] = json!({"prestart": [{"path": "/a"}], "createContainer": [{"path": "/b"}], "poststop": [{"path": "/c"}]});
        })
        .unwrap();
        assert_eq!((plan.hooks.prestart.len(), plan.hooks.poststop.len()), (1, 1));
        let guest = plan.create.spec.hooks().clone().unwrap();
        assert!(guest.create_container().is_some() && guest.poststop().is_none());
    }

    #[test]
    fn the_machine_is_as_large_as_the_limits_and_the_guest_itself() {
        let memory = |limit: i64| json!({"resources": {"memory": {"limit": limit}}});
        let cpu = |quota: i64, period: u64| json!({"resources": {"cpu": {"quota": quota, "period": period}}});
        assert_eq!(size(|_| {}).unwrap(), (1, 512));
        assert_eq!(size(|c| c["linux"] = memory(-1)).unwrap(), (1, 512));
        assert_eq!(size(|c| c["linux"] = memory(256 << 20)).unwrap(), (1, 320));
        assert_eq!(size(|c| c["linux"] = cpu(150_000, 100_000)).unwrap(), (2, 512));
        assert_eq!(size(|c| c["linux"] = cpu(10_000_000, 1000)).unwrap(), (32, 512));
        assert_eq!(
            size(|c| c["annotations"] = json!({"io.caisson.vcpus": "4", "io.caisson.memory-mib": "128"}))
                .unwrap(),
            (4, 128)
        );
        for absurd in [1, 1023, i64::MAX, -7] {
            assert!(
                matches!(size(|c| c["linux"] = memory(absurd)), Err(PlanError::Memory(_))),
                "{absurd}"
            );
        }
        assert!(matches!(
            size(|c| c["linux"] = cpu(5, 100_000)),
            Err(PlanError::Cpu { .. })
        ));
    }
}
