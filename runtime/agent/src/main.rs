//! PID 1 of the guest.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args_os()
        .nth(1)
        .is_some_and(|word| word == caisson_agent::container::CHILD_WORD)
    {
        return caisson_agent::container::child_main();
    }
    caisson_agent::init::main()
}
