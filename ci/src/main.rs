//! `cargo xtask`: what CI runs, runnable by hand.
//!
//! Each part of the test is a subcommand argument of its own; `.ci/run` calls `cargo xtask test` and nothing else.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "a command for people")]

mod lint;
mod setup;
mod test;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Checks and tests Caisson.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Installs what the tests need: formatter, linter, the target of static binaries, busybox.
    Setup,
    /// Checks the tree: formatting, clippy, dependency direction, names, sizes.
    Lint,
    /// Runs every part of the test, or only those named.
    Test {
        /// Lists the parts and what each needs.
        #[arg(long)]
        list: bool,
        /// Parts to run.
        parts: Vec<String>,
    },
}

fn main() -> ExitCode {
    let root = root();
    let outcome = match Arguments::parse().command {
        Command::Setup => setup::all(),
        Command::Lint => lint::run(&root),
        Command::Test { list: true, .. } => {
            test::list();
            Ok(())
        }
        Command::Test { parts, .. } => test::run(&root, &parts),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            println!("xtask: {err:#}");
            ExitCode::FAILURE
        }
    }
}

/// The workspace's top directory.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map_or_else(PathBuf::new, Path::to_owned)
}
