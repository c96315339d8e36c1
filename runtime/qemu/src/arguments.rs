//! QEMU's command line: every choice, no side effect.

use std::os::fd::RawFd;

use caisson_wire::vmm::SHARE_TAG;

/// A guest architecture that QEMU runs for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arch {
    X86_64,
    Aarch64,
}

impl Arch {
    /// From `uname -m`.
    pub(crate) fn named(name: &str) -> Option<Self> {
        match name {
            "x86_64" => Some(Self::X86_64),
            "aarch64" | "arm64" => Some(Self::Aarch64),
            _ => None,
        }
    }

    /// The Debian package that has its emulator.
    pub(crate) fn package(self) -> &'static str {
        match self {
            Self::X86_64 => "qemu-system-x86",
            Self::Aarch64 => "qemu-system-arm",
        }
    }

    /// Machine and processor.
    fn board(self) -> [&'static str; 4] {
        match self {
            Self::X86_64 => [
                "-M",
                "q35,usb=off,vmport=off,hpet=off,memory-backend=ram",
                "-cpu",
                "max",
            ],
            // The architecture's own pointer authentication is too slow to emulate.
            Self::Aarch64 => [
                "-M",
                "virt,gic-version=3,memory-backend=ram",
                "-cpu",
                "max,pauth-impdef=on",
            ],
        }
    }

    /// The machine's own words of the kernel command line.
    ///
    /// Linux 6.12 crashes under QEMU 7.2 in its allocator's `cmpxchg16b`; `clearcpuid` hides the instruction from
    /// the kernel alone. QEMU 10.0 does not need it, and what lies between was not tried.
    fn words(self) -> &'static str {
        match self {
            Self::X86_64 => {
                "console=ttyS0 8250.nr_uarts=1 quiet panic=-1 reboot=t tsc=reliable no_timer_check \
                 mitigations=off clearcpuid=cx16 rdinit=/init"
            }
            Self::Aarch64 => "console=ttyAMA0 quiet panic=-1 mitigations=off rdinit=/init",
        }
    }
}

/// What the machine is made of, as descriptors that the child has.
#[derive(Debug)]
pub(crate) struct Parts<'a> {
    pub(crate) arch: Arch,
    pub(crate) vcpus: u32,
    /// Bytes of guest memory, and the memory file.
    pub(crate) memory: (u64, RawFd),
    pub(crate) kernel: RawFd,
    pub(crate) initramfs: RawFd,
    pub(crate) cmdline: &'a str,
    pub(crate) qmp: RawFd,
    pub(crate) serial: RawFd,
    /// Sockets on which our devices are served.
    pub(crate) vsock: RawFd,
    pub(crate) share: Option<RawFd>,
    pub(crate) disks: Vec<Disk<'a>>,
    pub(crate) nets: Vec<Net>,
}

#[derive(Debug)]
pub(crate) struct Disk<'a> {
    pub(crate) image: RawFd,
    pub(crate) is_device: bool,
    pub(crate) read_only: bool,
    pub(crate) serial: &'a str,
}

#[derive(Debug)]
pub(crate) struct Net {
    pub(crate) tap: RawFd,
    pub(crate) mac: [u8; 6],
    pub(crate) mtu: u16,
}

/// Entries of the file device's queues: all that ours has.
const SHARE_QUEUE: u16 = 512;

/// The arguments after the program's name.
pub(crate) fn arguments(parts: &Parts<'_>) -> Vec<String> {
    let mut line: Vec<String> = [
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-nic",
        "none",
        "-accel",
        "tcg,thread=multi",
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ]
    .into_iter()
    .chain(parts.arch.board())
    .map(str::to_owned)
    .collect();
    let mut add = |option: &str, value: String| line.extend([option.to_owned(), value]);

    let (bytes, file) = parts.memory;
    add("-m", format!("{}M", bytes >> 20));
    add(
        "-object",
        format!("memory-backend-file,id=ram,mem-path=/proc/self/fd/{file},size={bytes},share=on"),
    );
    add("-smp", parts.vcpus.to_string());
    add("-kernel", format!("/proc/self/fd/{}", parts.kernel));
    add("-initrd", format!("/proc/self/fd/{}", parts.initramfs));
    add(
        "-append",
        format!("{} {}", parts.arch.words(), parts.cmdline)
            .trim()
            .to_owned(),
    );

    add("-chardev", format!("socket,id=qmp,fd={}", parts.qmp));
    add("-mon", "chardev=qmp,mode=control".to_owned());
    add("-chardev", format!("socket,id=serial,fd={}", parts.serial));
    add("-serial", "chardev:serial".to_owned());

    add("-chardev", format!("socket,id=vsock,fd={}", parts.vsock));
    add("-device", "vhost-user-vsock-pci,chardev=vsock".to_owned());
    if let Some(share) = parts.share {
        add("-chardev", format!("socket,id=share,fd={share}"));
        add(
            "-device",
            format!("vhost-user-fs-pci,chardev=share,tag={SHARE_TAG},queue-size={SHARE_QUEUE}"),
        );
    }
    for (index, disk) in parts.disks.iter().enumerate() {
        let (driver, mode) = (
            if disk.is_device { "host_device" } else { "file" },
            if disk.read_only { "on" } else { "off" },
        );
        add("-add-fd", format!("fd={},set={index}", disk.image));
        add(
            "-blockdev",
            format!(
                "driver=raw,node-name=disk{index},read-only={mode},discard=unmap,file.driver={driver},\
                 file.filename=/dev/fdset/{index},file.locking=off,file.read-only={mode}"
            ),
        );
        add(
            "-device",
            format!("virtio-blk-pci,drive=disk{index},serial={}", escaped(disk.serial)),
        );
    }
    for (index, net) in parts.nets.iter().enumerate() {
        let mac = net.mac.map(|byte| format!("{byte:02x}")).join(":");
        add("-netdev", format!("tap,id=net{index},fd={},vhost=off", net.tap));
        add(
            "-device",
            format!(
                "virtio-net-pci,netdev=net{index},mac={mac},host_mtu={},romfile=",
                net.mtu
            ),
        );
    }
    add("-object", "rng-builtin,id=rng".to_owned());
    add("-device", "virtio-rng-pci,rng=rng".to_owned());
    add("-device", "virtio-balloon-pci,free-page-reporting=on".to_owned());
    add("-device", "pvpanic-pci".to_owned());
    line
}

/// A value of QEMU's option syntax, where a comma is doubled to mean itself.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts() -> Parts<'static> {
        Parts {
            arch: Arch::X86_64,
            vcpus: 2,
            memory: (256 << 20, 200),
            kernel: 201,
            initramfs: 202,
            cmdline: "loglevel=7",
            qmp: 203,
            serial: 204,
            vsock: 205,
            share: Some(206),
            disks: vec![Disk {
                image: 207,
                is_device: false,
                read_only: true,
                serial: "a,file.filename=/etc/shadow",
            }],
            nets: vec![Net {
                tap: 208,
                mac: [2, 0, 0, 0, 0, 255],
                mtu: 1400,
            }],
        }
    }

    fn has(line: &[String], option: &str, start: &str) -> bool {
        line.windows(2)
            .any(|pair| pair[0] == option && pair[1].starts_with(start))
    }

    #[test]
    fn a_disk_is_raw_and_read_only_and_its_serial_is_no_option() {
        let line = arguments(&parts());
        assert!(has(
            &line,
            "-blockdev",
            "driver=raw,node-name=disk0,read-only=on,"
        ));
        assert!(has(
            &line,
            "-device",
            "virtio-blk-pci,drive=disk0,serial=a,,file.filename=/etc/shadow"
        ));
    }

    #[test]
    fn the_plans_words_follow_the_machines_own() {
        let line = arguments(&parts());
        assert!(
            line.iter()
                .any(|word| word.starts_with("console=ttyS0 ") && word.ends_with("rdinit=/init loglevel=7"))
        );
        let arm = arguments(&Parts {
            arch: Arch::Aarch64,
            ..parts()
        });
        assert!(has(&arm, "-cpu", "max,pauth-impdef=on"));
        assert!(has(&arm, "-append", "console=ttyAMA0"));
    }

    #[test]
    fn a_network_card_has_its_address_and_mtu() {
        assert!(has(
            &arguments(&parts()),
            "-device",
            "virtio-net-pci,netdev=net0,mac=02:00:00:00:00:ff,host_mtu=1400,romfile="
        ));
    }
}
