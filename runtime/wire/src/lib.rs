//! Messages and framing: control plane to vmm process, control plane to agent.
//!
//! Frames are length-prefixed JSON with a size cap on both sides; descriptors travel beside a frame on
//! unix sockets. Whoever receives treats the sender as hostile: caps, deadlines and id checks are the
//! receiver's business, and the types here make every answer one of a known few.
//!
//! Transport and meaning only: who reacts how is in `runtime/sandbox`, `runtime/machine` and `runtime/agent`.
#![forbid(unsafe_code)]

pub mod agent;
mod channel;
mod frame;
pub mod vmm;

pub use channel::{Receiver, RecvError, SendError, Sender, channel};
pub use frame::{DecodeError, Decoder, EncodeError, HEADER_LEN, encode};

/// Version of every message here. Both ends come from one build; a mismatch is an error, not a negotiation.
pub const VERSION: u32 = 1;
