//! A Linux guest with our agent, booted by the confined vmm process through QEMU.
//!
//! Needs root, QEMU, and the files that `CAISSON_TEST_KERNEL` and `CAISSON_TEST_INITRAMFS` name; without those
//! variables only the cases that need no guest run, and the others count as ignored.
#![expect(unsafe_code, reason = "a child gets its descriptor in its place")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::print_stdout, reason = "the test harness talks to people")]

mod cases;
mod supervisor;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let rest = arguments.get(2..).unwrap_or_default();
    match arguments.get(1).and_then(|name| name.to_str()) {
        Some("vmm") => {
            tracing_subscriber::fmt()
                .with_writer(std::io::stderr)
                .with_max_level(tracing::Level::DEBUG)
                .init();
            caisson_machine::process::main(rest, caisson_qemu::build)
        }
        filter => run_all(filter.filter(|name| !name.starts_with('-'))),
    }
}

fn run_all(filter: Option<&str>) -> ExitCode {
    let guest = supervisor::Guest::from_environment();
    let (mut passed, mut failed, mut ignored) = (0, 0, 0);
    for (name, case) in cases::ALL {
        if filter.is_some_and(|filter| !name.contains(filter)) {
            continue;
        }
        let began = Instant::now();
        let outcome = match (case, &guest) {
            (cases::Case::Plain(case), _) => std::panic::catch_unwind(case),
            (cases::Case::Guest(case), Some(guest)) => std::panic::catch_unwind(|| case(guest)),
            (cases::Case::Guest(_), None) => {
                println!("test {name} ... ignored, no guest");
                ignored += 1;
                continue;
            }
        };
        let word = if outcome.is_ok() { "ok" } else { "FAILED" };
        println!("test {name} ... {word} ({} ms)", began.elapsed().as_millis());
        match outcome {
            Ok(()) => passed += 1,
            Err(_) => failed += 1,
        }
    }
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {word}. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; 0 filtered out; finished in 0s"
    );
    ExitCode::from(u8::from(failed > 0))
}
