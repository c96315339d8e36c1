//! The Machine contract kept by a QEMU child, for emulation and foreign guests.
