//! Reading lines from a peer that is not trusted: capped in length, and told apart from a connection that ends.

use std::io;

use tokio::io::{AsyncBufRead, AsyncBufReadExt};

/// The longest line of a monitor that is accepted, in bytes. A QMP schema has 200 KB; lists of thousands of nodes have a few MB. As
/// values a line may take some thirty times as much.
pub(crate) const OF_MONITOR: usize = 16 << 20;

/// The longest line of a guest agent: it is the guest that says it, and nothing that it is asked has so much to tell.
pub(crate) const OF_AGENT: usize = 1 << 20;

/// What reading a line came to.
#[derive(Debug)]
pub(crate) enum Line {
    /// A whole line is in the buffer, without its end.
    Whole,
    /// The peer closed the connection; the buffer holds the beginning of a line, or nothing.
    End,
    /// The line is longer than what is accepted.
    Endless,
}

/// Appends the rest of the line to `buffer`, which then has at most `longest` bytes; on an error or when cancelled the buffer keeps what
/// has come so far.
pub(crate) async fn read<R: AsyncBufRead + Unpin>(
    longest: usize,
    reader: &mut R,
    buffer: &mut Vec<u8>,
) -> io::Result<Line> {
    loop {
        let chunk = reader.fill_buf().await?;
        if chunk.is_empty() {
            return Ok(Line::End);
        }
        let end = chunk.iter().position(|byte| *byte == b'\n');
        let taken = end.unwrap_or(chunk.len());
        if buffer.len() + taken > longest {
            return Ok(Line::Endless);
        }
        buffer.extend_from_slice(&chunk[..taken]);
        let used = taken + usize::from(end.is_some());
        reader.consume(used);
        if end.is_some() {
            return Ok(Line::Whole);
        }
    }
}
