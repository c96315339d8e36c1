//! Which machine runs a guest: the built-in hypervisor if it is usable, else QEMU, else an error.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use caisson_sandbox::config::Config;
use caisson_sandbox::plan::MachineChoice;

use crate::backend;

/// Chooses, and fails with what is missing and how to get it.
pub(crate) fn choose(config: &Config) -> Result<MachineChoice> {
    let because = match backend::probe() {
        Ok(_) => return Ok(MachineChoice::Native),
        Err(because) => because,
    };
    if config.require_hardware {
        bail!(
            "cannot use hardware virtualization: {because}; the configuration has require_hardware = true, \
             which rules emulation out"
        );
    }
    let arch = std::env::consts::ARCH;
    match emulator(config) {
        Ok(program) => Ok(MachineChoice::Qemu {
            program,
            arch: arch.to_owned(),
            because,
        }),
        Err(missing) => bail!("nothing here can run a virtual machine: {because}; and {missing}"),
    }
}

/// The emulator's program; otherwise what is missing and how to get it.
pub(crate) fn emulator(config: &Config) -> std::result::Result<PathBuf, String> {
    if let Some(program) = &config.qemu {
        return match is_program(program) {
            true => Ok(program.clone()),
            false => Err(format!(
                "{} is no program that can be run; correct \"qemu\" in the configuration",
                program.display()
            )),
        };
    }
    let arch = std::env::consts::ARCH;
    let name = format!("qemu-system-{arch}");
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join(&name))
        .find(|program| program.is_absolute() && is_program(program))
        .ok_or_else(|| {
            format!(
                "{name} is not on PATH for emulation; install it (Debian: apt-get install {}), or set \"qemu\" in \
                 the configuration",
                package(arch)
            )
        })
}

/// Says once that a guest is emulated, if it is.
pub(crate) fn announcement(choice: &MachineChoice) -> Option<String> {
    match choice {
        MachineChoice::Native => None,
        MachineChoice::Qemu { because, .. } => Some(format!(
            "the machine is emulated by QEMU, which is slow and a weaker boundary than hardware: {because}"
        )),
    }
}

fn package(arch: &str) -> &'static str {
    match arch {
        "aarch64" => "qemu-system-arm",
        _ => "qemu-system-x86",
    }
}

fn is_program(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}
