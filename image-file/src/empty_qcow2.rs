//! An empty qcow2 image, written into its file without a QEMU (QEMU's `docs/interop/qcow2.txt`), and whether one still
//! is empty.
//!
//! The guest's QEMU is not asked to make it: while its `blockdev-create` opens the image, QEMU 7.2 ends in an assertion of
//! `qcow2_get_specific_info` when anyone asks it for its nodes (`query-named-block-nodes`), and the guest ends with
//! it. Nor is `qemu-img` needed: an empty image is a header and a few numbers.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// 64 KiB, as QEMU makes them: `cluster_bits` of the header.
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// How much of the disk one entry of the L1 table covers: an L2 table is one cluster of 8-byte entries.
const L1_ENTRY_COVERS: u64 = CLUSTER / 8 * CLUSTER;
/// The longest L1 table that QEMU opens, in entries (32 MiB).
const LONGEST_L1: u64 = (32 << 20) / 8;
/// The longest name of a backing file that QEMU opens.
const LONGEST_NAME: usize = 1023;
/// The length of a version 3 header without optional fields.
const HEADER: usize = 104;
/// The extension that names the format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// The header, the table of reference counts, its one block, and then the L1 table: a cluster each but the last.
const REFCOUNT_TABLE: u64 = CLUSTER;
const REFCOUNT_BLOCK: u64 = 2 * CLUSTER;
const L1_TABLE: u64 = 3 * CLUSTER;

/// What an overlay names as the image below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backing<'a> {
    /// Its path, absolute or from the overlay's directory; at most 1023 bytes.
    pub name: &'a str,
    /// Its format.
    pub format: &'a str,
}

/// Makes an empty file an image of a disk of `size` bytes, rounded up to whole sectors as QEMU does, alone or over a
/// backing file.
///
/// # Errors
/// `InvalidInput` where the disk is larger than such an image can be (2 PiB) or the name longer; the operating
/// system's.
pub fn write_empty_qcow2(file: &File, size: u64, backing: Option<Backing<'_>>) -> io::Result<()> {
    let entries = size.div_ceil(L1_ENTRY_COVERS).max(1);
    if entries > LONGEST_L1 || backing.is_some_and(|b| b.name.len() > LONGEST_NAME) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a qcow2 image cannot be that large, or name a backing file with that long a path",
        ));
    }
    let clusters = L1_TABLE / CLUSTER + (entries * 8).div_ceil(CLUSTER);
    // All but these is zero, and a file's holes are.
    file.set_len(clusters * CLUSTER)?;
    let counts: Vec<u8> = (0..clusters).flat_map(|_| 1_u16.to_be_bytes()).collect();
    file.write_all_at(&counts, REFCOUNT_BLOCK)?;
    file.write_all_at(&REFCOUNT_BLOCK.to_be_bytes(), REFCOUNT_TABLE)?;
    file.write_all_at(&header(size.next_multiple_of(512), entries, backing), 0)
}

fn header(size: u64, l1_entries: u64, backing: Option<Backing<'_>>) -> Vec<u8> {
    let mut header = vec![0; HEADER];
    let named = backing.map(|backing| name_backing(&mut header, backing));
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3_u32.to_be_bytes());
    if let Some((at, length)) = named {
        put(8, &at.to_be_bytes());
        put(16, &length.to_be_bytes());
    }
    put(20, &CLUSTER_BITS.to_be_bytes());
    put(24, &size.to_be_bytes());
    // At most `LONGEST_L1`: the four bytes before are zero.
    put(36, &l1_entries.to_be_bytes()[4..]);
    put(40, &L1_TABLE.to_be_bytes());
    put(48, &REFCOUNT_TABLE.to_be_bytes());
    // Clusters of the table of reference counts.
    put(56, &1_u32.to_be_bytes());
    // Reference counts of 1 << 4 bits.
    put(96, &4_u32.to_be_bytes());
    put(100, &[0, 0, 0, 104]);
    header
}

/// Puts the format and the name of the backing file behind the header; where the name is, and its length.
fn name_backing(header: &mut Vec<u8>, backing: Backing<'_>) -> (u64, u32) {
    let extension = |bytes: &mut Vec<u8>, kind: u32, data: &[u8]| {
        let length = u32::try_from(data.len()).unwrap_or_default();
        bytes.extend(kind.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    };
    extension(header, BACKING_FORMAT, backing.format.as_bytes());
    extension(header, 0, &[]);
    let at = header.len() as u64;
    header.extend(backing.name.as_bytes());
    (at, u32::try_from(backing.name.len()).unwrap_or_default())
}

/// Whether an image made here holds anything that was written to it since.
///
/// # Errors
/// The operating system's.
pub fn qcow2_holds_data(path: &Path) -> io::Result<bool> {
    let file = File::open(path)?;
    let mut numbers = [0; 12];
    match file.read_exact_at(&mut numbers, 36) {
        // Killed before its header was written.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        result => result?,
    }
    let [a, b, c, d, offset @ ..] = numbers;
    let (entries, offset) = (u32::from_be_bytes([a, b, c, d]), u64::from_be_bytes(offset));
    if u64::from(entries) > LONGEST_L1 {
        return Ok(true);
    }
    let mut left = u64::from(entries) * 8;
    let (mut at, mut piece) = (offset, vec![0; 64 << 10]);
    while left > 0 {
        let length = usize::try_from(left).unwrap_or(piece.len()).min(piece.len());
        file.read_exact_at(&mut piece[..length], at)?;
        if piece[..length].iter().any(|byte| *byte != 0) {
            return Ok(true);
        }
        at += length as u64;
        left -= length as u64;
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::process::Command;

    use disksnap_test_support::{QemuVersion, need, tools};
    use serde_json::Value;

    use super::*;

    fn qemu_img(version: QemuVersion, what: &[&str], image: &Path) -> Value {
        let mut command = Command::new(version.program("qemu-img"));
        let output = command
            .args(what)
            .args(["-f", "qcow2", "--output=json"])
            .arg(image);
        let output = output.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{what:?}: {said}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// `qemu-img check` fails where a reference count or a table is wrong.
    fn qemu_likes_it(version: QemuVersion) {
        let dir = tempfile::tempdir().unwrap();
        let edge = L1_ENTRY_COVERS;
        let clusters_of_l1 = CLUSTER / 8 * edge;
        let largest = LONGEST_L1 * edge;
        for size in [
            0,
            1,
            512,
            (2 << 20) + 512,
            edge,
            edge + 512,
            clusters_of_l1 + 1,
            largest,
        ] {
            let path = dir.path().join(format!("{size}.qcow2"));
            write_empty_qcow2(&File::create(&path).unwrap(), size, None).unwrap();
            qemu_img(version, &["check"], &path);
            let info = qemu_img(version, &["info"], &path);
            assert_eq!(info["virtual-size"], size.next_multiple_of(512), "{info}");
            let data = &info["format-specific"]["data"];
            assert_eq!(
                (&data["compat"], &data["refcount-bits"]),
                (&"1.1".into(), &16.into())
            );
        }
    }

    #[test]
    fn qemu_takes_the_image_for_an_empty_one() {
        need!("qemu-img");
        qemu_likes_it(QemuVersion::V10_0);
    }

    #[test]
    fn so_does_the_old_qemu() {
        need!("qemu-7.2");
        qemu_likes_it(QemuVersion::V7_2);
    }

    fn run(program: &str, arguments: &[&str]) -> String {
        let output = Command::new(tools::program(program))
            .args(arguments)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{program} {arguments:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Odd and even sizes, one that needs a long L1 table, formats with short and padded names.
    #[test]
    fn qemu_finds_the_overlay_sound_and_its_backing_file_where_it_is() {
        need!("qemu-img", "qemu-io");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("overlay");
        let text = path.to_str().unwrap();
        for (size, format) in [
            (1, "raw"),
            (512, "qcow2"),
            ((3 << 20) + 777, "raw"),
            (5 << 40, "qcow2"),
        ] {
            let base = dir.path().join(format!("base.{format}"));
            let rounded = u64::next_multiple_of(size, 512).to_string();
            run(
                "qemu-img",
                &["create", "-q", "-f", format, base.to_str().unwrap(), &rounded],
            );
            let file = File::create(&path).unwrap();
            let name = format!("base.{format}");
            let backing = Backing { name: &name, format };
            write_empty_qcow2(&file, size, Some(backing)).unwrap();
            run("qemu-img", &["check", "-q", text]);
            let info = run("qemu-img", &["info", text]);
            for part in [
                format!("({rounded} bytes)"),
                format!("backing file: base.{format} (actual path: {})", base.display()),
                format!("backing file format: {format}"),
                "compat: 1.1".to_owned(),
            ] {
                assert!(info.contains(&part), "{part} is not in {info}");
            }
            assert!(!qcow2_holds_data(&path).unwrap());
            run("qemu-io", &["-f", "qcow2", "-c", "write 0 512", text]);
            assert!(qcow2_holds_data(&path).unwrap());
            run("qemu-img", &["check", "-q", text]);
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let largest = LONGEST_L1 * L1_ENTRY_COVERS;
        for (size, name) in [(largest + 1, "b".to_owned()), (512, "b".repeat(1024))] {
            let error = write_empty_qcow2(
                &file,
                size,
                Some(Backing {
                    name: &name,
                    format: "raw",
                }),
            )
            .unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
