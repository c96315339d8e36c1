//! The sandbox: plan, actor, container states, persistence, confinement.
//!
//! A sandbox is one virtual machine with the containers in it. Its supervisor process owns it: one task reads
//! one queue of events and is the only writer of state. The vmm process and the agent are told what to do by
//! messages and believed nothing; see `runtime/wire`.

pub mod plan;
