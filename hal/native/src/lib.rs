//! Picks the backend of this build.
#![forbid(unsafe_code)]
