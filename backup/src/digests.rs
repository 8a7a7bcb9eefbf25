//! The digests of an image's chunks, and the file that they are kept in.
//!
//! | file | what is in it |
//! | --- | --- |
//! | `format` | the file's parts, which `docs/backup-format.md` describes |
//! | `writer` | writing it as a stream |
//! | `reader` | reading it as a stream |
//! | `overlay` | several of them over each other: which image has what of the disk |
//! | `tree_hash` | a digest that can be gone on with later |

mod format;
mod overlay;
mod reader;
mod tree_hash;
mod writer;

use std::fmt;
use std::str::FromStr;

use disksnap::{Error, ErrorKind};
use serde::{Deserialize, Serialize};

pub(crate) use format::content_size;
pub(crate) use overlay::{Has, Overlay, Span};
pub(crate) use reader::{ChunksReader, digest, digest_of};
pub(crate) use writer::{ChunksState, ChunksWriter, head};

use crate::CHUNK;

/// A BLAKE3 digest; as text 64 hexadecimal digits, as `b3sum` prints it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// Of that many zeroes, a chunk at the most.
    pub(crate) fn of_zeroes(length: u64) -> Self {
        static WHOLE: std::sync::LazyLock<Digest> = std::sync::LazyLock::new(|| Digest::of(&ZEROES));
        if length == CHUNK {
            return *WHOLE;
        }
        Self::of(&ZEROES[..to_usize(length).min(CHUNK_BYTES)])
    }
}

static ZEROES: [u8; CHUNK_BYTES] = [0; CHUNK_BYTES];

/// [`CHUNK`] as a length in memory.
pub(crate) const CHUNK_BYTES: usize = 64 << 10;
const _: () = assert!(CHUNK_BYTES as u64 == CHUNK, "the same number");

/// As a length in memory: for numbers that are bounded by what is there or was read.
pub(crate) fn to_usize(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// Whether a chunk is zero; of data it is known after a few bytes.
pub(crate) fn is_zero(chunk: &[u8]) -> bool {
    chunk == &ZEROES[..chunk.len()]
}

/// How many chunks a disk of this size has.
pub(crate) fn chunks(size: u64) -> u64 {
    size.div_ceil(CHUNK)
}

/// How long a chunk of a disk of this size is: all but the last one are whole, those beyond the disk empty.
pub(crate) fn chunk_length(size: u64, chunk: u64) -> u64 {
    size.saturating_sub(chunk.saturating_mul(CHUNK)).min(CHUNK)
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let hash = blake3::Hash::from_hex(text);
        hash.map(|hash| Self(*hash.as_bytes())).map_err(|_| {
            Error::new(
                ErrorKind::Invalid,
                format!("'{text}' is no digest: expected 64 hexadecimal digits"),
            )
        })
    }
}

impl TryFrom<String> for Digest {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}
