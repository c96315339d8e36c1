//! The main job, as its users see it: every case drives the `caisson` binary and a real guest.
//!
//! The same cases run on this machine (over QEMU where there is no usable KVM) and inside the emulated host over its
//! real `/dev/kvm`. They need root, a static busybox and what [`world`] names.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod bad_input;
mod crashes;
mod files;
mod inside;
mod life;
mod streams;
mod world;
