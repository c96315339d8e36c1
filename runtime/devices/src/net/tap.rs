//! The one request to a tap that is not reading or writing.
#![expect(unsafe_code, reason = "no safe call for TUNSETOFFLOAD")]

use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{IntegerSetter, ioctl, opcode};

/// What the kernel may leave undone in the frames that it gives to a tap.
#[derive(Clone, Copy, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "independent powers, each named")]
pub(super) struct Offloads {
    pub(super) checksum: bool,
    pub(super) tcp4: bool,
    pub(super) tcp6: bool,
    pub(super) ecn: bool,
}

/// Tells the kernel what the reader of `tap` takes.
pub(super) fn set_offloads(tap: impl AsFd, offloads: Offloads) -> io::Result<()> {
    let tcp = offloads.tcp4 || offloads.tcp6;
    let bits = [
        (offloads.checksum, TUN_F_CSUM),
        (offloads.tcp4, TUN_F_TSO4),
        (offloads.tcp6, TUN_F_TSO6),
        (tcp && offloads.ecn, TUN_F_TSO_ECN),
    ];
    let flags = bits
        .into_iter()
        .filter(|(on, _)| *on)
        .fold(0, |all, (_, bit)| all | bit);
    // SAFETY: TUNSETOFFLOAD takes its argument by value, as this setter passes it, and writes no memory.
    let request = unsafe { IntegerSetter::<TUNSETOFFLOAD>::new_usize(flags) };
    // SAFETY: as above; on a descriptor that is no tap the kernel refuses the request.
    unsafe { ioctl(tap, request)? };
    Ok(())
}

/// `TUNSETOFFLOAD` (linux/if_tun.h).
const TUNSETOFFLOAD: rustix::ioctl::Opcode = opcode::write::<std::ffi::c_uint>(b'T', 208);
/// `TUN_F_*` (linux/if_tun.h).
const TUN_F_CSUM: usize = 0x01;
const TUN_F_TSO4: usize = 0x02;
const TUN_F_TSO6: usize = 0x04;
const TUN_F_TSO_ECN: usize = 0x08;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_has_the_number_of_the_kernel_header_and_needs_a_tap() {
        assert_eq!(u64::from(TUNSETOFFLOAD), 0x4004_54d0);
        let no_tap = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        assert!(set_offloads(&no_tap, Offloads::default()).is_err());
    }
}
