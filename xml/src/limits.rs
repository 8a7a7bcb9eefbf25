//! What a document may cost: size, depth, and counts, checked before anything is allocated for it.
//!
//! The parser compares each attribute of an element with all the others, and each namespace with all
//! the others in scope, so that a small hostile document could keep it busy for hours. One linear
//! pass over the markup sets bounds first. It agrees with the parser on where tags begin and end up
//! to the place where a document stops being well-formed, and there the parser stops too.

use disksnap_core::{Error, ErrorKind, Result};

/// Longest document, in bytes.
pub const MAX_BYTES: usize = 4 << 20;
/// Deepest nesting of elements; libxml2's own limit, and more than libvirt's longest backing chain (200) needs.
pub const MAX_DEPTH: usize = 256;
/// Most tags, comments and other pieces of markup in a document.
pub const MAX_MARKUP: usize = 100_000;
/// Longest set of checkpoints, in bytes; 10 000 of them on 16 disks need 20 MB.
pub const MAX_SET_BYTES: usize = 64 << 20;
/// Most pieces of markup in a set of checkpoints.
pub const MAX_SET_MARKUP: usize = 1_000_000;
/// Most attributes of one element.
pub const MAX_ATTRIBUTES: usize = 256;
/// Most namespace declarations in a document.
pub const MAX_NAMESPACES: usize = 128;

/// How long and how rich a document may be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    bytes: usize,
    markup: usize,
}

/// Those of a document about one thing.
pub(crate) const ONE: Bounds = Bounds {
    bytes: MAX_BYTES,
    markup: MAX_MARKUP,
};

/// Those of a set of checkpoints.
pub(crate) const SET: Bounds = Bounds {
    bytes: MAX_SET_BYTES,
    markup: MAX_SET_MARKUP,
};

/// One piece of markup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Markup<'t> {
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) kind: Kind<'t>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind<'t> {
    Open {
        name: &'t str,
        attributes: usize,
    },
    Empty {
        name: &'t str,
        attributes: usize,
    },
    Close,
    Cdata,
    /// A comment, a processing instruction or a declaration.
    Aside,
}

/// Splits a text into its markup without judging it. Stops where the markup does not end.
pub(crate) struct Scanner<'t> {
    text: &'t str,
    at: usize,
}

impl<'t> Scanner<'t> {
    pub(crate) fn new(text: &'t str) -> Self {
        Self { text, at: 0 }
    }

    fn until(&self, start: usize, skip: usize, close: &str, kind: Kind<'t>) -> Option<Markup<'t>> {
        let from = start + skip;
        let end = from + self.text.get(from..)?.find(close)? + close.len();
        Some(Markup { start, end, kind })
    }

    fn tag(&self, start: usize) -> Option<Markup<'t>> {
        let bytes = self.text.as_bytes();
        let (mut quote, mut attributes) = (None, 0);
        let mut at = start + 1;
        loop {
            match (quote, *bytes.get(at)?) {
                (None, b'>') => break,
                (None, b'=') => attributes += 1,
                (None, q @ (b'\'' | b'"')) => quote = Some(q),
                (Some(q), byte) if q == byte => quote = None,
                _ => {}
            }
            at += 1;
        }
        let inner = &self.text[start + 1..at];
        let name = tag_name(inner);
        let kind = match (inner.starts_with('/'), inner.ends_with('/')) {
            _ if inner.starts_with('!') => Kind::Aside,
            (true, _) => Kind::Close,
            (_, true) => Kind::Empty { name, attributes },
            _ => Kind::Open { name, attributes },
        };
        Some(Markup {
            start,
            end: at + 1,
            kind,
        })
    }
}

/// The qualified name at the beginning of what is between `<` and `>`.
pub(crate) fn tag_name(inner: &str) -> &str {
    let end = inner.find([' ', '\t', '\r', '\n', '/', '>', '<']);
    &inner[..end.unwrap_or(inner.len())]
}

impl<'t> Iterator for Scanner<'t> {
    type Item = Markup<'t>;

    fn next(&mut self) -> Option<Markup<'t>> {
        let start = self.at + self.text.get(self.at..)?.find('<')?;
        let rest = &self.text[start..];
        let found = if rest.starts_with("<!--") {
            self.until(start, 4, "-->", Kind::Aside)
        } else if rest.starts_with("<![CDATA[") {
            self.until(start, 9, "]]>", Kind::Cdata)
        } else if rest.starts_with("<?") {
            self.until(start, 2, "?>", Kind::Aside)
        } else {
            self.tag(start)
        };
        // What does not end is the last there is.
        self.at = found.map_or(self.text.len(), |markup| markup.end);
        found
    }
}

/// Refuses a document that is too long.
pub(crate) fn check_length(bytes: usize, bounds: Bounds) -> Result<()> {
    if bytes <= bounds.bytes {
        return Ok(());
    }
    let message = format!("the document has more than {} bytes", bounds.bytes);
    Err(Error::new(ErrorKind::Invalid, message).with("bytes", bytes))
}

/// Refuses a document that is too large, too deep or too rich.
pub(crate) fn check(text: &str, bounds: Bounds) -> Result<()> {
    check_length(text.len(), bounds)?;
    if text.matches("xmlns").count() > MAX_NAMESPACES {
        return Err(too_much(
            text,
            0,
            "the document",
            "namespace declarations",
            MAX_NAMESPACES,
        ));
    }
    let mut depth = 0_usize;
    for (n, markup) in Scanner::new(text).enumerate() {
        let at = |what: &str, unit, limit| Err(too_much(text, markup.start, what, unit, limit));
        if n >= bounds.markup {
            return at("the document", "tags and comments", bounds.markup);
        }
        match markup.kind {
            Kind::Open { attributes, .. } | Kind::Empty { attributes, .. } if attributes > MAX_ATTRIBUTES => {
                return at("an element", "attributes", MAX_ATTRIBUTES);
            }
            Kind::Open { .. } if depth >= MAX_DEPTH => return at("the document", "levels", MAX_DEPTH),
            Kind::Open { .. } => depth += 1,
            Kind::Close => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    Ok(())
}

fn too_much(text: &str, offset: usize, what: &str, unit: &str, limit: usize) -> Error {
    let (line, column) = position(text, offset);
    let element = enclosing(text, offset).map_or("", |(name, _)| name);
    let error = Error::new(ErrorKind::Invalid, format!("{what} has more than {limit} {unit}"))
        .with("line", line)
        .with("column", column);
    if element.is_empty() {
        error
    } else {
        error.with("element", element)
    }
}

/// Line and column of an offset, both from 1, the column in characters.
pub(crate) fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = &text[..text.floor_char_boundary(offset)];
    let line = before.rfind('\n').map_or(0, |n| n + 1);
    (
        before.matches('\n').count() + 1,
        before[line..].chars().count() + 1,
    )
}

/// Where the last tag or comment begins, when it does not end.
pub(crate) fn unfinished(text: &str) -> Option<usize> {
    let end = Scanner::new(text).last().map_or(0, |markup| markup.end);
    text[end..].find('<').map(|n| end + n)
}

/// The innermost element that an offset is in, and where that begins.
pub(crate) fn enclosing(text: &str, offset: usize) -> Option<(&str, usize)> {
    let mut open = Vec::new();
    for markup in Scanner::new(text) {
        if markup.start > offset {
            break;
        }
        let here = offset < markup.end;
        match markup.kind {
            Kind::Open { name, .. } => open.push((name, markup.start)),
            Kind::Empty { name, .. } if here => return Some((name, markup.start)),
            Kind::Close if !here => _ = open.pop(),
            _ => {}
        }
    }
    open.pop()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_hold_and_name_the_place() {
        let deep = "<a>".repeat(MAX_DEPTH) + &"</a>".repeat(MAX_DEPTH);
        assert!(check(&deep, ONE).is_ok());
        let error = check(&format!("<b>{deep}</b>"), ONE).expect_err("one level too many");
        assert_eq!(
            error.to_string(),
            "the document has more than 256 levels (line 1, column 769, element a)"
        );
        let rich = format!("<a>\n<b {}/></a>", "x='='".repeat(MAX_ATTRIBUTES + 1));
        let error = check(&rich, ONE).expect_err("one attribute too many");
        assert_eq!(
            error.to_string(),
            "an element has more than 256 attributes (line 2, column 1, element b)"
        );
        assert!(check(&rich.replacen("x='='", "", 1), ONE).is_ok());
        assert!(check(&" ".repeat(MAX_BYTES + 1), ONE).is_err());
        assert!(check(&"<a/>".repeat(MAX_MARKUP + 1), ONE).is_err());
        assert!(check(&"<a xmlns:a='b'/>".repeat(MAX_NAMESPACES + 1), ONE).is_err());
    }

    #[test]
    fn what_is_quoted_or_commented_is_no_markup() {
        let kinds: Vec<_> = Scanner::new("<?p >?><a b='>' c=\"'\"><!-- <x> --><![CDATA[<y>]]></a><b/><c")
            .map(|m| m.kind)
            .collect();
        let (a, b) = (("a", 2), ("b", 0));
        assert_eq!(
            kinds,
            [
                Kind::Aside,
                Kind::Open {
                    name: a.0,
                    attributes: a.1
                },
                Kind::Aside,
                Kind::Cdata,
                Kind::Close,
                Kind::Empty {
                    name: b.0,
                    attributes: b.1
                },
            ]
        );
    }

    #[test]
    fn columns_count_characters() {
        assert_eq!(position("ä\nöü<", 7), (2, 3));
        assert_eq!(position("", 0), (1, 1));
    }
}
