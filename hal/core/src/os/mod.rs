//! The few operating-system objects that cross crate boundaries, by concept rather than by name.

#[cfg_attr(target_os = "linux", path = "linux.rs")]
#[cfg_attr(target_os = "macos", path = "macos.rs")]
mod sys;

pub use sys::Event;
