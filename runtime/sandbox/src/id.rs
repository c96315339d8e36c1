//! Names of containers.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Most bytes an id may have: it is a directory's name, and `NAME_MAX` (limits.h) is 255.
const MOST_BYTES: usize = 255;
/// Most bytes runc accepts; beyond it the message says so in runc's terms.
const MOST_BYTES_RUNC: usize = 1024;

/// The id of a container: one path component of letters, digits and `_ + . -`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerId(String);

/// Text that is no container id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// No text at all.
    #[error("a container id may not be empty")]
    Empty,
    /// More than a directory's name can hold.
    #[error("a container id of {len} bytes is too long; the limit is {MOST_BYTES}")]
    TooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// A character that is not allowed.
    #[error("container id {id:?} contains {character:?}; only letters, digits and _ + . - are allowed")]
    Character {
        /// The id, shortened if it is long.
        id: String,
        /// The first character that is not allowed.
        character: char,
    },
    /// `.` or `..`.
    #[error("container id {0:?} would name a directory that already has a meaning")]
    Reserved(String),
}

impl ContainerId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ContainerId {
    type Error = IdError;

    fn try_from(id: String) -> Result<Self, IdError> {
        if id.is_empty() {
            return Err(IdError::Empty);
        }
        if id.len() > MOST_BYTES_RUNC {
            return Err(IdError::TooLong { len: id.len() });
        }
        if let Some(character) = id.chars().find(|c| !is_allowed(*c)) {
            return Err(IdError::Character {
                id: id.chars().take(64).collect(),
                character,
            });
        }
        if id.len() > MOST_BYTES {
            return Err(IdError::TooLong { len: id.len() });
        }
        if id == "." || id == ".." {
            return Err(IdError::Reserved(id));
        }
        Ok(Self(id))
    }
}

impl TryFrom<&str> for ContainerId {
    type Error = IdError;

    fn try_from(id: &str) -> Result<Self, IdError> {
        Self::try_from(id.to_owned())
    }
}

impl std::str::FromStr for ContainerId {
    type Err = IdError;

    fn from_str(id: &str) -> Result<Self, IdError> {
        Self::try_from(id)
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> Self {
        id.0
    }
}

impl AsRef<str> for ContainerId {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_allowed(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '.' | '-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_runc_takes_and_a_directory_can_have_are_taken() {
        for id in ["a", "web-1", "a+b_c.d-e", "...", &"x".repeat(255)] {
            assert!(ContainerId::try_from(id).is_ok(), "{id}");
        }
    }

    #[test]
    fn every_other_text_says_what_is_wrong_with_it() {
        let character = |id: &str, character| IdError::Character {
            id: id.to_owned(),
            character,
        };
        for (id, want) in [
            ("", IdError::Empty),
            (".", IdError::Reserved(".".to_owned())),
            ("..", IdError::Reserved("..".to_owned())),
            ("../x", character("../x", '/')),
            ("a b", character("a b", ' ')),
            ("a\0", character("a\0", '\0')),
            ("ü", character("ü", 'ü')),
            (&"x".repeat(256), IdError::TooLong { len: 256 }),
            (&"/".repeat(4096), IdError::TooLong { len: 4096 }),
        ] {
            assert_eq!(ContainerId::try_from(id), Err(want));
        }
    }
}
