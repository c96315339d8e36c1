//! The one host binary.
//!
//! The first argument picks the entry point: three words start the processes of a sandbox, everything else is
//! the command line. Here, and only here, is the environment read and text printed.
//!
//! **Invariant:** nothing in this crate runs a container's program on the host; commands ask the supervisor.

mod arguments;
mod assets;
mod backend;
mod commands;
mod failure;
mod log;
mod machine;
mod places;
mod run_bundle;
mod signals;
mod units;
mod users;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser as _;

use crate::arguments::CommandLine;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let rest = arguments.get(2..).unwrap_or_default();
    match arguments.get(1).and_then(|word| word.to_str()) {
        Some("supervise") => {
            log::to_stderr();
            caisson_sandbox::supervisor::main(rest)
        }
        Some("stand-in") => caisson_sandbox::stand_in::main(rest),
        Some("vmm") => {
            log::to_stderr();
            backend::serve(rest)
        }
        _ => command_line(&arguments),
    }
}

fn command_line(arguments: &[OsString]) -> ExitCode {
    let parsed = match CommandLine::try_parse_from(arguments) {
        Ok(parsed) => parsed,
        Err(err) => return failure::usage(&err),
    };
    let style = match log::start(&parsed.global) {
        Ok(style) => style,
        Err(err) => return failure::report(&err, log::Style::Plain),
    };
    match commands::carry_out(parsed) {
        Ok(code) => code,
        Err(err) => failure::report(&err, style),
    }
}
