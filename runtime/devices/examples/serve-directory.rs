//! Serves a directory to a QEMU guest: `serve-directory DIRECTORY SOCKET TAG`, one connection, then the end.
//!
//! QEMU's side: `-chardev socket,id=fs,path=SOCKET -device vhost-user-fs-pci,chardev=fs,tag=TAG,queue-size=512`
//! and shared guest memory (`-object memory-backend-memfd,share=on,…`).

use std::error::Error;
use std::os::unix::net::UnixListener;

use caisson_devices::fs::{Fs, FsConfig, Limits, own_descriptors};
use caisson_devices::thread::Threads;
use caisson_devices::vhost_user;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(directory), Some(socket), Some(tag)) = (arguments.next(), arguments.next(), arguments.next())
    else {
        return Err("give a directory, a socket and a tag".into());
    };
    rustix::process::umask(rustix::fs::Mode::empty());
    let fs = Fs::new(FsConfig {
        tag,
        root: std::fs::File::open(directory)?.into(),
        descriptors: own_descriptors()?,
        limits: Limits::of_process(),
    })?;
    let listener = UnixListener::bind(socket)?;
    let (stream, _) = listener.accept()?;
    let served = vhost_user::serve(Box::new(fs), stream, &Threads::plain(), "files-vhost")?;
    served.join().map_err(|_| "the service panicked".into())
}
