//! Integration tests live in the binaries beside this file.
