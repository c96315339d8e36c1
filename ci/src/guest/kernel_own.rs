//! Our own kernel: the distribution's source with our configuration, no modules.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use super::Kernel;
use super::apt::Apt;
use crate::cache::{Cache, Key};
use crate::{child, setup};

/// Builds the kernel, unless the cache has it.
pub(crate) fn prepare(root: &Path, cache: &Cache, apt: &Apt) -> anyhow::Result<Kernel> {
    let mut config = String::new();
    for part in ["common.config", "x86_64.config"] {
        let path = root.join("ci/guest/kernel").join(part);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        config.push_str(&text);
    }
    let source = apt.find(SOURCE, apt.newest())?;
    let key = Key::default().with(&source.version).with(&config).with(RECIPE);
    let directory = cache.entry("kernels", "x86_64-own", &key, |target| {
        setup::kernel_build_tools()?;
        println!("building a kernel from {} {}", source.name, source.version);
        let begun = Instant::now();
        let tree = tempfile::tempdir_in(target)?;
        apt.unpack(&source, tree.path())?;
        let archive = tree.path().join(format!("usr/src/{SOURCE}.tar.xz"));
        child::output(
            Command::new("tar")
                .arg("-xf")
                .arg(&archive)
                .arg("-C")
                .arg(tree.path()),
        )?;
        fs::remove_file(&archive)?;
        build(&tree.path().join(SOURCE), &config, target)?;
        println!("built in {} s", begun.elapsed().as_secs());
        Ok(())
    })?;
    let release = fs::read_to_string(directory.join("release")).context("the kernel has no release")?;
    Ok(Kernel {
        directory,
        release,
        name: "own",
    })
}

fn build(source: &Path, config: &str, target: &Path) -> anyhow::Result<()> {
    let wanted = source.join("caisson.config");
    fs::write(&wanted, config)?;
    let make = |arguments: &[&str]| {
        let mut command = Command::new("nice");
        command
            .args(["make", "--silent"])
            .args(arguments)
            .current_dir(source)
            // The same inputs give the same file.
            .env("KBUILD_BUILD_TIMESTAMP", "1970-01-01")
            .env("KBUILD_BUILD_USER", "caisson")
            .env("KBUILD_BUILD_HOST", "caisson");
        command
    };
    let all = format!("KCONFIG_ALLCONFIG={}", wanted.display());
    child::output(&mut make(&[&all, "allnoconfig"]))?;
    let made = fs::read_to_string(source.join(".config")).context("make allnoconfig wrote no .config")?;
    let lost = lost(config, &made);
    if !lost.is_empty() {
        bail!(
            "these lines of ci/guest/kernel/*.config have no effect in this kernel, because of what they depend on: {}",
            lost.join(", ")
        );
    }
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let status = child::follow(
        &mut make(&[&format!("-j{jobs}"), "vmlinux"]),
        BUILD_LIMIT,
        |line| println!("{line}"),
    )?;
    if !status.success() {
        bail!("the kernel does not build");
    }
    child::output(
        Command::new("strip")
            .arg("--strip-all")
            .arg("-o")
            .arg(target.join("vmlinux"))
            .arg(source.join("vmlinux")),
    )?;
    let release = child::output(&mut make(&["kernelrelease"]))?;
    fs::write(target.join("release"), release.trim())?;
    fs::write(target.join("config"), made)?;
    Ok(())
}

/// The lines of `wanted` that `made` does not have.
fn lost(wanted: &str, made: &str) -> Vec<String> {
    let has = |line: &str| made.lines().any(|other| other == line);
    wanted
        .lines()
        .filter(|line| match line.strip_prefix("# CONFIG_") {
            // An option that is off may also be one that the kernel does not offer.
            Some(rest) => rest
                .strip_suffix(" is not set")
                .is_some_and(|name| made.contains(&format!("\nCONFIG_{name}="))),
            None => line.starts_with("CONFIG_") && !has(line),
        })
        .map(str::to_owned)
        .collect()
}

/// The kernel's source as a package.
const SOURCE: &str = "linux-source-6.12";
/// Longest time for the build; about six minutes on two free cores.
const BUILD_LIMIT: Duration = Duration::from_secs(45 * 60);
/// Changes when the same inputs are to give something else.
const RECIPE: &str = "1";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_without_effect_are_found() {
        let made = "# head\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=y\n";
        let wanted = "# about A\nCONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\n# CONFIG_D is not set\n";
        assert_eq!(lost(wanted, made), ["CONFIG_B=y", "# CONFIG_C is not set"]);
    }
}
