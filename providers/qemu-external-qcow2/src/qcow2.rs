//! Empty qcow2 overlays, written without a QEMU (QEMU's `docs/interop/qcow2.txt`), and whether one still is empty.
//!
//! QEMU 7.2 may end in an assertion when it is asked for its nodes while its own `blockdev-create` makes an image,
//! and an overlay of a domain that is off must not need a `qemu-img`: an empty image is a header and a few numbers.

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

/// Makes an empty file an overlay of `size` bytes, rounded up to whole sectors as QEMU does, over a backing file.
///
/// # Errors
/// `InvalidInput` where the disk is larger than such an image can be (2 PiB) or the name longer; the operating
/// system's.
pub(crate) fn write_overlay(file: &File, size: u64, backing: &str, format: &str) -> io::Result<()> {
    let entries = size.div_ceil(L1_ENTRY_COVERS).max(1);
    if entries > LONGEST_L1 || backing.len() > LONGEST_NAME {
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
    file.write_all_at(&header(size.next_multiple_of(512), entries, backing, format), 0)
}

fn header(size: u64, l1_entries: u64, backing: &str, format: &str) -> Vec<u8> {
    let mut header = vec![0; HEADER];
    let extension = |bytes: &mut Vec<u8>, kind: u32, data: &[u8]| {
        let length = u32::try_from(data.len()).unwrap_or_default();
        bytes.extend(kind.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    };
    extension(&mut header, BACKING_FORMAT, format.as_bytes());
    extension(&mut header, 0, &[]);
    let name = header.len() as u64;
    header.extend(backing.as_bytes());
    let length = u32::try_from(backing.len()).unwrap_or_default();
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3_u32.to_be_bytes());
    put(8, &name.to_be_bytes());
    put(16, &length.to_be_bytes());
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

/// Whether an overlay made here holds anything that was written to it since.
///
/// # Errors
/// The operating system's.
pub(crate) fn holds_data(path: &Path) -> io::Result<bool> {
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

    use disksnap_test_support::{need, tools};

    use super::*;

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
            write_overlay(&file, size, &format!("base.{format}"), format).unwrap();
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
            assert!(!holds_data(&path).unwrap());
            run("qemu-io", &["-f", "qcow2", "-c", "write 0 512", text]);
            assert!(holds_data(&path).unwrap());
            run("qemu-img", &["check", "-q", text]);
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let file = tempfile::tempfile().unwrap();
        for (size, name) in [(3 << 50, "b".to_owned()), (512, "b".repeat(1024))] {
            let error = write_overlay(&file, size, &name, "raw").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
