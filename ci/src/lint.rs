//! Checks of the tree. Each rule says in its message why it is there.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::{matrix, test};

/// Which crates of ours each crate may depend on. What is not listed may depend on none.
const MAY_DEPEND: [(&str, &[&str]); 14] = [
    ("caisson-arch-x86_64", &["caisson-arch"]),
    ("caisson-hal", &["caisson-arch"]),
    (
        "caisson-hal-kvm",
        &["caisson-hal", "caisson-arch", "caisson-arch-x86_64"],
    ),
    ("caisson-hal-native", &["caisson-hal", "caisson-hal-kvm"]),
    ("caisson-hal-scripted", &["caisson-hal", "caisson-arch"]),
    ("caisson-devices", &["caisson-hal", "caisson-arch"]),
    ("caisson-machine", &["caisson-wire", "caisson-devices"]),
    (
        "caisson-vmm",
        &[
            "caisson-arch",
            "caisson-arch-x86_64",
            "caisson-hal",
            "caisson-hal-scripted",
            "caisson-devices",
            "caisson-machine",
            "caisson-wire",
        ],
    ),
    (
        "caisson-qemu",
        &["caisson-devices", "caisson-machine", "caisson-wire"],
    ),
    ("caisson-net", &[]),
    ("caisson-sandbox", &["caisson-net", "caisson-wire"]),
    (
        "caisson",
        &[
            "caisson-arch",
            "caisson-hal",
            "caisson-hal-native",
            "caisson-machine",
            "caisson-vmm",
            "caisson-qemu",
            "caisson-sandbox",
            "caisson-wire",
        ],
    ),
    (
        "caisson-tests",
        &[
            "caisson-arch",
            "caisson-arch-x86_64",
            "caisson-hal",
            "caisson-hal-native",
        ],
    ),
    ("caisson-agent", &["caisson-wire"]),
];
/// Crates that one crate of ours alone may name, and the rule behind it.
const RESERVED: [(&str, &[&str], &str); 4] = [
    (
        "kvm-ioctls",
        &["caisson-hal-kvm"],
        "only hal/kvm may; use caisson-hal",
    ),
    (
        "mshv-ioctls",
        &["caisson-hal-mshv"],
        "only hal/mshv may; use caisson-hal",
    ),
    (
        "xhypervisor",
        &["caisson-hal-hvf"],
        "only hal/hvf may; use caisson-hal",
    ),
    (
        "anyhow",
        &["caisson", "caisson-ci"],
        "libraries have an error enum per operation; only binaries may erase errors",
    ),
];
/// Longest file without a reason, in lines.
const LONGEST: usize = 700;
/// Most `cfg` lines of the whole tree, tests not counted.
const CFG_BUDGET: usize = 60;
/// What the top level may hold, beside hidden files.
const TOP_LEVEL: [&str; 9] = [
    "Cargo.toml",
    "Cargo.lock",
    "LICENSE",
    "README.md",
    "hal",
    "arch",
    "runtime",
    "ci",
    "tests",
];

/// Runs all checks and reports every finding.
pub(crate) fn run(root: &Path) -> anyhow::Result<()> {
    let mut findings = dependencies(&metadata(root)?);
    let files = tracked(root)?;
    findings.extend(top_level(&files));
    findings.extend(matrix::findings(root, &test::names())?);
    let mut cfgs = 0;
    for file in files.iter().filter(|file| file.ends_with(".rs")) {
        let text = std::fs::read_to_string(root.join(file)).with_context(|| format!("cannot read {file}"))?;
        findings.extend(source(file, &text));
        cfgs += count_cfgs(&text);
    }
    println!("cfg lines outside tests: {cfgs} of {CFG_BUDGET}");
    if cfgs > CFG_BUDGET {
        findings.push(format!(
            "{cfgs} cfg lines; the budget is {CFG_BUDGET}: move conditions to module boundaries"
        ));
    }
    for finding in &findings {
        println!("lint: {finding}");
    }
    if !findings.is_empty() {
        bail!("{} findings", findings.len());
    }
    cargo(root, &["fmt", "--all", "--check"])?;
    cargo(
        root,
        &[
            "clippy",
            "--workspace",
            "--all-targets",
            "--quiet",
            "--",
            "-D",
            "warnings",
        ],
    )
}

fn metadata(root: &Path) -> anyhow::Result<Value> {
    let out = Command::new("cargo")
        .args(["metadata", "--format-version", "1", "--no-deps"])
        .current_dir(root)
        .output()
        .context("cannot run cargo metadata")?;
    if !out.status.success() {
        bail!(
            "cargo metadata failed: {}",
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    serde_json::from_slice(&out.stdout).context("cannot understand cargo metadata")
}

/// Arrows that point the wrong way, and crates named where they may not be.
fn dependencies(metadata: &Value) -> Vec<String> {
    let allowed: BTreeMap<_, _> = MAY_DEPEND.into_iter().collect();
    let mut findings = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let target = dependency["name"].as_str().unwrap_or_default();
            let may = allowed.get(name).copied().unwrap_or_default();
            if target.starts_with("caisson-") && !may.contains(&target) {
                findings.push(format!(
                    "{name} depends on {target}; it may depend on [{}] (see runtime/README.md, \"arrows\")",
                    may.join(", ")
                ));
            }
            for (reserved, owner, why) in RESERVED {
                if target == reserved && !owner.contains(&name) {
                    findings.push(format!("{name} depends on {target}; {why}"));
                }
            }
        }
    }
    findings
}

fn tracked(root: &Path) -> anyhow::Result<Vec<String>> {
    let out = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .context("cannot run git")?;
    if !out.status.success() {
        bail!(
            "git ls-files failed: {}",
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    let names = String::from_utf8_lossy(&out.stdout);
    Ok(names
        .lines()
        .filter(|name| root.join(name).is_file())
        .map(str::to_owned)
        .collect())
}

fn top_level(files: &[String]) -> Vec<String> {
    let mut names: Vec<_> = files.iter().filter_map(|file| file.split('/').next()).collect();
    names.dedup();
    let extra = names
        .into_iter()
        .filter(|name| !name.starts_with('.') && !TOP_LEVEL.contains(name));
    extra
        .map(|name| format!("{name} at the top level; it may hold {}", TOP_LEVEL.join(", ")))
        .collect()
}

/// Findings in one source file.
fn source(file: &str, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    let lines = text.lines().count();
    if lines > LONGEST && !text.contains("// LONG:") {
        findings.push(format!(
            "{file} has {lines} lines: split it, or say why it is one thing (// LONG: …)"
        ));
    }
    let in_sys = file.contains("/sys/") || file.contains("/os/") || file.contains("/native/");
    for (number, line) in text.lines().enumerate().map(|(at, line)| (at + 1, line.trim())) {
        let mut found = |why: &str| findings.push(format!("{file}:{number}: {why}"));
        if line.starts_with("//") {
            continue;
        }
        if is_cfg(line) && line.contains("target_arch") && !line.contains("// ARCH:") {
            found("say why this line is architecture-specific (// ARCH: …), or move it to arch/");
        }
        if is_cfg(line) && line.contains("target_os") && !in_sys {
            found("move this to a sys module and export one name");
        }
        if line.starts_with("#[ignore") {
            found("run the test or delete it; an ignored test protects nothing");
        }
        if line.contains(concat!("todo", "!(")) || line.contains(concat!("unimplemented", "!(")) {
            found("finish it, or leave the feature out");
        }
        if declares_a_vague_name(line) {
            found("name what it is, not that it manages");
        }
    }
    findings
}

fn is_cfg(line: &str) -> bool {
    ["#[cfg(", "#![cfg(", "#[cfg_attr(", "cfg!("]
        .iter()
        .any(|start| line.starts_with(start))
}

fn count_cfgs(text: &str) -> usize {
    text.lines()
        .map(str::trim)
        .filter(|line| is_cfg(line) && !line.contains("cfg(test)"))
        .count()
}

/// Whether a line declares a type whose name says only that it does something.
fn declares_a_vague_name(line: &str) -> bool {
    let mut words = line.split_whitespace().skip_while(|word| word.starts_with("pub"));
    let (Some("struct" | "enum" | "trait"), Some(name)) = (words.next(), words.next()) else {
        return false;
    };
    let name: String = name.chars().take_while(|c| c.is_alphanumeric()).collect();
    ["Manager", "Helper", "Util", "Inner"]
        .iter()
        .any(|end| name.ends_with(end))
}

fn cargo(root: &Path, arguments: &[&str]) -> anyhow::Result<()> {
    let status = Command::new("cargo")
        .args(arguments)
        .current_dir(root)
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("cargo {} failed", arguments.join(" "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn package(name: &str, dependencies: &[&str]) -> Value {
        let dependencies: Vec<_> = dependencies.iter().map(|name| json!({"name": name})).collect();
        json!({"packages": [{"name": name, "dependencies": dependencies}]})
    }

    #[test]
    fn an_arrow_that_points_up_is_found() {
        let found = dependencies(&package("caisson-devices", &["caisson-hal", "caisson-sandbox"]));
        assert_eq!(found.len(), 1);
        assert!(
            found[0].starts_with("caisson-devices depends on caisson-sandbox"),
            "{}",
            found[0]
        );
    }

    #[test]
    fn a_backend_outside_its_crate_is_found() {
        assert_eq!(
            dependencies(&package("caisson-sandbox", &["kvm-ioctls"])).len(),
            1
        );
        assert_eq!(
            dependencies(&package("caisson-hal-kvm", &["kvm-ioctls"])),
            Vec::<String>::new()
        );
    }

    #[test]
    fn each_rule_on_source_finds_its_line() {
        for (line, found) in [
            ("#[cfg(target_arch = \"x86_64\")]", true),
            (
                "#[cfg(target_arch = \"x86_64\")] // ARCH: ports exist there only",
                false,
            ),
            ("#[cfg(target_os = \"linux\")]", true),
            ("#[ignore = \"slow\"]", true),
            ("struct DeviceManager {", true),
            ("pub(crate) enum VmInner {", true),
            ("pub struct Managers;", false),
            ("// #[ignore] is not allowed", false),
        ] {
            assert_eq!(
                source("runtime/x/src/lib.rs", line).len(),
                usize::from(found),
                "{line}"
            );
        }
        assert!(source("hal/core/src/os/mod.rs", "#[cfg(target_os = \"linux\")]").is_empty());
    }

    #[test]
    fn a_long_file_needs_a_reason() {
        let long = "\n".repeat(LONGEST + 1);
        assert_eq!(source("a.rs", &long).len(), 1);
        assert_eq!(source("a.rs", &format!("// LONG: one table\n{long}")).len(), 0);
    }

    #[test]
    fn the_top_level_is_fixed() {
        let files = ["hal/core/src/lib.rs", ".ci/run", "docs/x.md"].map(str::to_owned);
        assert_eq!(top_level(&files).len(), 1);
    }
}
