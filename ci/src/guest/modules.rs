//! Kernel modules and the order to load them in.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use elf::ElfBytes;
use elf::endian::LittleEndian;

use crate::child;

/// A module as the kernel takes it.
#[derive(Debug)]
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) content: Vec<u8>,
}

/// Reads the modules `wanted` and all that they depend on from `tree`, dependencies first.
///
/// Those built into the kernel are left out. A kernel package has no list of dependencies, because that is made
/// when it is installed; each module names its own.
pub(crate) fn in_order(tree: &Path, wanted: &[&str]) -> anyhow::Result<Vec<Module>> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let mut files = BTreeMap::new();
    index(tree, &mut files)?;
    let built_in = fs::read_to_string(tree.join("modules.builtin"))
        .with_context(|| format!("cannot read modules.builtin in {}", tree.display()))?;
    let mut order = Order {
        files,
        built_in: built_in
            .lines()
            .filter_map(|line| name(Path::new(line)))
            .collect(),
        seen: BTreeSet::new(),
        modules: Vec::new(),
    };
    for module in wanted {
        order.visit(module)?;
    }
    Ok(order.modules)
}

struct Order {
    files: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
    seen: BTreeSet<String>,
    modules: Vec<Module>,
}

impl Order {
    fn visit(&mut self, module: &str) -> anyhow::Result<()> {
        let module = module.replace('-', "_");
        if self.built_in.contains(&module) || !self.seen.insert(module.clone()) {
            return Ok(());
        }
        let Some(path) = self.files.get(&module).cloned() else {
            bail!("the kernel has no module {module}, neither built in nor as a file");
        };
        let content = read(&path)?;
        for dependency in depends(&content).with_context(|| format!("cannot read {}", path.display()))? {
            self.visit(&dependency)?;
        }
        self.modules.push(Module {
            name: module,
            content,
        });
        Ok(())
    }
}

fn index(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> anyhow::Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))? {
        let path = entry?.path();
        if path.is_symlink() {
            continue; // "build" and "source" lead elsewhere
        }
        if path.is_dir() {
            index(&path, files)?;
        } else if let Some(name) = name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// The module's name from the name of its file, which may have a suffix for compression.
fn name(path: &Path) -> Option<String> {
    let (name, suffix) = path.file_name()?.to_str()?.split_once(".ko")?;
    matches!(suffix, "" | ".xz" | ".zst" | ".gz").then(|| name.replace('-', "_"))
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let program = match path.extension().and_then(|end| end.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(path).with_context(|| format!("cannot read {}", path.display())),
    };
    child::bytes(Command::new(program).args(["-dc"]).arg(path))
}

/// The `depends=` entry of a module's `.modinfo` section: names, separated by commas.
fn depends(module: &[u8]) -> anyhow::Result<Vec<String>> {
    let file = ElfBytes::<LittleEndian>::minimal_parse(module).context("not an ELF file")?;
    let section = file
        .section_header_by_name(".modinfo")
        .context("broken section headers")?
        .context("no .modinfo section")?;
    let (bytes, _) = file.section_data(&section).context("no .modinfo section")?;
    Ok(bytes
        .split(|byte| *byte == 0)
        .filter_map(|entry| std::str::from_utf8(entry).ok()?.strip_prefix("depends="))
        .flat_map(|names| names.split(','))
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_from_files_whatever_their_compression() {
        for (file, want) in [
            ("a/virtio-gpu.ko", Some("virtio_gpu")),
            ("a/overlay.ko.xz", Some("overlay")),
            ("a/modules.order", None),
            ("a/x.kobold", None),
        ] {
            assert_eq!(name(Path::new(file)).as_deref(), want, "{file}");
        }
    }

    #[test]
    fn a_module_that_is_nowhere_is_named() {
        let tree = tempfile::tempdir().unwrap();
        fs::write(tree.path().join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
        assert!(in_order(tree.path(), &["ext4"]).unwrap().is_empty());
        let err = in_order(tree.path(), &["zfs"]).unwrap_err();
        assert!(err.to_string().contains("no module zfs"), "{err}");
    }
}
