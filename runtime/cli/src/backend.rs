//! What this build can run guests on.

use std::ffi::OsString;
use std::process::ExitCode;

/// The emulator's name, in messages.
pub(crate) const EMULATOR: &str = "qemu";

/// Every backend of this build.
pub(crate) fn names() -> Vec<&'static str> {
    vec![EMULATOR]
}

/// Whether Linux guests run on the built-in hypervisor here; otherwise why not.
pub(crate) fn probe() -> Result<&'static str, String> {
    Err("this build has no hypervisor of its own".to_owned())
}

/// Runs the vmm process.
pub(crate) fn serve(_arguments: &[OsString]) -> ExitCode {
    tracing::error!("this build has no machine");
    ExitCode::FAILURE
}
