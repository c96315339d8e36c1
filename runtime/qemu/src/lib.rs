//! The machine that a QEMU child runs.
