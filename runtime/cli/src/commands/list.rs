//! `caisson list`.

use std::process::ExitCode;

use caisson_sandbox::client::Runtime;

use super::state::StateJson;
use crate::arguments::TableFormat;
use crate::failure::Result;

/// Options of `list`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How to print
    #[arg(short, long, value_enum, default_value_t = TableFormat::Table, value_name = "FORMAT")]
    format: TableFormat,
    /// Print ids only
    #[arg(short, long)]
    quiet: bool,
}

impl Options {
    pub(crate) fn run(self, runtime: &Runtime) -> Result<ExitCode> {
        let states: Vec<StateJson> = runtime.list()?.into_iter().map(StateJson::from).collect();
        if self.quiet {
            return super::print(
                &states
                    .iter()
                    .map(|state| format!("{}\n", state.id))
                    .collect::<String>(),
            );
        }
        match self.format {
            // runc's word for an empty list.
            TableFormat::Json if states.is_empty() => super::print("null\n"),
            TableFormat::Json => super::print(&format!("{}\n", serde_json::to_string(&states)?)),
            TableFormat::Table => {
                let mut rows = vec![
                    ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
                        .map(str::to_owned)
                        .to_vec(),
                ];
                rows.extend(states.into_iter().map(|state| {
                    vec![
                        state.id,
                        state.pid.to_string(),
                        state.status,
                        state.bundle.display().to_string(),
                        state.created,
                        state.owner,
                    ]
                }));
                super::print(&super::table(&rows))
            }
        }
    }
}
