//! The program `thin_delta` (its manual page is in section 8): how the mappings of two thin devices differ, read while it prints.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::PathBuf;

use disksnap_core::{Error, ErrorKind, Result};
use duct::ReaderHandle;
use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

use crate::mapper::Pool;
use crate::program::{self, Known, apart};

const PROGRAM: Known = Known {
    name: "thin_delta",
    package: "thin_delta",
    install: "thin-provisioning-tools (Debian) or device-mapper-persistent-data (Fedora)",
    elsewhere: "DISKSNAP_THIN_DELTA",
};

/// The unit of `data_block_size`.
const SECTOR: u64 = 512;

/// The versions that miss changes, from the first on to before the second: what is mapped in scattered chunks they take for
/// one run ("range mappings preprocessing" in their `CHANGES`).
const MISSING_CHANGES: [Version; 2] = [[1, 0, 0], [1, 0, 6]];
/// Older ones have had errors of other kinds.
const OLDEST: Version = [0, 7, 0];

type Version = [u64; 3];

/// A `thin_delta` at hand.
#[derive(Debug, Clone)]
pub(crate) struct ThinDelta {
    program: PathBuf,
}

impl ThinDelta {
    /// Finds it.
    ///
    /// # Errors
    /// `Unavailable` where there is none, or one that is known to miss changes.
    pub(crate) fn find() -> Result<Self> {
        let program = PROGRAM.find()?;
        let version = duct::cmd!(&program, "--version")
            .env("LC_ALL", "C")
            .stdin_null()
            .stdout_capture()
            .stderr_capture();
        let output = program::run(&version, None)
            .map_err(|e| Error::io(format!("cannot run {}", program.display()), e))?;
        must_be_sound(&String::from_utf8_lossy(&output.stdout)).map_err(|why| {
            let what = format!("{} is not to be trusted: {why}", program.display());
            Error::new(ErrorKind::Unavailable, what)
                .retryable(false)
                .hint(format!("Install version 1.0.6 or newer of {}.", PROGRAM.install))
        })?;
        Ok(Self { program })
    }

    /// Gives each range of bytes that may differ between these two devices of a pool whose metadata snapshot is reserved,
    /// in ascending order, some touching each other. `held` is open in the program for as long as it lives.
    ///
    /// # Errors
    /// Whatever keeps it from telling all of them: what was given then must not be used.
    pub(crate) fn differing(
        &self,
        pool: &Pool,
        ids: [u64; 2],
        held: &File,
        each: impl FnMut(Range<u64>) -> Result<()>,
    ) -> Result<()> {
        let running = self.start(pool, ids, held)?;
        let read = parse(BufReader::new(&running), pool.chunk, ids, each);
        // At the end of what it prints it has been waited for.
        let ended = running
            .try_wait()
            .map_err(|e| Error::io("cannot wait for thin_delta", e))?;
        match (ended, read) {
            (Some(output), _) if !output.status.success() => {
                let said = String::from_utf8_lossy(&output.stderr);
                let lines = said
                    .lines()
                    .map(str::trim)
                    .take_while(|line| !line.starts_with("Usage:"));
                let said = lines
                    .filter(|line| !line.is_empty())
                    .collect::<Vec<_>>()
                    .join("; ");
                let what = format!("thin_delta failed ({}): {said}", output.status);
                Err(Error::new(ErrorKind::Refused, what).with("pool", &pool.name))
            }
            (Some(_), read) => read,
            (None, read) => {
                // What it might still print goes nowhere. Where it cannot be killed it has ended.
                let _ = running.kill();
                drop(running);
                read.and(Err(unlike("something that goes on after its end")))
            }
        }
    }

    fn start(&self, pool: &Pool, ids: [u64; 2], held: &File) -> Result<ReaderHandle> {
        let held = held.try_clone().map_err(|e| Error::io("cannot hold a file", e))?;
        let [left, right] = ids.map(|id| id.to_string());
        let metadata = pool.metadata();
        let metadata = metadata.as_os_str();
        let arguments = ["-m", "--thin1", &left, "--thin2", &right].map(AsRef::as_ref);
        let expression = apart(&duct::cmd(&self.program, arguments.into_iter().chain([metadata])));
        program::ours_alone(&expression)
            .env("LC_ALL", "C")
            .stdin_file(held)
            .stderr_capture()
            .unchecked()
            .reader()
            .map_err(|e| Error::io(format!("cannot run {}", self.program.display()), e))
    }
}

/// Whether the version, as it is printed, misses no changes; else why.
pub(crate) fn must_be_sound(printed: &str) -> std::result::Result<(), String> {
    let version = version(printed).ok_or_else(|| format!("it calls its version {:?}", printed.trim()))?;
    let [from, until] = MISSING_CHANGES;
    let shown = version.map(|part| part.to_string()).join(".");
    if (from..until).contains(&version) {
        return Err(format!(
            "version {shown} takes scattered chunks for one, and misses changes"
        ));
    }
    if version < OLDEST {
        return Err(format!("version {shown} is too old"));
    }
    Ok(())
}

/// `0.9.0`, `thin_delta 1.0.6`.
fn version(printed: &str) -> Option<Version> {
    let word = printed.lines().next()?.split_whitespace().next_back()?;
    let mut parts = word.split('.').map(str::parse);
    let mut part = || parts.next()?.ok();
    let version = [part()?, part()?, part()?];
    parts.next().is_none().then_some(version)
}

/// How far the document has been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Before,
    InSuperblock,
    InDiff,
    InRun,
    AfterDiff,
    After,
}

/// Reads the document to its very end.
pub(crate) fn parse(
    input: impl BufRead,
    chunk: u64,
    ids: [u64; 2],
    mut each: impl FnMut(Range<u64>) -> Result<()>,
) -> Result<()> {
    let mut reader = Reader::from_reader(input);
    reader.config_mut().expand_empty_elements = true;
    let (mut place, mut last, mut buffer) = (Place::Before, 0, Vec::new());
    loop {
        buffer.clear();
        let event = reader.read_event_into(&mut buffer);
        place = match (place, event.map_err(|e| unlike("no XML").because(e))?) {
            (Place::Before, Event::Start(tag)) if tag.name().as_ref() == "superblock" => {
                must_be(&tag, "data_block_size", chunk / SECTOR)?;
                Place::InSuperblock
            }
            (Place::InSuperblock, Event::Start(tag)) if tag.name().as_ref() == "diff" => {
                must_be(&tag, "left", ids[0])?;
                must_be(&tag, "right", ids[1])?;
                Place::InDiff
            }
            (Place::InDiff, Event::Start(tag)) => {
                let differs = differs(&tag)?;
                let run = run(&tag, last, chunk)?;
                last = run.end;
                if differs {
                    each(run)?;
                }
                Place::InRun
            }
            (Place::InRun, Event::End(_)) => Place::InDiff,
            (Place::InDiff, Event::End(_)) => Place::AfterDiff,
            (Place::AfterDiff, Event::End(_)) => Place::After,
            (place, Event::Text(text)) if text.trim_ascii().is_empty() => place,
            (Place::Before, Event::Decl(_)) => Place::Before,
            (Place::After, Event::Eof) => return Ok(()),
            (_, Event::Eof) => return Err(unlike("only the beginning of it")),
            (place, event) => return Err(unlike(&format!("{event:?} ({place:?})"))),
        };
    }
}

fn unlike(what: &str) -> Error {
    Error::new(
        ErrorKind::Protocol,
        format!("thin_delta printed something else than what differs: {what}"),
    )
}

/// Whether what a run tells may be another content; what is not known is no reason to say that it is not.
fn differs(tag: &BytesStart<'_>) -> Result<bool> {
    match tag.name().as_ref() {
        // One and the same chunk of the pool.
        "same" => Ok(false),
        // Two chunks; or one, and the other device reads zeros there.
        "different" | "left_only" | "right_only" => Ok(true),
        other => Err(unlike(&format!("<{other}>"))),
    }
}

/// The bytes that a run covers, which begins at the end of the last one or later.
fn run(tag: &BytesStart<'_>, last: u64, chunk: u64) -> Result<Range<u64>> {
    let (begin, length) = (number(tag, "begin")?, number(tag, "length")?);
    let bytes = |chunks: u64| chunks.checked_mul(chunk);
    let start = bytes(begin).filter(|start| *start >= last);
    let end = begin.checked_add(length).and_then(bytes);
    match (start, end) {
        (Some(start), Some(end)) if start < end => Ok(start..end),
        _ => Err(unlike(&format!(
            "{length} chunks from {begin} on, after the byte {last}"
        ))),
    }
}

fn must_be(tag: &BytesStart<'_>, name: &str, expected: u64) -> Result<()> {
    let told = number(tag, name)?;
    if told == expected {
        return Ok(());
    }
    Err(unlike(&format!("{name} is {told} instead of {expected}")))
}

fn number(tag: &BytesStart<'_>, name: &str) -> Result<u64> {
    let mut found = None;
    for attribute in tag.attributes() {
        let attribute = attribute.map_err(|e| unlike("no XML").because(e))?;
        if attribute.key.as_ref() == name {
            found = Some(attribute.value);
        }
    }
    let parsed = found.as_ref().and_then(|text| text.parse().ok());
    parsed.ok_or_else(|| unlike(&format!("{name} is {found:?}")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

    use proptest::prelude::*;

    use super::*;

    /// As the real `thin_delta` 0.9.0 printed it.
    const PRINTED: &str = r#"<superblock uuid="" time="3" transaction="4" data_block_size="256" nr_data_blocks="0">
  <diff left="2" right="3">
    <same begin="0" length="2"/>
    <different begin="2" length="2"/>
    <same begin="4" length="4"/>
    <left_only begin="8" length="1"/>
    <same begin="9" length="1"/>
    <right_only begin="16" length="1"/>
  </diff>
</superblock>
"#;
    const CHUNK: u64 = 128 << 10;

    fn read(text: &str) -> Result<Vec<Range<u64>>> {
        let mut all = Vec::new();
        parse(text.as_bytes(), CHUNK, [2, 3], |range| {
            all.push(range);
            Ok(())
        })
        .map(|()| all)
    }

    #[test]
    fn real_output_is_read() {
        let chunks: Vec<_> = read(PRINTED)
            .unwrap()
            .iter()
            .map(|range| range.start / CHUNK..range.end / CHUNK)
            .collect();
        assert_eq!(chunks, [2..4, 8..9, 16..17]);
        let nothing = r#"<superblock data_block_size="256"><diff left="2" right="3"></diff></superblock>"#;
        assert_eq!(read(nothing).unwrap(), []);
        assert_eq!(read(&nothing.replace("></diff>", "/>")).unwrap(), []);
    }

    #[test]
    fn versions_that_miss_changes_are_known() {
        for good in [
            "0.7.0",
            "0.9.0\n",
            "thin_delta 1.0.6",
            "1.0.12",
            "thin_delta 1.1.0\n",
            "2.0.0",
        ] {
            assert_eq!(must_be_sound(good), Ok(()), "{good}");
        }
        for bad in [
            "1.0.0",
            "thin_delta 1.0.5\n",
            "0.6.3",
            "",
            "one",
            "1.0",
            "1.0.6.1",
            "1.0.x",
        ] {
            assert!(must_be_sound(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_cut_off_is_no_end() {
        let whole = PRINTED.trim_end().len();
        for end in 0..whole {
            let cut = PRINTED.get(..end).unwrap();
            assert_eq!(read(cut).unwrap_err().kind(), ErrorKind::Protocol, "{cut}");
        }
        assert!(read(PRINTED.get(..whole).unwrap()).is_ok());
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let same = r#"<same begin="4" length="4"/>"#;
        for bad in [
            r#"<new begin="4" length="4"/>"#,
            r#"<same begin="3" length="4"/>"#,
            r#"<same begin="4" length="5"/>"#,
            r#"<same begin="4" length="0"/>"#,
            r#"<same begin="4"/>"#,
            r#"<same begin="4" begin="4" length="4"/>"#,
            r#"<same begin="-4" length="4"/>"#,
            r#"<different begin="18446744073709551615" length="1"/>"#,
            r#"<different begin="4" length="18446744073709551615"/>"#,
            r#"<same><range begin="4" length="4"/></same>"#,
            r#"<same begin="4" length="4"><different begin="4" length="4"/></same>"#,
            "</diff><diff left=\"2\" right=\"3\">",
            "<!-- a word -->",
            "<![CDATA[ ]]>",
            "&amp;",
            "a word",
            "<?a b?>",
        ] {
            let text = PRINTED.replace(same, bad);
            let error = read(&text).expect_err(bad);
            assert_eq!(error.kind(), ErrorKind::Protocol, "{bad}: {error}");
        }
        for (good, bad) in [
            ("\"256\"", "\"128\""),
            ("left=\"2\"", "left=\"4\""),
            ("right=\"3\"", "right=\"2\""),
            ("</superblock>", "</superblock><superblock/>"),
            ("</superblock>", "</superblock>more"),
            ("<superblock", "more<superblock"),
            ("<superblock", "<!DOCTYPE a [<!ENTITY b \"c\">]><superblock"),
        ] {
            let text = PRINTED.replace(good, bad);
            let error = read(&text).expect_err(bad);
            assert_eq!(error.kind(), ErrorKind::Protocol, "{bad}: {error}");
        }
    }

    #[test]
    fn what_the_reader_of_ranges_says_ends_it() {
        let full = || Err(Error::new(ErrorKind::NoSpace, "full"));
        let ended = parse(PRINTED.as_bytes(), CHUNK, [2, 3], |_| full());
        assert_eq!(ended.unwrap_err().kind(), ErrorKind::NoSpace);
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), at in 0..PRINTED.len()) {
            let mut text = PRINTED.as_bytes().to_vec();
            text.splice(at..at, bytes);
            let _ = parse(text.as_slice(), CHUNK, [2, 3], |range| {
                assert!(range.start < range.end);
                Ok(())
            });
        }
    }
}
