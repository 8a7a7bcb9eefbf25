//! What compares the copies of `memory`, by reading them; with one fault.

use std::ops::Range;

use async_trait::async_trait;
use disksnap_core::{Changed, Compare, Host, Peer, Precision, Result};
use futures_util::stream;

use super::file_of;

/// The bytes of a block that is told as a whole.
const BLOCK: usize = 512;

/// What is wrong with the comparing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wrong {
    Nothing,
    ForgetsZeroes,
    ForgetsTheTail,
    Backwards,
    InPieces,
    AllExactly,
    OneWay,
    SizeOfTheEarlier,
    NotOffered,
    Unpromised,
}

/// Compares so.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Comparing(pub(crate) Wrong);

#[async_trait]
impl Compare for Comparing {
    async fn changed(&self, _: &dyn Host, earlier: &Peer, later: &Peer, _: &str) -> Result<Changed> {
        let read = |peer: &Peer| std::fs::read(file_of(&peer.unit.data)).unwrap();
        let (before, after) = (read(earlier), read(later));
        let blocks = before.chunks(BLOCK).zip(after.chunks(BLOCK));
        let differs = |(before, after): (&[u8], &[u8])| match self.0 {
            Wrong::AllExactly => true,
            Wrong::ForgetsZeroes if after.iter().all(|byte| *byte == 0) => false,
            _ => before != after,
        };
        let mut differ: Vec<bool> = blocks.map(differs).collect();
        match self.0 {
            Wrong::ForgetsTheTail => *differ.last_mut().unwrap() = false,
            Wrong::OneWay if file_of(&earlier.unit.data) > file_of(&later.unit.data) => differ.fill(false),
            _ => {}
        }
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (n, _) in differ.iter().enumerate().filter(|(_, differ)| **differ) {
            let (start, end) = ((n * BLOCK) as u64, ((n + 1) * BLOCK).min(after.len()) as u64);
            match ranges.last_mut() {
                Some(last) if last.end == start && self.0 != Wrong::InPieces => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        if self.0 == Wrong::Backwards {
            ranges.reverse();
        }
        let size = after.len() as u64;
        Ok(Changed {
            size: if self.0 == Wrong::SizeOfTheEarlier {
                size + 512
            } else {
                size
            },
            precision: Precision::Exact(BLOCK as u64),
            ranges: Box::pin(stream::iter(ranges.into_iter().map(Ok))),
        })
    }
}
