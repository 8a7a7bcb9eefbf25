//! The test guest: Debian's cloud kernel and an initrd with the real guest agent, made without root.
//!
//! `vmlinux` and `initrd.img` are the small guest, which boots in seconds and has no root disk.
//! `lvm-initrd.img` is another, for the same kernel, that has LVM and runs what a test puts into it;
//! `machine-initrd.img` is what is appended to it where a test runs a QEMU inside that guest.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::apt::{Apt, Libc};
use crate::initrd::Initrd;
use crate::kernel;
use crate::tools::{beside, install, write_versions};

/// Raise it when the way of building changes; a change of the sources below is noticed by itself.
const RECIPE: &str = "2";

/// What is asked of Debian for the initrd. `usr-is-merged` keeps perl out.
pub(crate) const PACKAGES: &[&str] = &[
    "busybox-static",
    "e2fsprogs",
    "qemu-guest-agent",
    "util-linux",
    "usr-is-merged",
    "xfsprogs",
];

/// A package that depends on the current kernel for virtual machines.
const KERNEL: &str = "linux-image-cloud-amd64";

const PROGRAMS: &[&str] = &["busybox", "mke2fs", "mkfs.xfs", "qemu-ga", "blkdiscard"];

/// Loaded at boot, in this order; XFS only where it is wanted. Those that are built into the kernel are not in the initrd.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_scsi",
    "sd_mod",
    "virtio_console",
    "ext4",
    "crc32c_generic",
    "xfs",
];

const INIT: &str = include_str!("../guest/init.sh");
const WRITER: &str = include_str!("../guest/writer.rs");

/// What is asked of Debian for the guest that has LVM; the storage daemon comes from backports.
const LVM_PACKAGES: &[&str] = &[
    "btrfs-progs",
    "busybox-static",
    "e2fsprogs",
    "libgcc-s1",
    "lvm2",
    "qemu-system-x86",
    "qemu-utils",
    "thin-provisioning-tools",
    "usr-is-merged",
    "util-linux",
];

const LVM_PROGRAMS: &[&str] = &[
    "blkdiscard",
    "btrfs",
    "busybox",
    "dmsetup",
    "e2fsck",
    "lvm",
    "mke2fs",
    "mkfs.btrfs",
    "pdata_tools",
    "qemu-img",
    "qemu-io",
    "qemu-storage-daemon",
];

/// What the tests' programs, which come from the host, need besides what the programs above do.
const LVM_LIBRARIES: &[&str] = &["libgcc_s.so.1", "libm.so.6"];

const LVM_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "dm_mod",
    "dm_snapshot",
    "dm_thin_pool",
    "loop",
    "fuse",
    "crc32c_generic",
    "btrfs",
];

/// What runs a machine inside the guest, apart from the rest since few tests want it.
const MACHINE_PROGRAMS: &[&str] = &["qemu-system-x86_64"];

/// What a machine without a display or network starts with: where it is in the packages. All go into one directory.
const FIRMWARE: &[&str] = &["usr/share/seabios/bios-256k.bin", "usr/share/qemu/kvmvapic.bin"];

const LVM_INIT: &str = include_str!("../guest/lvm-init.sh");
const RUNNER: &str = include_str!("../guest/runner.rs");

/// Where it is, below the directory of the tools.
pub(crate) fn dir(tools: &Path) -> PathBuf {
    tools.join("guest")
}

/// Tells one state of the sources from another.
pub(crate) fn stamp() -> String {
    let small = format!("{PACKAGES:?} {KERNEL} {PROGRAMS:?} {MODULES:?} {INIT} {WRITER}");
    let lvm =
        format!("{LVM_PACKAGES:?} {LVM_PROGRAMS:?} {LVM_LIBRARIES:?} {LVM_MODULES:?} {LVM_INIT} {RUNNER}");
    let machine = format!("{MACHINE_PROGRAMS:?} {FIRMWARE:?}");
    let sources = format!("{RECIPE} {small} {lvm} {machine}");
    let digest = Sha256::digest(sources.as_bytes());
    digest
        .iter()
        .fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

/// Has it made anew next time.
pub(crate) fn forget(tools: &Path) {
    // Not being there is as good.
    let _ = fs::remove_file(dir(tools).join("STAMP"));
}

/// Makes it.
pub(crate) fn make(tools: &Path, apt: &Apt) -> Result<()> {
    println!("  guest");
    let new = beside(&dir(tools))?;
    let [root, lvm_root, kernel] = ["root", "lvm-root", "kernel"].map(|x| new.join(x));
    let packages = apt.resolve(PACKAGES, None)?;
    apt.unpack(&packages, Libc::Own, &root)?;
    let lvm_packages = apt.resolve(LVM_PACKAGES, Some("bookworm-backports"))?;
    apt.unpack(&lvm_packages, Libc::Own, &lvm_root)?;
    let all = apt.resolve(&[KERNEL], None)?;
    let image: Vec<_> = all.iter().filter(|x| is_kernel(&x.name)).cloned().collect();
    ensure!(image.len() == 1, "{KERNEL} depends on {} kernels", image.len());
    apt.unpack(&image, Libc::System, &kernel)?;

    make_kernel(&kernel, &new)?;
    let modules = ["lib/modules", "usr/lib/modules"].map(|x| kernel.join(x));
    let modules = modules.iter().find(|x| x.is_dir());
    let modules = modules.context("the kernel's package has no modules")?;
    make_initrd(&root, modules, &new)?;
    make_lvm_initrd(&lvm_root, modules, &new)?;
    make_machine_initrd(&lvm_root, &new)?;
    let mut all = [packages, image, lvm_packages].concat();
    all.sort_by(|a, b| (&a.name, &a.version).cmp(&(&b.name, &b.version)));
    all.dedup();
    write_versions(&new, &all)?;
    for tree in [&root, &lvm_root, &kernel] {
        fs::remove_dir_all(tree)?;
    }
    install(&new, &dir(tools), &stamp())
}

/// `linux-image-6.1.0-40-cloud-amd64`, not the package that depends on it.
fn is_kernel(name: &str) -> bool {
    name.strip_prefix("linux-image-")
        .is_some_and(|x| x.starts_with(|c: char| c.is_ascii_digit()))
}

fn make_kernel(tree: &Path, new: &Path) -> Result<()> {
    let boot = fs::read_dir(tree.join("boot")).context("the kernel's package has no /boot")?;
    let files = boot.filter_map(|x| Some(x.ok()?.path()));
    let is_image = |x: &PathBuf| {
        x.file_name()
            .is_some_and(|x| x.to_string_lossy().starts_with("vmlinuz-"))
    };
    let image = files
        .into_iter()
        .find(is_image)
        .context("the kernel's package has no vmlinuz")?;
    let kernel =
        kernel::vmlinux(&fs::read(&image)?).with_context(|| format!("cannot unpack {}", image.display()))?;
    Ok(fs::write(new.join("vmlinux"), kernel)?)
}

fn make_initrd(root: &Path, modules: &Path, new: &Path) -> Result<()> {
    let mut initrd = with_programs(root, PROGRAMS)?;
    initrd.modules(modules, MODULES)?;
    initrd.file("bin/guest-writer", compile(WRITER, new)?);
    initrd.file("init", INIT.as_bytes().to_vec());
    initrd.write(&new.join("initrd.img"))
}

fn make_lvm_initrd(root: &Path, modules: &Path, new: &Path) -> Result<()> {
    let mut initrd = with_programs(root, LVM_PROGRAMS)?;
    for library in LVM_LIBRARIES {
        initrd.library(root, library)?;
    }
    initrd.modules(modules, LVM_MODULES)?;
    initrd.file("bin/guest-runner", compile(RUNNER, new)?);
    initrd.file("init", LVM_INIT.as_bytes().to_vec());
    initrd.write(&new.join("lvm-initrd.img"))
}

fn make_machine_initrd(root: &Path, new: &Path) -> Result<()> {
    let mut initrd = Initrd::default();
    for program in MACHINE_PROGRAMS {
        initrd.program(root, program)?;
    }
    for path in FIRMWARE {
        let name = path.rsplit('/').next().unwrap_or(path);
        let contents = fs::read(root.join(path)).with_context(|| format!("the packages have no {path}"))?;
        initrd.file(&format!("usr/share/qemu/{name}"), contents);
    }
    initrd.write(&new.join("machine-initrd.img"))
}

fn with_programs(root: &Path, programs: &[&str]) -> Result<Initrd> {
    let mut initrd = Initrd::default();
    for path in ["dev", "proc", "sys", "run", "mnt", "tmp", "etc"] {
        initrd.directory(path);
    }
    for program in programs {
        initrd.program(root, program)?;
    }
    Ok(initrd)
}

/// Built with the compiler at hand, and static: the target for musl is seldom installed.
fn compile(text: &str, new: &Path) -> Result<Vec<u8>> {
    let (source, program) = (new.join("program.rs"), new.join("program"));
    fs::write(&source, text)?;
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let flags = ["--edition=2024", "-O", "-Cpanic=abort", "-Cstrip=symbols"];
    let output = Command::new(rustc)
        .args(flags)
        .args(["-Ctarget-feature=+crt-static", "-o"])
        .args([&program, &source])
        .output()
        .context("cannot start rustc")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "a program of the guest does not build: {errors}"
    );
    let built = fs::read(&program)?;
    fs::remove_file(source)?;
    fs::remove_file(program)?;
    Ok(built)
}
