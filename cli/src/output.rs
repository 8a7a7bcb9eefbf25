//! Printing: one form of three, on standard output; warnings on standard error.

use std::borrow::Cow;
use std::io::Write;

use anstyle::{AnsiColor, Style};
use disksnap::Error;
use serde::Serialize;

use crate::args::Form;
use crate::failure::{Failure, Outcome};

/// What a command has to show, for people.
pub(crate) trait Text {
    /// Whole lines.
    fn text(&self) -> String;
}

/// Where a command prints.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    pub(crate) form: Form,
    pub(crate) quiet: bool,
}

impl Output {
    /// Prints a view in the form that was asked for. Its serialization is its JSON.
    pub(crate) fn show(
        self,
        view: &(impl Text + Serialize),
        xml: impl FnOnce() -> disksnap::Result<String>,
    ) -> Outcome {
        let text = match self.form {
            Form::Text => plain(&view.text()).into_owned(),
            Form::Xml => xml()?,
            Form::Json => {
                let json = serde_json::to_string_pretty(view);
                json.map_err(|e| defect("cannot write JSON", e))? + "\n"
            }
        };
        print(text.as_bytes())
    }

    /// Tells a warning, where people read. In the other forms it is in the document.
    pub(crate) fn warn(self, warning: &str) {
        if !self.quiet && self.form == Form::Text {
            let yellow = Style::new().bold().fg_color(Some(AnsiColor::Yellow.into()));
            // Where standard error is gone there is nobody to be told.
            let _ = writeln!(
                anstream::stderr(),
                "{yellow}warning:{yellow:#} {}",
                plain(warning)
            );
        }
    }
}

pub(crate) fn print(bytes: &[u8]) -> Outcome {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .map_err(Failure::output)
}

fn defect(what: &str, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::new(disksnap::ErrorKind::Internal, what).because(error)
}

/// The text without what a terminal would obey: guests, hypervisors and NBD peers word parts of it. Lines stay lines.
pub(crate) fn plain(text: &str) -> Cow<'_, str> {
    // The marks that turn the direction of writing show one name as another.
    let bidi =
        |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let obeyed = |c: char| c != '\n' && (c.is_control() || bidi(c));
    if !text.contains(obeyed) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if obeyed(c) {
            shown.extend(c.escape_unicode());
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

/// Rows in columns, two spaces apart; the last column is not padded.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |n: usize| {
        rows.iter()
            .filter_map(|row| row.get(n))
            .map(|cell| cell.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..columns).map(|n| width(n).unwrap_or_default()).collect();
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width - cell.chars().count() + 2));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// Names and values, aligned, behind an indentation.
pub(crate) fn fields<'a>(indent: &str, fields: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let rows: Vec<Vec<String>> = fields
        .into_iter()
        .map(|(name, value)| vec![format!("{indent}{name}"), value])
        .collect();
    table(&rows)
}

/// A size for people: exact bytes, and a rounded figure where that is shorter to read.
pub(crate) fn size(bytes: u64) -> String {
    for (unit, name) in [
        (1_u64 << 40, "TiB"),
        (1 << 30, "GiB"),
        (1 << 20, "MiB"),
        (1 << 10, "KiB"),
    ] {
        if bytes >= unit {
            let (whole, tenth) = (bytes / unit, bytes % unit * 10 / unit);
            return match (bytes % unit, tenth) {
                (0, _) => format!("{whole} {name}"),
                _ => format!("{whole}.{tenth} {name} ({bytes} bytes)"),
            };
        }
    }
    format!("{bytes} bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let row = |cells: &[&str]| cells.iter().map(|c| (*c).to_owned()).collect();
        let rows = [row(&["NAME", "SIZE"]), row(&["nächtlich", "1"]), row(&["b", ""])];
        assert_eq!(table(&rows), "NAME       SIZE\nnächtlich  1\nb\n");
    }

    #[test]
    fn what_a_terminal_would_obey_is_shown_instead() {
        assert_eq!(plain("two\nlines, é😀"), "two\nlines, é😀");
        assert_eq!(
            plain("\u{1b}[2J\r\u{9b}1m\u{202e}txt.exe\u{7f}"),
            r"\u{1b}[2J\u{d}\u{9b}1m\u{202e}txt.exe\u{7f}"
        );
    }

    #[test]
    fn sizes_are_exact() {
        assert_eq!(size(512), "512 bytes");
        assert_eq!(size(1 << 30), "1 GiB");
        assert_eq!(size((1 << 30) + 512), "1.0 GiB (1073742336 bytes)");
        assert_eq!(size(3 << 19), "1.5 MiB (1572864 bytes)");
    }
}
