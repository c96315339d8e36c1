//! A backend that replays a script instead of running a guest.
#![forbid(unsafe_code)]
