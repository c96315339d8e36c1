//! What the command line looks like as a whole; each command's own options are beside the command.

use std::path::PathBuf;

use clap::{ArgAction, Parser, Subcommand, ValueEnum};

use crate::commands::{
    check, create, delete, events, exec, features, kill, lifecycle, list, ps, run, spec, state, update,
};

/// Version of the OCI runtime specification that is implemented.
pub(crate) const SPEC_VERSION: &str = "1.2.1";

/// Runs each container in its own lightweight virtual machine, with the command line of an OCI runtime.
#[derive(Debug, Parser)]
#[command(
    name = "caisson",
    version = version(),
    disable_version_flag = true,
    subcommand_required = true,
    arg_required_else_help = true,
    infer_long_args = false,
    after_help = "Environment: CAISSON_CONFIG is --config; CAISSON_KERNEL and CAISSON_INITRAMFS override the paths of \
                  the guest's kernel and initramfs; CAISSON_LOG is the level of the sandbox's own logs (error, \
                  warn, info, debug)."
)]
pub(crate) struct CommandLine {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, clap::Args)]
pub(crate) struct Global {
    /// Directory of the containers' state [default: /run/caisson, or $XDG_RUNTIME_DIR/caisson without root]
    #[arg(long, value_name = "DIR")]
    pub(crate) root: Option<PathBuf>,
    /// File for messages [default: standard error]
    #[arg(long, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,
    /// Format of messages
    #[arg(long, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT")]
    pub(crate) log_format: LogFormat,
    /// Say more in messages
    #[arg(long)]
    pub(crate) debug: bool,
    /// Read cgroupsPath as "slice:prefix:name"; the cgroup is made without asking systemd
    #[arg(long)]
    pub(crate) systemd_cgroup: bool,
    /// Configuration file [default: /etc/caisson/config.toml]
    #[arg(long, value_name = "FILE", env = "CAISSON_CONFIG", hide_env = true)]
    pub(crate) config: Option<PathBuf>,
    /// Accepted for compatibility; whether this is rootless is found out
    #[arg(long, value_name = "BOOL", hide = true)]
    pub(crate) rootless: Option<String>,
    /// Accepted for compatibility; CRIU is not used
    #[arg(long, value_name = "FILE", hide = true)]
    pub(crate) criu: Option<PathBuf>,
    /// Print version, specification and backends
    #[arg(short = 'v', long, action = ArgAction::Version)]
    version: Option<bool>,
}

/// How messages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line, as engines read it.
    Json,
}

/// How a table is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TableFormat {
    /// Columns for people.
    Table,
    /// JSON.
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a container, whose process then waits for "start"
    Create(create::Options),
    /// Start the process of a created container
    Start(lifecycle::Options),
    /// Print the state of a container as JSON
    State(state::Options),
    /// Send a signal to a container
    Kill(kill::Options),
    /// Delete a container and everything of it
    Delete(delete::Options),
    /// Create and start a container, wait for it and delete it
    Run(Box<run::Options>),
    /// Run one more process in a container
    Exec(Box<exec::Options>),
    /// List a container's processes, with their pids in the guest
    Ps(ps::Options),
    /// List containers
    List(list::Options),
    /// Freeze the processes of a container
    Pause(lifecycle::Options),
    /// Let the processes of a paused container go on
    Resume(lifecycle::Options),
    /// Change the limits of a container
    Update(Box<update::Options>),
    /// Print a container's events and statistics as JSON
    Events(events::Options),
    /// Write a config.json to start from
    Spec(spec::Options),
    /// Print what this runtime supports as JSON
    Features(features::Options),
    /// Say what works on this machine, what is missing, and how to get it
    Check(check::Options),
}

fn version() -> String {
    format!(
        "version {}\nspec: {SPEC_VERSION}\nbackends: {}",
        env!("CARGO_PKG_VERSION"),
        crate::backend::names().join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<CommandLine, clap::Error> {
        CommandLine::try_parse_from(words.split(' '))
    }

    #[test]
    fn what_engines_say_is_understood() {
        for words in [
            // containerd's go-runc
            "caisson --root /run/x --log /tmp/l --log-format json create --bundle /b --pid-file /p a",
            "caisson --root /r --log /l --log-format json --systemd-cgroup start a",
            "caisson exec --process /p.json --console-socket /c.sock --detach --pid-file /p a",
            "caisson kill --all a 9",
            "caisson delete --force a",
            "caisson ps --format json a",
            "caisson list --format=json",
            "caisson events --stats a",
            "caisson events --interval=1s a",
            "caisson update --resources - a",
            // conmon and podman
            "caisson --log-format=json --log=/l --systemd-cgroup --root=/r create --bundle /b --pid-file /p \
             --console-socket /s a",
            "caisson start a",
            "caisson kill a 15",
            "caisson delete a",
            "caisson state a",
            "caisson --rootless=true features",
            // people
            "caisson exec -t -u 1:2 -e A=b -e C=d --cwd /x a ls -la --color",
            "caisson exec a sh -c exit",
            "caisson run -d --keep -b /b a",
            "caisson run --no-pivot --no-new-keyring --preserve-fds 0 a",
            "caisson run --rootfs /r -i -t --memory 1G --cpus 1.5 --env A=b --user 0 -- sh -c true",
            "caisson run --rootfs /r name -- true",
            "caisson ps a -o pid,cmd",
            "caisson kill a SIGKILL",
            "caisson check --json",
            "caisson spec --rootless -b /b",
        ] {
            let words = words.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(parse(&words).is_ok(), "{words}: {}", parse(&words).unwrap_err());
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (words, want) in [
            ("caisson crate", "'create'"),
            ("caisson run --bundel /b a", "'--bundle'"),
            ("caisson state", "<ID>"),
            ("caisson state a b", "'b'"),
            ("caisson --log-format xml state a", "text, json"),
            ("caisson list --format yaml", "table, json"),
            ("caisson run", "<ID>"),
        ] {
            let err = parse(words).unwrap_err().to_string();
            assert!(err.contains(want), "{words}: {err}");
        }
    }

    #[test]
    fn the_arguments_agree_with_one_another() {
        use clap::CommandFactory as _;
        CommandLine::command().debug_assert();
    }
}
