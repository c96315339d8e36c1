//! Pseudo-terminals, made from the container's own devpts.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use caisson_wire::agent::{Failure, Stage, WindowSize};
use rustix::fs::{FileType, OFlags, makedev};
use rustix::io::Errno;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use super::mounts;
use super::root_dir::{Links, RootDir};
use crate::failure::At;
use crate::sys::{self, Reach};

/// Both sides of a pseudo-terminal.
#[derive(Debug)]
pub(crate) struct Terminal {
    /// The side that the agent keeps.
    pub(crate) controlling: OwnedFd,
    /// The side that the program gets.
    pub(crate) program: OwnedFd,
}

impl Terminal {
    /// Makes a terminal of this size in the container's `/dev/pts`.
    ///
    /// # Errors
    /// Fails if the container has no devpts there: what a container put in its place is not used.
    pub(crate) fn make(root: &RootDir, size: WindowSize) -> Result<Self, Failure> {
        let cannot = || "cannot create a terminal in the container's /dev/pts";
        let flags = OFlags::RDWR | OFlags::NOCTTY;
        let controlling = root
            .open(Path::new("/dev/pts/ptmx"), flags, Links::Refuse)
            .at(Stage::Stdio, cannot)?;
        let stat = rustix::fs::fstat(&controlling).at(Stage::Stdio, cannot)?;
        let is_multiplexer = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
            && stat.st_rdev == makedev(PTMX.0, PTMX.1);
        if !is_multiplexer {
            return Err(Errno::NODEV).at(Stage::Stdio, cannot);
        }
        rustix::pty::unlockpt(&controlling).at(Stage::Stdio, cannot)?;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let program = rustix::pty::ioctl_tiocgptpeer(&controlling, flags).at(Stage::Stdio, cannot)?;
        resize(controlling.as_fd(), size).at(Stage::Stdio, cannot)?;
        Ok(Self { controlling, program })
    }

    /// Binds the program's side to `/dev/console` of the container.
    ///
    /// # Errors
    /// As the mount calls.
    pub(crate) fn bind_console(&self, root: &RootDir) -> Result<(), Failure> {
        let cannot = || "cannot bind the terminal to /dev/console";
        let tree = mounts::clone_tree_of(self.program.as_fd(), Reach::One).at(Stage::Stdio, cannot)?;
        let target = root.file(Path::new("/dev/console")).at(Stage::Stdio, cannot)?;
        mounts::attach(tree.as_fd(), target.as_fd()).at(Stage::Stdio, cannot)
    }

    /// Makes the program's side the controlling terminal and the standard streams of this process, which
    /// leads a session without a terminal.
    ///
    /// # Errors
    /// As the ioctl and dup2(2).
    pub(crate) fn take(&self) -> Result<(), Failure> {
        let cannot = || "cannot take the terminal";
        rustix::process::ioctl_tiocsctty(&self.program).at(Stage::Stdio, cannot)?;
        for number in 0..3 {
            sys::make_stdio(self.program.as_fd(), number).at(Stage::Stdio, cannot)?;
        }
        Ok(())
    }
}

/// Sets the size of a terminal; the programs that use it get `SIGWINCH`.
///
/// # Errors
/// As the `TIOCSWINSZ` ioctl.
pub(crate) fn resize(controlling: BorrowedFd<'_>, size: WindowSize) -> rustix::io::Result<()> {
    rustix::termios::tcsetwinsize(
        controlling,
        Winsize {
            ws_row: size.rows,
            ws_col: size.columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        },
    )
}

/// Major and minor number of the multiplexer (Documentation/admin-guide/devices.txt).
const PTMX: (u32, u32) = (5, 2);
