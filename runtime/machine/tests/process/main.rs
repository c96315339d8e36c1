//! The vmm process, real but for its machine: this binary, started again as its supervisor would.
//!
//! Needs root, as a supervisor does.
#![expect(unsafe_code, reason = "a child gets its descriptor in its place")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::print_stdout, reason = "the test harness talks to people")]

mod cases;
mod machine;
mod supervisor;

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let rest = arguments.get(2..).unwrap_or_default();
    match arguments.get(1).and_then(|name| name.to_str()) {
        Some("vmm") => {
            tracing_subscriber::fmt().with_writer(std::io::stderr).init();
            caisson_machine::process::main(rest, machine::build)
        }
        filter => run_all(filter.filter(|name| !name.starts_with('-'))),
    }
}

fn run_all(filter: Option<&str>) -> ExitCode {
    supervisor::private_mounts();
    let (mut passed, mut failed) = (0, 0);
    for (name, case) in cases::ALL {
        if filter.is_some_and(|filter| !name.contains(filter)) {
            continue;
        }
        let outcome = std::panic::catch_unwind(case);
        println!(
            "test {name} ... {}",
            if outcome.is_ok() { "ok" } else { "FAILED" }
        );
        match outcome {
            Ok(()) => passed += 1,
            Err(_) => failed += 1,
        }
    }
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {word}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out; finished in 0s"
    );
    ExitCode::from(u8::from(failed > 0))
}
