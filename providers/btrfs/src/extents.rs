//! The extents of a file, as the tree of its subvolume has them (`BTRFS_IOC_TREE_SEARCH_V2`, btrfs-ioctl(3)).
//!
//! The other file that names `libbtrfs`.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use libbtrfs::tree_search::tree_item::{FileExtentItem, TreeItem};
use libbtrfs::tree_search::{SearchBuilder, SearchItem, SearchKeyBuilder};

/// How much of a tree one search reads: some 3000 extents. An item is never larger than the 64 KiB of a tree's node.
const BUFFER: u64 = 256 << 10;
/// The type of the item that every inode has, and that comes first (`BTRFS_INODE_ITEM_KEY`).
const INODE_ITEM: u32 = 1;
/// The tree of the file that the search is asked of.
const OWN_TREE: u64 = 0;

/// `BTRFS_FILE_EXTENT_INLINE`, `_REG` and `_PREALLOC`.
const INLINE: u8 = 0;
const REGULAR: u8 = 1;
const PREALLOCATED: u8 = 2;
/// An inline extent reads as if it went on to the end of its sector, and no sector is larger.
const LARGEST_SECTOR: u64 = 64 << 10;

/// What a stretch of a file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Held {
    /// Zeros: a hole, or room that nothing was written to yet.
    Zeros,
    /// A part of an extent on the disk. As long as two files have it, nobody writes to it.
    Stored {
        /// Its address in the file system; whatever device that is on.
        address: u64,
        /// Its length there.
        length: u64,
        compression: u8,
        /// Where in the file its first byte would be; wraps around below zero.
        origin: u64,
    },
    /// These bytes, which are in the tree itself.
    Inline(Vec<u8>),
    /// Something that this program does not know.
    Unknown,
}

impl Held {
    /// Whether two files that hold this at the same place are the same there.
    pub(crate) fn same_as(&self, other: &Self) -> bool {
        *self != Self::Unknown && self == other
    }
}

/// A stretch of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) held: Held,
}

/// What is known of a file from some place on: pieces that touch each other, up to `end`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) pieces: Vec<Piece>,
    /// `u64::MAX` where nothing follows.
    pub(crate) end: u64,
    /// The keys of the items, as type and offset.
    keys: Vec<(u32, u64)>,
}

/// A file on btrfs whose extents are read from its beginning to its end.
#[derive(Debug)]
pub(crate) struct Extents {
    file: File,
    inode: u64,
    size: u64,
    /// The last item that is not beyond what was read: from it on is searched. One is always found so.
    from: (u32, u64),
}

impl Extents {
    /// # Errors
    /// `PermissionDenied` without `CAP_SYS_ADMIN`; `Unsupported` where it is not on btrfs.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let extents = Self {
            inode: metadata.ino(),
            size: metadata.len(),
            file,
            from: (INODE_ITEM, 0),
        };
        extents.window(0)?;
        Ok(extents)
    }

    /// Its length in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// What is known from `start` on, which is where the last advance went to.
    pub(crate) fn window(&self, start: u64) -> io::Result<Window> {
        let builder = of_own_tree(SearchBuilder::from(self.file.as_fd()));
        let mut search = builder
            .objectid(..=self.inode)
            .item_type(self.from.0..=FileExtentItem::KEY)
            .offset(self.from.1..)
            .new_boxed(BUFFER);
        let (mut items, mut keys) = (Vec::new(), Vec::new());
        for item in search.search(|_| None)? {
            keys.push((item.ty(), item.offset()));
            items.extend(self.piece(&item)?);
        }
        if keys.first() != Some(&self.from) {
            return Err(io::Error::other("the file has gone while it was looked at"));
        }
        let end = match (keys.len(), items.last()) {
            // Only the item that was known already.
            (1, _) => u64::MAX,
            (_, last) => last.map_or(0, |last| last.end).max(start),
        };
        Ok(Window {
            pieces: joined(items, start, end),
            end,
            keys,
        })
    }

    /// Goes on to `place`, which is in the window. Says whether it went further.
    pub(crate) fn advance(&mut self, window: &Window, place: u64) -> bool {
        let reached = |key: &&(u32, u64)| key.0 != FileExtentItem::KEY || key.1 <= place;
        let last = window.keys.iter().rev().find(reached).copied();
        let further = last.filter(|last| *last != self.from);
        self.from = further.unwrap_or(self.from);
        further.is_some()
    }

    fn piece(&self, item: &SearchItem<'_>) -> io::Result<Option<Piece>> {
        let Some(extent) = item.get::<FileExtentItem<'_>>() else {
            return Ok(None);
        };
        let start = item.offset();
        let plain = extent.encryption() == 0 && extent.other_encoding() == 0;
        let (end, held) = match extent.type_() {
            INLINE => {
                let length = extent.ram_bytes().min(LARGEST_SECTOR);
                let held = self.read(start, length)?;
                (start.saturating_add(length), Held::Inline(held))
            }
            kind => {
                let held = match kind {
                    REGULAR if extent.disk_bytenr() == 0 => Held::Zeros,
                    PREALLOCATED => Held::Zeros,
                    REGULAR if plain => Held::Stored {
                        address: extent.disk_bytenr(),
                        length: extent.disk_num_bytes(),
                        compression: extent.compression(),
                        origin: start.wrapping_sub(extent.offset()),
                    },
                    _ => Held::Unknown,
                };
                (start.saturating_add(extent.num_bytes()), held)
            }
        };
        Ok(Some(Piece { start, end, held }))
    }

    fn read(&self, start: u64, length: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        let read = self.file.read_at(&mut bytes, start)?;
        bytes.truncate(read);
        Ok(bytes)
    }
}

/// The pieces from `start` to `end`, with what lies between them: a file has no items for its holes.
pub(crate) fn joined(found: Vec<Piece>, start: u64, end: u64) -> Vec<Piece> {
    let zeros = |start, end| Piece {
        start,
        end,
        held: Held::Zeros,
    };
    let (mut pieces, mut at) = (Vec::new(), start);
    for piece in found.into_iter().filter(|piece| piece.end > start) {
        if piece.start > at {
            pieces.push(zeros(at, piece.start));
        }
        at = piece.end;
        pieces.push(piece);
    }
    if at < end {
        pieces.push(zeros(at, end));
    }
    pieces
}

/// The crate knows names for the trees of the file system alone. In the key itself any tree can be said, and the key is
/// to be had where the builder is known by its trait only.
fn of_own_tree<B: SearchKeyBuilder>(mut builder: B) -> B {
    builder.get_key().tree_id = OWN_TREE;
    builder
}
