//! A BLAKE3 digest of a stream that can be gone on with by another process: what is kept of it is a few hundred bytes, and
//! not the stream. It is the plain digest, made of subtrees as BLAKE3's paper describes.

use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use serde::{Deserialize, Serialize};

use super::Digest;

/// How much is hashed at once: a power of two, enough for every SIMD unit.
const SEGMENT: usize = 16 << 10;

/// A digest in the making.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TreeHash {
    /// The whole subtrees so far, the largest first.
    subtrees: Vec<ChainingValue>,
    /// How many segments are in them.
    segments: u64,
    /// The segment that is being filled. It is kept until more follows, since the last one is hashed otherwise.
    #[serde(skip)]
    tail: Vec<u8>,
}

impl TreeHash {
    /// Adds to it.
    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.tail.len() == SEGMENT {
                self.end_segment();
            }
            let (now, rest) = bytes.split_at(bytes.len().min(SEGMENT - self.tail.len()));
            self.tail.extend_from_slice(now);
            bytes = rest;
        }
    }

    /// The digest of what was added.
    pub(crate) fn finish(&self) -> Digest {
        let Some((root, subtrees)) = self.subtrees.split_first() else {
            return Digest::of(&self.tail);
        };
        let mut right = self.tail_value();
        for left in subtrees.iter().rev() {
            right = merge_subtrees_non_root(left, &right, Mode::Hash);
        }
        Digest(*merge_subtrees_root(root, &right, Mode::Hash).as_bytes())
    }

    /// The part of the stream that a later one needs beside what is serialized.
    pub(crate) fn tail(&self) -> &[u8] {
        &self.tail
    }

    /// Goes on, with the part that [`TreeHash::tail`] gave; `None` for what cannot be.
    pub(crate) fn resume(mut self, tail: Vec<u8>) -> Option<Self> {
        let sound = self.subtrees.len() == self.segments.count_ones() as usize
            && tail.len() <= SEGMENT
            && (self.segments == 0 || !tail.is_empty())
            && self.segments < 1 << 48;
        self.tail = tail;
        sound.then_some(self)
    }

    /// How much was added, in bytes.
    pub(crate) fn length(&self) -> Option<u64> {
        let whole = self.segments.checked_mul(SEGMENT as u64)?;
        whole.checked_add(self.tail.len() as u64)
    }

    fn tail_value(&self) -> ChainingValue {
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(self.segments * SEGMENT as u64);
        hasher.update(&self.tail);
        hasher.finalize_non_root()
    }

    /// A whole segment that is not the last one: a subtree, which makes larger ones with those that are as large.
    fn end_segment(&mut self) {
        let mut value = self.tail_value();
        let mut pairs = self.segments;
        while pairs % 2 == 1 {
            if let Some(left) = self.subtrees.pop() {
                value = merge_subtrees_non_root(&left, &value, Mode::Hash);
            }
            pairs /= 2;
        }
        self.subtrees.push(value);
        self.segments += 1;
        self.tail.clear();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops at the first thing that fails")]

    use super::*;

    #[test]
    fn it_is_the_plain_digest_whatever_the_length_and_wherever_it_was_taken_up() {
        let bytes: Vec<u8> = (0..SEGMENT * 21 + 5)
            .map(|n| u8::try_from((n * n / 7 + n / 251) % 256).unwrap())
            .collect();
        let lengths = (0..=20).flat_map(|n| [n * SEGMENT, n * SEGMENT + 1, n * SEGMENT + 4321]);
        for length in lengths {
            let mut hash = TreeHash::default();
            for piece in bytes[..length].chunks(10_007) {
                hash.update(piece);
                let kept: TreeHash = serde_json::from_str(&serde_json::to_string(&hash).unwrap()).unwrap();
                hash = kept.resume(hash.tail().to_vec()).unwrap();
            }
            assert_eq!(hash.finish(), Digest::of(&bytes[..length]), "{length} bytes");
        }
    }
}
