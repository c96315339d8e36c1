//! `caisson delete`.

use std::process::ExitCode;

use caisson_sandbox::client::{Force, Runtime};

use crate::failure::Result;
use crate::run_bundle;

/// Options of `delete`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Name of the container
    id: String,
    /// Kill it first if it runs; a container that does not exist is no error
    #[arg(short, long)]
    force: bool,
}

impl Options {
    pub(crate) fn run(self, runtime: &Runtime) -> Result<ExitCode> {
        let id = super::id(&self.id)?;
        let force = match self.force {
            true => Force::Yes,
            false => Force::No,
        };
        runtime.delete(&id, force)?;
        run_bundle::remove(runtime.root(), &id)?;
        Ok(ExitCode::SUCCESS)
    }
}
