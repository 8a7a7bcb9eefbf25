//! Bytes as they stand in a state that is kept as JSON: packed by zstd, as base64.

use std::fmt;
use std::io::Read;

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
            (1, bytes) => unpacked(bytes, limit),
            _ => None,
        }
    }
}

/// Room is made for what there is, not for what there might be: the limit may come from where the bytes do.
fn unpacked(bytes: &[u8], limit: usize) -> Option<Vec<u8>> {
    let most = u64::try_from(limit).ok()?;
    let (mut out, frames) = (Vec::new(), zstd::stream::read::Decoder::new(bytes).ok()?);
    frames.take(most.saturating_add(1)).read_to_end(&mut out).ok()?;
    (out.len() <= limit).then_some(out)
}

impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Packed({} bytes)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops at the first thing that fails")]

    use super::*;

    #[test]
    fn bytes_come_back_within_their_limit_and_a_limit_costs_nothing() {
        let bytes = vec![7; 100_000];
        let packed = Packed::of(&bytes);
        assert_eq!(packed.open(bytes.len()).unwrap(), bytes);
        assert_eq!(packed.open(bytes.len() - 1), None);
        // Nobody has so much memory.
        assert_eq!(packed.open(usize::MAX).unwrap(), bytes);
        let torn = Packed(packed.0[..packed.0.len() / 2].to_owned());
        assert_eq!(torn.open(usize::MAX), None);
    }
}
