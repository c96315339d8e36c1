//! Length-prefixed JSON.
//!
//! A frame is two little-endian `u32`s, the body's length in bytes and the number of descriptors that
//! travel with it, and then the body.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Length of the frame header in bytes.
pub const HEADER_LEN: usize = 8;

/// A message that cannot be framed.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The message has no JSON form.
    #[error("cannot encode a message")]
    Json(#[source] serde_json::Error),
    /// The message is larger than the receiver would take.
    #[error("a message of {len} bytes is over the limit of {limit}")]
    TooLong {
        /// Length of the encoded body in bytes.
        len: usize,
        /// The channel's limit in bytes.
        limit: usize,
    },
}

/// Bytes that are no frame of ours. The stream is unusable afterwards.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The header announces more than the limit.
    #[error("the peer announced a message of {len} bytes; the limit is {limit}")]
    TooLong {
        /// Announced body length in bytes.
        len: usize,
        /// The channel's limit in bytes.
        limit: usize,
    },
    /// The header announces descriptors on a stream that carries none, or too many.
    #[error("the peer announced {count} descriptors; the limit is {limit}")]
    Descriptors {
        /// Announced number.
        count: usize,
        /// Largest number accepted.
        limit: usize,
    },
    /// The body is not the expected message.
    #[error("the peer sent a message that is none of ours")]
    Json(#[source] serde_json::Error),
}

/// Encodes one message as a frame that announces `descriptors` descriptors.
///
/// # Errors
/// Fails if the message has no JSON form or its body exceeds `limit` bytes.
pub fn encode<T: Serialize>(message: &T, descriptors: u32, limit: usize) -> Result<Vec<u8>, EncodeError> {
    let mut frame = vec![0; HEADER_LEN];
    serde_json::to_writer(&mut frame, message).map_err(EncodeError::Json)?;
    let len = frame.len() - HEADER_LEN;
    let announced = u32::try_from(len)
        .ok()
        .filter(|_| len <= limit)
        .ok_or(EncodeError::TooLong { len, limit })?;
    let header = announced
        .to_le_bytes()
        .into_iter()
        .chain(descriptors.to_le_bytes());
    for (place, byte) in frame.iter_mut().zip(header) {
        *place = byte;
    }
    Ok(frame)
}

/// Takes bytes as they come and gives whole messages.
///
/// Holds at most one header, one body of the limit's size and what one read brought beyond it.
#[derive(Debug)]
pub struct Decoder {
    buffer: Vec<u8>,
    limit: usize,
    most_descriptors: usize,
}

impl Decoder {
    /// A decoder that refuses bodies over `limit` bytes and frames with more than `most_descriptors`.
    pub fn new(limit: usize, most_descriptors: usize) -> Self {
        Self {
            buffer: Vec::new(),
            limit,
            most_descriptors,
        }
    }

    /// Adds bytes from the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether a frame has begun that is not complete.
    pub fn is_mid_frame(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// The next whole message and the number of descriptors announced with it.
    ///
    /// # Errors
    /// Fails if the header breaks a limit or the body is no `T`.
    pub fn take<T: DeserializeOwned>(&mut self) -> Result<Option<(T, usize)>, DecodeError> {
        let Some((header, rest)) = self.buffer.split_first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        let [l0, l1, l2, l3, d0, d1, d2, d3] = *header;
        let len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let count = u32::from_le_bytes([d0, d1, d2, d3]) as usize;
        if len > self.limit {
            return Err(DecodeError::TooLong {
                len,
                limit: self.limit,
            });
        }
        if count > self.most_descriptors {
            return Err(DecodeError::Descriptors {
                count,
                limit: self.most_descriptors,
            });
        }
        let Some(body) = rest.get(..len) else {
            return Ok(None);
        };
        let message = serde_json::from_slice(body).map_err(DecodeError::Json)?;
        self.buffer.drain(..HEADER_LEN + len);
        Ok(Some((message, count)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_survives_arriving_byte_by_byte() {
        let mut decoder = Decoder::new(64, 0);
        for byte in encode(&"ahoy", 0, 64).unwrap() {
            assert!(decoder.take::<String>().unwrap().is_none());
            decoder.push(&[byte]);
        }
        assert_eq!(decoder.take::<String>().unwrap(), Some(("ahoy".to_owned(), 0)));
        assert!(!decoder.is_mid_frame());
    }

    #[test]
    fn two_frames_in_one_read_are_two_messages() {
        let mut decoder = Decoder::new(64, 0);
        decoder.push(&[encode(&1, 0, 64).unwrap(), encode(&2, 0, 64).unwrap()].concat());
        assert_eq!(decoder.take::<u32>().unwrap(), Some((1, 0)));
        assert_eq!(decoder.take::<u32>().unwrap(), Some((2, 0)));
        assert_eq!(decoder.take::<u32>().unwrap(), None);
    }

    #[test]
    fn an_announced_length_over_the_limit_is_refused_before_the_body_comes() {
        let mut decoder = Decoder::new(64, 0);
        decoder.push(&[65, 0, 0, 0, 0, 0, 0, 0]);
        assert!(matches!(
            decoder.take::<u32>(),
            Err(DecodeError::TooLong { len: 65, limit: 64 })
        ));
    }

    #[test]
    fn descriptors_on_a_stream_without_descriptors_are_refused() {
        let mut decoder = Decoder::new(64, 0);
        decoder.push(&encode(&1, 1, 64).unwrap());
        assert!(matches!(
            decoder.take::<u32>(),
            Err(DecodeError::Descriptors { count: 1, limit: 0 })
        ));
    }

    #[test]
    fn a_body_of_another_type_is_refused() {
        let mut decoder = Decoder::new(64, 0);
        decoder.push(&encode(&"text", 0, 64).unwrap());
        assert!(matches!(decoder.take::<u32>(), Err(DecodeError::Json(_))));
    }

    #[test]
    fn a_message_over_the_limit_is_not_sent() {
        let long = "x".repeat(100);
        assert!(matches!(
            encode(&long, 0, 64),
            Err(EncodeError::TooLong { len: 102, limit: 64 })
        ));
    }
}
