//! What a guest boots: a kernel and the initial RAM file system that goes with it.
//!
//! Everything comes from the distribution's packages and this tree, and is kept in the [`Cache`] under the hash
//! of what it was made from.

pub(crate) mod apt;
mod boot;
pub(crate) mod cpio;
pub(crate) mod initramfs;
pub(crate) mod kernel_distro;
mod kernel_own;
pub(crate) mod modules;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::ValueEnum;

use crate::cache::{Cache, Key};
use crate::setup;
use apt::Apt;
pub(crate) use boot::check as boot_check;

/// Guest architectures.
#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum Arch {
    #[value(name = "x86_64")]
    X86_64,
}

/// Which kernels to prepare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Choice {
    /// The distribution's cloud kernel with modules: quick to get.
    Distro,
    /// Our configuration over the distribution's kernel source: quick to boot, some minutes to build.
    Own,
    /// Both of them.
    Both,
}

/// A kernel in the cache.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// Holds `vmlinux`; the distribution's also `vmlinuz` and `modules/`.
    pub(crate) directory: PathBuf,
    /// Its release, as `uname -r` says it.
    pub(crate) release: String,
    /// A short name for people and for the asset directory.
    pub(crate) name: &'static str,
}

/// A kernel and an initial RAM file system that boot together.
#[derive(Debug)]
pub(crate) struct Assets {
    /// Holds both, and a MANIFEST that says what they were made from.
    pub(crate) directory: PathBuf,
}

impl Assets {
    /// The kernel as an ELF file with a PVH entry, for our VMM and for QEMU.
    pub(crate) fn kernel(&self) -> PathBuf {
        self.directory.join("vmlinux")
    }

    /// The initial RAM file system.
    pub(crate) fn initramfs(&self) -> PathBuf {
        self.directory.join("initramfs.cpio")
    }
}

/// Prepares what `choice` names.
pub(crate) fn prepare(root: &Path, choice: Choice, Arch::X86_64: Arch) -> anyhow::Result<Vec<Assets>> {
    setup::guest_tools()?;
    let cache = Cache::open()?;
    let apt = Apt::open(&cache)?;
    let agent = initramfs::agent(root)?;
    let mut all = Vec::new();
    if choice != Choice::Own {
        let kernel = kernel_distro::newest(&cache, &apt)?;
        all.push(assemble(&cache, &kernel, &agent, &GUEST_MODULES)?);
    }
    if choice != Choice::Distro {
        let kernel = kernel_own::prepare(root, &cache, &apt)?;
        all.push(assemble(&cache, &kernel, &agent, &[])?);
    }
    Ok(all)
}

/// Prepares the one guest that `choice` names.
pub(crate) fn prepare_one(root: &Path, choice: Choice) -> anyhow::Result<Assets> {
    let all = prepare(root, choice, Arch::X86_64)?;
    all.into_iter().next_back().context("there is no such guest")
}

/// Puts a kernel and its initial RAM file system into one directory.
fn assemble(cache: &Cache, kernel: &Kernel, agent: &[u8], modules: &[&str]) -> anyhow::Result<Assets> {
    let key = Key::default()
        .with(kernel.directory.as_os_str().as_encoded_bytes())
        .with(agent)
        .with(modules.join(" "))
        .with(RECIPE);
    let name = format!("x86_64-{}", kernel.name);
    let directory = cache.entry("guest", &name, &key, |target| {
        for file in ["vmlinux", "vmlinuz"] {
            let source = kernel.directory.join(file);
            if source.exists() {
                // A second name of the same file: kernels are large, and neither directory is ever changed.
                fs::hard_link(&source, target.join(file))
                    .with_context(|| format!("cannot link {}", source.display()))?;
            }
        }
        let modules = modules::in_order(&kernel.directory.join("modules"), modules)?;
        fs::write(target.join("initramfs.cpio"), initramfs::write(agent, &modules)?)?;
        let names: Vec<_> = modules.iter().map(|module| module.name.as_str()).collect();
        fs::write(
            target.join("MANIFEST"),
            format!(
                "kernel {}\nrelease {}\nmodules {}\n",
                kernel.name,
                kernel.release,
                names.join(" ")
            ),
        )?;
        Ok(())
    })?;
    Ok(Assets { directory })
}

/// What the machine's devices and the agent need of a kernel built from modules; those built in are left out.
/// The connection to the host comes first, so that it is there when the agent dials.
const GUEST_MODULES: [&str; 12] = [
    "virtio_pci",
    "vmw_vsock_virtio_transport",
    "virtio_net",
    "virtio_blk",
    "virtio_balloon",
    "virtio_rng",
    "virtio_console",
    "virtiofs",
    "fuse",
    "overlay",
    "erofs",
    "ext4",
];
/// Changes when the same inputs are to give something else.
const RECIPE: &str = "1";
