//! `caisson run`: a bundle, or a root file system and a command.
#![expect(
    clippy::indexing_slicing,
    reason = "members of JSON objects that are made here; writing to a missing one adds it"
)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use caisson_sandbox::ContainerId;
use caisson_sandbox::bundle::Bundle;
use caisson_sandbox::client::{CreateOrder, Force, Runtime};
use serde_json::{Value, json};

use super::order::{Shared, Stay, announcement};
use super::spec;
use crate::arguments::Global;
use crate::failure::{Failure, Result};
use crate::run_bundle::RunBundle;
use crate::{units, users};

/// What a root file system needs to look up programs.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// CPU bandwidth period in microseconds, the kernel's default (sched-bwc.rst).
const PERIOD: i64 = 100_000;

/// Options of `run`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Name of the new container; with --rootfs one is made up if it is left away
    #[arg(required_unless_present = "rootfs")]
    id: Option<String>,
    #[command(flatten)]
    shared: Shared,
    /// Leave when the process has started
    #[arg(short, long)]
    detach: bool,
    /// Keep the container after its process has ended
    #[arg(long)]
    keep: bool,
    /// Accepted for compatibility
    #[arg(long, hide = true)]
    no_subreaper: bool,
    #[command(flatten)]
    quick: Quick,
}

/// A container without a config.json.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Without a config.json")]
struct Quick {
    /// Run the command in this root file system
    #[arg(long, value_name = "DIR", conflicts_with = "bundle")]
    rootfs: Option<PathBuf>,
    /// Pass standard input on
    #[arg(short, long, requires = "rootfs")]
    interactive: bool,
    /// Give the process a terminal
    #[arg(short, long, requires = "rootfs")]
    tty: bool,
    /// Memory limit: 512M, 2G
    #[arg(long, value_name = "SIZE", requires = "rootfs", value_parser = units::bytes)]
    memory: Option<i64>,
    /// Processors: 2, 0.5
    #[arg(long, value_name = "N", requires = "rootfs", value_parser = units::cpus)]
    cpus: Option<i64>,
    /// Environment variable; NAME alone takes the caller's value
    #[arg(short, long, value_name = "NAME[=VALUE]", requires = "rootfs")]
    env: Vec<String>,
    /// User and group, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]", requires = "rootfs")]
    user: Option<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR", requires = "rootfs")]
    workdir: Option<PathBuf>,
    /// Share a file or directory of the host
    #[arg(long, value_name = "HOST:CONTAINER[:ro]", requires = "rootfs")]
    volume: Vec<String>,
    /// Keep the container from writing to its root file system
    #[arg(long, requires = "rootfs")]
    read_only: bool,
    /// Host name [default: the container's id]
    #[arg(long, value_name = "NAME", requires = "rootfs")]
    hostname: Option<String>,
    /// Program and its arguments
    #[arg(last = true, value_name = "COMMAND", requires = "rootfs")]
    command: Vec<String>,
}

impl Options {
    pub(crate) fn run(self, global: &Global, runtime: &Runtime) -> Result<ExitCode> {
        let id = match &self.id {
            Some(id) => super::id(id)?,
            None => super::id(&made_up_id())?,
        };
        let stay = match self.detach {
            true => Stay::Detached,
            false => Stay::Attached,
        };
        let (bundle, made) = match &self.quick.rootfs {
            None => (Bundle::read(self.shared.bundle())?, None),
            Some(rootfs) => {
                let spec = self.quick.spec(rootfs, &id)?;
                // The id is known to be free before anything of its name is made; `create` checks it again.
                if runtime.state(&id).is_ok() {
                    bail_exists(&id)?;
                }
                let made = RunBundle::create(runtime.root(), &id, &spec)?;
                (Bundle::read(made.path())?, Some(made))
            }
        };
        let order = self.shared.order(global, runtime, &id, &bundle, stay)?;
        if let Some(line) = announcement(&order) {
            tracing::warn!("{line}");
        }
        if self.quick.rootfs.is_some() && !self.quick.interactive && !self.quick.tty {
            no_input()?;
        }
        match stay {
            Stay::Detached => {
                self.detached(runtime, &id, order)?;
                if self.id.is_none() {
                    super::print(&format!("{id}\n"))?;
                }
                if let Some(made) = made {
                    made.keep();
                }
                Ok(ExitCode::SUCCESS)
            }
            Stay::Attached => {
                let code = self.attached(runtime, &id, order)?;
                if let Some(made) = made.filter(|_| self.keep) {
                    made.keep();
                }
                Ok(code)
            }
        }
    }

    fn detached(&self, runtime: &Runtime, id: &ContainerId, order: CreateOrder) -> Result<()> {
        let created = runtime.create(order).map_err(Failure::of_guest)?;
        let rest = || -> Result<()> {
            if let Some(path) = &self.shared.pid_file {
                super::write_pid(path, created.pid)?;
            }
            runtime.start(id).map_err(Failure::of_guest)
        };
        rest().inspect_err(|_| forget(runtime, id))
    }

    fn attached(&self, runtime: &Runtime, id: &ContainerId, order: CreateOrder) -> Result<ExitCode> {
        let process = runtime.run(order).map_err(Failure::of_guest)?;
        if let Some(path) = &self.shared.pid_file
            && let Err(err) = super::write_pid(path, process.pid())
        {
            forget(runtime, id);
            return Err(err.into());
        }
        let status = process
            .wait()
            .with_context(|| format!("cannot wait for container {id}"));
        // Why it ended is lost with it.
        let failure = runtime.state(id).ok().and_then(|state| state.failure);
        if !self.keep {
            // It may be restarting or gone already; what is left of it, goes.
            runtime.delete(id, Force::Yes)?;
        }
        if let Some(failure) = failure {
            tracing::warn!("container {id} was ended: {failure}");
        }
        Ok(ExitCode::from(status?.shell_code()))
    }
}

impl Quick {
    fn spec(&self, rootfs: &Path, id: &ContainerId) -> Result<oci_spec::runtime::Spec> {
        if self.command.is_empty() {
            return Err(anyhow::anyhow!(
                "no command to run; add it after \"--\", as in: caisson run --rootfs {} -- /bin/sh",
                rootfs.display()
            )
            .into());
        }
        let root = rootfs
            .canonicalize()
            .with_context(|| format!("cannot use root file system {}", rootfs.display()))?;
        let user = match &self.user {
            Some(text) => users::in_root(text, &root)?,
            None => users::Ids::default(),
        };
        let mut env = vec![PATH.to_owned()];
        if self.tty {
            env.push(format!(
                "TERM={}",
                std::env::var("TERM").unwrap_or_else(|_| "xterm".to_owned())
            ));
        }
        env.extend(self.env.iter().filter_map(|given| match given.contains('=') {
            true => Some(given.clone()),
            false => std::env::var(given).ok().map(|value| format!("{given}={value}")),
        }));
        let mut spec = spec::starter();
        spec["process"]["terminal"] = self.tty.into();
        spec["process"]["args"] = json!(self.command);
        spec["process"]["env"] = json!(env);
        spec["process"]["user"] = json!({"uid": user.uid, "gid": user.gid.unwrap_or(0)});
        spec["process"]["cwd"] = json!(self.workdir.clone().unwrap_or_else(|| "/".into()));
        spec["process"]["capabilities"] = spec::usual_capabilities();
        // Limits of the guest itself are enough.
        spec["process"]["rlimits"] = json!([]);
        spec["root"] = json!({"path": root, "readonly": self.read_only});
        spec["hostname"] = json!(
            self.hostname
                .clone()
                .unwrap_or_else(|| id.as_str().chars().take(63).collect())
        );
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            for volume in &self.volume {
                mounts.push(bind(volume)?);
            }
        }
        if let Some(limit) = self.memory {
            spec["linux"]["resources"]["memory"] = json!({"limit": limit});
        }
        if let Some(thousandths) = self.cpus {
            let quota = thousandths * (PERIOD / 1000);
            spec["linux"]["resources"]["cpu"] = json!({"quota": quota, "period": PERIOD});
        }
        Ok(serde_json::from_value(spec).context("cannot make a configuration")?)
    }
}

/// A bind mount given as `HOST:CONTAINER[:ro]`.
fn bind(volume: &str) -> anyhow::Result<Value> {
    let mut parts = volume.split(':');
    let (source, target, mode) = (parts.next(), parts.next(), parts.next());
    let access = match (mode, parts.next()) {
        (None | Some("rw"), None) => "rw",
        (Some("ro"), None) => "ro",
        _ => bail!("cannot use volume {volume:?}; write HOST:CONTAINER or HOST:CONTAINER:ro"),
    };
    let (Some(source), Some(target)) = (source.filter(|text| !text.is_empty()), target) else {
        bail!("cannot use volume {volume:?}; write HOST:CONTAINER or HOST:CONTAINER:ro");
    };
    let source = PathBuf::from(source)
        .canonicalize()
        .with_context(|| format!("cannot share {source}"))?;
    Ok(json!({
        "destination": target, "type": "bind", "source": source, "options": ["rbind", access],
    }))
}

/// Removes a container that did not come to run; the first error is the one to tell.
fn forget(runtime: &Runtime, id: &ContainerId) {
    if let Err(err) = runtime.delete(id, Force::Yes) {
        tracing::warn!("{}", crate::failure::chain(&err));
    }
}

fn bail_exists(id: &ContainerId) -> anyhow::Result<()> {
    bail!("container {id} exists already; delete it first, or choose another id")
}

/// Makes standard input empty: nobody asked to pass it on.
fn no_input() -> anyhow::Result<()> {
    let null = std::fs::File::open("/dev/null").context("cannot open /dev/null")?;
    rustix::stdio::dup2_stdin(&null).context("cannot replace standard input")
}

/// Unique on this host while it is up.
fn made_up_id() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("run-{}-{:x}", std::process::id(), now.as_micros())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_bind_mounts() {
        assert_eq!(
            bind("/:/host:ro").unwrap(),
            json!({"destination": "/host", "type": "bind", "source": "/", "options": ["rbind", "ro"]})
        );
        for wrong in ["", "/", ":/x", "/nonexistent-here:/x", "/:/x:rx", "/:/x:ro:z"] {
            assert!(bind(wrong).is_err(), "{wrong}");
        }
    }
}
