//! The guest itself: what the first request sets up.

mod network;

use std::io;
use std::path::Path;

use caisson_wire::VERSION;
use caisson_wire::agent::{Failure, SHARE_DIR, Setup, Stage};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::time::{ClockId, Timespec};

use crate::container::set_sysctl;
use crate::failure::{At, failure};
use crate::sys;

/// Does everything that `setup` asks for.
///
/// # Errors
/// Fails with the stage [`Stage::Request`] for another version, else with that of the part that failed.
pub fn set_up(setup: &Setup) -> Result<(), Failure> {
    if setup.version != VERSION {
        let text = format!(
            "the control plane speaks version {}, the guest {VERSION}",
            setup.version
        );
        return Err(failure(Stage::Request, text));
    }
    if setup.time_ns != 0 {
        set_clock(setup.time_ns).at(Stage::Setup, || "cannot set the clock")?;
    }
    if !setup.entropy.is_empty() {
        add_entropy(&setup.entropy).at(Stage::Setup, || "cannot add entropy")?;
    }
    if !setup.hostname.is_empty() {
        rustix::system::sethostname(setup.hostname.as_bytes()).at(Stage::Setup, || {
            format!("cannot set the host name {:?}", setup.hostname)
        })?;
    }
    if setup.share {
        mount_share().at(Stage::Setup, || "cannot mount the shared directory")?;
    }
    network::set_up(setup)?;
    // After the interfaces, some of which have parameters of their own.
    setup
        .sysctl
        .iter()
        .try_for_each(|(key, value)| set_sysctl(key, value))
}

fn set_clock(time_ns: u64) -> rustix::io::Result<()> {
    const NANOSECONDS: u64 = 1_000_000_000;
    rustix::time::clock_settime(
        ClockId::Realtime,
        Timespec {
            tv_sec: (time_ns / NANOSECONDS).try_into().map_err(|_| Errno::INVAL)?,
            tv_nsec: (time_ns % NANOSECONDS).try_into().map_err(|_| Errno::INVAL)?,
        },
    )
}

fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    let random = rustix::fs::open("/dev/urandom", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    sys::add_entropy(std::os::fd::AsFd::as_fd(&random), bytes)
}

fn mount_share() -> io::Result<()> {
    std::fs::create_dir_all(SHARE_DIR)?;
    // Special files there are nobody's, and the host does not serve any.
    let flags = MountFlags::NODEV;
    Ok(rustix::mount::mount(
        SHARE_TAG,
        Path::new(SHARE_DIR),
        "virtiofs",
        flags,
        None,
    )?)
}

/// Tag of the shared directory's virtio-fs device.
const SHARE_TAG: &str = "caisson";
