//! Messages over sockets, without blocking: what `caisson_wire::channel` is to threads, this is to tasks.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use caisson_wire::{Decoder, RecvError, encode};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Bytes asked for at a time.
const READ_LEN: usize = 16 * 1024;
/// Most messages that may wait for a peer; one that takes none any more is given up.
const MOST_QUEUED: usize = 256;

/// A connected socket that never blocks.
#[derive(Clone, Debug)]
pub(crate) struct Link(Arc<AsyncFd<OwnedFd>>);

/// The sending half: queues, and never waits.
#[derive(Debug)]
pub(crate) struct Outbox {
    queue: mpsc::Sender<Letter>,
    limit: usize,
}

/// The receiving half.
#[derive(Debug)]
pub(crate) struct Inbox {
    link: Link,
    decoder: Decoder,
    /// Most descriptors a message may carry.
    most: usize,
    descriptors: VecDeque<OwnedFd>,
}

#[derive(Debug)]
struct Letter {
    frame: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

/// A message that will not arrive: it cannot be framed, or the peer takes none.
#[derive(Debug, thiserror::Error)]
#[error("cannot queue a message for the peer")]
pub(crate) struct Undeliverable;

impl Link {
    /// Wraps a socket, which becomes non-blocking; with it every copy of the descriptor that others hold.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let both = Interest::READABLE | Interest::WRITABLE;
        Ok(Self(Arc::new(crate::sys::watch(socket, both)?)))
    }

    /// Both halves. The task ends when the outbox is dropped and its queue is empty, or the peer has gone.
    pub(crate) fn split(
        self,
        limit: (usize, usize),
        most_descriptors: usize,
    ) -> (Outbox, Inbox, JoinHandle<()>) {
        let (queue, letters) = mpsc::channel(MOST_QUEUED);
        let (send_limit, receive_limit) = limit;
        let writer = tokio::task::spawn_local(write(self.clone(), letters));
        let inbox = Inbox {
            link: self,
            decoder: Decoder::new(receive_limit, most_descriptors),
            most: most_descriptors,
            descriptors: VecDeque::new(),
        };
        let outbox = Outbox {
            queue,
            limit: send_limit,
        };
        (outbox, inbox, writer)
    }
}

impl Outbox {
    pub(crate) fn send<T: Serialize>(&self, message: &T) -> Result<(), Undeliverable> {
        self.send_with(message, Vec::new())
    }

    pub(crate) fn send_with<T: Serialize>(
        &self,
        message: &T,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), Undeliverable> {
        let count = u32::try_from(descriptors.len()).map_err(|_| Undeliverable)?;
        let frame = encode(message, count, self.limit).map_err(|_| Undeliverable)?;
        self.queue
            .try_send(Letter { frame, descriptors })
            .map_err(|_| Undeliverable)
    }
}

impl Inbox {
    /// Waits for the next message and the descriptors that came with it.
    pub(crate) async fn recv<T: DeserializeOwned>(&mut self) -> Result<(T, Vec<OwnedFd>), RecvError> {
        loop {
            if let Some((message, count)) = self.decoder.take()? {
                if count > self.descriptors.len() {
                    return Err(RecvError::Truncated);
                }
                return Ok((message, self.descriptors.drain(..count).collect()));
            }
            self.read().await?;
        }
    }

    async fn read(&mut self) -> Result<(), RecvError> {
        let mut bytes = [0; READ_LEN];
        let most = self.most;
        let received = self
            .link
            .0
            .async_io(Interest::READABLE, |socket| receive(socket, &mut bytes, most))
            .await;
        let (count, descriptors) = received.map_err(RecvError::Socket)?;
        self.descriptors.extend(descriptors);
        if self.descriptors.len() > 2 * self.most {
            return Err(RecvError::Truncated);
        }
        match bytes.get(..count) {
            None | Some([]) if self.decoder.is_mid_frame() => Err(RecvError::Truncated),
            None | Some([]) => Err(RecvError::Closed),
            Some(read) => {
                self.decoder.push(read);
                Ok(())
            }
        }
    }
}

fn receive(socket: &OwnedFd, bytes: &mut [u8], most: usize) -> io::Result<(usize, Vec<OwnedFd>)> {
    if most == 0 {
        // Without room for them, descriptors that a peer sends all the same are closed by the kernel.
        return Ok((rustix::io::read(socket, bytes)?, Vec::new()));
    }
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(most))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(
        socket,
        &mut [IoSliceMut::new(bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    Ok((got.bytes, descriptors))
}

async fn write(link: Link, mut letters: mpsc::Receiver<Letter>) {
    while let Some(letter) = letters.recv().await {
        let mut rest = letter.frame.as_slice();
        let mut descriptors = letter.descriptors;
        while !rest.is_empty() {
            let sent = link
                .0
                .async_io(Interest::WRITABLE, |socket| transmit(socket, rest, &descriptors))
                .await;
            let Ok(sent) = sent else {
                return; // the receiving half reports that the peer has gone
            };
            descriptors.clear(); // they left with the first byte
            rest = rest.get(sent..).unwrap_or_default();
        }
    }
}

fn transmit(socket: &OwnedFd, bytes: &[u8], descriptors: &[OwnedFd]) -> io::Result<usize> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(descriptors.len()))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)? {
        0 => Err(io::ErrorKind::WriteZero.into()),
        sent => Ok(sent),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    fn on_a_runtime<T>(test: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let local = tokio::task::LocalSet::new();
        let limited = async {
            tokio::time::timeout(Duration::from_secs(5), test)
                .await
                .expect("went silent")
        };
        local.block_on(&runtime, limited)
    }

    #[test]
    fn messages_and_descriptors_go_to_a_blocking_peer_and_back() {
        on_a_runtime(async {
            let (a, b) = UnixStream::pair().unwrap();
            let (outbox, mut inbox, _) = Link::new(a.into()).unwrap().split((1 << 20, 1 << 20), 4);
            let peer = std::thread::spawn(move || {
                let (tx, mut rx) = caisson_wire::channel(b.into(), 1 << 20).unwrap();
                rx.set_timeout(Some(Duration::from_secs(5))).unwrap();
                let (text, descriptors) = rx.recv::<String>().unwrap();
                let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
                tx.send_with(&text, &borrowed).unwrap();
            });
            let long = "x".repeat(700_000);
            let file = rustix::fs::memfd_create(c"test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            outbox.send_with(&long, vec![file]).unwrap();
            let (echo, descriptors) = inbox.recv::<String>().await.unwrap();
            assert_eq!((echo, descriptors.len()), (long, 1));
            peer.join().unwrap();
            assert!(matches!(inbox.recv::<String>().await, Err(RecvError::Closed)));
        });
    }

    #[test]
    fn a_peer_that_takes_nothing_is_given_up_and_never_waited_for() {
        on_a_runtime(async {
            let (a, _b) = UnixStream::pair().unwrap();
            let (outbox, _inbox, _) = Link::new(a.into()).unwrap().split((1 << 20, 1 << 20), 0);
            let filled = (0..=MOST_QUEUED).find(|_| outbox.send(&"y".repeat(1000)).is_err());
            assert_eq!(filled, Some(MOST_QUEUED));
        });
    }
}
