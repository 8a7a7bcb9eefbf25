//! What is to be read from where: the digests' files say which image has a chunk, its tables say where. Both must agree, also
//! in that the images above have nothing of it: QEMU goes by the tables alone.

use disksnap::{Error, Result};

use super::fetch::{Fetch, Part};
use crate::CHUNK;
use crate::digests::{Digest, Has, Overlay, Span, chunk_length, digest};
use crate::qcow2::{Entry, L2, L2_ENTRIES, Tables};

/// How many chunks a piece of data has at the most: 1 MiB.
const PIECE: usize = 16;

/// An image that is read.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) tables: Tables,
    /// Its disk's size in bytes.
    pub(super) size: u64,
}

/// A piece that is to be read.
#[derive(Debug)]
pub(super) enum Planned {
    Zero { offset: u64, length: u64 },
    Data(Fetch),
}

/// Plans a disk's pieces in their order.
#[derive(Debug)]
pub(super) struct Planner {
    size: u64,
    overlay: Overlay,
    sources: Vec<Source>,
    /// What is planned before the overlay's next span: what is left of earlier ones, the first last.
    left: Vec<Span>,
    zero: Option<(u64, u64)>,
    data: Option<Fetch>,
}

impl Planner {
    pub(super) fn new(overlay: Overlay, sources: Vec<Source>) -> Self {
        let size = sources.first().map_or(0, |source| source.size);
        Self {
            size,
            overlay,
            sources,
            left: Vec::new(),
            zero: None,
            data: None,
        }
    }

    /// The next piece; `None` at the disk's end.
    pub(super) async fn next(&mut self) -> Result<Option<Planned>> {
        loop {
            let span = match self.left.pop() {
                Some(span) => Some(span),
                None => self.overlay.next().await?,
            };
            let Some(span) = span else {
                return Ok(self.take_zero().or_else(|| self.data.take().map(Planned::Data)));
            };
            // A part of it that one L2 table tells of.
            let here = span.count.min(L2_ENTRIES - span.first % L2_ENTRIES);
            let now = span.beginning(here);
            if here < span.count {
                self.left.push(span.rest(here));
            }
            if let Some(whole) = self.plan(&now).await? {
                return Ok(Some(whole));
            }
        }
    }

    /// Takes a span within one L2 table; what is whole then.
    async fn plan(&mut self, span: &Span) -> Result<Option<Planned>> {
        self.check_above(span).await?;
        match &span.has {
            Has::Nobody => {
                self.check_nobody(span)?;
                Ok(self.take_zero().or_else(|| self.data.take().map(Planned::Data)))
            }
            Has::Zero(layer) => {
                self.sources[*layer].check_zero(span).await?;
                Ok(self.add_zero(span))
            }
            Has::Behind(_) => Ok(self.add_zero(span)),
            Has::Data(layer, digests) => self.add_data(span, *layer, digests).await,
        }
    }

    fn add_zero(&mut self, span: &Span) -> Option<Planned> {
        let offset = span.first * CHUNK;
        let length = ((span.first + span.count) * CHUNK).min(self.size) - offset;
        match &mut self.zero {
            Some((first, so_far)) if *first + *so_far == offset => *so_far += length,
            zero => {
                let before = zero.replace((offset, length));
                if let Some((offset, length)) = before {
                    return Some(Planned::Zero { offset, length });
                }
            }
        }
        self.data.take().map(Planned::Data)
    }

    /// One chunk at a time: what is left of the span goes back.
    async fn add_data(
        &mut self,
        span: &Span,
        layer: usize,
        digests: &bytes::Bytes,
    ) -> Result<Option<Planned>> {
        if let Some(zero) = self.take_zero() {
            self.left.push(span.clone());
            return Ok(Some(zero));
        }
        for n in 0..span.count {
            if self
                .data
                .as_ref()
                .is_some_and(|data| !data.takes(span.first + n, PIECE))
            {
                self.left.push(span.rest(n));
                return Ok(self.data.take().map(Planned::Data));
            }
            let chunk = span.at(n);
            let part = self.sources[layer]
                .part(&chunk, digest(digests, n), self.size)
                .await?;
            match &mut self.data {
                Some(data) => data.push(part),
                none => *none = Some(Fetch::of(part)),
            }
        }
        Ok(None)
    }

    fn take_zero(&mut self) -> Option<Planned> {
        self.zero
            .take()
            .map(|(offset, length)| Planned::Zero { offset, length })
    }

    /// The images above the one that has it must have nothing there.
    async fn check_above(&mut self, span: &Span) -> Result<()> {
        let above = match &span.has {
            Has::Nobody => self.sources.len(),
            Has::Zero(layer) | Has::Behind(layer) | Has::Data(layer, _) => *layer,
        };
        for source in &mut self.sources[..above] {
            source.check_absent(span).await?;
        }
        Ok(())
    }

    /// Nobody has it: that is right where the lowest image has a backing file, and that shows through as a whole.
    fn check_nobody(&self, span: &Span) -> Result<()> {
        let Some(lowest) = self.sources.last() else {
            return Ok(());
        };
        let what = if lowest.tables.header().backing.is_none() {
            "its digests leave a part of the disk out, and it has no backing file"
        } else if span.visible.is_some() {
            "the disk's size changed in a chunk that no image above has"
        } else {
            return Ok(());
        };
        Err(lowest
            .tables
            .object()
            .broken(0, what)
            .with("disk offset", span.first * CHUNK))
    }
}

impl Source {
    /// How a chunk of data is read of which this image tells.
    pub(super) async fn part(&mut self, chunk: &Span, digest: Digest, size: u64) -> Result<Part> {
        let table = self.tables.l2(chunk.first / L2_ENTRIES).await?;
        let entry = match &table {
            Some(table) => self.tables.entry(table, chunk.first)?,
            None => Entry::Absent,
        };
        if entry.extent().is_none() {
            return Err(self.differs(table.as_ref(), chunk.first, "data", entry));
        }
        let length = chunk_length(size, chunk.first);
        Ok(Part {
            image: self.tables.object().clone(),
            entry,
            chunk: chunk.first,
            digest,
            stored: chunk_length(self.size, chunk.first),
            shown: chunk.visible.unwrap_or(length),
            length,
        })
    }

    async fn check_zero(&mut self, span: &Span) -> Result<()> {
        // Where nothing lies below, what is not there is zero.
        let zero = if self.tables.header().backing.is_some() {
            Entry::Zero
        } else {
            Entry::Absent
        };
        self.check(span, "zero", |entry| entry == zero).await
    }

    async fn check_absent(&mut self, span: &Span) -> Result<()> {
        self.check(span, "nothing", |entry| entry == Entry::Absent).await
    }

    async fn check(&mut self, span: &Span, digests: &str, sound: impl Fn(Entry) -> bool) -> Result<()> {
        let Some(table) = self.tables.l2(span.first / L2_ENTRIES).await? else {
            return if sound(Entry::Absent) {
                Ok(())
            } else {
                Err(self.differs(None, span.first, digests, Entry::Absent))
            };
        };
        for chunk in span.first..span.first + span.count {
            let entry = self.tables.entry(&table, chunk)?;
            if !sound(entry) {
                return Err(self.differs(Some(&table), chunk, digests, entry));
            }
        }
        Ok(())
    }

    fn differs(&self, table: Option<&L2>, chunk: u64, digests: &str, entry: Entry) -> Error {
        let tables = match entry {
            Entry::Absent => "nothing",
            Entry::Zero => "zero",
            Entry::Plain { .. } | Entry::Compressed { .. } => "data",
        };
        let at = table.map_or(self.tables.header().l1 + chunk / L2_ENTRIES * 8, |table| {
            table.place(chunk)
        });
        let what = format!("its tables have {tables} where its digests have {digests}");
        self.tables
            .object()
            .broken(at, what)
            .with("disk offset", chunk * CHUNK)
    }
}
