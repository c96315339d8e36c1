//! `caisson kill`.

use std::process::ExitCode;

use caisson_sandbox::Status;
use caisson_sandbox::client::{ControlError, Reach, Runtime};

use crate::failure::Result;
use crate::signals;

/// Options of `kill`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Name of the container
    id: String,
    /// Signal by name or number: SIGTERM, TERM, 15
    #[arg(default_value = "SIGTERM", allow_hyphen_values = true)]
    signal: String,
    /// Signal every process of the container
    #[arg(short, long)]
    all: bool,
}

impl Options {
    pub(crate) fn run(self, runtime: &Runtime) -> Result<ExitCode> {
        let id = super::id(&self.id)?;
        let signal = signals::parse(&self.signal)?;
        let reach = match self.all {
            true => Reach::All,
            false => Reach::Init,
        };
        match runtime.kill(&id, signal, reach) {
            // As runc does: where nobody is left, all have got it.
            Err(ControlError::Status {
                is: Status::Stopped, ..
            }) if self.all => Ok(ExitCode::SUCCESS),
            outcome => Ok(outcome.map(|()| ExitCode::SUCCESS)?),
        }
    }
}
