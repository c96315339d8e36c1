//! `cargo xtask`: what CI runs, runnable by hand.
//!
//! Each part of the test is a subcommand argument of its own; `.ci/run` calls `cargo xtask test` and nothing else.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "a command for people")]

mod bench;
mod build;
mod bundle;
mod cache;
mod child;
mod demo;
mod emulate;
mod guest;
mod lint;
mod matrix;
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
    /// Installs what the tests need: formatter, linter, static target, busybox, QEMU, kernel build tools.
    Setup,
    /// Checks the tree: formatting, clippy, dependency direction, names, sizes.
    Lint,
    /// Prepares what a guest boots and prints where it lies.
    Guest {
        /// Which kernel.
        #[arg(long, value_enum, default_value = "distro")]
        kernel: guest::Choice,
        /// For which architecture.
        #[arg(long, value_enum, default_value = "x86_64")]
        arch: guest::Arch,
    },
    /// Builds everything, makes a small bundle and runs it in a VM, with the time of each stage.
    Demo {
        /// Which kernel the guest has.
        #[arg(long, value_enum, default_value = "distro")]
        kernel: guest::Choice,
    },
    /// Measures start and memory beside runc and plain QEMU.
    Bench {
        /// How often each start is measured.
        #[arg(long, default_value_t = 5)]
        runs: usize,
        /// Which kernel the guest has.
        #[arg(long, value_enum, default_value = "distro")]
        kernel: guest::Choice,
        /// Also measures inside the emulated host, over KVM.
        #[arg(long)]
        emulated: bool,
        /// Measures what lies in the emulated host; for use in there.
        #[arg(long, hide = true)]
        here: bool,
    },
    /// Prints the support table of ci/matrix.toml.
    Matrix {
        /// Writes it into README.md instead.
        #[arg(long)]
        write: bool,
    },
    /// Runs a program on an emulated host that has a real /dev/kvm.
    Emulate(emulate::Emulation),
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
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(err) => {
            println!("xtask: {err:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    let root = root();
    match command {
        Command::Setup => setup::all()?,
        Command::Lint => lint::run(&root)?,
        Command::Guest { kernel, arch } => {
            for assets in guest::prepare(&root, kernel, arch)? {
                println!("{}", assets.kernel().display());
                println!("{}", assets.initramfs().display());
            }
        }
        Command::Demo { kernel } => demo::run(&root, kernel)?,
        Command::Bench { runs, here: true, .. } => bench::here(&bench::Subject::in_host(), runs)?,
        Command::Bench {
            runs,
            kernel,
            emulated,
            ..
        } => bench::run(&root, runs, kernel, emulated)?,
        Command::Matrix { write } => matrix::run(&root, write)?,
        Command::Emulate(emulation) => return emulate::command(&emulation),
        Command::Test { list: true, .. } => test::list(),
        Command::Test { parts, .. } => test::run(&root, &parts)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The workspace's top directory.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map_or_else(PathBuf::new, Path::to_owned)
}
