//! Bytes as they stand in a state that is kept as JSON: packed by zstd, as base64.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use serde::{Deserialize, Serialize};

/// Packed bytes.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Packed(String);

impl Packed {
    /// Packs them.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        // The first byte says how: memory that ran out is no reason to lose a state.
        let packed = match zstd::bulk::compress(bytes, 1) {
            Ok(packed) => [&[1], packed.as_slice()].concat(),
            Err(_) => [&[0], bytes].concat(),
        };
        Self(STANDARD_NO_PAD.encode(packed))
    }

    /// The bytes, if they are that many at the most.
    pub(crate) fn open(&self, limit: usize) -> Option<Vec<u8>> {
        let packed = STANDARD_NO_PAD.decode(&self.0).ok()?;
        match packed.split_first()? {
            (0, bytes) if bytes.len() <= limit => Some(bytes.to_vec()),
            (1, bytes) => zstd::bulk::decompress(bytes, limit).ok(),
            _ => None,
        }
    }
}

impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Packed({} bytes)", self.0.len())
    }
}
