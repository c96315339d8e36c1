//! `caisson start`, `pause` and `resume`.

use std::process::ExitCode;

use caisson_sandbox::client::Runtime;

use crate::failure::{Failure, Result};

/// Options of commands that only need a container.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Name of the container
    id: String,
}

impl Options {
    pub(crate) fn start(self, runtime: &Runtime) -> Result<ExitCode> {
        runtime.start(&super::id(&self.id)?).map_err(Failure::of_guest)?;
        Ok(ExitCode::SUCCESS)
    }

    pub(crate) fn pause(self, runtime: &Runtime) -> Result<ExitCode> {
        runtime.pause(&super::id(&self.id)?)?;
        Ok(ExitCode::SUCCESS)
    }

    pub(crate) fn resume(self, runtime: &Runtime) -> Result<ExitCode> {
        runtime.resume(&super::id(&self.id)?)?;
        Ok(ExitCode::SUCCESS)
    }
}
