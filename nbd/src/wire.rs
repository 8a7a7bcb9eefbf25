//! The NBD wire format as pure functions over byte slices: what we send, and what a server may say.
//!
//! Nothing here does I/O or allocates by a number that the server sent beyond the slice at hand.
//! The names are those of the NBD project's `doc/proto.md`.

use std::fmt;

use bytes::{BufMut, Bytes, BytesMut};

use crate::error::Refusal;

/// The longest string the protocol allows (export names, context names, messages), in bytes.
pub(crate) const MAX_STRING: usize = 4096;
/// The longest reply to an option that we take. The protocol's longest is two strings and a header.
pub(crate) const MAX_OPTION_REPLY: u32 = 64 << 10;
/// The most that all replies to one option may hold together: the list of a server's exports.
pub(crate) const MAX_OPTION_TOTAL: usize = 4 << 20;
/// The most replies to one option.
pub(crate) const MAX_OPTION_REPLIES: usize = 1 << 16;
/// The longest payload of an error chunk that we take.
pub(crate) const MAX_ERROR_PAYLOAD: u32 = 8 << 10;
/// The most descriptors in one block status chunk. QEMU sends up to 2^17, nbdkit up to 2^20.
pub(crate) const MAX_DESCRIPTORS: u32 = 1 << 20;

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454F_5054;
const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// `NBD_FLAG_FIXED_NEWSTYLE` and its answer.
const FIXED_NEWSTYLE: u16 = 1 << 0;
/// `NBD_FLAG_NO_ZEROES` and its answer.
const NO_ZEROES: u16 = 1 << 1;

pub(crate) const REP_ACK: u32 = 1;
pub(crate) const REP_SERVER: u32 = 2;
pub(crate) const REP_INFO: u32 = 3;
pub(crate) const REP_META_CONTEXT: u32 = 4;
const REP_ERROR: u32 = 1 << 31;

const INFO_EXPORT: u16 = 0;
const INFO_DESCRIPTION: u16 = 2;
const INFO_BLOCK_SIZE: u16 = 3;

/// A rule of the protocol that the server broke, in words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Violation(pub(crate) String);

pub(crate) type Checked<T> = Result<T, Violation>;

pub(crate) fn violation<T>(text: impl Into<String>) -> Checked<T> {
    Err(Violation(text.into()))
}

bitflags::bitflags! {
    /// What a server says of an export (`NBD_FLAG_…`, the transmission flags).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct TransmissionFlags: u16 {
        /// The field is in use; set by every server.
        const HAS_FLAGS = 1 << 0;
        /// The export cannot be written.
        const READ_ONLY = 1 << 1;
        /// [`Client::flush`](crate::Client::flush) works.
        const SEND_FLUSH = 1 << 2;
        /// [`CommandFlags::FUA`] works.
        const SEND_FUA = 1 << 3;
        /// The storage is a rotating disk.
        const ROTATIONAL = 1 << 4;
        /// [`Client::trim`](crate::Client::trim) works.
        const SEND_TRIM = 1 << 5;
        /// Zeroes can be written without sending them.
        const SEND_WRITE_ZEROES = 1 << 6;
        /// Unfragmented reads can be asked for.
        const SEND_DF = 1 << 7;
        /// Several connections see one another's writes after a flush.
        const CAN_MULTI_CONN = 1 << 8;
        /// The experimental resize extension.
        const SEND_RESIZE = 1 << 9;
        /// Reading ahead can be asked for.
        const SEND_CACHE = 1 << 10;
        /// [`CommandFlags::FAST_ZERO`] works.
        const SEND_FAST_ZERO = 1 << 11;
        const _ = !0;
    }

    /// How a request is to be carried out (`NBD_CMD_FLAG_…`).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct CommandFlags: u16 {
        /// Answer only when the data is on stable storage. For writes, zeroes and trims.
        const FUA = 1 << 0;
        /// Zeroes must be allocated, not punched. For zeroes.
        const NO_HOLE = 1 << 1;
        /// Fail with `ENOTSUP` unless faster than writing. For zeroes.
        const FAST_ZERO = 1 << 4;
    }
}

/// A kind of request (`NBD_CMD_…`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Command {
    /// `NBD_CMD_READ`
    Read,
    /// `NBD_CMD_WRITE`
    Write,
    /// `NBD_CMD_DISC`
    Disconnect,
    /// `NBD_CMD_FLUSH`
    Flush,
    /// `NBD_CMD_TRIM`
    Trim,
    /// `NBD_CMD_WRITE_ZEROES`
    WriteZeroes,
    /// `NBD_CMD_BLOCK_STATUS`
    BlockStatus,
}

impl Command {
    fn code(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Disconnect => "disconnect",
            Self::Flush => "flush",
            Self::Trim => "trim",
            Self::WriteZeroes => "write of zeroes",
            Self::BlockStatus => "block status",
        })
    }
}

/// An option of the handshake (`NBD_OPT_…`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Opt {
    ExportName = 1,
    Abort = 2,
    List = 3,
    StartTls = 5,
    Go = 7,
    StructuredReply = 8,
    ListMetaContext = 9,
    SetMetaContext = 10,
}

/// The sizes that requests should and must keep to (`NBD_INFO_BLOCK_SIZE`), in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths must be multiples of this: a power of two up to 64 KiB.
    pub minimum: u32,
    /// Offsets and lengths are served best as multiples of this: a power of two.
    pub preferred: u32,
    /// No read or write may be longer than this. `u32::MAX` means that the server has no limit.
    pub maximum: u32,
}

impl Default for BlockSizes {
    /// What the protocol tells a client to assume of a server that says nothing.
    fn default() -> Self {
        Self {
            minimum: 1,
            preferred: 4096,
            maximum: 32 << 20,
        }
    }
}

/// An export as a server lists it (`NBD_OPT_LIST`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedExport {
    /// Its name, for [`Uri::with_export`](crate::Uri::with_export).
    pub name: String,
    /// The server's words about it; often empty.
    pub description: String,
}

/// Takes fields off the front of a message.
struct Fields<'a> {
    rest: &'a [u8],
    message: &'static str,
}

impl<'a> Fields<'a> {
    fn new(message: &'static str, rest: &'a [u8]) -> Self {
        Self { rest, message }
    }

    fn array<const N: usize>(&mut self) -> Checked<[u8; N]> {
        match self.rest.split_first_chunk::<N>() {
            Some((head, rest)) => {
                self.rest = rest;
                Ok(*head)
            }
            None => violation(format!("{} is too short", self.message)),
        }
    }

    fn u16(&mut self) -> Checked<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Checked<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Checked<u64> {
        self.array().map(u64::from_be_bytes)
    }

    fn bytes(&mut self, length: usize) -> Checked<&'a [u8]> {
        match self.rest.split_at_checked(length) {
            Some((head, rest)) => {
                self.rest = rest;
                Ok(head)
            }
            None => violation(format!("{} is shorter than it says", self.message)),
        }
    }

    fn end(&self) -> Checked<()> {
        match self.rest.len() {
            0 => Ok(()),
            n => violation(format!("{} has {n} bytes too many", self.message)),
        }
    }

    fn name(&self, bytes: &[u8]) -> Checked<String> {
        if bytes.len() > MAX_STRING {
            return violation(format!("{} has a name of {} bytes", self.message, bytes.len()));
        }
        match std::str::from_utf8(bytes) {
            Ok(name) if !name.contains('\0') => Ok(name.to_owned()),
            _ => violation(format!("{} has a name that is not clean UTF-8", self.message)),
        }
    }
}

/// A server's words, made fit for a terminal: no control characters, no endless text.
pub(crate) fn printable(bytes: &[u8]) -> Option<Box<str>> {
    const LONGEST: usize = 500;
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_STRING)]);
    let clean: String = text.trim().chars().take(LONGEST).flat_map(shown).collect();
    (!clean.is_empty()).then(|| clean.into_boxed_str())
}

fn shown(c: char) -> impl Iterator<Item = char> {
    let escaped = (c.is_control() || is_bidi_control(c)).then(|| c.escape_unicode());
    let plain = escaped.is_none().then_some(c);
    escaped.into_iter().flatten().chain(plain)
}

/// Characters that make a terminal show text in another order than it stands in.
fn is_bidi_control(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

// --- handshake -------------------------------------------------------------------------------------

/// The first 18 bytes of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Greeting {
    /// The server omits 124 zero bytes after `NBD_OPT_EXPORT_NAME` when we agree to it.
    pub(crate) no_zeroes: bool,
}

impl Greeting {
    pub(crate) const LENGTH: usize = 18;

    pub(crate) fn parse(bytes: &[u8]) -> Checked<Self> {
        let mut fields = Fields::new("the server's greeting", bytes);
        if fields.u64()? != NBDMAGIC {
            return violation("it does not greet as an NBD server does; is another service listening there?");
        }
        match fields.u64()? {
            IHAVEOPT => {}
            OLDSTYLE_MAGIC => return violation("it speaks only the oldstyle handshake, given up long ago"),
            other => return violation(format!("unknown magic {other:#018x} in its greeting")),
        }
        let flags = fields.u16()?;
        fields.end()?;
        if flags & FIXED_NEWSTYLE == 0 {
            return violation("it does not speak the fixed newstyle handshake");
        }
        Ok(Self {
            no_zeroes: flags & NO_ZEROES != 0,
        })
    }

    /// The client flags that answer it.
    pub(crate) fn answer(self) -> [u8; 4] {
        let no_zeroes = if self.no_zeroes { NO_ZEROES } else { 0 };
        u32::from(FIXED_NEWSTYLE | no_zeroes).to_be_bytes()
    }
}

/// A whole option, header and data.
pub(crate) fn option(opt: Opt, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + data.len());
    out.put_u64(IHAVEOPT);
    out.put_u32(opt as u32);
    out.put_u32(length32(data.len()));
    out.put_slice(data);
    out
}

/// The data of `NBD_OPT_GO`: name, and the wish for block sizes.
pub(crate) fn go_data(export: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(export.len() + 10);
    put_string(&mut out, export);
    out.put_u16(2);
    out.put_u16(INFO_BLOCK_SIZE);
    out.put_u16(INFO_DESCRIPTION);
    out
}

/// The data of `NBD_OPT_SET_META_CONTEXT` and `NBD_OPT_LIST_META_CONTEXT`.
pub(crate) fn meta_context_data(export: &str, queries: &[String]) -> Vec<u8> {
    let mut out = Vec::new();
    put_string(&mut out, export);
    out.put_u32(length32(queries.len()));
    for query in queries {
        put_string(&mut out, query);
    }
    out
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.put_u32(length32(text.len()));
    out.put_slice(text.as_bytes());
}

/// Our own strings are checked to be short before they come here.
fn length32(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// The header of a reply to an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OptionReply {
    pub(crate) kind: u32,
    pub(crate) length: u32,
}

impl OptionReply {
    pub(crate) const LENGTH: usize = 20;

    /// Reads the header, which must answer `asked` and announce a length that we are willing to take.
    pub(crate) fn parse(bytes: &[u8], asked: Opt) -> Checked<Self> {
        let mut fields = Fields::new("a reply to an option", bytes);
        let magic = fields.u64()?;
        if magic != OPTION_REPLY_MAGIC {
            return violation(format!("unknown magic {magic:#018x} in a reply to an option"));
        }
        let option = fields.u32()?;
        let (kind, length) = (fields.u32()?, fields.u32()?);
        fields.end()?;
        if option != asked as u32 {
            return violation(format!("it answers option {option} when asked for {asked:?}"));
        }
        if length > MAX_OPTION_REPLY {
            return violation(format!("a reply of {length} bytes to {asked:?}"));
        }
        Ok(Self { kind, length })
    }

    /// The refusal this is, unless it is a good reply.
    pub(crate) fn refusal(self) -> Option<Refusal> {
        (self.kind & REP_ERROR != 0).then_some(match self.kind & !REP_ERROR {
            1 | 4 => Refusal::Unsupported,
            2 => Refusal::Policy,
            3 | 8 | 9 => Refusal::Invalid,
            5 => Refusal::TlsRequired,
            6 => Refusal::UnknownExport,
            7 => Refusal::ShuttingDown,
            _ => Refusal::Other(self.kind),
        })
    }
}

/// One `NBD_REP_INFO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Info {
    Export { size: u64, flags: TransmissionFlags },
    BlockSizes(BlockSizes),
    Description(Option<Box<str>>),
    Other,
}

impl Info {
    pub(crate) fn parse(bytes: &[u8]) -> Checked<Self> {
        let mut fields = Fields::new("an information about the export", bytes);
        let info = match fields.u16()? {
            INFO_EXPORT => {
                let size = check_size(fields.u64()?)?;
                let flags = TransmissionFlags::from_bits_retain(fields.u16()?);
                Self::Export { size, flags }
            }
            INFO_BLOCK_SIZE => {
                let sizes = BlockSizes {
                    minimum: fields.u32()?,
                    preferred: fields.u32()?,
                    maximum: fields.u32()?,
                };
                Self::BlockSizes(check_block_sizes(sizes)?)
            }
            INFO_DESCRIPTION => return Ok(Self::Description(printable(fields.rest))),
            _ => return Ok(Self::Other),
        };
        fields.end()?;
        Ok(info)
    }
}

/// No file can be larger than an `off_t`, and arithmetic on such a size is safe.
fn check_size(size: u64) -> Checked<u64> {
    if i64::try_from(size).is_err() {
        return violation(format!("an impossible export size of {size} bytes"));
    }
    Ok(size)
}

fn check_block_sizes(sizes: BlockSizes) -> Checked<BlockSizes> {
    let BlockSizes {
        minimum,
        preferred,
        maximum,
    } = sizes;
    let good = minimum.is_power_of_two()
        && minimum <= 1 << 16
        && preferred.is_power_of_two()
        && preferred >= minimum
        && maximum >= minimum
        && (maximum == u32::MAX || maximum.is_multiple_of(minimum));
    if good {
        Ok(sizes)
    } else {
        violation(format!(
            "impossible block sizes: minimum {minimum}, preferred {preferred}, maximum {maximum}"
        ))
    }
}

/// How many bytes answer `NBD_OPT_EXPORT_NAME`.
pub(crate) fn export_name_reply_length(greeting: Greeting) -> usize {
    if greeting.no_zeroes { 10 } else { 134 }
}

/// The answer to `NBD_OPT_EXPORT_NAME`: size and flags.
pub(crate) fn parse_export_name_reply(bytes: &[u8]) -> Checked<(u64, TransmissionFlags)> {
    let mut fields = Fields::new("the description of the export", bytes);
    let size = check_size(fields.u64()?)?;
    Ok((size, TransmissionFlags::from_bits_retain(fields.u16()?)))
}

/// `NBD_REP_SERVER`
pub(crate) fn parse_listed_export(bytes: &[u8]) -> Checked<ListedExport> {
    let mut fields = Fields::new("an entry of the list of exports", bytes);
    let length = fields.u32()?;
    let name = fields.bytes(length as usize)?;
    let name = fields.name(name)?;
    let description = printable(fields.rest).map(String::from).unwrap_or_default();
    Ok(ListedExport { name, description })
}

/// `NBD_REP_META_CONTEXT`: id and name.
pub(crate) fn parse_meta_context(bytes: &[u8]) -> Checked<(u32, String)> {
    let mut fields = Fields::new("a metadata context", bytes);
    let id = fields.u32()?;
    let name = fields.name(fields.rest)?;
    Ok((id, name))
}

// --- transmission ----------------------------------------------------------------------------------

/// Appends a request's header. A write's data follows it.
pub(crate) fn put_request(
    out: &mut BytesMut,
    command: Command,
    flags: CommandFlags,
    cookie: u64,
    offset: u64,
    length: u32,
) {
    out.put_u32(REQUEST_MAGIC);
    out.put_u16(flags.bits());
    out.put_u16(command.code());
    out.put_u64(cookie);
    out.put_u64(offset);
    out.put_u32(length);
}

/// The first 16 bytes of a reply, which every kind has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReplyHead {
    /// Data follows if it answers a read and `error` is zero.
    Simple { cookie: u64, error: u32 },
    /// Four bytes of length follow, then so much payload.
    Chunk { cookie: u64, chunk: Chunk, done: bool },
}

/// A type of structured reply chunk (`NBD_REPLY_TYPE_…`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Chunk {
    None,
    Data,
    Hole,
    BlockStatus,
    Error,
    ErrorOffset,
    /// An error of a kind that we do not know: it fails its request and harms nothing else.
    UnknownError(u16),
}

impl ReplyHead {
    pub(crate) const LENGTH: usize = 16;

    pub(crate) fn parse(bytes: &[u8]) -> Checked<Self> {
        let mut fields = Fields::new("a reply", bytes);
        let head = match fields.u32()? {
            SIMPLE_REPLY_MAGIC => Self::Simple {
                error: fields.u32()?,
                cookie: fields.u64()?,
            },
            STRUCTURED_REPLY_MAGIC => {
                let done = fields.u16()? & 1 != 0;
                let chunk = Chunk::parse(fields.u16()?)?;
                Self::Chunk {
                    chunk,
                    done,
                    cookie: fields.u64()?,
                }
            }
            magic => return violation(format!("unknown magic {magic:#010x} in a reply")),
        };
        fields.end()?;
        Ok(head)
    }
}

impl Chunk {
    fn parse(code: u16) -> Checked<Self> {
        Ok(match code {
            0 => Self::None,
            1 => Self::Data,
            2 => Self::Hole,
            5 => Self::BlockStatus,
            0x8001 => Self::Error,
            0x8002 => Self::ErrorOffset,
            code if code & 0x8000 != 0 => Self::UnknownError(code),
            code => return violation(format!("unknown type {code} of a structured reply")),
        })
    }

    /// Checks a payload's length before anything of it is read. `asked` is the request's length.
    pub(crate) fn check_length(self, length: u32, asked: u32) -> Checked<()> {
        let good = match self {
            Self::None => length == 0,
            Self::Data => length > 8 && length - 8 <= asked,
            Self::Hole => length == 12,
            Self::BlockStatus => length >= 12 && length % 8 == 4 && (length - 4) / 8 <= MAX_DESCRIPTORS,
            Self::Error | Self::UnknownError(_) => (6..=MAX_ERROR_PAYLOAD).contains(&length),
            Self::ErrorOffset => (14..=MAX_ERROR_PAYLOAD).contains(&length),
        };
        if good {
            Ok(())
        } else {
            violation(format!(
                "a {self:?} chunk of {length} bytes in answer to a request of {asked} bytes"
            ))
        }
    }
}

/// The payload of a hole chunk: offset and length.
pub(crate) fn parse_hole(payload: &[u8]) -> Checked<(u64, u32)> {
    let mut fields = Fields::new("a hole", payload);
    let hole = (fields.u64()?, fields.u32()?);
    fields.end()?;
    Ok(hole)
}

/// The payload of an error chunk of any kind: error number and message.
pub(crate) fn parse_error(payload: &[u8]) -> Checked<(u32, Option<Box<str>>)> {
    let mut fields = Fields::new("an error chunk", payload);
    let error = fields.u32()?;
    let length = fields.u16()?;
    let message = printable(fields.bytes(usize::from(length))?);
    if error == 0 {
        return violation("an error chunk with error number 0");
    }
    Ok((error, message))
}

/// The payload of a block status chunk. Descriptors are read from it one by one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StatusChunk {
    pub(crate) context: u32,
    descriptors: Bytes,
}

impl StatusChunk {
    /// Checks the whole chunk against the request that it answers: `offset` and `asked` are the
    /// request's, `size` is the export's, all in bytes.
    pub(crate) fn parse(mut payload: Bytes, offset: u64, asked: u32, size: u64) -> Checked<Self> {
        if payload.len() < 12 || payload.len() % 8 != 4 {
            return violation(format!("a block status chunk of {} bytes", payload.len()));
        }
        let context = Fields::new("a block status", &payload.split_to(4)).u32()?;
        let chunk = Self {
            context,
            descriptors: payload,
        };
        let mut covered = 0_u64;
        for (length, _) in chunk.descriptors() {
            if length == 0 {
                return violation("a block status extent of length zero");
            }
            // Only the last extent may reach beyond what was asked; it is the last when this is.
            if covered >= u64::from(asked) {
                return violation("block status extents that go on beyond the requested range");
            }
            covered += u64::from(length);
        }
        if covered > size.saturating_sub(offset) {
            return violation("a block status extent that reaches past the end of the export");
        }
        Ok(chunk)
    }

    /// Length and status flags of each extent, in order.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        let (pairs, _) = self.descriptors.as_chunks::<8>();
        pairs.iter().map(|&[a, b, c, d, e, f, g, h]| {
            (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]))
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

    use proptest::prelude::*;

    use super::*;

    fn status(offset: u64, asked: u32, size: u64, extents: &[(u32, u32)]) -> Checked<StatusChunk> {
        let mut payload = BytesMut::new();
        payload.put_u32(7);
        for (length, flags) in extents {
            payload.put_u32(*length);
            payload.put_u32(*flags);
        }
        StatusChunk::parse(payload.freeze(), offset, asked, size)
    }

    #[test]
    fn block_status_keeps_to_the_request() {
        let extents = [(10, 0), (5, 3)];
        let chunk = status(0, 15, 100, &extents).unwrap();
        assert_eq!(
            (chunk.context, chunk.descriptors().collect::<Vec<_>>()),
            (7, extents.to_vec())
        );
        assert!(
            status(0, 5, 100, &[(50, 0)]).is_ok(),
            "the last extent may be longer than asked"
        );
        assert!(
            status(0, 50, 100, &[(5, 0)]).is_ok(),
            "a server may answer for less"
        );
        for (extents, rule) in [
            (vec![(10, 0), (0, 1)], "length zero"),
            (vec![(15, 0), (1, 1)], "beyond the requested range"),
            (vec![(101, 0)], "past the end"),
            (vec![], "of 4 bytes"),
        ] {
            let error = status(0, 15, 100, &extents).unwrap_err();
            assert!(error.0.contains(rule), "{error}");
        }
        assert!(status(90, 10, 100, &[(11, 0)]).is_err());
    }

    #[test]
    fn chunk_lengths_are_checked_before_they_are_read() {
        assert!(Chunk::Data.check_length(8 + 512, 512).is_ok());
        assert!(Chunk::Data.check_length(8 + 513, 512).is_err());
        assert!(Chunk::Data.check_length(8, 512).is_err());
        assert!(Chunk::None.check_length(1, 512).is_err());
        assert!(Chunk::Error.check_length(u32::MAX, 512).is_err());
        assert!(Chunk::BlockStatus.check_length(u32::MAX - 3, 512).is_err());
    }

    #[test]
    fn server_text_cannot_steer_a_terminal() {
        assert_eq!(
            printable(b"no \x1b[31mspace\n").unwrap().as_ref(),
            "no \\u{1b}[31mspace"
        );
        assert_eq!(
            printable("a\u{202e}b".as_bytes()).unwrap().as_ref(),
            "a\\u{202e}b"
        );
        assert_eq!(printable(b"  "), None);
        assert!(printable(&vec![b'x'; 70_000]).unwrap().len() <= 500);
    }

    #[test]
    fn greetings_of_strangers() {
        let text = |bytes: &[u8]| Greeting::parse(bytes).unwrap_err().0;
        assert!(text(b"SSH-2.0-OpenSSH_9.2p1").contains("another service"));
        let mut old = NBDMAGIC.to_be_bytes().to_vec();
        old.extend(OLDSTYLE_MAGIC.to_be_bytes());
        old.extend([0, 0]);
        assert!(text(&old).contains("oldstyle"));
    }

    #[test]
    fn block_sizes_that_make_no_sense() {
        let sizes = |minimum, preferred, maximum| {
            check_block_sizes(BlockSizes {
                minimum,
                preferred,
                maximum,
            })
            .is_ok()
        };
        assert!(sizes(1, 4096, u32::MAX) && sizes(512, 512, 1536) && sizes(512, 4096, u32::MAX));
        for (minimum, preferred, maximum) in [
            (0, 4096, 1),
            (3, 4096, 4096),
            (1 << 17, 1 << 17, 1 << 17),
            (512, 256, 512),
            (1, 512, 0),
            (512, 512, 513),
        ] {
            assert!(
                !sizes(minimum, preferred, maximum),
                "{minimum} {preferred} {maximum}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            crate::fuzzing::messages(&bytes);
        }
    }
}
