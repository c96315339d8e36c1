//! What the operating system knows about memory and threads.

#[cfg_attr(target_os = "linux", path = "linux.rs")]
#[cfg_attr(target_os = "macos", path = "macos.rs")]
mod calls;

pub(crate) use calls::{Clock, keep_out_of_dumps, resident};
