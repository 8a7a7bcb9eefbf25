//! An empty qcow2 image, written into its file without a QEMU (QEMU's `docs/interop/qcow2.txt`).
//!
//! The guest's QEMU is not asked to: while its `blockdev-create` opens the image, QEMU 7.2 ends in an assertion of
//! `qcow2_get_specific_info` when anyone asks it for its nodes (`query-named-block-nodes`), and the guest ends with
//! it. Nor is `qemu-img` needed: an empty image is a header and a few numbers.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// 64 KiB, as QEMU makes them: `cluster_bits` of the header.
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// How much of the disk one entry of the L1 table covers: an L2 table is one cluster of 8-byte entries.
const L1_ENTRY_COVERS: u64 = CLUSTER / 8 * CLUSTER;
/// The longest L1 table that QEMU opens, in entries (32 MiB).
const LONGEST_L1: u64 = (32 << 20) / 8;
/// The length of a version 3 header without optional fields.
const HEADER: usize = 104;

/// The header, the table of reference counts, its one block, and then the L1 table: a cluster each but the last.
const REFCOUNT_TABLE: u64 = CLUSTER;
const REFCOUNT_BLOCK: u64 = 2 * CLUSTER;
const L1_TABLE: u64 = 3 * CLUSTER;

/// Makes an empty file an image of a disk of `size` bytes, rounded up to whole sectors as QEMU does.
///
/// # Errors
/// `InvalidInput` where a disk is larger than such an image can be (2 PiB); the operating system's.
pub(crate) fn write_empty(file: &File, size: u64) -> io::Result<()> {
    let entries = size.div_ceil(L1_ENTRY_COVERS).max(1);
    if entries > LONGEST_L1 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a qcow2 image of that size is larger than QEMU opens",
        ));
    }
    let clusters = L1_TABLE / CLUSTER + (entries * 8).div_ceil(CLUSTER);
    // All but these is zero, and a file's holes are.
    file.set_len(clusters * CLUSTER)?;
    let counts: Vec<u8> = (0..clusters).flat_map(|_| 1_u16.to_be_bytes()).collect();
    file.write_all_at(&counts, REFCOUNT_BLOCK)?;
    file.write_all_at(&REFCOUNT_BLOCK.to_be_bytes(), REFCOUNT_TABLE)?;
    file.write_all_at(&header(size.next_multiple_of(512), entries), 0)
}

fn header(size: u64, l1_entries: u64) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3_u32.to_be_bytes());
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::path::Path;
    use std::process::Command;

    use disksnap_test_support::{QemuVersion, need};
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
            write_empty(&File::create(&path).unwrap(), size).unwrap();
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

    #[test]
    fn a_disk_too_large_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let error = write_empty(&file, LONGEST_L1 * L1_ENTRY_COVERS + 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
