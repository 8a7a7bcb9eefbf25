//! Where the data of a guest's disk lies in the files of its image, from `qemu-img map`, as a stream.

use std::process::Stdio;

use disksnap_core::{Error, ErrorKind, Result, faults};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::task::JoinHandle;

use crate::{FileInImage, QemuImg, opened};

/// How much of what it complains of is told.
const COMPLAINT: u64 = 4 << 10;

/// Where a piece of the guest's disk comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum From {
    /// It is zero.
    Zero,
    /// From this layer; and from where in its file on, where it lies there as it is.
    Layer { layer: usize, offset: Option<u64> },
}

/// A piece of the guest's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) from: From,
}

impl Piece {
    /// Where its part from here on comes from.
    pub(crate) fn at(&self, start: u64) -> From {
        match self.from {
            From::Zero => From::Zero,
            From::Layer { layer, offset } => From::Layer {
                layer,
                offset: offset.map(|offset| offset.saturating_add(start - self.start)),
            },
        }
    }
}

/// One object of `qemu-img map --output=json`. Before QEMU 8.2 it has no `compressed`, and no `offset` either where that
/// would be true.
#[derive(Debug, Deserialize)]
struct Told {
    start: u64,
    length: u64,
    depth: usize,
    present: bool,
    zero: bool,
    #[serde(default)]
    compressed: bool,
    offset: Option<u64>,
}

impl std::convert::From<Told> for Piece {
    fn from(told: Told) -> Self {
        let from = if told.zero || !told.present {
            From::Zero
        } else {
            From::Layer {
                layer: told.depth,
                offset: told.offset.filter(|_| !told.compressed),
            }
        };
        Self {
            start: told.start,
            end: told.start.saturating_add(told.length),
            from,
        }
    }
}

/// The pieces of one disk, from its first byte to its last. Dropping it ends the program.
#[derive(Debug)]
pub(crate) struct Map {
    child: Child,
    lines: BufReader<ChildStdout>,
    complaint: JoinHandle<String>,
    line: Vec<u8>,
    telling: Telling,
    ended: bool,
}

/// How far the disk is told.
#[derive(Debug)]
pub(crate) struct Telling {
    at: u64,
    size: u64,
}

impl Map {
    /// Starts to read the map of the image that these files make, whose disk has `size` bytes.
    pub(crate) fn start(qemu_img: &QemuImg, files: &[FileInImage], size: u64) -> Result<Self> {
        let failed = |e| Error::io("cannot run qemu-img", e);
        let image = format!("json:{}", opened(files, |_| None)?);
        let mut command = Command::new(qemu_img.program());
        for variable in faults::VARIABLES {
            command.env_remove(variable);
        }
        let mut child = command
            .args(["map", "--output=json", &image])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let (Some(lines), Some(complaint)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(Error::new(ErrorKind::Internal, "qemu-img has no output"));
        };
        Ok(Self {
            child,
            lines: BufReader::with_capacity(64 << 10, lines),
            complaint: tokio::spawn(read_some(complaint)),
            line: Vec::new(),
            telling: Telling::of(size),
            ended: false,
        })
    }

    /// The next piece; they follow one another without a gap.
    ///
    /// # Errors
    /// `Io`, with what it said, when `qemu-img` fails; `Protocol` where its answer is not the whole disk.
    pub(crate) async fn next(&mut self) -> Result<Option<Piece>> {
        while !self.ended {
            self.line.clear();
            let read = self.lines.read_until(b'\n', &mut self.line).await;
            if read.map_err(|e| Error::io("cannot read what qemu-img says", e))? == 0 {
                self.ended = true;
                self.end().await?;
            } else if let Some(piece) = self.telling.piece(&self.line)? {
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }

    async fn end(&mut self) -> Result<()> {
        let status = self.child.wait().await;
        let status = status.map_err(|e| Error::io("cannot wait for qemu-img", e))?;
        if !status.success() {
            let said = (&mut self.complaint).await.unwrap_or_default();
            let what = format!("qemu-img map failed ({status}): {}", said.trim());
            return Err(Error::new(ErrorKind::Io, what));
        }
        self.telling.all_is_told()
    }
}

impl Telling {
    /// A disk of this size, of which nothing is told yet.
    pub(crate) fn of(size: u64) -> Self {
        Self { at: 0, size }
    }

    /// It prints one object in each line of the array.
    pub(crate) fn piece(&mut self, line: &[u8]) -> Result<Option<Piece>> {
        let told = line.trim_ascii();
        let told = told.strip_prefix(b"[").unwrap_or(told);
        let told = told.strip_suffix(b"]").unwrap_or(told);
        let told = told.strip_suffix(b",").unwrap_or(told);
        if told.is_empty() {
            return Ok(None);
        }
        let told: Told = serde_json::from_slice(told).map_err(|e| {
            let line = String::from_utf8_lossy(told).into_owned();
            Error::new(ErrorKind::Protocol, "qemu-img says of an image what is no map")
                .with("line", line)
                .because(e)
        })?;
        let piece = Piece::from(told);
        if piece.start != self.at || piece.end <= piece.start || piece.end > self.size {
            let what = format!(
                "qemu-img tells of {}..{} where {} of {} bytes are told",
                piece.start, piece.end, self.at, self.size
            );
            return Err(Error::new(ErrorKind::Protocol, what));
        }
        self.at = piece.end;
        Ok(Some(piece))
    }

    /// # Errors
    /// `Protocol` where the end of the disk was not told.
    pub(crate) fn all_is_told(&self) -> Result<()> {
        if self.at == self.size {
            return Ok(());
        }
        let what = format!(
            "qemu-img tells of {} bytes of a disk that has {}",
            self.at, self.size
        );
        Err(Error::new(ErrorKind::Protocol, what))
    }
}

/// Reads all, so that nobody waits to be heard, and keeps the beginning.
async fn read_some(mut from: impl AsyncRead + Unpin) -> String {
    let mut said = Vec::new();
    let _ = (&mut from).take(COMPLAINT).read_to_end(&mut said).await;
    let _ = tokio::io::copy(&mut from, &mut tokio::io::sink()).await;
    String::from_utf8_lossy(&said).into_owned()
}
