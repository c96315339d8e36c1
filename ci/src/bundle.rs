//! A small bundle: a static busybox, and what an engine would write for a plain container.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use serde_json::json;

/// Makes a bundle at `path` that runs `script` in a shell, with `memory` bytes as its limit.
pub(crate) fn make(path: &Path, script: &str, memory: Option<u64>) -> anyhow::Result<()> {
    let root = path.join("rootfs");
    for directory in ["bin", "dev", "etc", "proc", "sys", "tmp", "root"] {
        std::fs::create_dir_all(root.join(directory)).context("cannot make the root file system")?;
    }
    let busybox = busybox().context("cannot find busybox; install the package busybox-static")?;
    std::fs::copy(&busybox, root.join("bin/busybox")).context("cannot copy busybox")?;
    let list = Command::new(&busybox)
        .arg("--list")
        .output()
        .context("cannot run busybox")?;
    for applet in String::from_utf8_lossy(&list.stdout)
        .lines()
        .filter(|name| *name != "busybox")
    {
        let at = root.join("bin").join(applet);
        if !at.exists() {
            std::os::unix::fs::symlink("busybox", at).context("cannot link an applet")?;
        }
    }
    std::fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    std::fs::write(path.join("config.json"), config(script, memory).to_string())?;
    Ok(())
}

fn busybox() -> Option<PathBuf> {
    ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
}

fn config(script: &str, memory: Option<u64>) -> serde_json::Value {
    let devices = json!([{ "allow": false, "access": "rwm" }]);
    let resources = match memory {
        Some(limit) => json!({ "devices": devices, "memory": { "limit": limit } }),
        None => json!({ "devices": devices }),
    };
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": ["/bin/sh", "-c", script],
            "env": ["PATH=/bin", "HOME=/root"],
            "cwd": "/",
            "noNewPrivileges": true
        },
        "root": { "path": "rootfs" },
        "hostname": "caisson",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] }
        ],
        "linux": {
            "resources": resources,
            "namespaces": [
                { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }
            ]
        }
    })
}
