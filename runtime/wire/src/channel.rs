//! Frames over a stream socket, with descriptors where the socket is a unix one.
//!
//! Blocking by nature: whoever must not block gives the receiving half a thread of its own, and the
//! sending half a time limit ([`Sender::set_timeout`]).

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg, sockopt,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::frame::{DecodeError, Decoder, EncodeError, encode};

/// Most descriptors one frame may carry; `SCM_MAX_FD` of Linux (include/net/scm.h) is 253.
const MOST_DESCRIPTORS: usize = 128;
/// Bytes asked for by one `recvmsg`.
const READ_LEN: usize = 16 * 1024;

/// A message that was not sent whole. The channel is unusable afterwards.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The message cannot be framed; nothing was sent.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The socket failed, or the peer took nothing for the channel's time limit.
    #[error("cannot send a message")]
    Socket(#[source] io::Error),
}

/// Why no message came.
#[derive(Debug, thiserror::Error)]
pub enum RecvError {
    /// The peer has closed its end between two messages.
    #[error("the peer has gone")]
    Closed,
    /// The peer has closed its end in the middle of a message, or kept descriptors back.
    #[error("the peer went away in the middle of a message")]
    Truncated,
    /// The bytes are no message of ours.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The socket failed; `WouldBlock` if it is non-blocking or has a time limit.
    #[error("cannot receive a message")]
    Socket(#[source] io::Error),
}

/// Both halves of a channel over a connected stream socket; bodies are capped at `limit` bytes.
///
/// # Errors
/// Fails if the process is out of descriptors.
pub fn channel(socket: OwnedFd, limit: usize) -> io::Result<(Sender, Receiver)> {
    let second = socket.try_clone()?;
    Ok((
        Sender {
            socket: Arc::new(Mutex::new(socket)),
            limit,
        },
        Receiver {
            socket: second,
            decoder: Decoder::new(limit, MOST_DESCRIPTORS),
            descriptors: VecDeque::new(),
        },
    ))
}

/// The sending half; clones share the socket, and each message is sent whole.
#[derive(Clone, Debug)]
pub struct Sender {
    socket: Arc<Mutex<OwnedFd>>,
    limit: usize,
}

impl Sender {
    /// Bounds how long one [`Sender::send`] may wait for the peer.
    ///
    /// # Errors
    /// Fails if the socket does not support it.
    pub fn set_timeout(&self, limit: Duration) -> io::Result<()> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(sockopt::set_socket_timeout(
            &*socket,
            sockopt::Timeout::Send,
            Some(limit),
        )?)
    }

    /// Sends one message without descriptors.
    ///
    /// # Errors
    /// See [`Sender::send_with`].
    pub fn send<T: Serialize>(&self, message: &T) -> Result<(), SendError> {
        self.send_with(message, &[])
    }

    /// Sends one message; copies of `descriptors` travel with it, in order.
    ///
    /// # Errors
    /// Fails if the message is over the limit, the peer has gone, or it takes nothing for too long.
    pub fn send_with<T: Serialize>(
        &self,
        message: &T,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), SendError> {
        let count = u32::try_from(descriptors.len()).unwrap_or(u32::MAX);
        let frame = encode(message, count, self.limit)?;
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        send_frame(socket.as_fd(), &frame, descriptors).map_err(SendError::Socket)
    }
}

fn send_frame(socket: BorrowedFd<'_>, frame: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "too many descriptors for one message",
        ));
    }
    let mut rest = frame;
    while !rest.is_empty() {
        let sent = match sendmsg(socket, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(sent) => sent,
            Err(rustix::io::Errno::INTR) => continue,
            Err(err) => return Err(err.into()),
        };
        control.clear(); // the descriptors left with the first byte
        rest = rest.get(sent..).unwrap_or_default();
    }
    Ok(())
}

/// The receiving half.
#[derive(Debug)]
pub struct Receiver {
    socket: OwnedFd,
    decoder: Decoder,
    descriptors: VecDeque<OwnedFd>,
}

impl Receiver {
    /// Waits for the next message and the descriptors that came with it.
    ///
    /// # Errors
    /// Fails if the peer has gone, breaks a limit or the protocol, or the socket has a time limit that passed.
    pub fn recv<T: DeserializeOwned>(&mut self) -> Result<(T, Vec<OwnedFd>), RecvError> {
        loop {
            if let Some((message, count)) = self.decoder.take()? {
                if count > self.descriptors.len() {
                    return Err(RecvError::Truncated);
                }
                return Ok((message, self.descriptors.drain(..count).collect()));
            }
            self.read()?;
        }
    }

    /// Bounds how long one [`Receiver::recv`] may wait; `None` waits for ever.
    ///
    /// # Errors
    /// Fails if the socket does not support it.
    pub fn set_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        Ok(sockopt::set_socket_timeout(
            &self.socket,
            sockopt::Timeout::Recv,
            limit,
        )?)
    }

    fn read(&mut self) -> Result<(), RecvError> {
        let mut bytes = [0; READ_LEN];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = loop {
            match recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other.map_err(|err| RecvError::Socket(err.into()))?,
            }
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptors.extend(descriptors);
            }
        }
        if self.descriptors.len() > 2 * MOST_DESCRIPTORS {
            return Err(DecodeError::Descriptors {
                count: self.descriptors.len(),
                limit: MOST_DESCRIPTORS,
            }
            .into());
        }
        match bytes.get(..got.bytes) {
            None | Some([]) if self.decoder.is_mid_frame() => Err(RecvError::Truncated),
            None | Some([]) => Err(RecvError::Closed),
            Some(read) => {
                self.decoder.push(read);
                Ok(())
            }
        }
    }
}

impl AsFd for Receiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn pair() -> ((Sender, Receiver), (Sender, Receiver)) {
        let (a, b) = UnixStream::pair().unwrap();
        let ends = (
            channel(a.into(), 1 << 20).unwrap(),
            channel(b.into(), 1 << 20).unwrap(),
        );
        ends.1.1.set_timeout(Some(Duration::from_secs(5))).unwrap();
        ends
    }

    #[test]
    fn descriptors_arrive_with_their_message() {
        let ((tx, _), (_, mut rx)) = pair();
        let (read, write) = rustix::pipe::pipe().unwrap();
        tx.send(&"plain").unwrap();
        tx.send_with(&"with a pipe", &[write.as_fd()]).unwrap();
        drop(write);

        let (text, none) = rx.recv::<String>().unwrap();
        assert_eq!((text.as_str(), none.len()), ("plain", 0));
        let (text, mut fds) = rx.recv::<String>().unwrap();
        assert_eq!((text.as_str(), fds.len()), ("with a pipe", 1));
        rustix::io::write(fds.remove(0), b"x").unwrap();
        assert_eq!(rustix::io::read(read, &mut [0; 8]).unwrap(), 1);
    }

    #[test]
    fn a_message_larger_than_the_socket_buffer_arrives_whole() {
        let ((tx, _rx), (_, mut rx)) = pair();
        let long = "y".repeat(900_000);
        let sent = long.clone();
        let sender = std::thread::spawn(move || tx.send(&sent).unwrap());
        assert_eq!(rx.recv::<String>().unwrap().0, long);
        sender.join().unwrap();
    }

    #[test]
    fn a_peer_that_leaves_between_messages_is_told_from_one_that_leaves_within() {
        let (gone, (_, mut rx)) = pair();
        drop(gone);
        assert!(matches!(rx.recv::<String>(), Err(RecvError::Closed)));

        let (mut a, b) = UnixStream::pair().unwrap();
        let (_tx, mut rx) = channel(b.into(), 64).unwrap();
        io::Write::write_all(&mut a, &[9, 0, 0]).unwrap();
        drop(a);
        assert!(matches!(rx.recv::<String>(), Err(RecvError::Truncated)));
    }

    #[test]
    fn a_peer_that_takes_nothing_ends_the_send() {
        let ((tx, _rx), _silent) = pair();
        tx.set_timeout(Duration::from_millis(50)).unwrap();
        let err = loop {
            if let Err(err) = tx.send(&"z".repeat(100_000)) {
                break err;
            }
        };
        assert!(matches!(err, SendError::Socket(err) if err.kind() == io::ErrorKind::WouldBlock));
    }
}
