//! Reading a set of checkpoints from files, in whatever form it is.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use disksnap::checkpoint_set::ovirt::{DiskIds, Tables};
use disksnap::checkpoint_set::{MAX_BYTES, json};
use disksnap::xml::{checkpoints, set_text_of};
use disksnap::{Checkpoint, Domain, Error, ErrorKind, Result};

use crate::checkpoint_args::{Redefine, SetFormat};

/// A set as it was read.
#[derive(Debug)]
pub(crate) struct ReadSet {
    pub(crate) checkpoints: Vec<Checkpoint>,
    /// The ids of disks that the domain does not have, with the number of checkpoints that covered them.
    pub(crate) left_out: BTreeMap<String, usize>,
}

pub(crate) fn read(domain: &Domain, redefine: &Redefine) -> Result<ReadSet> {
    let path = &redefine.file;
    let named = |error: Error| error.with("document", path.display());
    let mut input = open(path)?;
    let format = match redefine.format {
        Some(format) => format,
        None => guess(&mut input).map_err(named)?,
    };
    let tables = match format {
        SetFormat::Xml => return plain(whole(input).and_then(|text| checkpoints(&text)).map_err(named)),
        SetFormat::Json => return plain(json::read(input).map_err(named)),
        SetFormat::OvirtJson => Tables::read_json(input).map_err(named)?,
        SetFormat::OvirtCsv => {
            let disks = redefine.disk_map.as_deref().map(open).transpose()?;
            let disks = disks.ok_or_else(|| Error::new(ErrorKind::Invalid, "no --disk-map is given"))?;
            // Each error names its table.
            Tables::read_csv(input, disks)?
        }
    };
    let ids = DiskIds::new(domain, &redefine.disks.told)?;
    let (checkpoints, left_out) =
        tables.checkpoints_of(&domain.id, &ids, redefine.leave_out_missing_disks)?;
    let left_out = left_out.into_iter();
    Ok(ReadSet {
        checkpoints,
        left_out: left_out.map(|(id, times)| (id.to_string(), times)).collect(),
    })
}

fn plain(checkpoints: Result<Vec<Checkpoint>>) -> Result<ReadSet> {
    Ok(ReadSet {
        checkpoints: checkpoints?,
        left_out: BTreeMap::new(),
    })
}

fn open(path: &Path) -> Result<Box<dyn BufRead>> {
    if path == Path::new("-") {
        return Ok(Box::new(io::stdin().lock()));
    }
    let file = File::open(path)
        .map_err(|e| Error::io("cannot read the set of checkpoints", e).with("document", path.display()))?;
    Ok(Box::new(BufReader::new(file)))
}

/// XML or JSON, by the first character.
fn guess(input: &mut impl BufRead) -> Result<SetFormat> {
    loop {
        let seen = input.fill_buf();
        let seen = seen.map_err(|e| Error::io("cannot read the set of checkpoints", e))?;
        match seen.iter().position(|byte| !byte.is_ascii_whitespace()) {
            Some(n) if seen[n] == b'<' => return Ok(SetFormat::Xml),
            Some(n) if seen[n] == b'{' => return Ok(SetFormat::Json),
            None if !seen.is_empty() => {
                // White space before an XML declaration would be at fault, but then the declaration says so itself.
                let all = seen.len();
                input.consume(all);
            }
            _ => {
                let message = "the set is neither XML nor JSON";
                return Err(Error::new(ErrorKind::Invalid, message)
                    .hint("Say its form: --format xml, json, ovirt-json or ovirt-csv."));
            }
        }
    }
}

/// One byte more than is allowed shows that it is too much, without reading all of it.
fn whole(input: impl Read) -> Result<String> {
    let mut bytes = Vec::new();
    let read = input.take(MAX_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(|e| Error::io("cannot read the set of checkpoints", e))?;
    set_text_of(bytes)
}
