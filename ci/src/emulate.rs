//! An emulated host: a small Linux with a real `/dev/kvm`, on any machine.
//!
//! QEMU's emulation of x86_64 has SVM with nested paging. The host inside runs one program with its root on a
//! tmpfs, shows what it prints and hands back its exit status. Time runs slowly there, so deadlines are generous.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use elf::ElfBytes;
use elf::abi::PT_INTERP;
use elf::endian::AnyEndian;

use crate::cache::{Cache, Key};
use crate::guest::apt::Apt;
use crate::guest::cpio::Archive;
use crate::guest::{Arch, Kernel, initramfs, kernel_distro, modules};
use crate::{child, setup};

/// What to run, and on how large a host.
#[derive(Clone, Debug, Args)]
pub(crate) struct Emulation {
    /// Architecture of the host.
    #[arg(value_enum)]
    pub(crate) arch: Arch,
    /// Memory of the host in MiB.
    #[arg(long, default_value_t = 2048, value_name = "MIB", value_parser = clap::value_parser!(u32).range(256..=65536))]
    pub(crate) memory: u32,
    /// Processors of the host. With more than one, the emulation stops for good now and then.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=32))]
    pub(crate) smp: u32,
    /// Puts a file or directory of this machine into the host; may be given several times.
    #[arg(long, value_name = "SRC:DST", value_parser = parse_file)]
    pub(crate) file: Vec<(PathBuf, String)>,
    /// Sets an environment variable of the program; may be given several times.
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_variable)]
    pub(crate) env: Vec<(String, String)>,
    /// Seconds until all of it is ended.
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    pub(crate) timeout: u64,
    /// A static program or a shell script, and its arguments.
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    pub(crate) command: Vec<String>,
}

/// Boots the host, runs the program in it and gives its exit status.
pub(crate) fn run(emulation: &Emulation, line: impl FnMut(&str)) -> anyhow::Result<u8> {
    let Arch::X86_64 = emulation.arch;
    setup::guest_tools()?;
    setup::busybox()?;
    setup::qemu()?;
    let cache = Cache::open()?;
    let kernel = kernel_distro::stable(&cache, &Apt::open(&cache)?)?;
    let base = base(&cache, &kernel)?;

    let directory = tempfile::tempdir().context("cannot make a temporary directory")?;
    let at = |name: &str| directory.path().join(name);
    // The kernel takes archives one behind the other; the first has a length that is a multiple of four.
    let mut initrd = fs::read(&base).with_context(|| format!("cannot read {}", base.display()))?;
    initrd.extend(payload(emulation)?);
    fs::write(at("initrd"), initrd).context("cannot write the initial RAM file system")?;

    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args([
        "-accel",
        "tcg,thread=multi",
        "-M",
        "q35",
        "-cpu",
        "EPYC,+svm,+npt,-cx16",
    ])
    .args(["-display", "none", "-nodefaults", "-no-user-config", "-no-reboot"])
    .args([
        "-smp",
        &emulation.smp.to_string(),
        "-m",
        &emulation.memory.to_string(),
    ])
    .arg("-kernel")
    .arg(kernel.directory.join("vmlinux"))
    .arg("-initrd")
    .arg(at("initrd"))
    .args(["-append", COMMAND_LINE])
    .arg("-serial")
    .arg(format!("file:{}", at("console").display()))
    .args(["-chardev", "stdio,id=out,signal=off"])
    .arg("-chardev")
    .arg(format!("file,id=rc,path={}", at("rc").display()))
    .args([
        "-device",
        "virtio-serial-pci",
        "-device",
        "virtconsole,chardev=out",
    ])
    .args(["-device", "virtserialport,chardev=rc,name=rc"])
    .env("TMPDIR", directory.path())
    // It warns of each feature of the processor model that it cannot emulate; none of them is needed.
    .stderr(fs::File::create(at("stderr")).context("cannot make a file for QEMU's errors")?);
    let status = child::follow(&mut qemu, Duration::from_secs(emulation.timeout), line)
        .with_context(|| format!("the emulated host was ended{}", tail("console", &at("console"))))?;
    if !status.success() {
        bail!("QEMU failed ({status}){}", tail("messages", &at("stderr")));
    }
    let code = fs::read_to_string(at("rc")).unwrap_or_default();
    code.trim().parse().map_err(|_| {
        anyhow::anyhow!(
            "the emulated host ended without an exit status of the program{}",
            tail("console", &at("console"))
        )
    })
}

/// As a command: prints, and leaves with the program's status.
pub(crate) fn command(emulation: &Emulation) -> anyhow::Result<ExitCode> {
    run(emulation, |line| println!("{line}")).map(ExitCode::from)
}

/// The archive that every emulated host of this kernel starts from.
fn base(cache: &Cache, kernel: &Kernel) -> anyhow::Result<PathBuf> {
    let busybox = fs::read("/usr/bin/busybox").context("cannot read /usr/bin/busybox")?;
    let key = Key::default()
        .with(kernel.directory.as_os_str().as_encoded_bytes())
        .with(&busybox)
        .with(INIT)
        .with(MAIN)
        .with(HOST_MODULES.join(" "));
    let directory = cache.entry("emulated", "x86_64", &key, |target| {
        let mut archive = Archive::default();
        archive.file("bin/busybox", 0o755, &busybox)?;
        archive.file("init", 0o755, INIT.as_bytes())?;
        archive.file("main", 0o755, MAIN.as_bytes())?;
        archive.character_device("dev/console", 0o600, 5, 1)?;
        for directory in [
            "etc", "proc", "root", "run", "sys", "tmp", "usr/bin", "usr/sbin", "sbin",
        ] {
            archive.directory(directory)?;
        }
        archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
        archive.file("etc/group", 0o644, b"root:x:0:\n")?;
        archive.link("bin/sh", "busybox")?;
        let modules = modules::in_order(&kernel.directory.join("modules"), &HOST_MODULES)?;
        initramfs::add_modules(&mut archive, &modules)?;
        fs::write(target.join("base.cpio"), archive.finish()?)?;
        Ok(())
    })?;
    Ok(directory.join("base.cpio"))
}

/// The archive with the program, its files, and a script that starts it.
fn payload(emulation: &Emulation) -> anyhow::Result<Vec<u8>> {
    let (program, arguments) = emulation.command.split_first().context("no program given")?;
    let program = Path::new(program);
    let content =
        fs::read(program).with_context(|| format!("cannot read the program {}", program.display()))?;
    check_program(program, &content)?;
    let base = program
        .file_name()
        .and_then(|name| name.to_str())
        .context("the program's name is not UTF-8")?;
    let mut archive = Archive::default();
    let inside = format!("/programs/{base}");
    archive.file(&inside, 0o755, &content)?;
    for (source, target) in &emulation.file {
        archive.tree(source, target)?;
    }
    let mut script = "#!/bin/sh\ncd /programs\n".to_owned();
    for (name, value) in &emulation.env {
        script.push_str(&format!("export {name}={}\n", quote(value)));
    }
    script.push_str("exec ");
    script.push_str(&quote(&inside));
    for argument in arguments {
        script.push(' ');
        script.push_str(&quote(argument));
    }
    script.push('\n');
    archive.file("/program", 0o755, script.as_bytes())?;
    archive.finish()
}

/// A program that needs a loader would fail inside with a message that says nothing.
fn check_program(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    if content.starts_with(b"#!") {
        return Ok(());
    }
    let file = ElfBytes::<AnyEndian>::minimal_parse(content)
        .with_context(|| format!("{} is neither an ELF file nor a script", path.display()))?;
    let needs_loader = file
        .segments()
        .is_some_and(|segments| segments.iter().any(|segment| segment.p_type == PT_INTERP));
    if needs_loader {
        bail!(
            "{} is linked dynamically and there is no loader in the emulated host; build it for {}",
            path.display(),
            setup::STATIC_TARGET
        );
    }
    Ok(())
}

/// A word that a shell reads as `text`.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// The end of a file of lines, to put behind an error.
fn tail(what: &str, path: &Path) -> String {
    let Ok(console) = fs::read(path) else {
        return String::new();
    };
    let console = String::from_utf8_lossy(&console);
    let lines: Vec<_> = console.lines().map(str::trim_end).collect();
    let tail = lines.get(lines.len().saturating_sub(TAIL)..).unwrap_or_default();
    if tail.is_empty() {
        return format!("; it left no {what}");
    }
    format!("; the end of its {what}:\n  {}\n", tail.join("\n  "))
}

fn parse_file(text: &str) -> Result<(PathBuf, String), String> {
    match text.split_once(':') {
        Some((source, target)) if !source.is_empty() && target.starts_with('/') => {
            Ok((source.into(), target.to_owned()))
        }
        _ => Err("it must be SRC:DST with an absolute DST".to_owned()),
    }
}

fn parse_variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value))
            if !name.is_empty()
                && !name.starts_with(|c: char| c.is_ascii_digit())
                && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') =>
        {
            Ok((name.to_owned(), value.to_owned()))
        }
        _ => Err("it must be KEY=VALUE".to_owned()),
    }
}

/// First process: loads modules and moves to a tmpfs, since the first file system cannot be pivoted away from.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /new
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in $(cat /modules.list); do
    insmod "/$module" || echo "emulated host: cannot load $module"
done
rm -rf /modules /modules.list
mount -t tmpfs -o mode=0755,size=90% tmpfs /new
for name in /*; do
    case "$name" in
        /proc | /sys | /dev | /new | /init) ;;
        *) mv "$name" /new/ ;;
    esac
done
cd /new
bin/busybox mkdir -p proc sys dev
for name in proc sys dev; do
    bin/busybox mount --move "/$name" "/new/$name"
done
exec bin/busybox switch_root /new /main
"#;

/// Second half: the rest of a host, then the program. Only the program has the stream of output open, so that
/// all of it has arrived when the program is gone.
const MAIN: &str = r#"#!/bin/sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=dumb
mkdir -p /dev/pts /dev/shm /run /tmp /programs
mount -t devpts -o mode=0620,ptmxmode=0666 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=0755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
hostname emulated-host
ip link set lo up
stty -F /dev/hvc0 raw -echo
/program </dev/null >/dev/hvc0 2>&1
code=$?
for port in /sys/class/virtio-ports/*; do
    if [ "$(cat "$port/name" 2>/dev/null)" = rc ]; then
        echo "$code" >"/dev/${port##*/}"
    fi
done
sync
reboot -f
"#;

/// What the host needs for its devices, for virtual machines, and for containers around them.
const HOST_MODULES: [&str; 9] = [
    "virtio_pci",
    "virtio_console",
    "kvm",
    "kvm-amd",
    "overlay",
    "tun",
    "veth",
    "bridge",
    "loop",
];
/// `no_timer_check`: the emulated timer is too slow for the check. No mitigations: nothing to protect, and slow.
const COMMAND_LINE: &str = "console=ttyS0 loglevel=4 panic=-1 mitigations=off nokaslr no_timer_check";
/// Lines of the console that an error shows.
const TAIL: usize = 30;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        let word = "it's $HOME; \"x\" \\";
        let out = child::output(
            Command::new("sh")
                .arg("-c")
                .arg(format!("printf %s {}", quote(word))),
        );
        assert_eq!(out.unwrap(), word);
    }

    #[test]
    fn a_dynamic_program_is_refused_and_says_what_to_do() {
        // The test itself is linked dynamically.
        let this = std::env::current_exe().unwrap();
        let err = check_program(&this, &fs::read(&this).unwrap()).unwrap_err();
        assert!(err.to_string().contains("linked dynamically"), "{err}");
        check_program(Path::new("x"), b"#!/bin/sh\n").unwrap();
        check_program(Path::new("x"), b"text").unwrap_err();
    }

    #[test]
    fn files_and_variables_are_parsed() {
        assert_eq!(parse_file("a:/b").unwrap(), ("a".into(), "/b".to_owned()));
        for wrong in ["a", "a:b", ":/b"] {
            parse_file(wrong).unwrap_err();
        }
        assert_eq!(
            parse_variable("A_1=b=c").unwrap(),
            ("A_1".to_owned(), "b=c".to_owned())
        );
        for wrong in ["A", "=b", "1A=b", "A B=c", "A;B=c"] {
            parse_variable(wrong).unwrap_err();
        }
    }
}
