//! The whole life of containers, with every process real but the machine: supervisor, stand-ins and clients are
//! this binary, started again, and so is a vmm process that only pretends.
//!
//! Needs root, as a supervisor does.
#![expect(
    unsafe_code,
    reason = "a process takes over the descriptor it was started with"
)]
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the test harness and the test client talk to people"
)]

mod bench;
mod cases;
mod fake_vmm;

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let rest = arguments.get(2..).unwrap_or_default();
    match arguments.get(1).and_then(|name| name.to_str()) {
        Some("supervise") => logged(|| caisson_sandbox::supervisor::main(rest)),
        Some("stand-in") => caisson_sandbox::stand_in::main(rest),
        Some("vmm") => fake_vmm::main(),
        Some("client") => bench::client(rest),
        filter => bench::run_all(filter.filter(|name| !name.starts_with('-')), cases::ALL),
    }
}

/// The supervisor's log goes to the file that is its standard error.
fn logged(run: impl FnOnce() -> ExitCode) -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(tracing::Level::DEBUG)
        .init();
    run()
}
