//! The Caisson host binary.

fn main() {}
