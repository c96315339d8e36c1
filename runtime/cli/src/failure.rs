//! Errors at their end: one line, once, and the exit code that users of an OCI runtime expect.

use std::io::Write as _;
use std::process::ExitCode;

use caisson_sandbox::client::GuestFailure;
use caisson_wire::agent::Stage;

use crate::log::Style;

/// What a shell leaves with if there is no such program (POSIX, XCU 2.8.2).
const NOT_FOUND: u8 = 127;
/// What a shell leaves with if a program cannot be executed.
const NOT_EXECUTABLE: u8 = 126;
/// What runc's `exec` leaves with if the process was not run.
pub(crate) const EXEC_FAILED: u8 = 255;

/// A command that failed, and what to leave with.
#[derive(Debug)]
pub(crate) struct Failure {
    error: anyhow::Error,
    code: u8,
}

/// Shorthand for this crate.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self {
            error: error.into(),
            code: 1,
        }
    }
}

impl Failure {
    /// The same with another exit code, unless one was chosen already.
    pub(crate) fn or_code(mut self, code: u8) -> Self {
        if self.code == 1 {
            self.code = code;
        }
        self
    }

    /// What the guest may have refused: the code tells a program that is not there from one that cannot run.
    pub(crate) fn of_guest<E>(error: E) -> Self
    where
        E: GuestFailure + std::error::Error + Send + Sync + 'static,
    {
        let refused = error.guest().filter(|failure| failure.stage == Stage::Program);
        let code = match refused.map(|failure| failure.errno) {
            Some(Some(errno)) if errno == rustix::io::Errno::NOENT.raw_os_error() => NOT_FOUND,
            Some(_) => NOT_EXECUTABLE,
            None => 1,
        };
        // Engines read the agent's own words, which are those of Go's os/exec.
        let error = error.into();
        Self { error, code }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&chain(self.error.as_ref()))
    }
}

/// An error with its causes, joined by colons; a cause that its effect quotes already is not repeated.
pub(crate) fn chain(err: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(err.source(), |err| err.source());
    causes.fold(err.to_string(), |text, cause| {
        let cause = cause.to_string();
        match text.contains(&cause) {
            true => text,
            false => format!("{text}: {}", cause.trim_end()),
        }
    })
}

/// Says what failed, to people and to whoever reads the log.
pub(crate) fn report(failure: &Failure, style: Style) -> ExitCode {
    if style != Style::Plain {
        tracing::error!("{failure}");
    }
    if style != Style::Stderr {
        // Nobody is left to be told if this fails.
        let _ = writeln!(std::io::stderr(), "caisson: {failure}");
    }
    ExitCode::from(failure.code)
}

/// Answers a command line that is no command, or asks for help.
pub(crate) fn usage(err: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind;
    match err.kind() {
        ErrorKind::DisplayHelp
        | ErrorKind::DisplayVersion
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = err.print();
            ExitCode::SUCCESS
        }
        _ => {
            let text = err.to_string();
            let text = text.strip_prefix("error: ").unwrap_or(&text);
            let _ = write!(std::io::stderr(), "caisson: {text}");
            // runc's code; clap's own would be 2.
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open {0}")]
    struct Outer(&'static str, #[source] std::io::Error);

    #[test]
    fn a_chain_is_one_line_and_says_nothing_twice() {
        let inner = || std::io::Error::other("it is full");
        assert_eq!(chain(&Outer("x", inner())), "cannot open x: it is full");
        assert_eq!(
            chain(&Outer("x: it is full", inner())),
            "cannot open x: it is full"
        );
    }
}
