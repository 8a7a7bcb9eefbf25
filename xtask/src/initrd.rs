//! An initrd in the making: files with the libraries they need, kernel modules with the ones they need.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use cpio::newc::{Builder, trailer};

const LIBRARIES: &str = "lib/x86_64-linux-gnu";

/// What the archive will hold: path without leading slash → mode and contents.
#[derive(Debug, Default)]
pub(crate) struct Initrd {
    entries: BTreeMap<String, (u32, Vec<u8>)>,
}

impl Initrd {
    /// An empty directory, and those above it.
    pub(crate) fn directory(&mut self, path: &str) {
        let mut above = String::new();
        for part in path.split('/') {
            if !above.is_empty() {
                above.push('/');
            }
            above.push_str(part);
            self.entries
                .entry(above.clone())
                .or_insert_with(|| (0o040_755, Vec::new()));
        }
    }

    /// A file that may be executed.
    pub(crate) fn file(&mut self, path: &str, contents: Vec<u8>) {
        if let Some((dir, _)) = path.rsplit_once('/') {
            self.directory(dir);
        }
        self.entries.insert(path.to_owned(), (0o100_755, contents));
    }

    /// A program from an unpacked `root`, in `/bin`, with its loader and libraries.
    pub(crate) fn program(&mut self, root: &Path, name: &str) -> Result<()> {
        let found = ["usr/bin", "usr/sbin", "bin", "sbin"].map(|dir| root.join(dir).join(name));
        let path = found.iter().find(|x| x.is_file());
        let path = path.with_context(|| format!("the packages have no program {name}"))?;
        self.elf(root, path, &format!("bin/{name}"))
    }

    /// A library that no program here names, with those it needs.
    pub(crate) fn library(&mut self, root: &Path, name: &str) -> Result<()> {
        let place = format!("{LIBRARIES}/{name}");
        if self.entries.contains_key(&place) {
            return Ok(());
        }
        self.elf(root, &library(root, name)?, &place)
    }

    fn elf(&mut self, root: &Path, from: &Path, to: &str) -> Result<()> {
        let contents = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        let elf = goblin::elf::Elf::parse(&contents)
            .with_context(|| format!("{} is no program", from.display()))?;
        let needed: Vec<String> = elf.libraries.iter().map(|x| (*x).to_owned()).collect();
        let loader = elf.interpreter.map(|x| x.trim_start_matches('/').to_owned());
        self.file(to, contents);
        for name in needed {
            self.library(root, &name)?;
        }
        if let Some(loader) = loader
            && !self.entries.contains_key(&loader)
        {
            let name = loader.rsplit('/').next().unwrap_or(&loader).to_owned();
            self.elf(root, &library(root, &name)?, &loader)?;
        }
        Ok(())
    }

    /// Kernel modules from the tree of a kernel package, in `/modules`, with those they depend on, and
    /// the order to load them in.
    pub(crate) fn modules(&mut self, tree: &Path, names: &[&str]) -> Result<()> {
        let mut files = BTreeMap::new();
        collect_modules(tree, &mut files)?;
        ensure!(!files.is_empty(), "no kernel modules in {}", tree.display());
        let mut order = Vec::new();
        for name in names {
            // What is no module is built into the kernel; the guest says so if it is neither.
            self.module(&files, name, &mut order)?;
        }
        self.file("modules/order", order.join("").into_bytes());
        Ok(())
    }

    fn module(
        &mut self,
        files: &BTreeMap<String, PathBuf>,
        name: &str,
        order: &mut Vec<String>,
    ) -> Result<()> {
        let line = format!("{name}.ko\n");
        let Some(path) = files.get(name) else {
            return Ok(());
        };
        if order.contains(&line) {
            return Ok(());
        }
        let contents = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        for depended in depends(&contents) {
            self.module(files, &depended, order)?;
        }
        self.file(&format!("modules/{name}.ko"), contents);
        order.push(line);
        Ok(())
    }

    /// Writes it in the `newc` form, as the kernel reads it.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let mut out = Vec::new();
        for (inode, (name, (mode, contents))) in (1..).zip(&self.entries) {
            let size = u32::try_from(contents.len()).context("a file is too big for an initrd")?;
            let links = if mode & 0o040_000 == 0 { 1 } else { 2 };
            let entry = Builder::new(name).ino(inode).mode(*mode).nlink(links);
            let mut writer = entry.write(&mut out, size);
            std::io::Write::write_all(&mut writer, contents)?;
            writer.finish()?;
        }
        let out = trailer(out)?;
        fs::write(path, out).with_context(|| format!("cannot write {}", path.display()))
    }
}

fn library(root: &Path, name: &str) -> Result<PathBuf> {
    let dirs = ["usr/lib/x86_64-linux-gnu", LIBRARIES, "lib64", "usr/lib64"];
    let found = dirs
        .map(|dir| root.join(dir).join(name))
        .into_iter()
        .find(|x| x.is_file());
    found.with_context(|| format!("the packages have no library {name}"))
}

fn collect_modules(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() && !path.is_symlink() {
            collect_modules(&path, files)?;
        } else if path.extension().is_some_and(|x| x == "ko")
            && let Some(stem) = path.file_stem().and_then(|x| x.to_str())
        {
            files.insert(stem.replace('-', "_"), path);
        }
    }
    Ok(())
}

/// The modules that this one's `.modinfo` section says must be loaded first.
fn depends(module: &[u8]) -> Vec<String> {
    let Ok(elf) = goblin::elf::Elf::parse(module) else {
        return Vec::new();
    };
    let info = elf
        .section_headers
        .iter()
        .find(|section| elf.shdr_strtab.get_at(section.sh_name) == Some(".modinfo"));
    let data = info.and_then(|x| module.get(x.file_range()?)).unwrap_or_default();
    let mut fields = data.split(|x| *x == 0);
    let value = fields
        .find_map(|x| x.strip_prefix(b"depends="))
        .unwrap_or_default();
    let names = value.split(|x| *x == b',').filter(|x| !x.is_empty());
    names
        .map(|x| String::from_utf8_lossy(x).replace('-', "_"))
        .collect()
}
