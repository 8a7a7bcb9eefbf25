//! What the method is told of a disk.

use std::path::PathBuf;

use disksnap_core::{ErrorKind, OptionDoc, Options};
use disksnap_image_file::Unfit;

use crate::volume::Volume;

/// The volume, where it is not the disk's own source: `<device path='/dev/vg/lv4'/>` of the document.
const DEVICE: &str = "device.path";
const SIZE: &str = "snapshot.size";
const WARN: &str = "snapshot.warn";
/// From how many percent on what fills up is warned of, where the caller does not say.
pub(crate) const MARK: u8 = 80;

/// How much room a classic snapshot gets for what is overwritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Size {
    Bytes(u64),
    PercentOfOrigin(u64),
    PercentOfFree(u64),
}

impl Default for Size {
    fn default() -> Self {
        Self::PercentOfOrigin(20)
    }
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) device: Option<PathBuf>,
    pub(crate) size: Option<Size>,
    /// The percentage from which on the filling of a snapshot or a pool is worth a warning.
    pub(crate) warn: u8,
}

/// What the method can be told.
pub(crate) fn docs() -> Vec<OptionDoc> {
    let doc = |key: &str, help: &str| OptionDoc {
        key: key.to_owned(),
        help: help.to_owned(),
    };
    vec![
        doc(
            DEVICE,
            "the logical volume, where it is not the disk's own source: /dev/VG/LV, /dev/mapper/… or a link to it",
        ),
        doc(
            SIZE,
            "room of a classic snapshot for what is overwritten: bytes, 20%ORIGIN (the default) or 50%FREE; none for a \
             thin volume",
        ),
        doc(
            WARN,
            "from how many percent on a filling snapshot or thin pool is warned of, when it is made, looked at and read: 1 to \
             100, 80 when not given",
        ),
    ]
}

impl Settings {
    /// # Errors
    /// `Invalid`, naming the key.
    pub(crate) fn read(options: &Options) -> Result<Self, Unfit> {
        let device = options.get(DEVICE).map(PathBuf::from);
        if device.as_ref().is_some_and(|path| !path.is_absolute()) {
            return Err(invalid(format!("{DEVICE} must be an absolute path")));
        }
        Ok(Self {
            device,
            size: options.get(SIZE).map(size).transpose()?,
            warn: options.get(WARN).map_or(Ok(MARK), warn)?,
        })
    }
}

fn warn(text: &str) -> Result<u8, Unfit> {
    let number = text.strip_suffix('%').unwrap_or(text).parse().ok();
    number
        .filter(|percent| (1..=100).contains(percent))
        .ok_or_else(|| {
            invalid(format!(
                "{WARN} is {text:?}: it must be a percentage from 1 to 100"
            ))
        })
}

fn size(text: &str) -> Result<Size, Unfit> {
    let bad = || {
        invalid(format!(
            "{SIZE} is {text:?}: it must be a number of bytes, or a percentage such as 20%ORIGIN or 50%FREE, and more \
             than 0"
        ))
    };
    let Some((number, of)) = text.split_once('%') else {
        let bytes = text.parse().ok().filter(|bytes| *bytes > 0);
        return bytes.map(Size::Bytes).ok_or_else(bad);
    };
    let percent = number.parse::<u64>().ok();
    let percent = percent
        .filter(|percent| (1..=100).contains(percent))
        .ok_or_else(bad)?;
    match of.to_ascii_uppercase().as_str() {
        "" | "ORIGIN" => Ok(Size::PercentOfOrigin(percent)),
        "FREE" => Ok(Size::PercentOfFree(percent)),
        _ => Err(bad()),
    }
}

fn invalid(why: String) -> Unfit {
    Unfit {
        kind: ErrorKind::Invalid,
        why,
    }
}

impl Size {
    /// How many bytes that is for this origin, in whole extents, when its group has `free` bytes.
    ///
    /// More than what a whole overwritten origin needs is of no use, and lvm2 does not give it.
    pub(crate) fn of(self, origin: &Volume, free: u64) -> u64 {
        let extent = origin.extent.max(512);
        // 16 bytes a chunk of 4 KiB to say where it is, and a little to begin with.
        let whole = origin.size + origin.size / 256 + (64 << 10);
        let wanted = match self {
            Self::Bytes(bytes) => bytes,
            Self::PercentOfOrigin(percent) => share(whole, percent),
            Self::PercentOfFree(percent) => return share(free / extent, percent) * extent,
        };
        wanted.min(whole).div_ceil(extent).max(1) * extent
    }
}

fn share(of: u64, percent: u64) -> u64 {
    u64::try_from(u128::from(of) * u128::from(percent) / 100).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Settings, Unfit> {
        Settings::read(&pairs.iter().copied().collect())
    }

    #[test]
    fn sizes_are_bytes_or_percentages() {
        let size = |text: &str| read(&[(SIZE, text)]).unwrap().size.unwrap();
        assert_eq!(size("1073741824"), Size::Bytes(1 << 30));
        assert_eq!(size("20%"), Size::PercentOfOrigin(20));
        assert_eq!(size("100%origin"), Size::PercentOfOrigin(100));
        assert_eq!(size("50%FREE"), Size::PercentOfFree(50));
        for bad in [
            "",
            "0",
            "0%",
            "101%FREE",
            "-1",
            "1G",
            "10%VG",
            "1.5%",
            "99999999999999999999",
        ] {
            let unfit = read(&[(SIZE, bad)]).unwrap_err();
            assert_eq!(unfit.kind, ErrorKind::Invalid, "{bad}");
            assert!(unfit.why.contains(SIZE), "{}", unfit.why);
        }
    }

    #[test]
    fn other_settings_are_checked() {
        assert_eq!(read(&[]).unwrap().warn, 80);
        assert_eq!(read(&[(WARN, "95%")]).unwrap().warn, 95);
        for (key, bad) in [(WARN, "0"), (WARN, "101"), (WARN, "x"), (DEVICE, "vg/lv")] {
            assert!(read(&[(key, bad)]).unwrap_err().why.contains(key));
        }
    }

    #[test]
    fn sizes_come_in_whole_extents_and_never_more_than_is_of_use() {
        let origin = Volume {
            extent: 4 << 20,
            size: 64 << 20,
            ..Volume::default()
        };
        assert_eq!(Size::Bytes(1).of(&origin, 0), 4 << 20);
        assert_eq!(Size::Bytes(u64::MAX).of(&origin, 0), 68 << 20);
        assert_eq!(Size::PercentOfOrigin(20).of(&origin, 0), 16 << 20);
        assert_eq!(Size::PercentOfFree(50).of(&origin, 20 << 20), 8 << 20);
        assert_eq!(
            Size::PercentOfFree(50).of(&origin, 4 << 20),
            0,
            "too little is told as such"
        );
    }
}
