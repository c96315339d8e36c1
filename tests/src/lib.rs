//! Integration tests only; see `tests/tests`.
