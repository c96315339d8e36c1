//! The backend that this build was made for.
