//! A qcow2 image that keeps nothing but dirty bitmaps: its data is a raw disk that is there already (QEMU's
//! `docs/interop/qcow2.txt`, "external data file" and "raw external data"), and whether that was written to past it.
//!
//! `qemu-img create -o data_file=…` is never asked to make it: it zeroes the raw disk. Here the raw disk is only
//! named, and not even opened.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use disksnap_core::faults;

use crate::{Qcow2, named};

/// 64 KiB, as QEMU makes them.
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Entries in a table of one cluster.
const ENTRIES: u64 = CLUSTER / 8;
/// Counts in a block of reference counts, of 16 bits each.
const COUNTS: u64 = CLUSTER / 2;
/// The longest L1 table that QEMU opens, in entries (32 MiB): a disk of 2 PiB.
const LONGEST_L1: u64 = (32 << 20) / 8;
/// The longest name that fits behind the header with room to spare.
const LONGEST_NAME: usize = 1023;
/// The length of a version 3 header without optional fields.
const HEADER: usize = 104;
/// The extension that names the data file (`DATA`).
const DATA_FILE: u32 = 0x4441_5441;
/// The incompatible feature: the data is in another file.
const EXTERNAL: u64 = 1 << 2;
/// The autoclear feature: that file is the disk, byte for byte.
const RAW: u64 = 1 << 1;
/// The mark of an entry whose cluster belongs to nobody else (`QCOW_OFLAG_COPIED`).
const COPIED: u64 = 1 << 63;
/// Entries of the tables are written in pieces of so many clusters.
const PIECE: u64 = 64;

/// Where everything is in such an image, in clusters: the header, the table of reference counts, its blocks, the L1
/// table, the L2 tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    /// Clusters of the disk.
    data: u64,
    tables: u64,
    count_table: u64,
    count_blocks: u64,
    l1: u64,
}

impl Layout {
    fn of(size: u64) -> Option<Self> {
        let data = size.div_ceil(CLUSTER).max(1);
        let tables = data.div_ceil(ENTRIES);
        if tables > LONGEST_L1 {
            return None;
        }
        let mut layout = Self {
            data,
            tables,
            count_table: 1,
            count_blocks: 1,
            l1: tables.div_ceil(ENTRIES),
        };
        // The counts count their own clusters too.
        loop {
            let blocks = layout.clusters().div_ceil(COUNTS);
            let table = blocks.div_ceil(ENTRIES);
            if blocks <= layout.count_blocks && table <= layout.count_table {
                return Some(layout);
            }
            (layout.count_blocks, layout.count_table) = (blocks, table);
        }
    }

    fn clusters(&self) -> u64 {
        1 + self.count_table + self.count_blocks + self.l1 + self.tables
    }

    fn first_block(&self) -> u64 {
        (1 + self.count_table) * CLUSTER
    }

    fn l1_table(&self) -> u64 {
        self.first_block() + self.count_blocks * CLUSTER
    }

    fn first_table(&self) -> u64 {
        self.l1_table() + self.l1 * CLUSTER
    }
}

/// How many bytes such an image of a disk of `size` bytes takes up before it has any bitmap; `None` where the disk is
/// too large.
#[must_use]
pub fn raw_data_qcow2_size(size: u64) -> Option<u64> {
    Layout::of(size).map(|layout| layout.clusters() * CLUSTER)
}

/// Makes an empty file an image whose data is the raw file or device `data`, as it is now: a disk of `size` bytes,
/// rounded up to whole sectors as QEMU does.
///
/// QEMU reads as zeroes what the tables do not map, also where the data is raw: all of the disk is mapped, each
/// cluster to where it is.
///
/// # Errors
/// `InvalidInput` where the disk is larger than such an image can be (2 PiB) or the name longer than 1023 bytes; the
/// operating system's.
pub fn write_raw_data_qcow2(file: &File, size: u64, data: &str) -> io::Result<()> {
    let size = size.next_multiple_of(512);
    let layout = Layout::of(size).filter(|_| data.len() <= LONGEST_NAME);
    let Some(layout) = layout else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a qcow2 image cannot be that large, or name a data file with that long a path",
        ));
    };
    file.set_len(layout.clusters() * CLUSTER)?;
    let block = |n: u64| layout.first_block() + n * CLUSTER;
    entries(file, CLUSTER, layout.count_blocks, block)?;
    let counts = usize::try_from(layout.clusters()).unwrap_or(usize::MAX);
    file.write_all_at(&1_u16.to_be_bytes().repeat(counts), layout.first_block())?;
    let table = |n: u64| COPIED | (layout.first_table() + n * CLUSTER);
    entries(file, layout.l1_table(), layout.tables, table)?;
    entries(file, layout.first_table(), layout.data, |n| {
        COPIED | (n * CLUSTER)
    })?;
    // Last: an image without a header is none.
    file.write_all_at(&header(size, &layout, data), 0)?;
    file.sync_all()
}

/// Writes so many entries of 8 bytes one after another.
fn entries(file: &File, at: u64, count: u64, entry: impl Fn(u64) -> u64) -> io::Result<()> {
    let mut next = 0;
    while next < count {
        let until = count.min(next + PIECE * ENTRIES);
        let bytes: Vec<u8> = (next..until).flat_map(|n| entry(n).to_be_bytes()).collect();
        file.write_all_at(&bytes, at + next * 8)?;
        next = until;
    }
    Ok(())
}

fn header(size: u64, layout: &Layout, data: &str) -> Vec<u8> {
    let mut header = vec![0; HEADER];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3_u32.to_be_bytes());
    put(20, &CLUSTER_BITS.to_be_bytes());
    put(24, &size.to_be_bytes());
    // At most `LONGEST_L1`, and fewer blocks than that: the four bytes before are zero.
    put(36, &layout.tables.to_be_bytes()[4..]);
    put(40, &layout.l1_table().to_be_bytes());
    put(48, &CLUSTER.to_be_bytes());
    put(56, &layout.count_table.to_be_bytes()[4..]);
    put(72, &EXTERNAL.to_be_bytes());
    put(88, &RAW.to_be_bytes());
    // Reference counts of 1 << 4 bits.
    put(96, &4_u32.to_be_bytes());
    put(100, &[0, 0, 0, 104]);
    let length = u32::try_from(data.len()).unwrap_or_default();
    header.extend(DATA_FILE.to_be_bytes());
    header.extend(length.to_be_bytes());
    header.extend(data.as_bytes());
    header.resize(header.len().next_multiple_of(8), 0);
    // The end of the extensions.
    header.extend([0; 8]);
    header
}

/// The raw file or device that is the data of the qcow2 at this path, byte for byte; `None` where it is no such image.
///
/// # Errors
/// The operating system's; `InvalidData` where it is no qcow2 at all.
pub fn raw_data_of(image: &Path) -> io::Result<Option<PathBuf>> {
    let file = File::open(image)?;
    let header = Qcow2::read(&file)?;
    if !header.external_data || autoclear(&file)? & RAW == 0 {
        return Ok(None);
    }
    Ok(header.data_file.and_then(|name| named(image, &name)))
}

fn autoclear(file: &File) -> io::Result<u64> {
    let mut bits = [0; 8];
    file.read_exact_at(&mut bits, 88)?;
    Ok(u64::from_be_bytes(bits))
}

/// Whether the raw file below such an image was written to later than the image itself was closed: what its bitmaps say
/// is not all that changed then. To be asked of an image that nobody has open.
///
/// QEMU writes an image with bitmaps when it closes it, after all that the guest wrote. So a raw file that is younger
/// was written by somebody else. Told is only what can be: both must be files of one file system, since two need not go
/// by one clock, and nothing tells when a device was written.
///
/// # Errors
/// The operating system's.
pub fn written_past(image: &Path, data: &Path) -> io::Result<bool> {
    let (image, data) = (fs::metadata(image)?, fs::metadata(data)?);
    let comparable = image.is_file() && data.is_file() && image.dev() == data.dev();
    let written = |m: &fs::Metadata| (m.mtime(), m.mtime_nsec());
    Ok(comparable && written(&data) > written(&image))
}

/// Whether [`written_past`] could tell.
#[must_use]
pub fn can_tell_written_past(directory: &Path, data: &Path) -> bool {
    match (fs::metadata(directory), fs::metadata(data)) {
        (Ok(directory), Ok(data)) => data.is_file() && directory.dev() == data.dev(),
        _ => false,
    }
}

/// Whether another process has an image or a device open that QEMU locks: a hypervisor, `qemu-nbd`, a storage daemon.
///
/// Nothing is said of one that this process may not write to, nor of programs that lock nothing.
#[must_use]
pub fn is_in_use(path: &Path) -> bool {
    use rustix::fs::{FlockOperation, fcntl_lock};
    let Ok(file) = OpenOptions::new().read(true).write(true).open(path) else {
        return false;
    };
    // Only for a moment. `fcntl_getlk` would take none, but panics on QEMU's locks, whose pid is -1.
    let locked = fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive);
    matches!(locked, Err(rustix::io::Errno::AGAIN | rustix::io::Errno::ACCESS))
}

/// Whether such an image is as it was made: without bitmaps, with all of the raw disk mapped, and none of that past its
/// end.
///
/// # Errors
/// The operating system's.
pub fn raw_data_qcow2_is_new(image: &Path) -> io::Result<bool> {
    let file = File::open(image)?;
    let header = Qcow2::read(&file)?;
    let Some(layout) = Layout::of(header.size) else {
        return Ok(false);
    };
    let Some(data) = header.data_file.and_then(|name| named(image, &name)) else {
        return Ok(false);
    };
    if length_of(&data)? > header.size {
        return Ok(false);
    }
    let length = layout.clusters() * CLUSTER;
    if autoclear(&file)? != RAW || file.metadata()?.len() != length {
        return Ok(false);
    }
    let mut next = 0;
    while next < layout.data {
        let until = layout.data.min(next + PIECE * ENTRIES);
        let expected: Vec<u8> = (next..until).flat_map(|n| mapped(n).to_be_bytes()).collect();
        let mut found = vec![0; expected.len()];
        file.read_exact_at(&mut found, layout.first_table() + next * 8)?;
        if found != expected {
            return Ok(false);
        }
        next = until;
    }
    Ok(true)
}

/// The entry of a cluster that is where it is in the raw disk.
fn mapped(cluster: u64) -> u64 {
    COPIED | (cluster * CLUSTER)
}

/// The bytes of a raw file or device.
fn length_of(data: &Path) -> io::Result<u64> {
    let metadata = fs::metadata(data)?;
    if metadata.is_file() {
        return Ok(metadata.len());
    }
    // A header names it: what is no device could wait for ever.
    if !metadata.file_type().is_block_device() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    File::open(data)?.seek(SeekFrom::End(0))
}

/// Makes such an image anew in its place, for the raw disk as it is now: without bitmaps, and without what it says
/// reads as zeroes. As a whole or not at all; owner and mode stay.
///
/// Where the raw disk has grown the image is as large, else what is past its end would be cut off. Where it is shorter
/// the image keeps its size: that may be mended yet, and the guest would find its disk cut off meanwhile. Then the
/// answer is the raw disk's length in bytes.
///
/// # Errors
/// `InvalidInput` where it is no such image; the operating system's.
pub fn renew_raw_data_qcow2(image: &Path) -> io::Result<Option<u64>> {
    let image = &image.canonicalize()?;
    let old = File::open(image)?;
    let header = Qcow2::read(&old)?;
    let name = header.data_file.filter(|_| header.external_data);
    let found = name.and_then(|data| Some((named(image, &data)?, data)));
    let Some((path, data)) = found else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the image keeps its data in itself",
        ));
    };
    let length = length_of(&path)?;
    let name = image.file_name().unwrap_or_default().to_string_lossy();
    let new = image.with_file_name(format!(".{name}.disksnap-new"));
    match faults::around("file", "remove", || fs::remove_file(&new)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let metadata = old.metadata()?;
    let mut made = OpenOptions::new();
    made.write(true).create_new(true).mode(metadata.mode() & 0o777);
    let file = faults::around("file", "create image", || made.open(&new))?;
    let made = write_raw_data_qcow2(&file, header.size.max(length), &data).and_then(|()| {
        let own = file.metadata()?;
        if (own.uid(), own.gid()) != (metadata.uid(), metadata.gid()) {
            std::os::unix::fs::fchown(&file, Some(metadata.uid()), Some(metadata.gid()))?;
        }
        faults::around("file", "rename image", || fs::rename(&new, image))
    });
    if made.is_err() {
        // What is wrong is told; that the rest of it could not be removed either is nothing besides.
        let _ = faults::around("file", "remove", || fs::remove_file(&new));
    }
    made.map(|()| Some(length).filter(|length| length.next_multiple_of(512) < header.size))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::process::Command;
    use std::time::{Duration, SystemTime};

    use disksnap_test_support::{QemuVersion, need};

    use super::*;

    fn run(version: QemuVersion, program: &str, arguments: &[&str]) -> String {
        let output = Command::new(version.program(program))
            .args(arguments)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{program} {arguments:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn content(length: usize) -> Vec<u8> {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_be_bytes()[0]
        };
        (0..length).map(|_| next()).collect()
    }

    /// Sizes that end within a cluster, a sector, or nowhere; the disk is as it was, and reads so.
    fn the_disk_is_untouched(version: QemuVersion) {
        let dir = tempfile::tempdir().unwrap();
        let (image, raw) = (dir.path().join("a.qcow2"), dir.path().join("a.raw"));
        let (image_text, raw_text) = (image.to_str().unwrap(), raw.to_str().unwrap());
        for size in [1, 512, 65536, 65537, (5 << 20) + 1000, 64 << 20] {
            let content = content(size);
            fs::write(&raw, &content).unwrap();
            let file = File::create(&image).unwrap();
            write_raw_data_qcow2(&file, size as u64, raw_text).unwrap();
            run(version, "qemu-img", &["check", "-q", image_text]);
            let info = run(version, "qemu-img", &["info", image_text]);
            let rounded = size.next_multiple_of(512);
            for part in [
                format!("({rounded} bytes)"),
                format!("data file: {raw_text}"),
                "data file raw: true".to_owned(),
                "compat: 1.1".to_owned(),
            ] {
                assert!(info.contains(&part), "{part} is not in {info}");
            }
            let compare = ["compare", "-f", "qcow2", "-F", "raw", image_text, raw_text];
            run(version, "qemu-img", &compare);
            assert_eq!(fs::read(&raw).unwrap(), content, "{size}");
            assert_eq!(raw_data_of(&image).unwrap().as_deref(), Some(raw.as_path()));
        }
    }

    #[test]
    fn the_raw_disk_is_untouched_and_reads_as_before() {
        need!("qemu-img");
        the_disk_is_untouched(QemuVersion::V10_0);
    }

    #[test]
    fn so_it_does_in_the_old_qemu() {
        need!("qemu-7.2");
        the_disk_is_untouched(QemuVersion::V7_2);
    }

    /// One that needs several blocks of counts, and the largest: only the numbers, the tables would take up terabytes.
    #[test]
    fn large_disks_have_room_for_their_own_counts() {
        for size in [1 << 40, 20 << 40, 300 << 40, LONGEST_L1 * ENTRIES * CLUSTER] {
            let layout = Layout::of(size).unwrap();
            assert!(layout.count_blocks * COUNTS >= layout.clusters());
            assert!(layout.count_table * ENTRIES >= layout.count_blocks);
            assert_eq!(layout.tables * ENTRIES * CLUSTER, size);
        }
        assert_eq!(Layout::of(LONGEST_L1 * ENTRIES * CLUSTER + 1), None);
    }

    /// A disk of 17 TiB: its tables have more clusters than one block of counts counts.
    #[test]
    fn a_large_disk_is_sound() {
        need!("qemu-img");
        let dir = tempfile::tempdir().unwrap();
        let (image, raw) = (dir.path().join("a.qcow2"), dir.path().join("a.raw"));
        let size = 1_u64 << 40;
        File::create(&raw).unwrap().set_len(size).unwrap();
        write_raw_data_qcow2(&File::create(&image).unwrap(), size, raw.to_str().unwrap()).unwrap();
        assert_eq!(Some(image.metadata().unwrap().len()), raw_data_qcow2_size(size));
        run(
            QemuVersion::V10_0,
            "qemu-img",
            &["check", "-q", image.to_str().unwrap()],
        );
    }

    #[test]
    fn what_was_written_past_it_is_told_where_it_can_be() {
        need!("qemu-img", "qemu-io");
        let dir = tempfile::tempdir().unwrap();
        let (image, raw) = (dir.path().join("a.qcow2"), dir.path().join("a.raw"));
        let text = image.to_str().unwrap();
        fs::write(&raw, content(1 << 20)).unwrap();
        write_raw_data_qcow2(&File::create(&image).unwrap(), 1 << 20, raw.to_str().unwrap()).unwrap();
        run(QemuVersion::V10_0, "qemu-img", &["bitmap", "--add", text, "c1"]);
        assert!(!written_past(&image, &raw).unwrap());
        let write = [
            "-f",
            "qcow2",
            "-c",
            "write -P 7 64k 64k",
            "-c",
            "discard 128k 64k",
            text,
        ];
        run(QemuVersion::V10_0, "qemu-io", &write);
        assert!(!written_past(&image, &raw).unwrap(), "through the image");
        let later = SystemTime::now() + Duration::from_secs(3);
        let past = OpenOptions::new().write(true).open(&raw).unwrap();
        past.write_all_at(&[9; 512], 128 << 10).unwrap();
        past.set_modified(later).unwrap();
        assert!(written_past(&image, &raw).unwrap(), "past it");
        // It would have hidden what was written where it had been discarded.
        assert!(!raw_data_qcow2_is_new(&image).unwrap());
        renew_raw_data_qcow2(&image).unwrap();
        assert!(raw_data_qcow2_is_new(&image).unwrap());
        let compare = ["compare", "-f", "qcow2", "-F", "raw", text, raw.to_str().unwrap()];
        run(QemuVersion::V10_0, "qemu-img", &compare);
        let info = run(QemuVersion::V10_0, "qemu-img", &["info", text]);
        assert!(!info.contains("c1"), "{info}");
        let entries = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(entries, 2);
    }

    #[test]
    fn it_is_never_shorter_than_its_raw_disk() {
        need!("qemu-img");
        let dir = tempfile::tempdir().unwrap();
        let (image, raw) = (dir.path().join("a.qcow2"), dir.path().join("a.raw"));
        fs::write(&raw, content(1000)).unwrap();
        let file = File::create(&image).unwrap();
        write_raw_data_qcow2(&file, 1000, raw.to_str().unwrap()).unwrap();
        assert!(raw_data_qcow2_is_new(&image).unwrap(), "rounded up");
        let whole = content((1 << 20) + 100);
        fs::write(&raw, &whole).unwrap();
        assert!(!raw_data_qcow2_is_new(&image).unwrap(), "past its end");
        assert_eq!(renew_raw_data_qcow2(&image).unwrap(), None);
        assert!(raw_data_qcow2_is_new(&image).unwrap());
        let text = image.to_str().unwrap();
        let compare = ["compare", "-f", "qcow2", "-F", "raw", text, raw.to_str().unwrap()];
        run(QemuVersion::V10_0, "qemu-img", &compare);
        fs::write(&raw, &whole[..4096]).unwrap();
        assert_eq!(renew_raw_data_qcow2(&image).unwrap(), Some(4096));
        assert!(raw_data_qcow2_is_new(&image).unwrap(), "it keeps its size");
        let info = run(QemuVersion::V10_0, "qemu-img", &["info", text]);
        assert!(info.contains("(1049088 bytes)"), "{info}");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let file = tempfile::tempfile().unwrap();
        for (size, name) in [
            (LONGEST_L1 * ENTRIES * CLUSTER + 1, "b".to_owned()),
            (512, "b".repeat(1024)),
        ] {
            let error = write_raw_data_qcow2(&file, size, &name).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
