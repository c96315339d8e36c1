//! `caisson create`.

use std::process::ExitCode;

use caisson_sandbox::bundle::Bundle;
use caisson_sandbox::client::{Force, Runtime};

use super::order::{Shared, Stay, announcement};
use crate::arguments::Global;
use crate::failure::{Failure, Result};

/// Options of `create`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Name of the new container
    id: String,
    #[command(flatten)]
    shared: Shared,
}

impl Options {
    pub(crate) fn run(self, global: &Global, runtime: &Runtime) -> Result<ExitCode> {
        let id = super::id(&self.id)?;
        let bundle = Bundle::read(self.shared.bundle())?;
        let order = self.shared.order(global, runtime, &id, &bundle, Stay::Detached)?;
        if let Some(line) = announcement(&order) {
            tracing::info!("{line}");
        }
        let created = runtime.create(order).map_err(Failure::of_guest)?;
        if let Some(path) = &self.shared.pid_file
            && let Err(err) = super::write_pid(path, created.pid)
        {
            // Whoever asked cannot know of it, so it may not stay.
            runtime.delete(&id, Force::Yes)?;
            return Err(err.into());
        }
        Ok(ExitCode::SUCCESS)
    }
}
