//! The rows of both tables, read and written.

use std::io::{self, BufReader, Read, Write};
use std::time::SystemTime;

use disksnap_core::Result;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::input::{self, Bounded, not_csv};
use crate::time;

/// Which table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// `vm_checkpoints`: a row for each checkpoint.
    Checkpoints,
    /// `vm_checkpoint_disk_map`: a row for each disk of each checkpoint.
    Disks,
}

impl Table {
    /// As the database calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Checkpoints => "vm_checkpoints",
            Self::Disks => "vm_checkpoint_disk_map",
        }
    }
}

/// A row of `vm_checkpoints`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointRow {
    /// The checkpoint.
    #[serde(deserialize_with = "input::id")]
    pub checkpoint_id: Uuid,
    /// The one before it.
    #[serde(default, alias = "parent_id", deserialize_with = "input::optional_id")]
    pub parent: Option<Uuid>,
    /// The VM.
    #[serde(deserialize_with = "input::id")]
    pub vm_id: Uuid,
    /// The instant; written in UTC.
    #[serde(alias = "_create_date", with = "time")]
    pub creation_date: SystemTime,
    /// The user's words. Only newer tables have this column: it is written where there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

/// A row of `vm_checkpoint_disk_map`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskRow {
    /// The disk.
    #[serde(deserialize_with = "input::id")]
    pub disk_id: Uuid,
    /// The checkpoint that covers it.
    #[serde(deserialize_with = "input::id")]
    pub checkpoint_id: Uuid,
}

/// Both tables.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "expected an object with both tables, each a list of rows"
)]
pub struct Tables {
    /// The checkpoints.
    #[serde(rename = "vm_checkpoints")]
    pub checkpoints: Vec<CheckpointRow>,
    /// The disks of each.
    #[serde(rename = "vm_checkpoint_disk_map")]
    pub disks: Vec<DiskRow>,
}

impl Tables {
    /// Reads both tables from one JSON object; each is a list of rows, and each row an object.
    ///
    /// # Errors
    /// `Invalid` with line and column for what is no such document, or is longer than [`MAX_BYTES`](crate::MAX_BYTES).
    pub fn read_json(from: impl Read) -> Result<Self> {
        input::json(from)
    }

    /// Writes both tables as one JSON object, indented.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write_json(&self, mut to: impl Write) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut to, self)?;
        to.write_all(b"\n")
    }

    /// Reads both tables from CSV (RFC 4180) whose first lines name the columns, in any order, as `COPY … CSV HEADER` of a
    /// database writes them. An empty field is NULL.
    ///
    /// # Errors
    /// `Invalid` with table and line for what is no such table, has a column that is not known, or is longer than
    /// [`MAX_BYTES`](crate::MAX_BYTES).
    pub fn read_csv(checkpoints: impl Read, disks: impl Read) -> Result<Self> {
        Ok(Self {
            checkpoints: rows(
                checkpoints,
                Table::Checkpoints,
                &[
                    "checkpoint_id",
                    "parent",
                    "parent_id",
                    "vm_id",
                    "creation_date",
                    "_create_date",
                    "description",
                ],
            )?,
            disks: rows(disks, Table::Disks, &["disk_id", "checkpoint_id"])?,
        })
    }

    /// Writes one of the tables as CSV, with a first line that names the columns.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write_csv(&self, table: Table, to: impl Write) -> io::Result<()> {
        let mut to = csv::WriterBuilder::new().has_headers(false).from_writer(to);
        match table {
            Table::Disks => {
                to.write_record(["disk_id", "checkpoint_id"])?;
                self.disks.iter().try_for_each(|row| to.serialize(row))?;
            }
            Table::Checkpoints => self.write_checkpoints(&mut to)?,
        }
        to.flush()
    }

    fn write_checkpoints<W: Write>(&self, to: &mut csv::Writer<W>) -> csv::Result<()> {
        let described = self.checkpoints.iter().any(|row| row.description.is_some());
        let mut columns = vec!["checkpoint_id", "parent", "vm_id", "creation_date"];
        columns.extend(described.then_some("description"));
        to.write_record(columns)?;
        for row in &self.checkpoints {
            match (described, &row.description) {
                (true, None) => to.serialize((row, ""))?,
                _ => to.serialize(row)?,
            }
        }
        Ok(())
    }
}

fn rows<T: DeserializeOwned>(from: impl Read, table: Table, known: &[&str]) -> Result<Vec<T>> {
    let from = BufReader::with_capacity(1 << 16, Bounded::new(from));
    let mut reader = csv::Reader::from_reader(from);
    let failed = |error| not_csv(error, table.name());
    let columns = reader.headers().map_err(failed)?;
    if let Some(column) = columns.iter().find(|column| !known.contains(column)) {
        let message = format!(
            "the column {column:?} is not known: expected {}",
            known.join(", ")
        );
        return Err(
            disksnap_core::Error::new(disksnap_core::ErrorKind::Invalid, message)
                .with("table", table.name())
                .with("line", 1)
                .hint("Name the columns that are to be copied, or leave the others out."),
        );
    }
    reader.deserialize().map(|row| row.map_err(failed)).collect()
}
