//! The stand-in: the host process that engines take for a container's.
//!
//! It lives as long as the process in the guest, relays its streams, hands it every signal that can be caught,
//! and leaves with its status. If it is killed, its container is killed; if the supervisor dies, it dies. It
//! holds no state and needs little memory: a thread for each direction of a stream, and no runtime.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use caisson_wire::agent::{ExitStatus, WindowSize};
use caisson_wire::{Receiver, Sender, channel};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{Shutdown, shutdown};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::proto::{FromStandIn, LIMIT, Stream, ToStandIn};
use crate::sys::{Signals, die_by, inherited};

/// The mode of a stand-in whose standard streams are a terminal.
pub(crate) const TERMINAL: &str = "terminal";
/// The mode of any other.
pub(crate) const PIPES: &str = "pipes";
/// Bytes copied at a time, as much as a pipe holds (pipe(7)).
const CHUNK: usize = 64 * 1024;
/// Stack of a copying thread; it calls read and write.
const STACK: usize = 64 * 1024;
/// How long the guest may keep a stream open, without sending, after its process has ended.
const IDLE_LIMIT: Duration = Duration::from_secs(2);
/// How long whoever reads our output may take nothing after the process has ended.
const BLOCKED_LIMIT: Duration = Duration::from_secs(30);
/// How long the supervisor may take no message.
const SEND_LIMIT: Duration = Duration::from_secs(2);

/// Runs a stand-in. `arguments` are those after `caisson stand-in`: a name for `ps`, a mode and a descriptor.
///
/// The process ends like the one it stands for: with its code, or by its signal.
pub fn main(arguments: &[OsString]) -> ExitCode {
    match serve(arguments) {
        Ok(ExitStatus::Code(code)) => ExitCode::from(code),
        Ok(ExitStatus::Signal(signal)) => die_by(signal),
        Err(err) => {
            tracing::error!(error = %err, "the stand-in could not serve");
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: &[OsString]) -> io::Result<ExitStatus> {
    let [_name, mode, socket] = arguments else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a stand-in is started by caisson itself",
        ));
    };
    let socket = inherited(socket)?;
    // What `ps` shows; without it the name is that of /proc/self/exe.
    let _ = rustix::thread::set_name(c"caisson");
    let signals = Signals::take()?;
    let terminal = (mode == TERMINAL).then(TerminalGuard::save);
    if let Some(terminal) = &terminal {
        terminal.make_raw();
    }
    // Without a supervisor there is no virtual machine any more: its processes were killed.
    let status = Relay::new(socket)?
        .run(&signals)
        .unwrap_or(ExitStatus::Signal(libc::SIGKILL));
    drop(terminal);
    Ok(status)
}

/// Relays for one process, over a socket to the supervisor.
#[derive(Debug)]
pub(crate) struct Relay {
    sender: Sender,
    receiver: Receiver,
    outputs: Arc<Outputs>,
}

impl Relay {
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        let (sender, receiver) = channel(socket, LIMIT)?;
        sender.set_timeout(SEND_LIMIT)?;
        Ok(Self {
            sender,
            receiver,
            outputs: Arc::default(),
        })
    }

    /// Relays until the process has ended and its output is written; `None` if the supervisor is gone.
    pub(crate) fn run(mut self, signals: &Signals) -> Option<ExitStatus> {
        let (stop, stopped) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).ok()?;
        let sender = self.sender.clone();
        std::thread::scope(|scope| {
            let forwarding = std::thread::Builder::new()
                .name("signals".to_owned())
                .stack_size(STACK)
                .spawn_scoped(scope, move || forward(signals, &stop, &sender));
            let status = match forwarding {
                Ok(_) => self.until_exit(),
                Err(_) => None,
            };
            drop(stopped); // ends the forwarding
            status
        })
    }

    fn until_exit(&mut self) -> Option<ExitStatus> {
        loop {
            let (message, descriptors) = self.receiver.recv::<ToStandIn>().ok()?;
            match message {
                ToStandIn::Stream(stream) => {
                    if let Some(descriptor) = descriptors.into_iter().next() {
                        self.attach(stream, descriptor);
                    }
                }
                ToStandIn::Exited(status) => {
                    self.outputs.drain();
                    return Some(status);
                }
            }
        }
    }

    fn attach(&self, stream: Stream, descriptor: OwnedFd) {
        match stream {
            Stream::Stdin => copy_in(Arc::new(descriptor)),
            Stream::Stdout => self.copy_out(Arc::new(descriptor), Output::Stdout),
            Stream::Stderr => self.copy_out(Arc::new(descriptor), Output::Stderr),
            Stream::Terminal => {
                // The size may have changed since the guest was told.
                let size = window_size(io::stdin().as_fd());
                let _ = self.sender.send(&FromStandIn::Resize(size));
                let descriptor = Arc::new(descriptor);
                copy_in(Arc::clone(&descriptor));
                self.copy_out(descriptor, Output::Stdout);
            }
        }
    }

    fn copy_out(&self, stream: Arc<OwnedFd>, output: Output) {
        let open = Outputs::open(&self.outputs);
        thread("output", move || {
            let mut bytes = vec![0; CHUNK];
            while let Some(got) = read(stream.as_fd(), &mut bytes) {
                open.writing(true);
                let written = match output {
                    Output::Stdout => write_all(io::stdout().as_fd(), got),
                    Output::Stderr => write_all(io::stderr().as_fd(), got),
                };
                open.writing(false);
                if !written {
                    // Nobody reads any more: let the process in the guest know by its own write.
                    let _ = shutdown(&*stream, Shutdown::Read);
                    break;
                }
            }
        });
    }
}

/// Hands signals on until the other end of `stop` is closed.
fn forward(signals: &Signals, stop: &OwnedFd, sender: &Sender) {
    loop {
        let mut sources = [
            PollFd::new(signals, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        match poll(&mut sources, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
        if sources.last().is_some_and(|source| !source.revents().is_empty()) {
            return;
        }
        while let Some(signal) = signals.next() {
            let message = match signal {
                libc::SIGWINCH => FromStandIn::Resize(window_size(io::stdin().as_fd())),
                // About this process: its children, its pipes, its place in its terminal.
                libc::SIGCHLD | libc::SIGPIPE | libc::SIGTTIN | libc::SIGTTOU => continue,
                signal => FromStandIn::Signal(signal),
            };
            // If the supervisor is gone, receiving says so.
            let _ = sender.send(&message);
        }
    }
}

#[derive(Clone, Copy)]
enum Output {
    Stdout,
    Stderr,
}

/// How far the outputs are.
#[derive(Debug, Default)]
struct Outputs {
    state: Mutex<Flow>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Flow {
    /// Streams that are still open.
    open: usize,
    /// Of those, how many wait for whoever reads our output.
    writing: usize,
    /// Grows with every chunk.
    chunks: u64,
}

/// One stream, as long as it is open.
struct Open(Arc<Outputs>);

impl Outputs {
    fn open(outputs: &Arc<Self>) -> Open {
        outputs.change(|flow| flow.open += 1);
        Open(Arc::clone(outputs))
    }

    fn change(&self, change: impl FnOnce(&mut Flow)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// Waits until all streams are at their end, for as long as something moves.
    fn drain(&self) {
        let mut flow = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut seen, mut since) = (flow.chunks, Instant::now());
        while flow.open > 0 {
            if flow.chunks != seen {
                (seen, since) = (flow.chunks, Instant::now());
            }
            let limit = if flow.writing > 0 {
                BLOCKED_LIMIT
            } else {
                IDLE_LIMIT
            };
            let Some(left) = limit.checked_sub(since.elapsed()) else {
                return;
            };
            flow = match self.changed.wait_timeout(flow, left) {
                Ok((flow, _)) => flow,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

impl Open {
    fn writing(&self, begins: bool) {
        self.0.change(|flow| {
            if begins {
                flow.writing += 1;
            } else {
                flow.writing = flow.writing.saturating_sub(1);
                flow.chunks = flow.chunks.wrapping_add(1);
            }
        });
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.change(|flow| flow.open = flow.open.saturating_sub(1));
    }
}

/// Copies standard input into the guest; its end is the stream's end, and the other direction stays open.
fn copy_in(stream: Arc<OwnedFd>) {
    thread("input", move || {
        let mut bytes = vec![0; CHUNK];
        while let Some(got) = read(io::stdin().as_fd(), &mut bytes) {
            if !write_all(stream.as_fd(), got) {
                return;
            }
        }
        let _ = shutdown(&*stream, Shutdown::Write);
    });
}

/// Starts a thread that nobody waits for. Without it the stream is closed at once, which the guest sees.
fn thread(name: &str, body: impl FnOnce() + Send + 'static) {
    let started = std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK)
        .spawn(body);
    if let Err(err) = started {
        tracing::error!(error = %err, "could not start a relaying thread");
    }
}

/// The next bytes; `None` at the end, and for a terminal that has hung up.
fn read<'a>(from: BorrowedFd<'_>, bytes: &'a mut [u8]) -> Option<&'a [u8]> {
    let got = loop {
        match rustix::io::read(from, &mut *bytes) {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => wait_for(from, PollFlags::IN),
            other => break other.ok()?,
        }
    };
    bytes.get(..got).filter(|got| !got.is_empty())
}

/// Writes all of it; says whether it could.
fn write_all(to: BorrowedFd<'_>, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            // The caller may have made its descriptor non-blocking; it shares that with us.
            Err(rustix::io::Errno::AGAIN) => wait_for(to, PollFlags::OUT),
            Err(_) => return false,
        }
    }
    true
}

fn wait_for(descriptor: BorrowedFd<'_>, flags: PollFlags) {
    // Whatever this says, the next read or write tells more.
    let _ = poll(&mut [PollFd::from_borrowed_fd(descriptor, flags)], None);
}

/// A terminal's size; nothing if it is none.
pub(crate) fn window_size(terminal: BorrowedFd<'_>) -> WindowSize {
    tcgetwinsize(terminal).map_or(WindowSize::default(), |size| WindowSize {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}

/// The terminal on standard input as it was; dropping it restores that.
#[derive(Debug)]
pub(crate) struct TerminalGuard(Option<Termios>);

impl TerminalGuard {
    /// Remembers the terminal's modes, if there is one.
    pub(crate) fn save() -> Self {
        Self(tcgetattr(io::stdin()).ok())
    }

    /// Hands every byte on unchanged: the guest's terminal does what a terminal does.
    pub(crate) fn make_raw(&self) {
        if let Some(before) = &self.0 {
            let mut raw = before.clone();
            raw.make_raw();
            // A terminal that cannot be raw still works, with its own line discipline.
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, &raw);
        }
    }
}

impl Drop for TerminalGuard {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // If it has hung up there is nothing to restore.
            let _ = tcsetattr(io::stdin(), OptionalActions::Drain, before);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn draining_ends_when_the_last_stream_does() {
        let outputs = Arc::<Outputs>::default();
        let open = Outputs::open(&outputs);
        let began = Instant::now();
        let other = std::thread::spawn(move || {
            open.writing(true);
            open.writing(false);
            drop(open);
        });
        outputs.drain();
        other.join().unwrap();
        assert!(began.elapsed() < IDLE_LIMIT);
    }

    #[test]
    fn draining_gives_up_on_a_stream_that_stays_open_and_silent() {
        let outputs = Arc::<Outputs>::default();
        let _open = Outputs::open(&outputs);
        let began = Instant::now();
        outputs.drain();
        assert!(began.elapsed() >= IDLE_LIMIT);
    }

    #[test]
    fn a_relay_without_its_supervisor_says_so() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let relay = Relay::new(ours.into()).unwrap();
        drop(theirs);
        let signals = Signals::take().unwrap();
        assert_eq!(relay.run(&signals), None);
    }

    #[test]
    fn what_is_written_to_a_closed_stream_is_a_failure_and_not_a_signal() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(!write_all(ours.as_fd(), b"x"));
    }
}
