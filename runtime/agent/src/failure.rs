//! From an error to a [`Failure`] with its stage.

use std::fmt::Display;
use std::io;

use caisson_wire::agent::{Failure, Stage};

/// Adds the stage and the object to an error.
pub(crate) trait At<T> {
    /// The error as a failure of `stage`; `what` says verb and object, without the cause.
    fn at<D: Display>(self, stage: Stage, what: impl FnOnce() -> D) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at<D: Display>(self, stage: Stage, what: impl FnOnce() -> D) -> Result<T, Failure> {
        self.map_err(|error| {
            let error: io::Error = error.into();
            Failure {
                stage,
                message: format!("{}: {}", what(), plain(&error)),
                errno: error.raw_os_error(),
            }
        })
    }
}

/// A failure without a system error behind it.
pub(crate) fn failure(stage: Stage, message: impl Into<String>) -> Failure {
    Failure {
        stage,
        message: message.into(),
        errno: None,
    }
}

/// A failure that is reported as `errno` although no system call returned it.
pub(crate) fn failure_with(stage: Stage, errno: rustix::io::Errno, message: impl Into<String>) -> Failure {
    Failure {
        stage,
        message: message.into(),
        errno: Some(errno.raw_os_error()),
    }
}

/// The error's text without the "(os error N)" that std appends; the number travels beside it.
pub(crate) fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    match (error.raw_os_error(), text.rfind(" (os error ")) {
        (Some(_), Some(end)) => text.get(..end).unwrap_or(&text).to_owned(),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_error_keeps_its_number_beside_the_text() {
        let result: Result<(), rustix::io::Errno> = Err(rustix::io::Errno::NOENT);
        assert_eq!(
            result.at(Stage::Mounts, || "cannot mount proc").unwrap_err(),
            Failure {
                stage: Stage::Mounts,
                message: "cannot mount proc: No such file or directory".to_owned(),
                errno: Some(2),
            }
        );
    }
}
