//! The header of a qcow2 image (QEMU's `docs/interop/qcow2.txt`). Reading only.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const MAGIC: &[u8; 4] = b"QFI\xfb";
/// The header and its extensions lie in the first cluster; what matters here is in its beginning.
const READ: usize = 64 << 10;
/// The longest name of a backing file that QEMU writes.
const LONGEST_NAME: usize = 1023;
/// Where the extensions of a version 2 header begin.
const V2_LENGTH: usize = 72;
/// The extension that names the format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// The extension that names the external data file.
const DATA_FILE: u32 = 0x4441_5441;

/// What the header says.
///
/// Whoever could write the image wrote it: a name in it is for telling, not for opening.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "they are the header's own feature bits, each by itself"
)]
pub struct Qcow2 {
    /// 2 or 3.
    pub version: u32,
    /// The virtual size in bytes.
    pub size: u64,
    /// The name of the backing file, as it stands there.
    pub backing: Option<String>,
    /// The format of the backing file, where the header says it.
    pub backing_format: Option<String>,
    /// The guest's data is in another file.
    pub external_data: bool,
    /// The name of that file, as it stands there.
    pub data_file: Option<String>,
    /// QEMU encrypts what is written.
    pub encrypted: bool,
    /// `lazy_refcounts=on`: while the image is open its reference counts may lag behind.
    pub lazy_refcounts: bool,
    /// The reference counts do lag behind: `qemu-img check -r all` mends them.
    pub dirty: bool,
    /// QEMU has found the image damaged.
    pub corrupt: bool,
}

impl Qcow2 {
    /// Reads the header of an image.
    ///
    /// # Errors
    /// The operating system's; `InvalidData`, with what is wrong, for a file that is no qcow2 image.
    pub fn read(file: &File) -> io::Result<Self> {
        let mut bytes = vec![0; READ];
        let mut filled = 0;
        while filled < READ {
            match file.read_at(&mut bytes[filled..], filled as u64) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Self::parse(&bytes[..filled]).map_err(|why| io::Error::new(io::ErrorKind::InvalidData, why))
    }

    /// Reads the header from the first bytes of an image, 64 KiB or the whole of it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.get(..4) != Some(MAGIC) {
            return Err("it does not begin as a qcow2 image does".to_owned());
        }
        let version = u32_at(bytes, 4)?;
        let (incompatible, compatible, length) = match version {
            2 => (0, 0, V2_LENGTH),
            3 => (
                u64_at(bytes, 72)?,
                u64_at(bytes, 80)?,
                usize_of(u32_at(bytes, 100)?),
            ),
            other => return Err(format!("it is a qcow2 image of version {other}")),
        };
        Ok(Self {
            version,
            size: u64_at(bytes, 24)?,
            backing: backing(bytes)?,
            backing_format: extension(bytes, length, BACKING_FORMAT)?,
            external_data: incompatible & 4 != 0,
            data_file: extension(bytes, length, DATA_FILE)?,
            encrypted: u32_at(bytes, 32)? != 0,
            lazy_refcounts: compatible & 1 != 0,
            dirty: incompatible & 1 != 0,
            corrupt: incompatible & 2 != 0,
        })
    }
}

/// The name of the backing file. Only in the part of the image that was read: QEMU writes it there.
fn backing(bytes: &[u8]) -> Result<Option<String>, String> {
    let (offset, length) = (u64_at(bytes, 8)?, usize_of(u32_at(bytes, 16)?));
    if offset == 0 {
        return Ok(None);
    }
    let name = usize::try_from(offset)
        .ok()
        .filter(|_| length <= LONGEST_NAME)
        .and_then(|start| bytes.get(start..start.checked_add(length)?))
        .ok_or("the name of its backing file lies outside its header")?;
    Ok(Some(String::from_utf8_lossy(name).into_owned()))
}

/// The text of a header extension.
fn extension(bytes: &[u8], start: usize, wanted: u32) -> Result<Option<String>, String> {
    let mut at = start;
    while let (Ok(kind), Ok(length)) = (u32_at(bytes, at), u32_at(bytes, at + 4)) {
        if kind == 0 {
            break;
        }
        let (data, length) = (at + 8, usize_of(length));
        let content = data.checked_add(length).and_then(|end| bytes.get(data..end));
        let content = content.ok_or("an extension of its header reaches beyond it")?;
        if kind == wanted {
            return Ok(Some(String::from_utf8_lossy(content).into_owned()));
        }
        at = data + length.next_multiple_of(8);
    }
    Ok(None)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, String> {
    field(bytes, at).map(u32::from_be_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64, String> {
    field(bytes, at).map(u64::from_be_bytes)
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], String> {
    let found = at.checked_add(N).and_then(|end| bytes.get(at..end));
    found
        .and_then(|found| found.try_into().ok())
        .ok_or_else(|| "its header is cut short".to_owned())
}

fn usize_of(n: u32) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

    use std::path::Path;
    use std::process::Command;

    use disksnap_test_support::{need, tools};
    use proptest::prelude::*;

    use super::*;

    /// An image that the real `qemu-img` made, and its header.
    fn made(dir: &Path, arguments: &[&str]) -> Qcow2 {
        let image = dir.join("image");
        let mut command = Command::new(tools::program("qemu-img"));
        command
            .current_dir(dir)
            .args(["create", "-q", "-f", "qcow2"])
            .args(arguments);
        assert!(command.arg("image").arg("3M").status().unwrap().success());
        Qcow2::read(&File::open(image).unwrap()).unwrap()
    }

    #[test]
    fn real_headers_are_read() {
        need!("qemu-img");
        let dir = tempfile::tempdir().unwrap();
        let plain = made(dir.path(), &[]);
        let expected = Qcow2 {
            version: 3,
            size: 3 << 20,
            ..Qcow2::default()
        };
        assert_eq!(plain, expected);
        let old = made(dir.path(), &["-o", "compat=0.10,cluster_size=512"]);
        assert_eq!((old.version, old.size), (2, 3 << 20));
        assert!(made(dir.path(), &["-o", "lazy_refcounts=on"]).lazy_refcounts);
        let outside = made(dir.path(), &["-o", "data_file=data"]);
        assert!(outside.external_data && outside.data_file.as_deref() == Some("data"));
        let secret = ["--object", "secret,id=k,data=k"];
        let luks = [
            "-o",
            "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=1",
        ];
        assert!(made(dir.path(), &[secret, luks].concat()).encrypted);
    }

    #[test]
    fn a_real_backing_file_is_read() {
        need!("qemu-img");
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("base.raw"), [0; 512]).unwrap();
        for version in ["0.10", "1.1"] {
            let compat = format!("compat={version}");
            let overlay = made(dir.path(), &["-o", &compat, "-b", "base.raw", "-F", "raw"]);
            assert_eq!(overlay.backing.as_deref(), Some("base.raw"), "{version}");
            assert_eq!(overlay.backing_format.as_deref(), Some("raw"), "{version}");
        }
    }

    #[test]
    fn hostile_headers_are_refused_and_never_panic() {
        let mut header = vec![0; 512];
        header[..4].copy_from_slice(MAGIC);
        header[7] = 3;
        header[103] = 104;
        assert!(Qcow2::parse(&header).is_ok());
        assert!(Qcow2::parse(&header[..80]).is_err(), "cut short");
        assert!(Qcow2::parse(b"QFI").is_err());
        assert!(Qcow2::parse(&[]).is_err());
        let mut name = header.clone();
        name[8..16].copy_from_slice(&u64::MAX.to_be_bytes());
        name[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(Qcow2::parse(&name).is_err(), "a name that is nowhere");
        let mut extension = header.clone();
        extension[104..112].copy_from_slice(&[0xff; 8]);
        assert!(Qcow2::parse(&extension).is_err(), "an extension without end");
        header[7] = 4;
        assert!(Qcow2::parse(&header).is_err(), "a version to come");
    }

    proptest! {
        #[test]
        fn any_header_is_read_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 8..600), v3: bool) {
            bytes[..4].copy_from_slice(MAGIC);
            bytes[4..8].copy_from_slice(&[0, 0, 0, if v3 { 3 } else { 2 }]);
            let _ = Qcow2::parse(&bytes);
        }
    }
}
