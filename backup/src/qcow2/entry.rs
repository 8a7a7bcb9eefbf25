//! What an L2 table says of one cluster of the disk.

use super::{CLUSTER, COPIED};

/// Where a compressed cluster's descriptor has the number of sectors: `62 - (cluster_bits - 8)`.
const SECTORS_AT: u32 = 54;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const SECTOR: u64 = 512;

/// One entry of an L2 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// It is as in the backing file; without one it is zero.
    Absent,
    /// It reads as zeroes, whatever the backing file has.
    Zero,
    /// A cluster of the file.
    Plain {
        /// Where it begins in the file.
        host: u64,
    },
    /// Compressed.
    Compressed {
        /// Where it begins in the file.
        host: u64,
        /// How many sectors of the file it touches.
        sectors: u64,
    },
}

impl Entry {
    /// That of `length` compressed bytes.
    pub(crate) fn compressed(host: u64, length: u64) -> Self {
        let sectors = (host + length - 1) / SECTOR - host / SECTOR + 1;
        Self::Compressed { host, sectors }
    }

    /// As the table holds it.
    pub(crate) fn encode(self) -> u64 {
        match self {
            Self::Absent => 0,
            Self::Zero => ZERO,
            Self::Plain { host } => host | COPIED,
            Self::Compressed { host, sectors } => host | ((sectors - 1) << SECTORS_AT) | COMPRESSED,
        }
    }

    /// From the table; `None` for what this crate's images never hold.
    pub(crate) fn decode(raw: u64) -> Option<Self> {
        if raw & COMPRESSED != 0 {
            let sectors = ((raw & !COPIED & !COMPRESSED) >> SECTORS_AT) + 1;
            let host = raw & ((1 << SECTORS_AT) - 1);
            return (raw & COPIED == 0 && host >= CLUSTER).then_some(Self::Compressed { host, sectors });
        }
        match raw {
            0 => Some(Self::Absent),
            ZERO => Some(Self::Zero),
            _ => plain_offset(raw).map(|host| Self::Plain { host }),
        }
    }

    /// What of the file it takes, where it takes any: from where to where.
    pub(crate) fn extent(self) -> Option<(u64, u64)> {
        match self {
            Self::Absent | Self::Zero => None,
            Self::Plain { host } => Some((host, host + CLUSTER)),
            Self::Compressed { host, sectors } => Some((host, (host / SECTOR + sectors) * SECTOR)),
        }
    }
}

/// The offset in an L1 entry, or in an L2 entry of a plain cluster: whole clusters behind the header, refcount one.
pub(crate) fn plain_offset(raw: u64) -> Option<u64> {
    let host = raw & !COPIED;
    let sound = raw & COPIED != 0 && host >= CLUSTER && host.is_multiple_of(CLUSTER) && host < 1 << 56;
    sound.then_some(host)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops at the first thing that fails")]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_compressed_cluster_counts_every_sector_it_touches() {
        let sectors = |host, length| match Entry::compressed(host, length) {
            Entry::Compressed { sectors, .. } => sectors,
            _ => 0,
        };
        assert_eq!(sectors(CLUSTER, 1), 1);
        assert_eq!(sectors(CLUSTER, 512), 1);
        assert_eq!(sectors(CLUSTER, 513), 2);
        assert_eq!(sectors(CLUSTER + 511, 2), 2);
        assert_eq!(sectors(CLUSTER + 1, 61_440), 121);
    }

    #[test]
    fn what_no_image_of_ours_holds_is_no_entry() {
        // Without the flag, with both flags, askew, in the header, with the zero flag over data.
        for raw in [
            CLUSTER,
            COPIED | COMPRESSED | CLUSTER,
            COPIED | (CLUSTER + 512),
            COPIED,
            COPIED | CLUSTER | 1,
            2,
        ] {
            assert_eq!(Entry::decode(raw), None, "{raw:#x}");
        }
    }

    proptest! {
        #[test]
        fn entries_survive_the_table(cluster in 1_u64..1 << 30, askew in 0_u64..CLUSTER, length in 1_u64..CLUSTER) {
            let host = cluster * CLUSTER;
            for entry in [Entry::Absent, Entry::Zero, Entry::Plain { host }, Entry::compressed(host + askew, length)] {
                prop_assert_eq!(Entry::decode(entry.encode()), Some(entry));
            }
        }

        #[test]
        fn an_entry_is_read_as_written_or_not_at_all(raw in any::<u64>()) {
            if let Some(entry) = Entry::decode(raw) {
                prop_assert_eq!(entry.encode(), raw);
            }
        }
    }
}
