//! The digest of a disk's content, from the pieces of it that pass by: see [`content_digest`](crate::content_digest).

use disksnap::{Error, ErrorKind, Piece, Result};

use crate::{CHUNK, Digest};

/// How many digests of zero chunks are hashed at once.
const BATCH: usize = 4096;

/// Adds up the digests of all chunks of a disk in order.
#[derive(Debug)]
pub(crate) struct Content {
    size: u64,
    at: u64,
    hasher: blake3::Hasher,
    /// The digest of a whole chunk of zeroes, many times.
    zeroes: Vec<u8>,
}

impl Content {
    pub(crate) fn new(size: u64) -> Self {
        Self {
            size,
            at: 0,
            hasher: blake3::Hasher::new(),
            zeroes: zero_digest(CHUNK).0.repeat(BATCH),
        }
    }

    /// The next piece, which begins where the last one ended and ends where a chunk does.
    ///
    /// # Errors
    /// `Internal` for any other.
    pub(crate) fn add(&mut self, piece: &Piece) -> Result<()> {
        let end = piece.offset().saturating_add(piece.length());
        let whole = end.is_multiple_of(CHUNK) || end == self.size;
        if piece.offset() != self.at || !whole || end > self.size {
            let why = format!(
                "after {} bytes of the disk comes what is from {} to {end}",
                self.at,
                piece.offset()
            );
            return Err(Error::new(ErrorKind::Internal, why));
        }
        match piece {
            Piece::Data { data, .. } => self.add_data(data),
            Piece::Zero { length, .. } => self.add_zeroes(*length),
        }
        self.at = end;
        Ok(())
    }

    fn add_data(&mut self, data: &[u8]) {
        let chunk = usize::try_from(CHUNK).unwrap_or(usize::MAX);
        for chunk in data.chunks(chunk) {
            self.hasher.update(blake3::hash(chunk).as_bytes());
        }
    }

    fn add_zeroes(&mut self, length: u64) {
        let mut whole = length / CHUNK;
        while whole > 0 {
            let batch = usize::try_from(whole).unwrap_or(BATCH).min(BATCH);
            self.hasher.update(&self.zeroes[..batch * 32]);
            whole -= batch as u64;
        }
        if !length.is_multiple_of(CHUNK) {
            self.hasher.update(&zero_digest(length % CHUNK).0);
        }
    }

    /// The digest of it all.
    ///
    /// # Errors
    /// `Internal` when the disk's end has not come.
    pub(crate) fn finish(self) -> Result<Digest> {
        if self.at == self.size {
            return Ok(Digest(*self.hasher.finalize().as_bytes()));
        }
        let why = format!("the disk ended after {} of its {} bytes", self.at, self.size);
        Err(Error::new(ErrorKind::Internal, why))
    }
}

/// The digest of at most a chunk of zeroes.
fn zero_digest(length: u64) -> Digest {
    Digest::of(&vec![0; usize::try_from(length).unwrap_or(0)])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

    use super::*;

    fn zero(offset: u64, length: u64) -> Piece {
        Piece::Zero { offset, length }
    }

    #[test]
    fn zeroes_count_as_the_bytes_they_are() {
        let size = CHUNK * 5000 + 100;
        let mut told = Content::new(size);
        told.add(&zero(0, size)).unwrap();
        let mut digests = Vec::new();
        for n in 0..5001 {
            let length = if n == 5000 { 100 } else { CHUNK };
            digests.extend(zero_digest(length).0);
        }
        assert_eq!(told.finish().unwrap(), Digest::of(&digests));
        let mut as_data = Content::new(CHUNK + 1);
        let data = vec![0; usize::try_from(CHUNK).unwrap() + 1];
        as_data.add(&Piece::Data { offset: 0, data }).unwrap();
        let mut as_zero = Content::new(CHUNK + 1);
        as_zero.add(&zero(0, CHUNK)).unwrap();
        as_zero.add(&zero(CHUNK, 1)).unwrap();
        assert_eq!(as_data.finish().unwrap(), as_zero.finish().unwrap());
    }

    #[test]
    fn gaps_and_ends_are_noticed() {
        let mut content = Content::new(CHUNK * 3);
        assert!(content.add(&zero(CHUNK, CHUNK)).is_err());
        assert!(content.add(&zero(0, CHUNK / 2)).is_err());
        assert!(content.add(&zero(0, CHUNK * 4)).is_err());
        content.add(&zero(0, CHUNK)).unwrap();
        assert!(content.finish().is_err());
    }
}
