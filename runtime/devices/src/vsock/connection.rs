//! One stream between a port of the guest and a port of the host: its credit, its halves, its backlog.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::packet::{Header, NO_RECEIVE, NO_SEND};

/// Bytes the guest may send ahead of what the host end has taken; what we announce as `buf_alloc`.
pub(super) const WINDOW: u32 = 64 * 1024;

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    /// Our end of the pair whose other end the host has. Non-blocking.
    pub(super) stream: UnixStream,
    /// What is owed to the guest besides data.
    pub(super) owed: Owed,
    /// Whether the connection waits for its turn on the receive queue.
    pub(super) queued: bool,
    /// Whether the host end may have bytes for the guest.
    pub(super) readable: bool,
    /// The host end sends no more.
    host_silent: bool,
    guest_silent: bool,
    guest_deaf: bool,
    backlog: VecDeque<u8>,
    /// Bytes that the host end has taken, modulo 2^32.
    forwarded: u32,
    /// The value of `forwarded` that the guest knows.
    announced: u32,
    /// Bytes sent to the guest, modulo 2^32.
    sent: u32,
    guest_window: u32,
    guest_forwarded: u32,
    asked_for_credit: bool,
}

/// Packets without data that a connection owes to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Owed {
    /// The answer to its request.
    pub(super) response: bool,
    /// What `forwarded` is.
    pub(super) credit: bool,
    /// A question for what the guest has forwarded.
    pub(super) credit_request: bool,
    /// `VIRTIO_VSOCK_SHUTDOWN_F_*` bits that the guest has yet to hear.
    pub(super) shutdown: u32,
}

impl Owed {
    fn any(self) -> bool {
        self != Self::default()
    }
}

/// Why a connection cannot go on; the guest gets a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Broken;

impl Connection {
    /// A connection that the guest asked for with `request`.
    pub(super) fn new(stream: UnixStream, request: &Header) -> Self {
        Self {
            stream,
            owed: Owed {
                response: true,
                ..Owed::default()
            },
            queued: false,
            readable: false,
            host_silent: false,
            guest_silent: false,
            guest_deaf: false,
            backlog: VecDeque::new(),
            forwarded: 0,
            announced: 0,
            sent: 0,
            guest_window: request.buf_alloc.get(),
            guest_forwarded: request.fwd_cnt.get(),
            asked_for_credit: false,
        }
    }

    /// Takes note of the credit that every packet of the guest carries.
    pub(super) fn hear_credit(&mut self, header: &Header) {
        self.guest_window = header.buf_alloc.get();
        self.guest_forwarded = header.fwd_cnt.get();
        if self.credit() > 0 {
            self.asked_for_credit = false;
        }
    }

    /// Bytes that the guest has room for. A guest that claims nonsense gets nothing.
    pub(super) fn credit(&self) -> u32 {
        self.guest_window
            .saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// Whether `len` bytes from the guest are within what it was promised and has not given up.
    pub(super) fn admits(&self, len: usize) -> Result<(), Broken> {
        let room = (WINDOW as usize).saturating_sub(self.backlog.len());
        if self.guest_silent || len > room {
            Err(Broken)
        } else {
            Ok(())
        }
    }

    /// Whether bytes may go to the host end at once, ahead of no others.
    pub(super) fn is_drained(&self) -> bool {
        self.backlog.is_empty()
    }

    /// Counts bytes that went to the host end at once.
    pub(super) fn count_forwarded(&mut self, len: usize) {
        self.forwarded = self.forwarded.wrapping_add(truncated(len));
        if self.forwarded.wrapping_sub(self.announced) >= WINDOW / 2 {
            self.owed.credit = true;
        }
    }

    /// Keeps bytes that the host end does not take now. The caller has asked [`Connection::admits`].
    pub(super) fn keep(&mut self, bytes: &[u8]) {
        self.backlog.extend(bytes);
    }

    /// Writes the backlog to the host end as far as it takes it, and then what the guest has closed.
    pub(super) fn drain(&mut self) -> Result<(), Broken> {
        while !self.backlog.is_empty() {
            match self.stream.write(self.backlog.as_slices().0) {
                Ok(0) => return Err(Broken),
                Ok(len) => {
                    self.backlog.drain(..len);
                    self.count_forwarded(len);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Broken),
            }
        }
        self.backlog.shrink_to(0);
        if self.guest_silent {
            // Fails only if the host end is gone, which its next read shows.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// The guest closes what `flags` say; half-closed stays half-open.
    pub(super) fn close_guest(&mut self, flags: u32) {
        self.guest_silent |= flags & NO_SEND != 0;
        if flags & NO_RECEIVE != 0 && !self.guest_deaf {
            self.guest_deaf = true;
            let _ = self.stream.shutdown(Shutdown::Read);
        }
    }

    /// Whether the guest has closed both halves and its last byte has gone out.
    pub(super) fn is_over(&self) -> bool {
        self.guest_silent && self.guest_deaf && self.backlog.is_empty()
    }

    /// The host end sends no more; `gone` if it does not receive either.
    pub(super) fn close_host(&mut self, gone: bool) {
        self.readable = false;
        if !self.host_silent {
            self.host_silent = true;
            self.owed.shutdown = NO_SEND | if gone { NO_RECEIVE } else { 0 };
        }
    }

    /// Whether the host end is worth waiting for: it may send, and the guest would take it.
    pub(super) fn wants_input(&self) -> bool {
        !self.host_silent && !self.guest_deaf && !self.readable && self.credit() > 0
    }

    /// Whether the connection can use a buffer of the receive queue now.
    pub(super) fn wants_turn(&mut self) -> bool {
        let stuck = self.readable && self.credit() == 0;
        if stuck && !self.asked_for_credit {
            self.asked_for_credit = true;
            self.owed.credit_request = true;
        }
        self.owed.any() || (self.can_read() && !stuck)
    }

    /// Whether data may be read from the host end for the guest.
    pub(super) fn can_read(&self) -> bool {
        self.readable && !self.host_silent && !self.guest_deaf
    }

    /// Counts bytes that went to the guest.
    pub(super) fn count_sent(&mut self, len: usize) {
        self.sent = self.sent.wrapping_add(truncated(len));
    }

    /// What every packet to the guest says about our room; the guest knows it from then on.
    pub(super) fn announce(&mut self, header: &mut Header) {
        header.buf_alloc.set(WINDOW);
        header.fwd_cnt.set(self.forwarded);
        self.announced = self.forwarded;
        self.owed.credit = false;
    }
}

/// A packet's length, which [`WINDOW`] or a read's limit bounds far below 2^32.
fn truncated(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(window: u32) -> (Connection, UnixStream) {
        let (ours, host) = UnixStream::pair().expect("pair");
        ours.set_nonblocking(true).expect("nonblocking");
        let request = Header {
            buf_alloc: window.into(),
            ..Header::default()
        };
        (Connection::new(ours, &request), host)
    }

    #[test]
    fn credit_is_the_window_less_what_is_under_way_modulo_2_to_the_32() {
        for (window, sent, forwarded, want) in [
            (100, 0, 0, 100),
            (100, 40, 0, 60),
            (100, 40, 40, 100),
            (100, 100, 0, 0),
            (100, 10, u32::MAX - 9, 80), // wrapped
            (100, 10, 50, 0),            // claims more than was sent
            (50, 100, 0, 0),             // shrank its window
        ] {
            let (mut connection, _host) = connection(window);
            connection.sent = sent;
            connection.guest_forwarded = forwarded;
            assert_eq!(connection.credit(), want, "{window} {sent} {forwarded}");
        }
    }

    #[test]
    fn a_guest_cannot_send_more_than_the_window_it_was_promised() {
        let (mut connection, _host) = connection(0);
        connection.keep(&[0; WINDOW as usize]);
        assert_eq!(connection.admits(1), Err(Broken));
        assert_eq!(connection.admits(0), Ok(()));
    }

    #[test]
    fn a_silent_guest_may_not_send() {
        let (mut connection, _host) = connection(0);
        connection.close_guest(NO_SEND);
        assert_eq!(connection.admits(0), Err(Broken));
        assert!(!connection.is_over());
    }

    #[test]
    fn credit_is_owed_after_half_the_window_and_paid_by_any_packet() {
        let (mut connection, _host) = connection(0);
        connection.count_forwarded(WINDOW as usize / 2 - 1);
        assert!(!connection.owed.credit);
        connection.count_forwarded(1);
        assert!(connection.owed.credit);
        connection.announce(&mut Header::default());
        assert!(!connection.owed.credit);
    }

    #[test]
    fn a_host_without_credit_is_asked_for_once() {
        let (mut connection, _host) = connection(0);
        connection.owed = Owed::default();
        connection.readable = true;
        assert!(connection.wants_turn());
        assert!(connection.owed.credit_request);
        connection.owed = Owed::default();
        assert!(!connection.wants_turn());
    }
}
