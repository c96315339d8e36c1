//! `caisson features` (runtime-spec, features.md and features-linux.md): what the guest's agent really does.

use std::process::ExitCode;

use serde_json::json;

use crate::arguments::SPEC_VERSION;
use crate::failure::Result;

/// Options of `features`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {}

/// Oldest configuration that is understood.
const OLDEST: &str = "1.0.0";
const HOOKS: [&str; 6] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];
/// Options that change a mount itself; with an `r` before them they change the whole tree.
const ATTRIBUTES: [&str; 18] = [
    "ro",
    "rw",
    "nosuid",
    "suid",
    "nodev",
    "dev",
    "noexec",
    "exec",
    "nodiratime",
    "diratime",
    "nosymfollow",
    "symfollow",
    "noatime",
    "relatime",
    "strictatime",
    "atime",
    "norelatime",
    "nostrictatime",
];
/// Other mount options.
const OPTIONS: [&str; 21] = [
    "async",
    "bind",
    "defaults",
    "dirsync",
    "lazytime",
    "loud",
    "noiversion",
    "nolazytime",
    "nomand",
    "private",
    "rbind",
    "rprivate",
    "rshared",
    "rslave",
    "runbindable",
    "shared",
    "silent",
    "slave",
    "sync",
    "tmpcopyup",
    "unbindable",
];
const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"];
/// capabilities(7).
const CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];
/// Every action but SCMP_ACT_NOTIFY, whose listener would be on the host.
const ACTIONS: [&str; 8] = [
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_LOG",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_TRAP",
];
const OPERATORS: [&str; 7] = [
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_LE",
    "SCMP_CMP_LT",
    "SCMP_CMP_MASKED_EQ",
    "SCMP_CMP_NE",
];
const FLAGS: [&str; 3] = [
    "SECCOMP_FILTER_FLAG_LOG",
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_TSYNC",
];

impl Options {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let mut text = serde_json::to_string_pretty(&features())?;
        text.push('\n');
        super::print(&text)
    }
}

fn features() -> serde_json::Value {
    let mut options: Vec<String> = OPTIONS.map(str::to_owned).to_vec();
    for attribute in ATTRIBUTES {
        options.push(attribute.to_owned());
        options.push(format!("r{attribute}"));
    }
    options.sort();
    let archs: &[&str] = match std::env::consts::ARCH {
        "aarch64" => &["SCMP_ARCH_AARCH64"],
        _ => &["SCMP_ARCH_X86", "SCMP_ARCH_X86_64"],
    };
    json!({
        "ociVersionMin": OLDEST,
        "ociVersionMax": SPEC_VERSION,
        "hooks": HOOKS,
        "mountOptions": options,
        "linux": {
            "namespaces": NAMESPACES,
            "capabilities": CAPABILITIES.as_slice(),
            "cgroup": {"v1": true, "v2": true, "systemd": true, "systemdUser": false, "rdma": false},
            "seccomp": {
                "enabled": true,
                "actions": ACTIONS,
                "operators": OPERATORS,
                "archs": archs,
                "knownFlags": FLAGS,
                "supportedFlags": FLAGS,
            },
            // Of the guest's kernel, which has neither; nor has it Intel RDT.
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": false}},
        },
        "annotations": {
            "io.caisson.version": env!("CARGO_PKG_VERSION"),
            "io.caisson.backends": crate::backend::names().join(","),
            "run.oci.checkpoint.enabled": "false",
        },
        "potentiallyUnsafeConfigAnnotations": ["io.caisson."],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_has_the_members_of_features_md() {
        let features = features();
        for member in [
            "ociVersionMin",
            "ociVersionMax",
            "hooks",
            "mountOptions",
            "linux",
            "annotations",
        ] {
            assert!(features.get(member).is_some(), "{member}");
        }
        let parsed: oci_spec::runtime::Features = serde_json::from_value(features).unwrap();
        assert!(parsed.linux().is_some());
    }
}
