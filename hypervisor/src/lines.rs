//! Reading lines from a peer that is not trusted: capped in length, and told apart from a connection that ends.

use std::io;

use tokio::io::{AsyncBufRead, AsyncBufReadExt};

/// The longest line that is accepted, in bytes. A QMP schema has 200 KB; lists of thousands of nodes have a few MB.
pub(crate) const LONGEST: usize = 64 << 20;

/// What reading a line came to.
#[derive(Debug)]
pub(crate) enum Line {
    /// A whole line is in the buffer, without its end.
    Whole,
    /// The peer closed the connection; the buffer holds the beginning of a line, or nothing.
    End,
    /// The line is longer than [`LONGEST`].
    Endless,
}

/// Appends the rest of the line to `buffer`; on an error or when cancelled the buffer keeps what has come so far.
pub(crate) async fn read<R: AsyncBufRead + Unpin>(reader: &mut R, buffer: &mut Vec<u8>) -> io::Result<Line> {
    loop {
        let chunk = reader.fill_buf().await?;
        if chunk.is_empty() {
            return Ok(Line::End);
        }
        let end = chunk.iter().position(|byte| *byte == b'\n');
        let taken = end.unwrap_or(chunk.len());
        if buffer.len() + taken > LONGEST {
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
