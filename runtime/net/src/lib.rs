//! The host side of networking.
