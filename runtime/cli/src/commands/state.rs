//! `caisson state`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use caisson_sandbox::bundle::Bundle;
use caisson_sandbox::client::{ContainerState, Runtime};
use serde::Serialize;

use crate::failure::Result;
use crate::users;

/// Options of `state`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Name of the container
    id: String,
}

impl Options {
    pub(crate) fn run(self, runtime: &Runtime) -> Result<ExitCode> {
        let state = StateJson::from(runtime.state(&super::id(&self.id)?)?);
        let mut text = serde_json::to_string_pretty(&state)?;
        text.push('\n');
        super::print(&text)
    }
}

/// A container's state as runc prints it: what runtime-spec, runtime.md, "State" has, and four members more.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct StateJson {
    oci_version: String,
    pub(crate) id: String,
    pub(crate) pid: i32,
    pub(crate) status: String,
    pub(crate) bundle: PathBuf,
    rootfs: PathBuf,
    pub(crate) created: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
    pub(crate) owner: String,
}

impl From<ContainerState> for StateJson {
    fn from(state: ContainerState) -> Self {
        // A bundle may be gone before its container is.
        let root = Bundle::read(&state.bundle)
            .ok()
            .and_then(|bundle| Some(bundle.spec.root().as_ref()?.path().clone()))
            .unwrap_or_else(|| "rootfs".into());
        Self {
            oci_version: state.oci_version,
            id: state.id.to_string(),
            pid: state.pid,
            status: state.status.to_string(),
            rootfs: state.bundle.join(root),
            bundle: state.bundle,
            created: state.created,
            annotations: state.annotations,
            owner: users::name_of(state.owner),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use caisson_sandbox::Status;

    pub(crate) fn state() -> ContainerState {
        ContainerState {
            id: "a".try_into().unwrap(),
            oci_version: "1.0.2".to_owned(),
            status: Status::Running,
            pid: 7,
            bundle: "/nonexistent/b".into(),
            created: "2026-01-02T03:04:05Z".to_owned(),
            owner: 0,
            annotations: BTreeMap::from([("k".to_owned(), "v".to_owned())]),
            sandbox: "a".try_into().unwrap(),
            exit: None,
            failure: None,
            machine: None,
        }
    }

    #[test]
    fn the_members_and_their_order_are_those_of_runc() {
        assert_eq!(
            serde_json::to_string(&StateJson::from(state())).unwrap(),
            r#"{"ociVersion":"1.0.2","id":"a","pid":7,"status":"running","bundle":"/nonexistent/b","rootfs":"/nonexistent/b/rootfs","created":"2026-01-02T03:04:05Z","annotations":{"k":"v"},"owner":"root"}"#
        );
    }
}
