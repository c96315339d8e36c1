//! `caisson exec`.

use std::collections::HashSet;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use caisson_sandbox::ContainerId;
use caisson_sandbox::bundle::{Bundle, read_process};
use caisson_sandbox::client::{ExecOrder, Executed, Runtime};
use oci_spec::runtime::{Capability, LinuxCapabilities, Process};

use super::order::{Stay, refuse_descriptors, stdio};
use crate::failure::{EXEC_FAILED, Failure, Result};
use crate::users::{self, Ids};

/// Options of `exec`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Unix socket to which the terminal's master is sent
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Working directory in the container
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// Environment variable; may be repeated
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Give the process a terminal
    #[arg(short, long)]
    tty: bool,
    /// User, and group if given
    #[arg(short, long, value_name = "UID[:GID]", value_parser = users::numeric)]
    user: Option<Ids>,
    /// Further group; may be repeated
    #[arg(short = 'g', long, value_name = "GID")]
    additional_gids: Vec<u32>,
    /// File with the process as config.json has it
    #[arg(short, long, value_name = "FILE")]
    process: Option<PathBuf>,
    /// Leave when the process has started
    #[arg(short, long)]
    detach: bool,
    /// File for the pid of the host process that stands for the process
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Accepted for compatibility; the guest's kernel has no SELinux
    #[arg(long, value_name = "LABEL")]
    process_label: Option<String>,
    /// Accepted for compatibility; the guest's kernel has no AppArmor
    #[arg(long, value_name = "PROFILE")]
    apparmor: Option<String>,
    /// Keep the process from gaining privileges
    #[arg(long)]
    no_new_privs: bool,
    /// Capability to add; may be repeated
    #[arg(short, long, value_name = "CAP")]
    cap: Vec<String>,
    /// Only 0 is possible: descriptors of the host cannot enter a VM
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,
    /// Accepted for compatibility; a paused container runs no new process
    #[arg(long)]
    ignore_paused: bool,
    /// Only the container's own cgroup is possible: "/" or nothing
    #[arg(long, value_name = "PATH")]
    cgroup: Option<String>,
    /// Name of the container
    id: String,
    /// Program and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Options {
    pub(crate) fn run(self, runtime: &Runtime) -> Result<ExitCode> {
        // Whoever runs a command through us tells our failures from the command's by this code.
        self.carry_out(runtime).map_err(|err| err.or_code(EXEC_FAILED))
    }

    fn carry_out(self, runtime: &Runtime) -> Result<ExitCode> {
        refuse_descriptors(self.preserve_fds)?;
        if let Some(path) = self
            .cgroup
            .as_deref()
            .filter(|path| !matches!(*path, "" | "/" | ":/"))
        {
            return Err(anyhow::anyhow!(
                "cannot run the process in cgroup {path}: a process in a VM shares its container's cgroup; leave \
                 --cgroup away"
            )
            .into());
        }
        let id = super::id(&self.id)?;
        let process = self.process(runtime, &id)?;
        let stay = match self.detach {
            true => Stay::Detached,
            false => Stay::Attached,
        };
        let terminal = process.terminal().unwrap_or(false);
        let order = ExecOrder {
            exec: None,
            process,
            stdio: stdio(self.console_socket.as_deref(), terminal, stay)?,
            detach: self.detach,
        };
        match runtime.exec(&id, order).map_err(Failure::of_guest)? {
            Executed::Detached { pid } => {
                if let Some(path) = &self.pid_file {
                    super::write_pid(path, pid)?;
                }
                Ok(ExitCode::SUCCESS)
            }
            Executed::Attached(process) => {
                if let Some(path) = &self.pid_file {
                    super::write_pid(path, process.pid())?;
                }
                let status = process
                    .wait()
                    .with_context(|| format!("cannot wait for the process in container {id}"))?;
                Ok(ExitCode::from(status.shell_code()))
            }
        }
    }

    /// The process of the file given; otherwise the container's own with the changes that are asked for.
    fn process(&self, runtime: &Runtime, id: &ContainerId) -> anyhow::Result<Process> {
        if let Some(path) = &self.process {
            let process = read_process(path)?;
            if process.args().as_ref().is_none_or(Vec::is_empty) {
                bail!("{} has no args; name the program to run", path.display());
            }
            return Ok(process);
        }
        if self.command.is_empty() {
            bail!("no command to run in container {id}; add it after the id, or give --process");
        }
        let state = runtime.state(id)?;
        let bundle = Bundle::read(&state.bundle).context("cannot read the container's own process")?;
        let process = bundle
            .spec
            .process()
            .clone()
            .context("config.json has no process; give one with --process")?;
        self.changed(process)
    }

    fn changed(&self, mut process: Process) -> anyhow::Result<Process> {
        process.set_args(Some(self.command.clone()));
        process.set_terminal(Some(self.tty));
        if let Some(cwd) = &self.cwd {
            process.set_cwd(cwd.clone());
        }
        if !self.env.is_empty() {
            let mut env = process.env().clone().unwrap_or_default();
            for given in &self.env {
                let Some((name, _)) = given.split_once('=').filter(|(name, _)| !name.is_empty()) else {
                    bail!("cannot use environment variable {given:?}; write NAME=VALUE");
                };
                env.retain(|known| known.split('=').next() != Some(name));
                env.push(given.clone());
            }
            process.set_env(Some(env));
        }
        let mut user = process.user().clone();
        if let Some(ids) = self.user {
            user.set_uid(ids.uid);
            if let Some(gid) = ids.gid {
                user.set_gid(gid);
            }
        }
        if !self.additional_gids.is_empty() {
            let mut gids = user.additional_gids().clone().unwrap_or_default();
            gids.extend(&self.additional_gids);
            user.set_additional_gids(Some(gids));
        }
        process.set_user(user);
        if self.no_new_privs {
            process.set_no_new_privileges(Some(true));
        }
        if self.process_label.is_some() {
            process.set_selinux_label(self.process_label.clone());
        }
        if self.apparmor.is_some() {
            process.set_apparmor_profile(self.apparmor.clone());
        }
        let added = self
            .cap
            .iter()
            .map(|name| capability(name))
            .collect::<anyhow::Result<Vec<_>>>()?;
        if !added.is_empty() {
            let sets = process.capabilities().clone().unwrap_or_else(no_capabilities);
            process.set_capabilities(Some(with(sets, &added)));
        }
        Ok(process)
    }
}

/// A capability given as `CAP_KILL` or `kill`.
fn capability(name: &str) -> anyhow::Result<Capability> {
    let upper = name.to_uppercase();
    let full = match upper.starts_with("CAP_") {
        true => upper,
        false => format!("CAP_{upper}"),
    };
    serde_json::from_value(full.into())
        .map_err(|_| anyhow::anyhow!("unknown capability {name:?}; see capabilities(7)"))
}

/// The library's default is a choice of capabilities, not none.
fn no_capabilities() -> LinuxCapabilities {
    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(None);
    sets.set_effective(None);
    sets.set_permitted(None);
    sets.set_inheritable(None);
    sets.set_ambient(None);
    sets
}

/// Adds to every set, the ambient one only where that set is used at all: it grants what a program does not ask for.
fn with(mut sets: LinuxCapabilities, added: &[Capability]) -> LinuxCapabilities {
    let more = |set: &Option<HashSet<Capability>>| {
        let mut set = set.clone().unwrap_or_default();
        set.extend(added.iter().copied());
        Some(set)
    };
    sets.set_bounding(more(sets.bounding()));
    sets.set_effective(more(sets.effective()));
    sets.set_permitted(more(sets.permitted()));
    if sets.inheritable().is_some() {
        sets.set_inheritable(more(sets.inheritable()));
    }
    if sets.ambient().is_some() {
        sets.set_inheritable(more(sets.inheritable()));
        sets.set_ambient(more(sets.ambient()));
    }
    sets
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(words: &[&str]) -> Options {
        Line::try_parse_from(std::iter::once(&"exec").chain(words))
            .unwrap()
            .options
    }

    #[test]
    fn the_options_change_the_containers_own_process() {
        let process = options(&[
            "-e", "A=2", "-e", "B=3", "-u", "5:6", "-g", "7", "-t", "-c", "CAP_KILL", "--cwd", "/w", "a",
            "ls", "-l",
        ])
        .changed(
            serde_json::from_str(
                r#"{"cwd": "/", "args": ["x"], "env": ["A=1", "P=q"], "user": {"uid": 0, "gid": 0}}"#,
            )
            .unwrap(),
        )
        .unwrap();
        assert_eq!(process.args().as_deref().unwrap(), ["ls", "-l"]);
        assert_eq!(process.env().as_deref().unwrap(), ["P=q", "A=2", "B=3"]);
        assert_eq!(process.user().uid(), 5);
        assert_eq!(process.user().additional_gids().as_deref().unwrap(), [7]);
        assert_eq!(process.terminal(), Some(true));
        let sets = process.capabilities().as_ref().unwrap();
        assert!(sets.bounding().as_ref().unwrap().contains(&Capability::Kill));
        assert!(sets.ambient().is_none());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let process =
            || serde_json::from_str::<Process>(r#"{"cwd": "/", "user": {"uid": 0, "gid": 0}}"#).unwrap();
        assert!(options(&["-e", "A", "a", "ls"]).changed(process()).is_err());
        assert!(
            options(&["-c", "CAP_NONSENSE", "a", "ls"])
                .changed(process())
                .is_err()
        );
    }
}
