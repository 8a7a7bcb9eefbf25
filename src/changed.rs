//! What changed in a disk of a snapshot since a checkpoint, as the reader's export tells it.

use disksnap_core::Result;
use disksnap_nbd::ExtentStream;

use crate::disk::of_nbd;

/// A range of a disk that was written, zeroed or discarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChangedExtent {
    /// Where it begins on the disk, in bytes.
    pub offset: u64,
    /// How long it is, in bytes.
    pub length: u64,
}

/// The changed ranges of a disk: sorted, disjoint, each as long as it can be; in memory that does not grow with the disk.
///
/// See [`DiskReader::changes`](crate::DiskReader::changes).
#[derive(Debug)]
pub struct ChangeStream {
    extents: ExtentStream,
    held: Option<ChangedExtent>,
}

impl ChangeStream {
    pub(crate) fn new(extents: ExtentStream) -> Self {
        Self { extents, held: None }
    }

    /// The next one, or `None` at the end of the disk.
    ///
    /// # Errors
    /// What the connection meets.
    pub async fn next(&mut self) -> Result<Option<ChangedExtent>> {
        while let Some(extent) = self.extents.next().await.map_err(of_nbd)? {
            if !extent.is_dirty() {
                continue;
            }
            let found = ChangedExtent {
                offset: extent.offset,
                length: extent.length,
            };
            match &mut self.held {
                Some(held) if held.offset + held.length == found.offset => held.length += found.length,
                held => {
                    if let Some(done) = held.replace(found) {
                        return Ok(Some(done));
                    }
                }
            }
        }
        Ok(self.held.take())
    }
}
