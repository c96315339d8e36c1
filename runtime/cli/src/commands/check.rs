//! `caisson check`: what works here, what is missing, and how to get it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use caisson_sandbox::config::Config;
use serde::Serialize;

use crate::arguments::Global;
use crate::failure::Result;
use crate::{assets, backend, machine, places};

/// Options of `check`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    name: &'static str,
    verdict: Verdict,
    /// What was found, or what is missing.
    detail: String,
    /// How to get what is missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Works,
    /// Containers run without it, with less speed or fewer features.
    Missing,
    /// No container runs without it.
    Needed,
}

impl Options {
    pub(crate) fn run(self, global: &Global) -> Result<ExitCode> {
        let config = places::config(global)?;
        let findings = findings(&config);
        let ready = findings.iter().all(|finding| finding.verdict != Verdict::Needed);
        let machine = machine::choose(&config).ok();
        let machine = machine.map(|choice| match choice {
            caisson_sandbox::plan::MachineChoice::Native => "native",
            caisson_sandbox::plan::MachineChoice::Qemu { .. } => backend::EMULATOR,
        });
        if self.json {
            let all = serde_json::json!({"ready": ready, "machine": machine, "findings": findings});
            super::print(&format!("{}\n", serde_json::to_string_pretty(&all)?))?;
        } else {
            super::print(&text(&findings, ready, machine))?;
        }
        Ok(match ready {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        })
    }
}

fn text(findings: &[Finding], ready: bool, machine: Option<&str>) -> String {
    let mut text = String::new();
    for finding in findings {
        let word = match finding.verdict {
            Verdict::Works => "ok",
            Verdict::Missing => "-",
            Verdict::Needed => "NEEDED",
        };
        text.push_str(&format!("{word:<8}{:<18}{}\n", finding.name, finding.detail));
        if let Some(remedy) = finding.remedy {
            text.push_str(&format!("{:26}to get it: {remedy}\n", ""));
        }
    }
    text.push_str(&match (ready, machine) {
        (true, Some("native")) => "Containers can run, on hardware virtualization.\n".to_owned(),
        (true, Some(machine)) => {
            format!("Containers can run, emulated by {machine}: slow, and a weaker boundary.\n")
        }
        _ => "Containers cannot run here until what is NEEDED is there.\n".to_owned(),
    });
    text
}

fn findings(config: &Config) -> Vec<Finding> {
    let hypervisor = backend::probe();
    let emulator = machine::emulator(config);
    let mut findings = Vec::new();
    let chosen = machine::choose(config).map(|_| ());
    findings.push(match &hypervisor {
        Ok(name) => works("hypervisor", format!("{name}: hardware virtualization")),
        Err(because) => Finding {
            name: "hypervisor",
            verdict: worst(chosen.is_ok()),
            detail: because.clone(),
            remedy: Some("a machine or VM with (nested) virtualization switched on; see \"kvm device\""),
        },
    });
    findings.push(kvm_device());
    findings.push(match emulator {
        Ok(program) => match version(&program) {
            Ok(version) => works("emulator", format!("{}, {version}", program.display())),
            Err(err) => Finding {
                name: "emulator",
                verdict: worst(hypervisor.is_ok()),
                detail: format!("{} does not run: {err}", program.display()),
                remedy: Some("apt-get install --reinstall qemu-system-x86 (arm64: qemu-system-arm)"),
            },
        },
        Err(missing) => Finding {
            name: "emulator",
            verdict: worst(hypervisor.is_ok()),
            detail: missing,
            remedy: None,
        },
    });
    if config.require_hardware && hypervisor.is_err() {
        findings.push(Finding {
            name: "require_hardware",
            verdict: Verdict::Needed,
            detail: "the configuration rules emulation out".to_owned(),
            remedy: Some("require_hardware = false, if emulation is good enough"),
        });
    }
    findings.push(match assets::kernel(&config.kernel) {
        Ok(arch) => works("guest kernel", format!("{}, {arch}", config.kernel.display())),
        Err(err) => needed("guest kernel", format!("{err:#}")),
    });
    findings.push(match assets::initramfs(&config.initramfs) {
        Ok(()) => works("guest initramfs", config.initramfs.display().to_string()),
        Err(err) => needed("guest initramfs", format!("{err:#}")),
    });
    findings.push(privileges());
    findings.extend(["mnt", "net", "pid", "user"].map(namespace));
    findings.push(cgroups());
    findings.push(tun());
    findings
}

fn works(name: &'static str, detail: String) -> Finding {
    Finding {
        name,
        verdict: Verdict::Works,
        detail,
        remedy: None,
    }
}

/// The detail says what to do already.
fn needed(name: &'static str, detail: String) -> Finding {
    Finding {
        name,
        verdict: Verdict::Needed,
        detail,
        remedy: None,
    }
}

fn worst(dispensable: bool) -> Verdict {
    match dispensable {
        true => Verdict::Missing,
        false => Verdict::Needed,
    }
}

fn kvm_device() -> Finding {
    let path = Path::new("/dev/kvm");
    let missing = |detail: String, remedy| Finding {
        name: "kvm device",
        verdict: Verdict::Missing,
        detail,
        remedy: Some(remedy),
    };
    match File::options().read(true).write(true).open(path) {
        Ok(_) => works("kvm device", "/dev/kvm opens".to_owned()),
        Err(err) if err.kind() == io::ErrorKind::NotFound => missing(
            "/dev/kvm is not there".to_owned(),
            "modprobe kvm-intel or kvm-amd; virtualization may be off in the firmware",
        ),
        Err(err) if err.kind() == io::ErrorKind::PermissionDenied => missing(
            "/dev/kvm may not be opened by this user".to_owned(),
            "adduser USER kvm, then log in again",
        ),
        Err(err) => missing(
            format!("/dev/kvm does not open: {err}"),
            "modprobe kvm-intel or kvm-amd",
        ),
    }
}

/// First line of what the emulator says of itself.
fn version(program: &PathBuf) -> io::Result<String> {
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().next().filter(|_| output.status.success()) {
        Some(line) => Ok(line.to_owned()),
        None => Err(io::Error::other(format!("{}", output.status))),
    }
}

fn privileges() -> Finding {
    match rustix::process::geteuid().is_root() {
        true => works("privileges", "root".to_owned()),
        false => Finding {
            name: "privileges",
            verdict: Verdict::Needed,
            detail: "a sandbox is set up by root".to_owned(),
            remedy: Some("sudo caisson …"),
        },
    }
}

fn namespace(kind: &'static str) -> Finding {
    let name = match kind {
        "mnt" => "mount namespaces",
        "net" => "net namespaces",
        "pid" => "pid namespaces",
        _ => "user namespaces",
    };
    let there = Path::new("/proc/self/ns").join(kind).exists();
    let limit = match kind {
        "user" => std::fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap_or_default(),
        _ => String::new(),
    };
    if there && limit.trim() != "0" {
        return works(name, "there".to_owned());
    }
    Finding {
        name,
        verdict: match kind {
            "user" => Verdict::Missing,
            _ => Verdict::Needed,
        },
        detail: match there {
            true => "switched off".to_owned(),
            false => "not in this kernel".to_owned(),
        },
        remedy: match there {
            true => Some("sysctl user.max_user_namespaces=10000"),
            false => Some("a kernel with namespaces, as every distribution's is"),
        },
    }
}

fn cgroups() -> Finding {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // The file system's type follows " - " (proc(5), mountinfo).
    let kinds: Vec<&str> = table
        .lines()
        .filter_map(|line| line.split_once(" - ")?.1.split(' ').next())
        .collect();
    let mode = match (kinds.contains(&"cgroup"), kinds.contains(&"cgroup2")) {
        (false, true) => "v2",
        (true, false) => "v1",
        (true, true) => "v1 and v2 (hybrid)",
        (false, false) => {
            return Finding {
                name: "cgroups",
                verdict: Verdict::Missing,
                detail: "not mounted; limits hold inside the guest only".to_owned(),
                remedy: Some("mount -t cgroup2 none /sys/fs/cgroup"),
            };
        }
    };
    works("cgroups", mode.to_owned())
}

fn tun() -> Finding {
    match File::options().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => works("tun device", "/dev/net/tun opens".to_owned()),
        Err(err) => Finding {
            name: "tun device",
            verdict: Verdict::Missing,
            detail: format!("containers have no network: /dev/net/tun: {err}"),
            remedy: Some("modprobe tun"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_comes_with_how_to_get_it() {
        let config = Config {
            kernel: "/nonexistent/vmlinux".into(),
            qemu: Some("/nonexistent/qemu".into()),
            ..Config::default()
        };
        let findings = findings(&config);
        let text = text(&findings, false, None);
        for part in ["NEEDED  guest kernel", "cargo xtask guest", "/nonexistent/qemu"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
