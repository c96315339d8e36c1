//! Containers made by the agent, in fresh namespaces of this machine.
//!
//! This program is the agent on another transport: with a word as its first argument it is the guest's PID 1
//! (`serve`) or a process of a container; without, it runs the tests. They need root, a cgroup v2 hierarchy
//! and a static busybox; where `CAISSON_NEED` lists `root`, their absence is a failure.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test without the test harness: what is unexpected ends the case"
)]

mod cases;
mod guest;

use std::panic::AssertUnwindSafe;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let filter = match args.next().as_deref() {
        Some(caisson_agent::container::CHILD_WORD) => return caisson_agent::container::child_main(),
        Some("serve") => return guest::serve(args.collect()),
        Some("--list") => return ExitCode::SUCCESS,
        first => first.filter(|word| !word.starts_with("--")).map(str::to_owned),
    };
    if let Err(missing) = guest::requirements() {
        let needed =
            std::env::var("CAISSON_NEED").is_ok_and(|need| need.split(',').any(|word| word == "root"));
        say(&format!(
            "containers: {missing}; {}",
            if needed { "needed" } else { "not run" }
        ));
        return if needed {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        };
    }
    let mut failed = 0;
    for (name, case) in cases::ALL {
        if filter.as_deref().is_some_and(|word| !name.contains(word)) {
            continue;
        }
        let passed = std::panic::catch_unwind(AssertUnwindSafe(case)).is_ok();
        say(&format!(
            "test {name} ... {}",
            if passed { "ok" } else { "FAILED" }
        ));
        failed += usize::from(!passed);
    }
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn say(line: &str) {
    use std::io::Write;
    writeln!(std::io::stdout(), "{line}").expect("standard output is open");
}
