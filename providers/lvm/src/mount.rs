//! The file system that an image file is in: on which device it lies, and where the file is inside it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

/// Where a file is inside a file system on a block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Inside {
    /// The device's number, `MAJOR:MINOR`.
    pub(crate) number: String,
    /// The path from the file system's root, with a leading slash.
    pub(crate) path: PathBuf,
    /// `ext4`, `btrfs`, …
    pub(crate) kind: String,
}

/// One line of `/proc/self/mountinfo` (proc(5)), as far as it matters.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    number: String,
    root: PathBuf,
    point: PathBuf,
    kind: String,
    device: PathBuf,
}

/// Finds it for a file whose path is absolute and without links.
pub(crate) fn inside(file: &Path) -> Result<Inside, String> {
    let shown = file.display();
    let failed =
        |error: &dyn std::fmt::Display| format!("cannot tell which file system {shown} is on: {error}");
    let found = statx(
        CWD,
        file,
        AtFlags::empty(),
        StatxFlags::BASIC_STATS | StatxFlags::MNT_ID,
    );
    let found = found.map_err(|e| failed(&e))?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|e| failed(&e))?;
    let id = found.stx_mnt_id.to_string();
    let line = mounts.lines().find(|line| line.split(' ').next() == Some(&id));
    let mount = line
        .and_then(parse)
        .ok_or_else(|| failed(&"its mount is not in /proc/self/mountinfo"))?;
    let rest = file
        .strip_prefix(&mount.point)
        .map_err(|_| failed(&"it is mounted over"))?;
    let number = if mount.number.starts_with("0:") {
        // btrfs gives no device's number here; the device that it was mounted by is one of its devices.
        let device = mount
            .device
            .metadata()
            .map_err(|_| format!("{shown} is not on a block device"))?;
        let number = device.rdev();
        format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number))
    } else {
        mount.number.clone()
    };
    if mount.kind == "btrfs" {
        on_one_device(&number)?;
    }
    Ok(Inside {
        number,
        path: mount.root.join(rest),
        kind: mount.kind,
    })
}

/// A snapshot of one device of several would be torn.
fn on_one_device(number: &str) -> Result<(), String> {
    let device = fs::canonicalize(format!("/sys/dev/block/{number}")).ok();
    let name = device.as_deref().and_then(Path::file_name).map(OsString::from);
    let Some(name) = name else {
        return Ok(());
    };
    for fs in fs::read_dir("/sys/fs/btrfs").into_iter().flatten().flatten() {
        let devices = fs.path().join("devices");
        if !devices.join(&name).exists() {
            continue;
        }
        let count = fs::read_dir(devices).into_iter().flatten().count();
        if count > 1 {
            return Err(format!(
                "the image's btrfs lies on {count} devices, which are not snapshotted as one"
            ));
        }
    }
    Ok(())
}

/// Reads any line as one of the kernel's; for fuzzing.
pub(crate) fn parse_any(line: &str) {
    let _ = parse(line);
}

fn parse(line: &str) -> Option<Mount> {
    let (first, second) = line.split_once(" - ")?;
    let mut first = first.split(' ').skip(2);
    let mut second = second.split(' ');
    Some(Mount {
        number: first.next()?.to_owned(),
        root: unescaped(first.next()?),
        point: unescaped(first.next()?),
        kind: second.next()?.to_owned(),
        device: unescaped(second.next()?),
    })
}

/// A space and the like stand as `\040` there.
fn unescaped(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let code = tail.get(..3).filter(|_| *first == b'\\');
        let code = code.and_then(|code| std::str::from_utf8(code).ok());
        if let Some(byte) = code.and_then(|code| u8::from_str_radix(code, 8).ok()) {
            bytes.push(byte);
            rest = &tail[3..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

    use super::*;

    #[test]
    fn mounts_are_read() {
        let ext4 =
            parse("36 35 253:4 / /srv/my\\040vms rw,noatime shared:1 - ext4 /dev/mapper/vg-lv rw").unwrap();
        assert_eq!((ext4.number.as_str(), ext4.kind.as_str()), ("253:4", "ext4"));
        assert_eq!(ext4.point, Path::new("/srv/my vms"));
        let btrfs = parse("40 1 0:33 /vms /srv rw - btrfs /dev/vg/a rw,subvol=/vms").unwrap();
        assert_eq!(btrfs.root, Path::new("/vms"));
        assert_eq!(btrfs.device, Path::new("/dev/vg/a"));
        assert_eq!(parse("40 1 0:33 /vms /srv rw"), None);
    }

    #[test]
    fn a_file_is_found_in_its_file_system() {
        let file = std::env::current_exe().unwrap().canonicalize().unwrap();
        // Where this runs is not ours to say; but it runs somewhere, and never panics.
        if let Ok(inside) = inside(&file) {
            assert!(inside.path.ends_with(file.file_name().unwrap()));
        }
    }
}
