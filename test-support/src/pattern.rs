//! Bytes that tell where they were written, and digests.

use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

/// One KiB.
pub const KIB: u64 = 1 << 10;
/// One MiB.
pub const MIB: u64 = 1 << 20;
/// One GiB.
pub const GIB: u64 = 1 << 30;

/// `len` bytes that are the same for the same seed and differ everywhere for another one: no block of
/// them equals another, so that a misplaced block is noticed.
#[must_use]
pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        out.extend_from_slice(&random.next_u64().to_le_bytes());
    }
    out.truncate(len);
    out
}

/// The sha256 of some bytes, in hexadecimal.
#[must_use]
pub fn digest(data: &[u8]) -> String {
    hex(&Sha256::digest(data))
}

/// The sha256 of a file or block device, read in pieces.
#[must_use]
pub fn digest_file(path: &Path) -> String {
    let open = std::fs::File::open(path);
    let mut file = open.unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return hex(&hash.finalize()),
            Ok(n) => hash.update(&buffer[..n]),
            Err(error) => panic!("cannot read {}: {error}", path.display()),
        }
    }
}

fn hex(digest: &[u8]) -> String {
    digest
        .iter()
        .fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

/// A small repeatable generator (`SplitMix64`): tests name their seed in the failure message.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator that gives the same numbers for the same seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `end`, which must not be zero.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next_u64() % end
    }
}
