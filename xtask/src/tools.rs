//! `./x tools`: the external programs, in a directory of their own, each behind a small wrapper.
//!
//! Everything is made beside its place and renamed into it, under a lock, so that a run that is
//! interrupted, or two at once, leave nothing half done.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use disksnap_test_support::tools::{TOOLS_ENV, find, tools_dir};

use crate::apt::{Apt, Libc, Package};
use crate::guest;

/// Raise it when what a tree holds, or how its wrappers look, changes.
const RECIPE: &str = "1";

/// A set of programs from one closure of packages.
struct Tree {
    /// The directory, and the name in `VERSIONS`.
    name: &'static str,
    /// Where the wrappers go, below the directory of the tools.
    bin: &'static str,
    suite: Option<&'static str>,
    packages: &'static [&'static str],
    /// Whether these packages do without what they depend on.
    alone: bool,
    programs: &'static [&'static str],
}

const TREES: [Tree; 4] = [
    Tree {
        name: "qemu-10.0",
        bin: "bin",
        suite: Some("bookworm-backports"),
        packages: &["qemu-system-x86", "qemu-utils", "libnbd-bin", "libxml2-utils"],
        alone: false,
        programs: &[
            "qemu-system-x86_64",
            "qemu-storage-daemon",
            "qemu-img",
            "qemu-io",
            "qemu-nbd",
            "nbdcopy",
            "nbdinfo",
            "xmllint",
        ],
    },
    Tree {
        name: "qemu-7.2",
        bin: "qemu-7.2/bin",
        suite: None,
        packages: &["qemu-system-x86", "qemu-utils"],
        alone: false,
        programs: &[
            "qemu-system-x86_64",
            "qemu-storage-daemon",
            "qemu-img",
            "qemu-io",
            "qemu-nbd",
        ],
    },
    Tree {
        // For the schemas of the documents, not for a program.
        name: "libvirt",
        bin: "libvirt/bin",
        suite: None,
        packages: &["libvirt0"],
        alone: true,
        programs: &[],
    },
    Tree {
        name: "file-systems",
        bin: "bin",
        suite: None,
        packages: &["btrfs-progs", "xfsprogs"],
        alone: false,
        programs: &["btrfs", "mkfs.btrfs", "mkfs.xfs", "xfs_repair"],
    },
];

/// Gets what is missing. Quick when all is there.
pub(crate) fn ensure() -> Result<()> {
    if std::env::var_os(TOOLS_ENV).is_some_and(|x| x == "system") {
        return check_system();
    }
    make(false)
}

/// Gets everything anew, in the versions the mirror has now.
pub(crate) fn renew() -> Result<()> {
    make(true)
}

/// The environment in which programs find the tools: `PATH`, and the variables by which disksnap and its
/// tests are told of a program or file elsewhere than in the system's directories. What the caller has
/// set stays.
pub(crate) fn environment() -> Result<Vec<(&'static str, OsString)>> {
    if std::env::var_os(TOOLS_ENV).is_some_and(|x| x == "system") {
        return Ok(Vec::new());
    }
    let dir = tools_dir();
    let bin = dir.join("bin");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::iter::once(bin.clone()).chain(std::env::split_paths(&path));
    let mut variables = vec![("PATH", std::env::join_paths(path)?)];
    let known = [
        ("DISKSNAP_QEMU_IMG", bin.join("qemu-img")),
        (
            "DISKSNAP_LIBVIRT_SCHEMAS",
            dir.join("libvirt/root/usr/share/libvirt/schemas"),
        ),
    ];
    let unset = known
        .into_iter()
        .filter(|(name, _)| std::env::var_os(name).is_none());
    variables.extend(unset.map(|(name, path)| (name, path.into_os_string())));
    Ok(variables)
}

fn check_system() -> Result<()> {
    let missing: Vec<_> = TREES[0]
        .programs
        .iter()
        .filter(|x| **x != "xmllint" && find(x).is_none())
        .collect();
    ensure!(
        missing.is_empty(),
        "{TOOLS_ENV}=system, but these are not on PATH: {missing:?}"
    );
    println!("using the programs on PATH, since {TOOLS_ENV}=system");
    Ok(())
}

fn make(fresh: bool) -> Result<()> {
    let dir = tools_dir();
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    // Absolute from here on: programs are started in other directories.
    let dir = dir
        .canonicalize()
        .with_context(|| format!("no {}", dir.display()))?;
    let lock = File::create(dir.join(".lock")).context("cannot make the lock file")?;
    lock.lock().context("cannot take the lock file")?;
    if fresh {
        for tree in &TREES {
            let _ = fs::remove_file(dir.join(tree.name).join("STAMP"));
        }
        guest::forget(&dir);
    }
    let mut apt = Lazy { dir: &dir, apt: None };
    for tree in &TREES {
        if !has_stamp(&dir.join(tree.name), &tree.stamp()) {
            tree.make(&dir, apt.get()?)
                .with_context(|| format!("{} was not made", tree.name))?;
        }
    }
    if !has_stamp(&guest::dir(&dir), &guest::stamp()) {
        guest::make(&dir, apt.get()?).context("the test guest was not made")?;
    }
    if apt.apt.is_some() {
        report(&dir)?;
    }
    Ok(())
}

/// The package lists are fetched only when something is to be made.
struct Lazy<'a> {
    dir: &'a Path,
    apt: Option<Apt>,
}

impl Lazy<'_> {
    fn get(&mut self) -> Result<&Apt> {
        if self.apt.is_none() {
            let arch = std::env::consts::ARCH;
            ensure!(
                arch == "x86_64",
                "the programs are for x86_64, and this machine is {arch}"
            );
            println!("getting programs into {} (once)", self.dir.display());
            self.apt = Some(Apt::new(&self.dir.join("apt"))?);
        }
        self.apt.as_ref().context("apt was just set up")
    }
}

/// Whether a finished directory holds what this stamp describes.
fn has_stamp(dir: &Path, stamp: &str) -> bool {
    fs::read_to_string(dir.join("STAMP")).is_ok_and(|x| x == stamp)
}

/// Puts a directory made beside its place into it. The old one goes only then.
pub(crate) fn install(new: &Path, place: &Path, stamp: &str) -> Result<()> {
    fs::write(new.join("STAMP"), stamp)?;
    let old = place.with_extension("old");
    let _ = fs::remove_dir_all(&old);
    if place.exists() {
        fs::rename(place, &old)?;
    }
    fs::rename(new, place)?;
    let _ = fs::remove_dir_all(&old);
    Ok(())
}

/// What came, one line a package, in the directory itself.
pub(crate) fn write_versions(dir: &Path, packages: &[Package]) -> Result<()> {
    let lines = packages.iter().map(|x| format!("{} {}\n", x.name, x.version));
    Ok(fs::write(dir.join("VERSIONS"), lines.collect::<String>())?)
}

/// An empty directory beside `place`, to make its next contents in.
pub(crate) fn beside(place: &Path) -> Result<std::path::PathBuf> {
    let new = place.with_extension("new");
    let _ = fs::remove_dir_all(&new);
    fs::create_dir_all(&new).with_context(|| format!("cannot make {}", new.display()))?;
    Ok(new)
}

impl Tree {
    fn stamp(&self) -> String {
        format!(
            "{RECIPE} {:?} {:?} {:?}\n",
            self.suite, self.packages, self.programs
        )
    }

    fn make(&self, dir: &Path, apt: &Apt) -> Result<()> {
        println!("  {}", self.name);
        let place = dir.join(self.name);
        let new = beside(&place)?;
        let mut packages = apt.resolve(self.packages, self.suite)?;
        if self.alone {
            packages.retain(|x| self.packages.contains(&x.name.as_str()));
        }
        let unpacked = new.join("root");
        apt.unpack(&packages, Libc::System, &unpacked)?;
        write_versions(&new, &packages)?;
        for program in self.programs {
            program_dir(&unpacked, program)?;
        }
        // The wrappers come before the stamp: what is stamped is complete.
        if self.bin.starts_with(self.name) {
            self.write_wrappers(&new.join("bin"), &unpacked, "../root")?;
        } else {
            let root = format!("../{}/root", self.name);
            self.write_wrappers(&dir.join(self.bin), &unpacked, &root)?;
        }
        install(&new, &place, &self.stamp())
    }

    /// `root` is where the wrappers find what is `unpacked`, from their own directory.
    fn write_wrappers(&self, bin: &Path, unpacked: &Path, root: &str) -> Result<()> {
        fs::create_dir_all(bin)?;
        for program in self.programs {
            let new = bin.join(format!(".{program}"));
            let dir = program_dir(unpacked, program)?;
            fs::write(&new, wrapper(dir, program, root))?;
            fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
            fs::rename(&new, bin.join(program))?;
        }
        Ok(())
    }
}

/// Where in an unpacked tree a program is.
fn program_dir(root: &Path, program: &str) -> Result<&'static str> {
    let dirs = ["usr/bin", "usr/sbin", "bin", "sbin"];
    let found = dirs.into_iter().find(|dir| root.join(dir).join(program).exists());
    found.with_context(|| format!("the packages have no {program}"))
}

/// Finds the tree from its own place, so that the directory can be moved or mounted elsewhere.
fn wrapper(dir: &str, program: &str, root: &str) -> String {
    let firmware = match program {
        "qemu-system-x86_64" => {
            " -L \"$r/usr/share/qemu\" -L \"$r/usr/share/seabios\" -L \"$r/usr/lib/ipxe/qemu\""
        }
        _ => "",
    };
    format!(
        "#!/bin/sh\nr=${{0%/*}}/{root}\nl=lib/x86_64-linux-gnu\n\
         export LD_LIBRARY_PATH=\"$r/usr/$l:$r/$l${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}\"\n\
         export QEMU_MODULE_DIR=\"$r/usr/$l/qemu\"\n\
         exec \"$r/{dir}/{program}\"{firmware} \"$@\"\n"
    )
}

/// Writes `VERSIONS` for the whole and prints the packages that were asked for.
fn report(dir: &Path) -> Result<()> {
    let mut all = String::new();
    let names = TREES
        .iter()
        .map(|x| (x.name, x.packages))
        .chain([("guest", guest::PACKAGES)]);
    for (name, asked) in names {
        let versions = fs::read_to_string(dir.join(name).join("VERSIONS"))?;
        for line in versions.lines() {
            all.extend([name, " ", line, "\n"]);
            if asked.iter().any(|x| line.split(' ').next() == Some(x)) {
                println!("    {name}: {line}");
            }
        }
    }
    fs::write(dir.join("VERSIONS"), all)?;
    println!("  every version: {}", dir.join("VERSIONS").display());
    Ok(())
}
