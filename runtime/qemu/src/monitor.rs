//! Listens to QEMU: its protocol, what the guest prints, what it complains of, and its end.

use std::collections::VecDeque;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use caisson_machine::Console;
use caisson_wire::vmm::End;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::child::Child;
use crate::qmp::{Message, Reader};

/// How long QEMU may take to leave once its guest has ended.
const LEAVING: Duration = Duration::from_secs(5);
/// Most bytes kept of what QEMU complains of.
const COMPLAINTS: usize = 4 * 1024;

/// The tail of QEMU's standard error.
#[derive(Clone, Debug, Default)]
pub(crate) struct Complaints(Arc<Mutex<VecDeque<u8>>>);

impl Complaints {
    fn add(&self, bytes: &[u8]) {
        let mut tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend(bytes);
        let excess = tail.len().saturating_sub(COMPLAINTS);
        tail.drain(..excess);
    }

    /// What QEMU said last, in one line.
    pub(crate) fn text(&self) -> String {
        let mut tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(tail.make_contiguous()).into_owned();
        let lines: Vec<&str> = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .collect();
        lines.join("; ")
    }
}

/// What the monitor listens to, and whom it tells.
#[derive(Debug)]
pub(crate) struct Monitor {
    pub(crate) child: Arc<Child>,
    pub(crate) qmp: OwnedFd,
    pub(crate) serial: OwnedFd,
    pub(crate) stderr: OwnedFd,
    pub(crate) console: Console,
    pub(crate) complaints: Complaints,
    /// Answers to commands, in order.
    pub(crate) answers: Sender<Result<(), String>>,
    pub(crate) ended: Sender<End>,
}

impl Monitor {
    /// Listens until QEMU has ended, and says how.
    pub(crate) fn run(self) {
        let mut end = None;
        let mut deadline: Option<Instant> = None;
        let mut reader = Reader::default();
        let mut open = [true; 3];
        loop {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                break;
            }
            let ready = self.wait(open, left);
            if let [true, ..] = ready {
                match self.read(&self.qmp, |bytes| reader.push(bytes)) {
                    Some(Ok(messages)) => {
                        for message in messages {
                            self.heard(message, &mut end);
                        }
                    }
                    Some(Err(broken)) => {
                        end.get_or_insert_with(|| End::Crashed(broken.to_string()));
                        break;
                    }
                    None => break, // it is leaving, or has left
                }
            }
            if let [_, true, _] = ready
                && self
                    .read(&self.serial, |bytes| self.console.write(bytes))
                    .is_none()
            {
                open = [open[0], false, open[2]];
            }
            if let [.., true] = ready
                && self.read(&self.stderr, |bytes| self.complain(bytes)).is_none()
            {
                open = [open[0], open[1], false];
            }
            if end.is_some() {
                deadline.get_or_insert_with(|| Instant::now() + LEAVING);
            }
        }
        let how = self.child.end(LEAVING);
        while self.read_rest(&self.serial, |bytes| self.console.write(bytes)) {}
        while self.read_rest(&self.stderr, |bytes| self.complain(bytes)) {}
        let end = end.unwrap_or_else(|| match self.complaints.text() {
            said if said.is_empty() => End::Crashed(how),
            said => End::Crashed(format!("{how}: {said}")),
        });
        // Nobody waits for it if the machine could not start.
        let _ = self.ended.send(end);
    }

    fn heard(&self, message: Message, end: &mut Option<End>) {
        match message {
            // Nobody may wait for it any more.
            Message::Answer(answer) => drop(self.answers.send(answer)),
            Message::Panicked => {
                end.get_or_insert_with(|| End::Crashed("the guest's kernel panicked".to_owned()));
            }
            Message::Shutdown(reason) => {
                end.get_or_insert_with(|| match reason.as_str() {
                    "guest-shutdown" => End::PowerOff,
                    "guest-reset" => End::Reset,
                    other => End::Crashed(format!("QEMU shut the guest down: {other}")),
                });
            }
            Message::Other => {}
        }
    }

    fn complain(&self, bytes: &[u8]) {
        tracing::debug!(text = %String::from_utf8_lossy(bytes).trim_end(), "qemu");
        self.complaints.add(bytes);
    }

    /// Which of the protocol, the serial port and the errors have something; none after `limit`.
    fn wait(&self, open: [bool; 3], limit: Option<Duration>) -> [bool; 3] {
        let flags = |open| if open { PollFlags::IN } else { PollFlags::empty() };
        let [qmp, serial, stderr] = open;
        let mut fds = vec![PollFd::new(&self.qmp, flags(qmp))];
        // A closed one would be reported for ever.
        for (fd, open) in [(&self.serial, serial), (&self.stderr, stderr)] {
            let fd = if open { fd } else { &self.qmp };
            fds.push(PollFd::new(fd, flags(open)));
        }
        let limit = limit.map(|limit| Timespec::try_from(limit).unwrap_or_default());
        if poll(&mut fds, limit.as_ref()).is_err() {
            return [false; 3]; // a signal; look again
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty()).zip(open);
        std::array::from_fn(|_| ready.next().is_some_and(|(ready, open)| ready && open))
    }

    /// Reads once; `None` at the end of the stream.
    fn read<T>(&self, fd: &OwnedFd, take: impl FnOnce(&[u8]) -> T) -> Option<T> {
        let mut bytes = [0; 4096];
        match rustix::io::read(fd, &mut bytes) {
            Ok(0) => None,
            Ok(got) => bytes.get(..got).map(take),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => Some(take(&[])),
            Err(_) => None,
        }
    }

    /// Reads what is there; `false` if there is nothing more.
    fn read_rest(&self, fd: &OwnedFd, take: impl FnOnce(&[u8])) -> bool {
        is_readable(fd.as_fd()) && self.read(fd, take).is_some()
    }
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1))
}
