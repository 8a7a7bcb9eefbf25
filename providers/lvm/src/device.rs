//! From a path to the logical volume behind it, by what the kernel says; by names where there is no device.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use disksnap_core::ErrorKind;
use disksnap_image_file::Unfit;

/// What a path leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Named {
    /// The volume with this id, 32 letters of its group's and 32 of its own: it is active.
    Id(String),
    /// There is no device; by its path it would be this volume of this group.
    Name { group: String, name: String },
}

/// Finds the volume behind the path of a device: `/dev/VG/LV`, `/dev/mapper/VG-LV`, `/dev/dm-N`, or a link to one.
pub(crate) fn of_path(path: &Path) -> Result<Named, Unfit> {
    if !path.is_absolute() {
        return Err(format!("the device's path {} is not absolute", path.display()).into());
    }
    let found = match fs::metadata(path) {
        Ok(found) => found,
        Err(error) => {
            let unfit = Unfit {
                kind: ErrorKind::of_io(&error),
                why: format!("cannot find {}: {error}", path.display()),
            };
            return by_name(path).ok_or(unfit);
        }
    };
    if !found.file_type().is_block_device() {
        return Err(format!("{} is not a block device", path.display()).into());
    }
    of_number(&number(found.rdev()), &path.display().to_string()).map(Named::Id)
}

/// `MAJOR:MINOR`, as the kernel spells it.
fn number(device: u64) -> String {
    format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device))
}

/// The id of the logical volume with this device number.
pub(crate) fn of_number(number: &str, shown: &str) -> Result<String, Unfit> {
    let file = PathBuf::from(format!("/sys/dev/block/{number}/dm/uuid"));
    let uuid = fs::read_to_string(file)
        .map_err(|_| format!("{shown} is not a logical volume: it is no device of device-mapper"))?;
    volume_id(uuid.trim()).map_err(|why| format!("{shown} is not a logical volume: {why}").into())
}

/// The id of a volume from the one that lvm2 gives its device: `LVM-`, then group and volume, then nothing:
/// with something more it is a part of a volume (`-real`, `-cow`, `-tpool`).
fn volume_id(uuid: &str) -> Result<String, String> {
    let Some(id) = uuid.strip_prefix("LVM-") else {
        let kind = uuid.split('-').next().filter(|kind| !kind.is_empty());
        return Err(match kind {
            Some(kind) => format!("it is a device-mapper device of the kind {kind}"),
            None => "device-mapper does not say what it is".to_owned(),
        });
    };
    if id.len() == 64 && id.chars().all(|c| c.is_ascii_alphanumeric()) {
        Ok(id.to_owned())
    } else {
        Err("it is only a part of one".to_owned())
    }
}

/// The volume that a path would be of, were it active.
fn by_name(path: &Path) -> Option<Named> {
    let text = path.to_str()?;
    let (group, name) = if let Some(mapped) = text.strip_prefix("/dev/mapper/") {
        split_mapped(mapped)?
    } else {
        let (group, name) = text.strip_prefix("/dev/")?.split_once('/')?;
        (group.to_owned(), name.to_owned())
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "+_.-".contains(c);
    let good = |name: &str| !name.is_empty() && !name.starts_with('-') && name.chars().all(plain);
    (good(&group) && good(&name)).then_some(Named::Name { group, name })
}

/// `VG-LV` with every dash inside a name doubled. A third part would be a part of a volume.
fn split_mapped(mapped: &str) -> Option<(String, String)> {
    let mut parts = vec![String::new()];
    let mut letters = mapped.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter != '-' {
            parts.last_mut()?.push(letter);
        } else if letters.next_if_eq(&'-').is_some() {
            parts.last_mut()?.push('-');
        } else {
            parts.push(String::new());
        }
    }
    let [group, name] = <[String; 2]>::try_from(parts).ok()?;
    Some((group, name))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

    use super::*;

    fn name(path: &str) -> Option<(String, String)> {
        match by_name(Path::new(path)) {
            Some(Named::Name { group, name }) => Some((group, name)),
            _ => None,
        }
    }

    #[test]
    fn names_with_dashes_and_dots_are_taken_apart() {
        assert_eq!(name("/dev/vg/lv").unwrap(), ("vg".into(), "lv".into()));
        assert_eq!(
            name("/dev/my-vg/web-1.data").unwrap(),
            ("my-vg".into(), "web-1.data".into())
        );
        assert_eq!(name("/dev/mapper/vg-lv").unwrap(), ("vg".into(), "lv".into()));
        assert_eq!(
            name("/dev/mapper/my--vg-web--1.data").unwrap(),
            ("my-vg".into(), "web-1.data".into())
        );
        assert_eq!(name("/dev/mapper/vg---lv").unwrap(), ("vg-".into(), "lv".into()));
        assert_eq!(name("/dev/mapper/a-b----c").unwrap(), ("a".into(), "b--c".into()));
        for other in [
            "/dev/mapper/vg-lv-real",
            "/dev/mapper/vg",
            "/dev/mapper/vg-",
            "/dev/sda",
            "/dev/disk/by-id/x",
            "/dev/vg/-lv",
            "/dev/vg/l v",
            "/srv/vg/lv",
            "/dev/vg/",
        ] {
            assert_eq!(name(other), None, "{other}");
        }
    }

    #[test]
    fn only_whole_volumes_have_an_id() {
        let id = "a".repeat(64);
        assert_eq!(volume_id(&format!("LVM-{id}")).unwrap(), id);
        for part in ["-real", "-cow", "-tpool"] {
            assert!(
                volume_id(&format!("LVM-{id}{part}"))
                    .unwrap_err()
                    .contains("part")
            );
        }
        assert!(
            volume_id(&format!("part1-LVM-{id}"))
                .unwrap_err()
                .contains("part1")
        );
        assert!(volume_id("CRYPT-LUKS2-0123").unwrap_err().contains("CRYPT"));
        assert!(volume_id("").is_err());
    }

    #[test]
    fn what_is_no_volume_is_told() {
        let why = |path: &str| of_path(Path::new(path)).unwrap_err();
        assert!(why("/dev/null").why.contains("not a block device"));
        assert!(why("vg/lv").why.contains("not absolute"));
        let missing = why("/no/such/device");
        assert_eq!(missing.kind, ErrorKind::NotFound);
    }
}
