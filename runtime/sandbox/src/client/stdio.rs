//! The streams of a process, as its stand-in gets them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, sendmsg, socket_with, sockopt,
};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use super::StdioChoice;
use crate::proto::Wanted;
use crate::stand_in::window_size;

/// Longest time whoever listens on a console socket may take.
const CONSOLE_LIMIT: Duration = Duration::from_secs(10);
/// Device number of `/dev/null` (Linux, Documentation/admin-guide/devices.txt: 1, 3).
const NULL: (u32, u32) = (1, 3);

/// A failure to set streams up: what was being done, and the cause.
pub(crate) type Failed = (&'static str, io::Error);

/// The stand-in's standard streams, and which of the guest's are wanted for them.
#[derive(Debug)]
pub(crate) struct Streams {
    pub(crate) wanted: Wanted,
    /// The slave side of a new terminal; `None` inherits the caller's streams.
    slave: Option<OwnedFd>,
}

impl Streams {
    pub(crate) fn prepare(choice: &StdioChoice, terminal: bool) -> Result<Self, Failed> {
        match choice {
            StdioChoice::ConsoleSocket(path) if terminal => {
                let slave = new_terminal(path)?;
                Ok(Self {
                    wanted: Wanted {
                        terminal: Some(window_size(slave.as_fd())),
                        ..Wanted::default()
                    },
                    slave: Some(slave),
                })
            }
            StdioChoice::ConsoleSocket(_) => Err((
                "use a console socket for a process without a terminal",
                io::ErrorKind::InvalidInput.into(),
            )),
            StdioChoice::Inherit if terminal => Ok(Self {
                wanted: Wanted {
                    terminal: Some(window_size(io::stdin().as_fd())),
                    ..Wanted::default()
                },
                slave: None,
            }),
            StdioChoice::Inherit => Ok(Self {
                wanted: Wanted {
                    stdin: leads_somewhere(io::stdin().as_fd()),
                    stdout: leads_somewhere(io::stdout().as_fd()),
                    stderr: leads_somewhere(io::stderr().as_fd()),
                    terminal: None,
                },
                slave: None,
            }),
        }
    }

    /// Whether the stand-in has a terminal of its own, which it leads.
    pub(crate) fn own_terminal(&self) -> bool {
        self.slave.is_some()
    }

    /// The three streams, to start a stand-in with.
    pub(crate) fn open(&self) -> io::Result<[Stdio; 3]> {
        match &self.slave {
            None => Ok([Stdio::inherit(), Stdio::inherit(), Stdio::inherit()]),
            Some(slave) => Ok([
                slave.try_clone()?.into(),
                slave.try_clone()?.into(),
                slave.try_clone()?.into(),
            ]),
        }
    }
}

/// Whether a stream is worth a connection: not closed, and not `/dev/null`.
fn leads_somewhere(stream: BorrowedFd<'_>) -> bool {
    rustix::fs::fstat(stream).is_ok_and(|stat| {
        let device = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        let kind = rustix::fs::FileType::from_raw_mode(stat.st_mode);
        kind != rustix::fs::FileType::CharacterDevice || device != NULL
    })
}

/// Makes a terminal, sends its master to the socket at `path`, and gives its slave.
fn new_terminal(path: &Path) -> Result<OwnedFd, Failed> {
    let make = || -> io::Result<(OwnedFd, OwnedFd, Vec<u8>)> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
        let slave = rustix::fs::open(&name, flags, rustix::fs::Mode::empty())?;
        Ok((master, slave, name.into_bytes()))
    };
    let (master, slave, name) = make().map_err(|err| ("make a terminal", err))?;
    send_master(path, &master, &name).map_err(|err| ("send the terminal to the console socket", err))?;
    Ok(slave)
}

/// Sends the master as engines expect it (runc, docs/terminals.md): one message, the name and the descriptor.
fn send_master(path: &Path, master: &OwnedFd, name: &[u8]) -> io::Result<()> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(CONSOLE_LIMIT))?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [master.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    sendmsg(
        &socket,
        &[io::IoSlice::new(name)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}
