//! Standard streams: bytes between a process and the host.
//!
//! A process gets pipes, or a pseudo-terminal, rather than the vsock connections themselves: programs ask
//! what their streams are, open `/dev/stdout` a second time, and hand them to children that outlive them,
//! all of which a pipe can do and a socket cannot. One thread a direction copies with a fixed buffer; it
//! waits for both ends at once, so it ends when either does.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::Shutdown;

/// Makes connections to the host.
pub trait Dial: Send + Sync + std::fmt::Debug {
    /// Connects to a port of the host.
    ///
    /// # Errors
    /// Fails if nobody accepts there within a short time.
    fn dial(&self, port: u32) -> io::Result<OwnedFd>;
}

/// Copies from `from` to `to` in a thread of its own, until `from` ends or `to` takes no more. Then `to` is
/// told that nothing more comes.
///
/// # Errors
/// Fails if there is no room for a thread.
pub(crate) fn copy(from: OwnedFd, to: OwnedFd) -> io::Result<()> {
    crate::spawn("stream", move || {
        // A failure is the end of the stream, for whatever reason; whoever is at the other end sees it.
        let _ = pump(&from, &to);
        // Only a socket has a direction to shut down; for the rest the end is the drop.
        let _ = rustix::net::shutdown(&to, Shutdown::Write);
    })
}

fn pump(from: &OwnedFd, to: &OwnedFd) -> rustix::io::Result<()> {
    let mut buffer = [0; BUFFER_LEN];
    loop {
        wait(from, to)?;
        let count = match rustix::io::read(from, &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(Errno::INTR | Errno::AGAIN) => continue,
            Err(err) => return Err(err), // EIO: a terminal that no program has open any more
        };
        let mut rest = buffer.get(..count).unwrap_or_default();
        while !rest.is_empty() {
            match rustix::io::write(to, rest) {
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(err) => return Err(err),
            }
        }
    }
}

/// Waits until there is something to read, or nobody to write it to.
fn wait(from: impl AsFd, to: impl AsFd) -> rustix::io::Result<()> {
    let mut ends = [
        PollFd::new(&from, PollFlags::IN),
        PollFd::new(&to, PollFlags::empty()), // errors and hang-ups are always reported
    ];
    loop {
        match rustix::event::poll(&mut ends, None) {
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(err) => return Err(err),
        }
    }
    let [source, target] = ends;
    let gone = PollFlags::ERR | PollFlags::HUP;
    if target.revents().intersects(gone) && !source.revents().contains(PollFlags::IN) {
        return Err(Errno::PIPE);
    }
    Ok(())
}

/// Bytes copied at once; also what a stream holds at most.
const BUFFER_LEN: usize = 16 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    fn socket() -> (OwnedFd, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        (ours.into(), theirs)
    }

    #[test]
    fn the_end_of_a_pipe_is_the_end_of_the_stream_after_the_last_byte() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let (ours, mut host) = socket();
        copy(read, ours).unwrap();
        let long = vec![7; 300_000];
        let sent = long.clone();
        std::thread::spawn(move || std::fs::File::from(write).write_all(&sent).unwrap());
        let mut got = Vec::new();
        host.read_to_end(&mut got).unwrap();
        assert!(got == long);
    }

    #[test]
    fn the_hosts_end_of_input_closes_the_pipe() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let (ours, mut host) = socket();
        copy(ours, write).unwrap();
        host.write_all(b"last words").unwrap();
        host.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        std::fs::File::from(read).read_to_string(&mut text).unwrap();
        assert_eq!(text, "last words");
    }

    #[test]
    fn a_program_that_closes_its_input_ends_the_stream_although_nothing_is_sent() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let (ours, mut host) = socket();
        copy(ours, write).unwrap();
        drop(read);
        assert_eq!(host.read(&mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn a_host_that_hangs_up_breaks_the_pipe() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let (ours, host) = socket();
        copy(read, ours).unwrap();
        drop(host);
        let mut ends = [PollFd::new(&write, PollFlags::empty())];
        let limit = rustix::event::Timespec {
            tv_sec: 5,
            tv_nsec: 0,
        };
        assert_eq!(rustix::event::poll(&mut ends, Some(&limit)).unwrap(), 1);
    }
}
