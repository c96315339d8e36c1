//! `caisson spec`: a configuration to start from.
#![expect(
    clippy::indexing_slicing,
    reason = "members of JSON objects that are made here; writing to a missing one adds it"
)]

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::arguments::SPEC_VERSION;
use crate::failure::Result;

/// Options of `spec`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Directory for config.json [default: the current directory]
    #[arg(short, long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Map the container's root to the calling user
    #[arg(long)]
    rootless: bool,
}

impl Options {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let mut spec = starter();
        if self.rootless {
            map_to_caller(&mut spec);
        }
        let path = self.bundle.unwrap_or_default().join("config.json");
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let mut file = match file {
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {
                Err(err).with_context(|| format!("cannot write {}; remove it first", path.display()))?
            }
            file => file.with_context(|| format!("cannot write {}", path.display()))?,
        };
        let text = serde_json::to_string_pretty(&spec)?;
        writeln!(file, "{text}").with_context(|| format!("cannot write {}", path.display()))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// A shell in `rootfs`, read-only, with namespaces of its own.
pub(crate) fn starter() -> Value {
    let capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    json!({
        "ociVersion": SPEC_VERSION,
        "process": {
            "terminal": true,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "caisson",
        "mounts": [
            mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "cgroup"},
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi",
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

/// The capabilities that container engines give by default.
pub(crate) fn usual_capabilities() -> Value {
    let usual = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE",
    ];
    json!({"bounding": usual, "effective": usual, "permitted": usual})
}

/// What a runtime without privileges can do: one user, and no group 5 to own terminals.
fn map_to_caller(spec: &mut Value) {
    let (uid, gid) = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": uid, "size": 1}]);
    spec["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": gid, "size": 1}]);
    spec["linux"]["resources"] = json!({});
    if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
        namespaces.push(json!({"type": "user"}));
    }
    for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
        if let Some(options) = mount["options"].as_array_mut() {
            options.retain(|option| option != "gid=5");
        }
    }
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": kind, "source": source, "options": options})
}

#[cfg(test)]
mod tests {
    use super::*;
    use caisson_sandbox::bundle::Bundle;
    use caisson_sandbox::planner::plan_container;

    #[test]
    fn what_is_written_can_be_planned() {
        for rootless in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir(dir.path().join("rootfs")).unwrap();
            let options = || Options {
                bundle: Some(dir.path().to_owned()),
                rootless,
            };
            options().run().unwrap();
            let bundle = Bundle::read(dir.path()).unwrap();
            plan_container(&"a".try_into().unwrap(), &bundle).unwrap();
            let again = options().run().unwrap_err().to_string();
            assert!(again.contains("remove it first"), "{again}");
        }
    }
}
