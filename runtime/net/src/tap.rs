//! Making taps.
#![expect(unsafe_code, reason = "no safe call for the requests of /dev/net/tun")]

use std::ffi::{c_int, c_short, c_uint};
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{Opcode, Setter, Updater, ioctl, opcode};

/// Makes a tap in the calling thread's namespace; gives its descriptor and its name.
///
/// It goes away with its last descriptor. Offloads are off until its reader asks for them.
pub(crate) fn make() -> io::Result<(OwnedFd, String)> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let tap = rustix::fs::open("/dev/net/tun", flags, Mode::empty())?;
    let mut request = InterfaceRequest::default();
    for (to, from) in request.name.iter_mut().zip(format!("{PREFIX}%d").bytes()) {
        *to = from;
    }
    request.flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, whose size and layout `InterfaceRequest` has.
    let update = unsafe { Updater::<TUNSETIFF, _>::new(&mut request) };
    // SAFETY: as above; `request` outlives the call.
    unsafe { ioctl(&tap, update)? };
    // SAFETY: TUNSETVNETHDRSZ reads an int.
    let header = unsafe { Setter::<TUNSETVNETHDRSZ, c_int>::new(VNET_HEADER) };
    // SAFETY: as above.
    unsafe { ioctl(&tap, header)? };
    let name = request.name.iter().copied().take_while(|byte| *byte != 0);
    Ok((
        tap,
        String::from_utf8_lossy(&name.collect::<Vec<_>>()).into_owned(),
    ))
}

/// How our taps' names begin.
pub(crate) const PREFIX: &str = "caisson";

/// `struct ifreq` (netdevice(7)) with the flags of its union.
#[derive(Default)]
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: c_short,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<InterfaceRequest>() == 40);

/// `TUNSETIFF`, `TUNSETVNETHDRSZ` and `IFF_*` (linux/if_tun.h).
const TUNSETIFF: Opcode = opcode::write::<c_uint>(b'T', 202);
const TUNSETVNETHDRSZ: Opcode = opcode::write::<c_uint>(b'T', 216);
const IFF_TAP: c_short = 0x0002;
const IFF_NO_PI: c_short = 0x1000;
const IFF_VNET_HDR: c_short = 0x4000;
/// `struct virtio_net_hdr_v1` (virtio 1.2, section 5.1.6).
const VNET_HEADER: c_int = 12;
