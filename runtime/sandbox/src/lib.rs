//! The sandbox: plan, actor, container states, persistence, confinement.
//!
//! A sandbox is one virtual machine with the containers in it. Its supervisor process owns it: one task reads
//! one queue of events and is the only writer of state. The vmm process and the agent are told what to do by
//! messages and believed nothing; see `runtime/wire`.
//!
//! Three entry points of the host binary live here: [`client`] is what every command calls, [`supervisor`]
//! runs one sandbox, and [`stand_in`] is the process that engines take for the container's.

pub mod bundle;
mod cgroup;
pub mod client;
pub mod config;
mod disk;
mod id;
pub mod plan;
pub mod planner;
mod process;
mod proto;
pub mod stand_in;
pub mod supervisor;
mod sys;

pub use cgroup::CgroupError;
pub use client::Runtime;
pub use disk::StateError;
pub use id::{ContainerId, IdError};
pub use process::ProcessId;
pub use proto::{MachineFailure, Measured, Refusal, Status};
