//! Root filesystems, volumes and the sharing policy.
