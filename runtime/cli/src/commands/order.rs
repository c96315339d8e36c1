//! From a bundle and options to an order: what `create` and `run` have in common.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use caisson_sandbox::ContainerId;
use caisson_sandbox::bundle::Bundle;
use caisson_sandbox::client::{ContainerState, CreateOrder, Place, Runtime, StdioChoice};
use caisson_sandbox::plan::{CgroupPlan, MachineChoice, SandboxPlan};
use caisson_sandbox::planner::{plan_container, plan_sandbox};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::arguments::Global;
use crate::failure::Result;
use crate::{assets, machine, places};

/// Memory of our processes beside the guest's own, in bytes, by which the host's limit exceeds the guest's memory.
const NATIVE_OVERHEAD: u64 = 64 << 20;
/// The same for QEMU, whose translated code alone may take hundreds of MiB.
const QEMU_OVERHEAD: u64 = 768 << 20;

/// Options of `create` and `run`.
#[derive(Debug, clap::Args)]
pub(crate) struct Shared {
    /// Directory that holds config.json [default: the current directory]
    #[arg(short, long, value_name = "DIR")]
    pub(crate) bundle: Option<PathBuf>,
    /// Unix socket to which the terminal's master is sent
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// File for the pid of the host process that stands for the container's
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Accepted for compatibility; has no meaning in a VM
    #[arg(long)]
    no_pivot: bool,
    /// Accepted for compatibility; the VM has keyrings of its own
    #[arg(long)]
    no_new_keyring: bool,
    /// Only 0 is possible: descriptors of the host cannot enter a VM
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,
}

/// A caller that leaves cannot lend its terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stay {
    /// It waits for the process.
    Attached,
    /// It leaves.
    Detached,
}

impl Shared {
    pub(crate) fn bundle(&self) -> &Path {
        self.bundle.as_deref().unwrap_or(Path::new("."))
    }

    /// Decides everything about a container; nothing is made yet.
    pub(crate) fn order(
        &self,
        global: &Global,
        runtime: &Runtime,
        id: &ContainerId,
        bundle: &Bundle,
        stay: Stay,
    ) -> Result<CreateOrder> {
        refuse_descriptors(self.preserve_fds)?;
        let mut container = plan_container(id, bundle)?;
        let stdio = stdio(self.console_socket.as_deref(), container.terminal, stay)?;
        let place = match joined(&bundle.spec, &runtime.list()?) {
            Some((sandbox, joins)) => {
                tracing::info!("container {id} joins the sandbox of container {sandbox}");
                container.create.join = joins.into_iter().collect();
                Place::Join(sandbox)
            }
            None => {
                let config = places::config(global)?;
                let choice = machine::choose(&config)?;
                assets::require(&config)?;
                let mut sandbox = plan_sandbox(id, bundle, &config, choice)?;
                sandbox.cgroup = cgroup(global, runtime.root(), &bundle.spec, &sandbox);
                Place::New(Box::new(sandbox))
            }
        };
        Ok(CreateOrder {
            place,
            container,
            stdio,
        })
    }
}

/// What an order's machine has to say to the user.
pub(crate) fn announcement(order: &CreateOrder) -> Option<String> {
    match &order.place {
        Place::New(plan) => machine::announcement(&plan.machine),
        Place::Join(_) => None,
    }
}

/// Refuses `--preserve-fds`.
pub(crate) fn refuse_descriptors(count: u32) -> anyhow::Result<()> {
    if count > 0 {
        bail!(
            "cannot pass {count} more descriptors to the container: an open file of the host cannot enter a VM; \
             leave --preserve-fds away, and share the file with a mount"
        );
    }
    Ok(())
}

/// Where the streams come from.
pub(crate) fn stdio(socket: Option<&Path>, terminal: bool, stay: Stay) -> anyhow::Result<StdioChoice> {
    match (socket, terminal, stay) {
        (Some(_), false, _) => {
            bail!(
                "cannot use --console-socket: the process has no terminal; set process.terminal, or leave it away"
            )
        }
        (None, true, Stay::Detached) => bail!(
            "cannot give the process a terminal while nobody stays with it; give --console-socket, or set \
             process.terminal to false"
        ),
        (Some(socket), true, _) => Ok(StdioChoice::ConsoleSocket(
            std::path::absolute(socket).with_context(|| format!("cannot find {}", socket.display()))?,
        )),
        (None, _, _) => Ok(StdioChoice::Inherit),
    }
}

/// The sandbox that a configuration's namespaces lead to, and which of its containers each belongs to.
///
/// An engine that puts containers together gives the second one paths like `/proc/PID/ns/ipc`, where PID is what
/// we said the first one's is.
fn joined(spec: &Spec, known: &[ContainerState]) -> Option<(ContainerId, Vec<(String, String)>)> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    let mut sandbox = None;
    let mut joins = Vec::new();
    for namespace in namespaces {
        let Some(pid) = namespace.path().as_deref().and_then(pid_in) else {
            continue;
        };
        let Some(owner) = known.iter().find(|state| state.pid == pid) else {
            continue;
        };
        // Namespaces of two sandboxes cannot be had together: the first one given decides.
        if *sandbox.get_or_insert_with(|| owner.sandbox.clone()) == owner.sandbox {
            joins.push((name(namespace.typ()).to_owned(), owner.id.to_string()));
        }
    }
    Some((sandbox?, joins))
}

/// PID of `/proc/PID/ns/…`.
fn pid_in(path: &Path) -> Option<i32> {
    let rest = path.strip_prefix("/proc").ok()?;
    let mut parts = rest.iter();
    let pid = parts.next()?.to_str()?.parse().ok()?;
    (parts.next()? == "ns" && pid > 0).then_some(pid)
}

/// As config.json names it.
fn name(kind: LinuxNamespaceType) -> &'static str {
    match kind {
        LinuxNamespaceType::Mount => "mount",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "network",
        LinuxNamespaceType::Time => "time",
    }
}

/// The host cgroup of a sandbox: that of its first container, or one of our own where we may make it.
fn cgroup(global: &Global, root: &Path, spec: &Spec, sandbox: &SandboxPlan) -> Option<CgroupPlan> {
    let linux = spec.linux().as_ref();
    let given = linux.and_then(|linux| linux.cgroups_path().as_ref());
    let path = match given.map(|path| path.to_string_lossy()) {
        Some(path) if global.systemd_cgroup => of_slice(&path),
        Some(path) => path.into_owned(),
        None if rustix::process::geteuid().is_root() && Path::new("/sys/fs/cgroup").exists() => {
            own_cgroup(root, &sandbox.id)
        }
        None => return None,
    };
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    let cpu = resources.and_then(|all| all.cpu().as_ref());
    let limited = resources
        .and_then(|all| all.memory().as_ref()?.limit())
        .is_some_and(|limit| limit > 0);
    let overhead = match sandbox.machine {
        MachineChoice::Native => NATIVE_OVERHEAD,
        MachineChoice::Qemu { .. } => QEMU_OVERHEAD,
    };
    Some(CgroupPlan {
        path,
        memory: limited.then(|| sandbox.memory.saturating_add(overhead)),
        cpu: cpu.and_then(|cpu| Some((cpu.quota()?, cpu.period().unwrap_or(100_000)))),
        shares: cpu.and_then(oci_spec::runtime::LinuxCpu::shares),
        // The processors that a container names are those of its guest.
        cpuset: None,
    })
}

/// A path of our own. Two root directories may hold containers of one id; sharing a cgroup, deleting one would kill
/// the other.
fn own_cgroup(root: &Path, id: &str) -> String {
    let mut hasher = DefaultHasher::new();
    root.hash(&mut hasher);
    format!("/caisson/{:016x}/{id}", hasher.finish())
}

/// The path that systemd would make for `slice:prefix:name`: a slice is below those whose names begin it.
fn of_slice(path: &str) -> String {
    let mut parts = path.splitn(3, ':');
    let (Some(slice), Some(prefix), Some(name)) = (parts.next(), parts.next(), parts.next()) else {
        return path.to_owned();
    };
    let slice = match slice {
        "" => "system.slice",
        slice => slice,
    };
    let mut at = String::new();
    // "-.slice" is the root of all.
    let stem = slice.trim_end_matches(".slice").trim_start_matches('-');
    for (end, _) in stem.match_indices('-').chain([(stem.len(), "")]) {
        if let Some(parent) = stem.get(..end).filter(|parent| !parent.is_empty()) {
            at.push_str(&format!("/{parent}.slice"));
        }
    }
    match prefix {
        "" => format!("{at}/{name}.scope"),
        prefix => format!("{at}/{prefix}-{name}.scope"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_nested_by_their_names() {
        for (given, want) in [
            ("system.slice:runc:a", "/system.slice/runc-a.scope"),
            (":cri:a", "/system.slice/cri-a.scope"),
            ("kube-pods.slice:cri:a", "/kube.slice/kube-pods.slice/cri-a.scope"),
            ("-.slice:x:a", "/x-a.scope"),
            ("/plain/path", "/plain/path"),
        ] {
            assert_eq!(of_slice(given), want, "{given}");
        }
    }

    #[test]
    fn one_id_below_two_roots_has_two_cgroups() {
        let (one, other) = (own_cgroup(Path::new("/a"), "c"), own_cgroup(Path::new("/b"), "c"));
        assert_ne!(one, other);
        assert!(one.starts_with("/caisson/") && one.ends_with("/c"), "{one}");
    }

    #[test]
    fn a_namespace_path_tells_whose_it_is() {
        for (path, want) in [
            ("/proc/12/ns/net", Some(12)),
            ("/proc/12/task/12/ns/net", None),
            ("/proc/self/ns/net", None),
            ("/proc/-1/ns/net", None),
            ("/run/netns/a", None),
        ] {
            assert_eq!(pid_in(Path::new(path)), want, "{path}");
        }
    }

    #[test]
    fn a_terminal_needs_somebody_who_holds_it() {
        let socket = Some(Path::new("/s"));
        for (socket, terminal, stay, want) in [
            (None, false, Stay::Detached, true),
            (None, true, Stay::Attached, true),
            (None, true, Stay::Detached, false),
            (socket, true, Stay::Detached, true),
            (socket, false, Stay::Detached, false),
        ] {
            assert_eq!(stdio(socket, terminal, stay).is_ok(), want, "{terminal} {stay:?}");
        }
    }
}
