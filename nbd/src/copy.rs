//! Reading in bulk: a long range in order, with many requests in flight, on one connection or
//! several, without fetching what is known to be zero.

use std::collections::VecDeque;
use std::future::pending;
use std::ops::Range;

use bytes::Bytes;

use crate::client::{Client, Content, PendingRead};
use crate::error::{Error, Result};
use crate::extents::BASE_ALLOCATION;
use crate::selection::{Changed, Piece, Selection};
use crate::wire::Command;

/// How to read in bulk.
#[derive(Debug, Clone)]
pub struct BulkOptions {
    /// The length of one read, in bytes. It is brought within what the server allows.
    pub request_size: u32,
    /// How many reads may be in flight on each connection.
    pub in_flight: usize,
    /// How many bytes may be in flight, or waiting to be taken, on each connection: what a
    /// [`BulkReader`] takes of memory. One read is always in flight.
    pub in_flight_bytes: u64,
    /// Ask which parts read as zeroes ([`BASE_ALLOCATION`], when the server granted it), and do not
    /// fetch them. They are reported as [`Chunk::Zero`] all the same.
    pub skip_zeroes: bool,
    /// Read only what is dirty in this context (see
    /// [`dirty_bitmap_context`](crate::dirty_bitmap_context)), and say nothing of the rest.
    pub only_changed: Option<String>,
    /// With [`BulkOptions::only_changed`]: ranges that are read as if they were dirty, such as what a disk has grown by.
    /// What of them lies outside the range being read is left alone; they may overlap.
    pub also: Vec<Range<u64>>,
    /// Chunks begin and end at multiples of this, in bytes, or where the range being read does; 0 and 1: anywhere. What has
    /// changed is rounded out, and the rest of its unit is read from the export; zeroes are told in whole units. A unit that
    /// does not fit into one read is told in several chunks.
    pub round_to: u64,
}

impl Default for BulkOptions {
    /// 1 MiB per read; 16 reads, or 4 MiB, in flight per connection; zeroes skipped, everything read.
    fn default() -> Self {
        Self {
            request_size: 1 << 20,
            in_flight: 16,
            in_flight_bytes: 4 << 20,
            skip_zeroes: true,
            only_changed: None,
            also: Vec::new(),
            round_to: 1,
        }
    }
}

/// A piece of what was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chunk {
    /// Bytes of the export, not all of them zero.
    Data {
        /// Where they stand in the export, in bytes.
        offset: u64,
        /// The bytes; never empty.
        data: Bytes,
    },
    /// A range that reads as zeroes. Zero is data: what is made from the export must be zero here.
    Zero {
        /// Where it begins in the export, in bytes.
        offset: u64,
        /// How long it is, in bytes; never zero.
        length: u64,
    },
}

impl Chunk {
    /// Where it begins in the export, in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        match self {
            Self::Data { offset, .. } | Self::Zero { offset, .. } => *offset,
        }
    }

    /// How long it is, in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        match self {
            Self::Data { data, .. } => data.len() as u64,
            Self::Zero { length, .. } => *length,
        }
    }
}

/// Reads a range of an export from its start to its end.
///
/// The chunks come in order and without overlap, and cover the range (or what has changed of it)
/// without a gap. To take up a reading again, read from the end of the last chunk.
///
/// ```no_run
/// # async fn example(uri: &disksnap_nbd::Uri) -> disksnap_nbd::Result<()> {
/// use disksnap_nbd::{BASE_ALLOCATION, BulkOptions, BulkReader, Chunk, Client, ConnectOptions};
///
/// let contexts = vec![BASE_ALLOCATION.to_owned()];
/// let options = ConnectOptions { meta_contexts: contexts, ..ConnectOptions::default() };
/// let clients = Client::connect_many(uri, &options, 4).await?;
/// let whole = 0..clients[0].size();
/// let mut reader = BulkReader::new(clients, whole, &BulkOptions::default())?;
/// while let Some(chunk) = reader.next().await? {
///     match chunk {
///         Chunk::Data { offset, data } => { /* write `data` at `offset` */ }
///         Chunk::Zero { offset, length } => { /* make it zero there */ }
///     }
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct BulkReader {
    planner: Planner,
    planned: bool,
    queue: VecDeque<Slot>,
    /// How many chunks the queue may hold, and how many bytes of data.
    depth: usize,
    window: u64,
    queued_bytes: u64,
    failed: Option<Error>,
}

impl BulkReader {
    /// Gets ready to read `range`. The clients are connections to one export, as
    /// [`Client::connect_many`] makes them; the reads are dealt out among them, and the first is
    /// asked for extents. Nothing is sent before the first [`BulkReader::next`].
    ///
    /// # Errors
    /// [`Error::OutOfBounds`], or [`Error::MissingContext`] for [`BulkOptions::only_changed`].
    ///
    /// # Panics
    /// If there is no client.
    pub fn new(clients: Vec<Client>, range: Range<u64>, options: &BulkOptions) -> Result<Self> {
        assert!(!clients.is_empty(), "a bulk read needs a connection");
        let client = &clients[0];
        client.check_range(Command::Read, range.start, range.end.saturating_sub(range.start))?;
        let allocation = options.skip_zeroes && client.has_context(BASE_ALLOCATION);
        let unit = options.round_to.max(1);
        let selection = match &options.only_changed {
            Some(context) => Selection::Changed {
                changed: Changed::new(
                    client.extents(context, range.clone())?,
                    &options.also,
                    range,
                    unit,
                ),
                within: None,
                allocation,
            },
            None => Selection::whole(client, range, unit, allocation)?,
        };
        let request_size = request_size(&clients, options);
        let depth = options.in_flight.max(1).saturating_mul(clients.len());
        let window = options.in_flight_bytes.saturating_mul(clients.len() as u64);
        let planner = Planner {
            clients,
            turn: 0,
            selection,
            piece: None,
            request_size,
        };
        Ok(Self {
            planner,
            planned: false,
            queue: VecDeque::new(),
            depth,
            window,
            queued_bytes: 0,
            failed: None,
        })
    }

    /// The next chunk, or `None` at the end of the range.
    ///
    /// The future may be dropped and the call repeated: no chunk is lost. After an error every
    /// further call gives that error.
    ///
    /// # Errors
    /// [`Error::Server`] and whatever ends one of the connections.
    pub async fn next(&mut self) -> Result<Option<Chunk>> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let chunk = self.advance().await;
        if let Err(error) = &chunk {
            self.failed = Some(error.clone());
        }
        chunk
    }

    /// Keeps the queue full, and takes its front as soon as that is there.
    async fn advance(&mut self) -> Result<Option<Chunk>> {
        while !self.planned && self.has_room() {
            let front = self.queue.front_mut();
            tokio::select! {
                biased;
                slot = self.planner.next_slot() => {
                    let slot = slot?;
                    self.planned = slot.is_none();
                    self.queued_bytes += slot.as_ref().map_or(0, Slot::bytes);
                    self.queue.extend(slot);
                }
                chunk = async {
                    match front {
                        Some(slot) => slot.wait().await,
                        None => pending().await,
                    }
                } => return self.taken(chunk).map(Some),
            }
        }
        match self.queue.front_mut() {
            Some(front) => {
                let chunk = front.wait().await;
                self.taken(chunk).map(Some)
            }
            None => Ok(None),
        }
    }

    fn has_room(&self) -> bool {
        let bytes = self.queued_bytes + self.planner.request_size;
        self.queue.len() < self.depth && (self.queued_bytes == 0 || bytes <= self.window)
    }

    /// The front of the queue has become this.
    fn taken(&mut self, chunk: Result<Chunk>) -> Result<Chunk> {
        if let Some(slot) = self.queue.pop_front() {
            self.queued_bytes -= slot.bytes();
        }
        chunk
    }
}

/// The length of one read: what is asked for, as far as every connection allows it, in whole units.
fn request_size(clients: &[Client], options: &BulkOptions) -> u64 {
    let align = clients[0].alignment();
    // Alignment may widen a read on both sides.
    let most = clients.iter().map(Client::max_payload).min().unwrap_or(align);
    let most = most.saturating_sub(2 * align).max(align);
    let fits = options.round_to.is_multiple_of(align) && (1..=most).contains(&options.round_to);
    let step = if fits { options.round_to } else { align };
    let wanted = u64::from(options.request_size).next_multiple_of(step);
    wanted.clamp(step, most / step * step)
}

/// A chunk to come.
#[derive(Debug)]
enum Slot {
    Read {
        offset: u64,
        length: u64,
        read: PendingRead,
    },
    Zero {
        offset: u64,
        length: u64,
    },
}

impl Slot {
    /// The memory that it takes, or will.
    fn bytes(&self) -> u64 {
        match self {
            Self::Read { length, .. } => *length,
            Self::Zero { .. } => 0,
        }
    }

    async fn wait(&mut self) -> Result<Chunk> {
        match self {
            Self::Read { offset, read, .. } => {
                let offset = *offset;
                Ok(match read.wait().await? {
                    Content::Data(data) if is_zero(&data) => Chunk::Zero {
                        offset,
                        length: data.len() as u64,
                    },
                    Content::Data(data) => Chunk::Data { offset, data },
                    Content::Zero(length) => Chunk::Zero {
                        offset,
                        length: length as u64,
                    },
                })
            }
            Self::Zero { offset, length } => Ok(Chunk::Zero {
                offset: *offset,
                length: *length,
            }),
        }
    }
}

/// Stops at the first byte that is not zero, and compares at the speed of memory until then.
fn is_zero(bytes: &[u8]) -> bool {
    static ZEROES: [u8; 4096] = [0; 4096];
    bytes
        .chunks(ZEROES.len())
        .all(|chunk| chunk == &ZEROES[..chunk.len()])
}

/// Decides what to read next and sends the reads. Its futures may be dropped: nothing is skipped.
#[derive(Debug)]
struct Planner {
    clients: Vec<Client>,
    turn: usize,
    selection: Selection,
    /// What is left of the piece being cut into reads.
    piece: Option<Piece>,
    request_size: u64,
}

impl Planner {
    async fn next_slot(&mut self) -> Result<Option<Slot>> {
        loop {
            let Some(piece) = &mut self.piece else {
                match self.selection.next().await? {
                    Some(piece) => self.piece = Some(piece),
                    None => return Ok(None),
                }
                continue;
            };
            let Range { start, end } = piece.range;
            if start >= end {
                self.piece = None;
            } else if piece.zero {
                self.piece = None;
                return Ok(Some(Slot::Zero {
                    offset: start,
                    length: end - start,
                }));
            } else {
                let cut = end.min((start / self.request_size + 1) * self.request_size);
                let client = &self.clients[self.turn];
                let read = client.start_read(start, cut - start).await?;
                piece.range.start = cut;
                self.turn = (self.turn + 1) % self.clients.len();
                return Ok(Some(Slot::Read {
                    offset: start,
                    length: cut - start,
                    read,
                }));
            }
        }
    }
}
