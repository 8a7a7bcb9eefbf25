//! The first cluster of an image.

use super::{CLUSTER, MAX_L1_ENTRIES, l1_entries};

const MAGIC: &[u8; 4] = b"QFI\xfb";
const VERSION: u32 = 3;
const CLUSTER_BITS: u32 = 16;
/// With the compression type and its padding.
const LENGTH: u32 = 112;
/// The shortest of version 3.
const LENGTH_AT_LEAST: u32 = 104;
/// Refcounts of 16 bits.
const REFCOUNT_ORDER: u32 = 4;
/// Incompatible feature: the compression is not zlib.
const COMPRESSION_TYPE: u64 = 1 << 3;
const BACKING_FORMAT: u32 = 0xE279_2ACA;
const ZSTD: u8 = 1;
const FORMAT: &[u8] = b"qcow2";
/// The longest name of a backing file that QEMU takes, in bytes.
pub(crate) const MAX_BACKING: usize = 1023;

/// What the header of an image says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    /// The virtual size in bytes: the disk's, rounded up to whole sectors as QEMU does with a raw file. (In an image, QEMU
    /// rounds it down.)
    pub(crate) size: u64,
    /// The backing file's name; its format is qcow2.
    pub(crate) backing: Option<String>,
    /// Whether compressed clusters are by zstd.
    pub(crate) zstd: bool,
    /// Where the L1 table is, which is as long as the size makes it.
    pub(crate) l1: u64,
    /// Where the refcount table is.
    pub(crate) refcounts: u64,
    /// How long that is, in clusters.
    pub(crate) refcount_clusters: u32,
}

/// The virtual size that the image of a disk of this size has.
pub(crate) fn virtual_size(size: u64) -> u64 {
    size.next_multiple_of(512)
}

impl Header {
    /// The bytes that stand at the file's beginning; less than a cluster.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let name = self.backing.as_deref().unwrap_or_default().as_bytes();
        let extensions = extensions(self.backing.is_some());
        let name_at = if name.is_empty() {
            0
        } else {
            u64::from(LENGTH) + extensions.len() as u64
        };
        let mut out = Vec::with_capacity(512);
        out.extend(MAGIC);
        out.extend(VERSION.to_be_bytes());
        out.extend(name_at.to_be_bytes());
        out.extend(to_u32(name.len() as u64).to_be_bytes());
        out.extend(CLUSTER_BITS.to_be_bytes());
        out.extend(virtual_size(self.size).to_be_bytes());
        out.extend(0_u32.to_be_bytes()); // no encryption
        out.extend(to_u32(l1_entries(self.size)).to_be_bytes());
        out.extend(self.l1.to_be_bytes());
        out.extend(self.refcounts.to_be_bytes());
        out.extend(self.refcount_clusters.to_be_bytes());
        out.extend([0; 12]); // no snapshots
        out.extend(if self.zstd { COMPRESSION_TYPE } else { 0 }.to_be_bytes());
        out.extend([0; 16]); // no compatible and no autoclear features
        out.extend(REFCOUNT_ORDER.to_be_bytes());
        out.extend(LENGTH.to_be_bytes());
        out.extend([if self.zstd { ZSTD } else { 0 }, 0, 0, 0, 0, 0, 0, 0]);
        out.extend(extensions);
        out.extend(name);
        out
    }

    /// Reads the file's first bytes, up to a cluster.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        if bytes.get(..4) != Some(MAGIC) {
            return Err("it is no qcow2 image".to_owned());
        }
        let fields = Fields { bytes };
        expect("version", fields.u32(4)?, VERSION)?;
        expect("cluster bits", fields.u32(20)?, CLUSTER_BITS)?;
        expect("encryption", fields.u32(32)?, 0)?;
        expect("number of snapshots", fields.u32(60)?, 0)?;
        expect("refcount order", fields.u32(96)?, REFCOUNT_ORDER)?;
        let length = fields.u32(100)?;
        if length < LENGTH_AT_LEAST || u64::from(length) > CLUSTER {
            return Err(format!("its header claims a length of {length}"));
        }
        let incompatible = fields.u64(72)?;
        let kind = if length > LENGTH_AT_LEAST {
            fields.slice(104, 1)?[0]
        } else {
            0
        };
        let zstd = match (incompatible, kind) {
            (0, 0) => false,
            (COMPRESSION_TYPE, ZSTD) => true,
            _ => {
                return Err(format!(
                    "it has features {incompatible:#x} and compression {kind}, which are not known"
                ));
            }
        };
        let size = fields.u64(24)?;
        let entries = fields.u32(36)?;
        if l1_entries(size) > MAX_L1_ENTRIES || u64::from(entries) != l1_entries(size) {
            return Err(format!(
                "its L1 table of {entries} entries does not fit a disk of {size} bytes"
            ));
        }
        Ok(Self {
            size,
            backing: backing(&fields)?,
            zstd,
            l1: aligned("L1 table", fields.u64(40)?, entries == 0)?,
            refcounts: aligned("refcount table", fields.u64(48)?, false)?,
            refcount_clusters: fields.u32(56)?,
        })
    }
}

/// The backing file's format, where there is one, and the end.
fn extensions(backed: bool) -> Vec<u8> {
    let mut out = Vec::new();
    if backed {
        out.extend(BACKING_FORMAT.to_be_bytes());
        out.extend(to_u32(FORMAT.len() as u64).to_be_bytes());
        out.extend(FORMAT);
        out.extend([0; 3]); // to a multiple of eight
    }
    out.extend([0; 8]);
    out
}

fn backing(fields: &Fields<'_>) -> Result<Option<String>, String> {
    let (at, length) = (fields.u64(8)?, fields.u32(16)? as usize);
    if at == 0 {
        return Ok(None);
    }
    if length == 0 || length > MAX_BACKING {
        return Err(format!("its backing file has a name of {length} bytes"));
    }
    let at = usize::try_from(at).map_err(|_| format!("its backing file's name is at {at}"))?;
    let name = String::from_utf8(fields.slice(at, length)?.to_vec());
    name.map(Some)
        .map_err(|_| "its backing file's name is no text".to_owned())
}

fn expect(what: &str, is: u32, should: u32) -> Result<(), String> {
    if is == should {
        Ok(())
    } else {
        Err(format!("its {what} is {is}, not {should}"))
    }
}

fn aligned(what: &str, at: u64, may_be_none: bool) -> Result<u64, String> {
    let sound = at.is_multiple_of(CLUSTER) && at < 1 << 56 && (at >= CLUSTER || may_be_none);
    if sound {
        Ok(at)
    } else {
        Err(format!("its {what} is at {at}"))
    }
}

/// Big-endian fields of the header.
struct Fields<'a> {
    bytes: &'a [u8],
}

impl Fields<'_> {
    fn slice(&self, at: usize, length: usize) -> Result<&[u8], String> {
        let end = at.checked_add(length).ok_or("its header is torn")?;
        Ok(self.bytes.get(at..end).ok_or("its header is torn")?)
    }

    fn u32(&self, at: usize) -> Result<u32, String> {
        let mut field = [0; 4];
        field.copy_from_slice(self.slice(at, 4)?);
        Ok(u32::from_be_bytes(field))
    }

    fn u64(&self, at: usize) -> Result<u64, String> {
        let mut field = [0; 8];
        field.copy_from_slice(self.slice(at, 8)?);
        Ok(u64::from_be_bytes(field))
    }
}

/// For numbers that are known to be small: an L1 table's length, a name's.
fn to_u32(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops at the first thing that fails")]

    use proptest::prelude::*;

    use super::*;

    fn sample(backing: Option<&str>, zstd: bool) -> Header {
        Header {
            size: 5 << 30,
            backing: backing.map(str::to_owned),
            zstd,
            l1: 7 * CLUSTER,
            refcounts: 9 * CLUSTER,
            refcount_clusters: 1,
        }
    }

    #[test]
    fn headers_survive() {
        for header in [
            sample(None, false),
            sample(None, true),
            sample(Some("../a/vda.qcow2"), true),
        ] {
            assert_eq!(Header::decode(&header.encode()).unwrap(), header);
        }
    }

    #[test]
    fn a_torn_header_is_told() {
        let whole = sample(Some("../a/vda.qcow2"), true).encode();
        for length in 0..whole.len() {
            Header::decode(&whole[..length]).unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn no_header_harms(at in 4_usize..136, byte in any::<u8>()) {
            let mut bytes = sample(Some("../a/vda.qcow2"), true).encode();
            bytes[at] = byte;
            let _ = Header::decode(&bytes);
        }
    }
}
