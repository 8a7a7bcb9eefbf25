//! Writing: elements as values, escaped and indented when they are put out.

use std::fmt::{self, Write as _};

use disksnap_core::{Error, ErrorKind, Result};

use crate::limits::{Kind, Scanner};

/// An element to be written. The documents of this crate are made of these; a program that puts out
/// a list or a report of its own can use them too.
///
/// ```
/// use disksnap_xml::Element;
/// let list = Element::new("things").child(Element::new("thing").attr("name", "a<b"));
/// assert_eq!(list.to_document()?, "<things>\n  <thing name='a&lt;b'/>\n</things>\n");
/// # Ok::<(), disksnap_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    name: String,
    attributes: Vec<(String, String)>,
    content: Vec<Content>,
    verbatim: Option<Verbatim>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    Element(Element),
    Text(String),
}

/// The text of an element as another document has it, and the indentation of its lines there.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Verbatim {
    text: String,
    indent: String,
}

impl Element {
    /// An empty element.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            attributes: Vec::new(),
            content: Vec::new(),
            verbatim: None,
        }
    }

    /// An element by its text in another document, whose lines are indented by `indent` there.
    pub(crate) fn verbatim(text: impl Into<String>, indent: impl Into<String>) -> Self {
        let (text, indent) = (text.into(), indent.into());
        Self {
            verbatim: Some(Verbatim { text, indent }),
            ..Self::new("")
        }
    }

    /// Adds an attribute at the end.
    #[must_use]
    pub fn attr(mut self, name: impl Into<String>, value: impl fmt::Display) -> Self {
        self.attributes.push((name.into(), value.to_string()));
        self
    }

    /// Adds an attribute when there is a value for it.
    #[must_use]
    pub fn attr_if(self, name: &str, value: Option<impl fmt::Display>) -> Self {
        match value {
            Some(value) => self.attr(name, value),
            None => self,
        }
    }

    /// Adds a child element at the end.
    #[must_use]
    pub fn child(mut self, child: Element) -> Self {
        self.content.push(Content::Element(child));
        self
    }

    /// Adds child elements at the end.
    #[must_use]
    pub fn children(mut self, children: impl IntoIterator<Item = Element>) -> Self {
        self.content.extend(children.into_iter().map(Content::Element));
        self
    }

    /// Adds text at the end. An element has either text or children; with both, lines are not broken.
    #[must_use]
    pub fn text(mut self, text: impl fmt::Display) -> Self {
        self.content.push(Content::Text(text.to_string()));
        self
    }

    pub(crate) fn has_content(&self) -> bool {
        !self.content.is_empty()
    }

    pub(crate) fn push(&mut self, child: Element) {
        self.content.push(Content::Element(child));
    }

    pub(crate) fn push_attr(&mut self, name: &str, value: &str) {
        self.attributes.push((name.to_owned(), value.to_owned()));
    }

    pub(crate) fn has_attr(&self, name: &str) -> bool {
        self.attributes.iter().any(|(known, _)| known == name)
    }

    /// The document with this root, indented by two spaces, with a newline at its end.
    ///
    /// # Errors
    /// `Unsupported` for a name or a character that XML cannot hold.
    pub fn to_document(&self) -> Result<String> {
        Ok(self.render(Some(&Layout::default()))? + "\n")
    }

    /// The element without a newline at its end; on one line without a layout.
    pub(crate) fn render(&self, layout: Option<&Layout>) -> Result<String> {
        let mut out = String::new();
        self.write(&mut out, layout)?;
        Ok(out)
    }

    fn write(&self, out: &mut String, layout: Option<&Layout>) -> Result<()> {
        if let Some(Verbatim { text, indent }) = &self.verbatim {
            match layout {
                Some(layout) => out.push_str(&reindent(text, indent, &layout.indent)),
                None => out.push_str(text),
            }
            return Ok(());
        }
        check_name(&self.name)?;
        out.push('<');
        out.push_str(&self.name);
        for (name, value) in &self.attributes {
            check_name(name)?;
            let value = escape(value)?;
            // A String takes any text.
            let _ = write!(out, " {name}='{value}'");
        }
        if self.content.is_empty() {
            out.push_str("/>");
            return Ok(());
        }
        out.push('>');
        let mixed = self.content.iter().any(|c| matches!(c, Content::Text(_)));
        let inner = layout.filter(|_| !mixed).map(Layout::deeper);
        for content in &self.content {
            if let Some(inner) = &inner {
                inner.line_break(out);
            }
            match content {
                Content::Element(element) => element.write(out, inner.as_ref())?,
                Content::Text(text) => out.push_str(&escape(text)?),
            }
        }
        if let (Some(layout), Some(_)) = (layout, &inner) {
            layout.line_break(out);
        }
        let _ = write!(out, "</{}>", self.name);
        Ok(())
    }
}

/// How the lines around a place are broken and indented.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) newline: &'static str,
    pub(crate) indent: String,
    pub(crate) unit: String,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            newline: "\n",
            indent: String::new(),
            unit: "  ".to_owned(),
        }
    }
}

impl Layout {
    /// The layout of what is one level further in.
    pub(crate) fn deeper(&self) -> Self {
        Self {
            indent: format!("{}{}", self.indent, self.unit),
            ..self.clone()
        }
    }

    pub(crate) fn line_break(&self, out: &mut String) {
        out.push_str(self.newline);
        out.push_str(&self.indent);
    }
}

/// The text as it may stand between tags and in quotes of either kind; read back it is the same.
///
/// Line breaks and tabs are written as numbers, because a parser turns raw ones into spaces in
/// attributes and `\r\n` into `\n` everywhere.
///
/// # Errors
/// `Unsupported` for a character that XML 1.0 cannot hold in any way.
pub(crate) fn escape(text: &str) -> Result<String> {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&apos;"),
            '"' => out.push_str("&quot;"),
            '\t' => out.push_str("&#9;"),
            '\n' => out.push_str("&#10;"),
            '\r' => out.push_str("&#13;"),
            '\0'..='\x1f' | '\u{fffe}' | '\u{ffff}' => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("XML cannot hold the character {c:?} of {text:?}"),
                ));
            }
            c => out.push(c),
        }
    }
    Ok(out)
}

fn check_name(name: &str) -> Result<()> {
    if is_name(name) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        format!("{name:?} cannot be the name of an element or attribute in XML"),
    ))
}

/// Whether a text is a name in XML; a colon counts as part of one, for prefixes.
pub(crate) fn is_name(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(is_name_start) && chars.all(|c| {
        is_name_start(c)
            || matches!(c, '-' | '.' | '0'..='9' | '\u{b7}' | '\u{300}'..='\u{36f}' | '\u{203f}'..='\u{2040}')
    })
}

/// `NameStartChar` of XML 1.0, fifth edition, section 2.3.
fn is_name_start(c: char) -> bool {
    matches!(c,
        ':' | '_' | 'A'..='Z' | 'a'..='z' | '\u{c0}'..='\u{d6}' | '\u{d8}'..='\u{f6}'
        | '\u{f8}'..='\u{2ff}' | '\u{370}'..='\u{37d}' | '\u{37f}'..='\u{1fff}'
        | '\u{200c}'..='\u{200d}' | '\u{2070}'..='\u{218f}' | '\u{2c00}'..='\u{2fef}'
        | '\u{3001}'..='\u{d7ff}' | '\u{f900}'..='\u{fdcf}' | '\u{fdf0}'..='\u{fffd}'
        | '\u{10000}'..='\u{effff}')
}

/// An element's text with the lines that begin with a tag moved from one indentation to another.
/// Nothing else changes: white space inside tags, texts and comments is content.
pub(crate) fn reindent(text: &str, from: &str, to: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut done = 0;
    let mut before = None;
    for markup in Scanner::new(text) {
        let gap = &text[done..markup.start];
        let leaf = matches!((before, markup.kind), (Some(Kind::Open { .. }), Kind::Close));
        let cdata = before == Some(Kind::Cdata) || markup.kind == Kind::Cdata;
        match gap.rfind('\n') {
            Some(line) if !leaf && !cdata && gap.trim().is_empty() => {
                let (kept, indent) = gap.split_at(line + 1);
                out.push_str(kept);
                out.push_str(to);
                out.push_str(indent.strip_prefix(from).unwrap_or(""));
            }
            _ => out.push_str(gap),
        }
        out.push_str(&text[markup.start..markup.end]);
        done = markup.end;
        before = Some(markup.kind);
    }
    out.push_str(&text[done..]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_that_begin_with_a_tag_are_moved() {
        let text = "<a b='x\n  y'>\n    <c>\n  text\n  </c>\n\n    <d>\n  </d>\n    <e>\n  <![CDATA[z]]>\n  </e>\n  </a>";
        let moved = "<a b='x\n  y'>\n--  <c>\n  text\n  </c>\n\n--  <d>\n  </d>\n--  <e>\n  <![CDATA[z]]>\n  </e>\n--</a>";
        assert_eq!(reindent(text, "  ", "--"), moved);
    }

    #[test]
    fn names_are_those_of_xml() {
        for good in ["a", "_", "ä1", "a-b.c", "p:n"] {
            assert!(is_name(good), "{good:?}");
        }
        for bad in ["", "1", "-a", "a b", "a>", "a\u{d7}", ".", "a\0"] {
            assert!(!is_name(bad), "{bad:?}");
        }
    }
}
