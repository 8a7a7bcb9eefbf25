//! Reading within a bound, and what a parser's error means to the user.

use std::error::Error as _;
use std::fmt;
use std::io::{self, BufReader, Read};

use disksnap_core::{Error, ErrorKind, Result};
use serde::de::{self, DeserializeOwned};
use serde::{Deserialize, Deserializer};
use uuid::Uuid;

/// The longest set that is read, in bytes; 10 000 checkpoints of 16 disks need 30 MB.
pub const MAX_BYTES: u64 = 64 << 20;

/// A reader that fails past the bound.
pub(crate) struct Bounded<R> {
    inner: R,
    left: u64,
}

impl<R> Bounded<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self {
            inner,
            left: MAX_BYTES,
        }
    }
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(into)? as u64;
        self.left = self
            .left
            .checked_sub(read)
            .ok_or_else(|| io::Error::other(TooLong))?;
        Ok(usize::try_from(read).unwrap_or_default())
    }
}

#[derive(Debug)]
struct TooLong;

impl fmt::Display for TooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the set has more than {MAX_BYTES} bytes")
    }
}

impl std::error::Error for TooLong {}

/// An error of the reader itself: too much, or what the operating system says.
pub(crate) fn unread(error: io::Error) -> Error {
    if let Some(inner) = error.get_ref()
        && inner.is::<TooLong>()
    {
        return Error::new(ErrorKind::Invalid, TooLong.to_string());
    }
    Error::io("cannot read the set of checkpoints", error)
}

/// One JSON document, read in a stream.
pub(crate) fn json<T: DeserializeOwned>(from: impl Read) -> Result<T> {
    serde_json::from_reader(BufReader::with_capacity(1 << 16, Bounded::new(from))).map_err(not_json)
}

fn not_json(error: serde_json::Error) -> Error {
    let (line, column) = (error.line(), error.column());
    if error.is_io() {
        return unread(error.into());
    }
    let text = error.to_string();
    let text = text
        .strip_suffix(&format!(" at line {line} column {column}"))
        .unwrap_or(&text);
    let message = if error.is_eof() {
        "the document ends in the middle".to_owned()
    } else {
        text.to_owned()
    };
    Error::new(ErrorKind::Invalid, message)
        .with("line", line)
        .with("column", column)
}

/// An error of the CSV reader in the table.
pub(crate) fn not_csv(error: csv::Error, table: &'static str) -> Error {
    let line = error.position().map(csv::Position::line);
    let message = match error.kind() {
        csv::ErrorKind::Utf8 { err, .. } => format!("the {}. field is not UTF-8", err.field() + 1),
        csv::ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => {
            format!("the record has {len} fields: expected {expected_len}, as many as the first line names")
        }
        csv::ErrorKind::Deserialize { err, .. } => deserialize(err),
        csv::ErrorKind::Io(_) => return unread(error.into()).with("table", table),
        _ => error.source().unwrap_or(&error).to_string(),
    };
    let told = Error::new(ErrorKind::Invalid, message).with("table", table);
    match line {
        Some(line) => told.with("line", line),
        None => told,
    }
}

fn deserialize(error: &csv::DeserializeError) -> String {
    match error.kind() {
        csv::DeserializeErrorKind::Message(text) => text.clone(),
        other => other.to_string(),
    }
}

/// A UUID that is told as it was found where it is none.
pub(crate) fn id<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Uuid, D::Error> {
    parse(&String::deserialize(from)?)
}

/// The same, or NULL.
pub(crate) fn optional_id<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Option<Uuid>, D::Error> {
    let text = Option::<String>::deserialize(from)?;
    text.as_deref().map(parse).transpose()
}

fn parse<E: de::Error>(text: &str) -> std::result::Result<Uuid, E> {
    text.parse()
        .map_err(|_| E::custom(format_args!("{text:?} is no UUID: expected such as {EXAMPLE}")))
}

const EXAMPLE: &str = "5768a388-c1c4-414c-ac4e-eab216ba7c0c";
