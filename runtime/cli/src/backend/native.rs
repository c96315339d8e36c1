//! The hypervisor that was chosen at compile time.

use caisson_hal::Hypervisor as _;
use caisson_hal_native::Native;
use caisson_machine::{BuildError, Machine, Setup};

use crate::failure::chain;

/// Its name.
pub(crate) const NAME: Option<&str> = Some(Native::NAME);

/// Whether Linux guests run on it here; otherwise why not.
pub(crate) fn probe() -> Result<&'static str, String> {
    Native::open()
        .and_then(|native| native.probe())
        .map(|()| Native::NAME)
        .map_err(|err| chain(&err))
}

pub(crate) fn build(setup: Setup) -> Result<Box<dyn Machine>, BuildError> {
    caisson_vmm::build::<Native>(setup)
}
