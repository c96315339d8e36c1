//! A build without a hypervisor: every machine is emulated.

use caisson_machine::{BuildError, Machine, Setup};

/// None.
pub(crate) const NAME: Option<&str> = None;

/// There is none; says so.
pub(crate) fn probe() -> Result<&'static str, String> {
    Err("this build has no hypervisor backend".to_owned())
}

pub(crate) fn build(_setup: Setup) -> Result<Box<dyn Machine>, BuildError> {
    Err(BuildError::new(
        "build the machine",
        "this build has no hypervisor backend",
    ))
}
