//! Whether assets boot: under QEMU's emulation, without the host that the agent looks for.

use std::process::Command;
use std::time::Duration;

use anyhow::bail;

use super::Assets;
use crate::{child, setup};

/// Boots `assets` and waits for the agent to say that there is no host for it.
///
/// That is after all modules are loaded and the guest's file systems are mounted.
pub(crate) fn check(assets: &Assets) -> anyhow::Result<()> {
    setup::qemu()?;
    let mut console = String::new();
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg", "-M", "q35", "-smp", "1", "-m", "256"])
        // cmpxchg16b of this emulator crashes kernels from 6.12 on.
        .args(["-cpu", "max,-cx16"])
        .args(["-display", "none", "-nodefaults", "-no-user-config", "-no-reboot"])
        .arg("-kernel")
        .arg(assets.kernel())
        .arg("-initrd")
        .arg(assets.initramfs())
        .args([
            "-append",
            "console=ttyS0 quiet panic=-1 no_timer_check tsc=reliable",
        ])
        .args(["-serial", "stdio"]);
    let outcome = child::follow(&mut qemu, LIMIT, |line| {
        console.push_str(line);
        console.push('\n');
    });
    if !console.contains(LAST_WORDS) {
        bail!(
            "{} does not boot: {}\n{console}",
            assets.directory.display(),
            outcome.map_or_else(|err| err.to_string(), |status| status.to_string())
        );
    }
    Ok(())
}

/// What the agent says when it gives up on its host, after thirty seconds.
const LAST_WORDS: &str = "cannot connect to the control plane";
const LIMIT: Duration = Duration::from_secs(180);
