//! What this build can run guests on.

#[cfg_attr(feature = "kvm", path = "backend/native.rs")]
#[cfg_attr(not(feature = "kvm"), path = "backend/none.rs")]
mod built_in;

use std::ffi::OsString;
use std::process::ExitCode;

pub(crate) use built_in::probe;
use caisson_machine::{BuildError, Machine, Setup};

/// The emulator's name, in messages.
pub(crate) const EMULATOR: &str = "qemu";

/// Every backend of this build.
pub(crate) fn names() -> Vec<&'static str> {
    built_in::NAME.into_iter().chain([EMULATOR]).collect()
}

/// Runs the vmm process.
pub(crate) fn serve(arguments: &[OsString]) -> ExitCode {
    caisson_machine::process::main(arguments, build)
}

fn build(setup: Setup) -> Result<Box<dyn Machine>, BuildError> {
    match setup.launch.emulator {
        Some(_) => caisson_qemu::build(setup),
        None => built_in::build(setup),
    }
}
