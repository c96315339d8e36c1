//! The supervisor.
use std::ffi::OsString;
use std::process::ExitCode;
/// Runs the supervisor of one sandbox. `arguments` are those after `caisson supervise`.
pub fn main(_arguments: &[OsString]) -> ExitCode {
    ExitCode::FAILURE
}
