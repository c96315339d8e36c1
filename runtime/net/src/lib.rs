//! Host side of a sandbox network.
