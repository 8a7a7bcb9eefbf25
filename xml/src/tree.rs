//! A parsed document and typed access to its elements; every fault names line, column and element.
//!
//! roxmltree does the parsing: it keeps the place of each element and attribute in the text, which
//! error messages and edits in place need. It reads no external entity, and no DTD here.

use std::ops::Range;

use disksnap_core::{Error, ErrorKind, Result};
use roxmltree::{Attribute, Document, Node, ParsingOptions};

use crate::limits::{self, Bounds};

/// A well-formed document within the limits.
#[derive(Debug)]
pub(crate) struct Tree<'t> {
    document: Document<'t>,
}

impl<'t> Tree<'t> {
    pub(crate) fn parse(text: &'t str) -> Result<Self> {
        Self::parse_within(text, limits::ONE)
    }

    pub(crate) fn parse_within(text: &'t str, bounds: Bounds) -> Result<Self> {
        limits::check(text, bounds)?;
        let options = ParsingOptions {
            allow_dtd: false,
            ..ParsingOptions::default()
        };
        let document = Document::parse_with_options(text, options).map_err(|e| malformed(text, &e))?;
        Ok(Self { document })
    }

    pub(crate) fn root(&self) -> Elem<'_, 't> {
        Elem {
            node: self.document.root_element(),
        }
    }

    /// The root, which must be this element without a namespace.
    pub(crate) fn root_named(&self, name: &str) -> Result<Elem<'_, 't>> {
        let root = self.root();
        if root.is(None, name) {
            return Ok(root);
        }
        let found = match root.namespace() {
            None => format!("<{}>", root.name()),
            Some(uri) => format!("<{}> in the namespace '{uri}'", root.name()),
        };
        Err(root.fault(format!(
            "expected a document whose root is <{name}>, found {found}"
        )))
    }
}

fn malformed(text: &str, error: &roxmltree::Error) -> Error {
    use roxmltree::Error as E;
    let end = text.trim_end().len();
    let offset = match error {
        E::UnclosedRootNode | E::UnexpectedEndOfStream | E::NoRootNode => end,
        E::DtdDetected => text.find("<!DOCTYPE").unwrap_or(0),
        other => offset_of(text, other.pos()),
    };
    let enclosing = limits::enclosing(text, offset);
    let (line, column) = limits::position(text, offset);
    let mut error = Error::new(ErrorKind::Invalid, explain(text, error, enclosing))
        .with("line", line)
        .with("column", column);
    if let Some((name, _)) = enclosing.filter(|(name, _)| !name.is_empty()) {
        error = error.with("element", name);
    }
    error
}

/// The byte that a parser's position means.
fn offset_of(text: &str, pos: roxmltree::TextPos) -> usize {
    let lines = text.split_inclusive('\n');
    let before: usize = lines.take(pos.row as usize - 1).map(str::len).sum();
    let column = text[before..].char_indices().nth(pos.col as usize - 1);
    column.map_or(text.len(), |(n, _)| before + n)
}

fn explain(text: &str, error: &roxmltree::Error, enclosing: Option<(&str, usize)>) -> String {
    use roxmltree::Error as E;
    let entities = "only &amp; &lt; &gt; &quot; &apos; and numbers such as &#10; are read";
    match error {
        E::UnexpectedCloseTag(expected, found, _) => format!("expected </{expected}>, found </{found}>"),
        E::UnknownEntityReference(name, _) => format!("unknown entity '&{name};': {entities}"),
        E::MalformedEntityReference(_) => format!("a '&' that begins no entity: {entities}"),
        E::DtdDetected => "a document type declaration (<!DOCTYPE …>) is not accepted".to_owned(),
        E::NoRootNode => "the document is empty: expected an element".to_owned(),
        E::InvalidAttributeValue(_) => "a '<' in an attribute's value: write &lt;".to_owned(),
        E::DuplicatedAttribute(name, _) => format!("the attribute '{name}' is given twice"),
        E::InvalidChar(_, b'<', _) => explain(text, &E::InvalidAttributeValue(error.pos()), enclosing),
        E::UnknownToken(_) => "expected one root element, and nothing else beside it".to_owned(),
        E::UnknownNamespace(prefix, _) => {
            format!("the namespace prefix '{prefix}' is not declared: expected xmlns:{prefix}='…'")
        }
        E::UnclosedRootNode | E::UnexpectedEndOfStream => match enclosing {
            _ if limits::unfinished(text).is_some() => "the document ends in the middle of a tag".to_owned(),
            Some((name, start)) => {
                let (line, _) = limits::position(text, start);
                format!("the document ends inside <{name}>, which was opened in line {line}")
            }
            None => "the document ends in the middle".to_owned(),
        },
        other => {
            let text = other.to_string();
            let place = format!(" at {}", other.pos());
            format!("malformed XML: {}", text.replace(&place, ""))
        }
    }
}

/// An element.
#[derive(Clone, Copy)]
pub(crate) struct Elem<'a, 't> {
    node: Node<'a, 't>,
}

impl<'a, 't> Elem<'a, 't> {
    pub(crate) fn name(self) -> &'t str {
        self.node.tag_name().name()
    }

    pub(crate) fn namespace(self) -> Option<&'a str> {
        // xmlns='' takes the default namespace away again.
        self.node.tag_name().namespace().filter(|uri| !uri.is_empty())
    }

    pub(crate) fn is(self, namespace: Option<&str>, name: &str) -> bool {
        self.name() == name && self.namespace() == namespace
    }

    /// Where it is in the text, from `<` to the `>` of its end.
    pub(crate) fn range(self) -> Range<usize> {
        self.node.range()
    }

    pub(crate) fn parent(self) -> Option<Self> {
        self.node.parent_element().map(|node| Self { node })
    }

    /// All child elements, of whatever namespace.
    pub(crate) fn children(self) -> impl DoubleEndedIterator<Item = Self> {
        let elements = self.node.children().filter(Node::is_element);
        elements.map(|node| Self { node })
    }

    /// The child elements of this name and no namespace.
    pub(crate) fn all(self, name: &str) -> impl Iterator<Item = Self> {
        self.children().filter(move |child| child.is(None, name))
    }

    /// The one child of this name and no namespace, if there is one.
    pub(crate) fn child(self, name: &str) -> Result<Option<Self>> {
        self.child_in(None, name)
    }

    pub(crate) fn child_in(self, namespace: Option<&str>, name: &str) -> Result<Option<Self>> {
        let mut found = self.children().filter(|child| child.is(namespace, name));
        let first = found.next();
        match found.next() {
            Some(second) => {
                Err(second.fault(format!("<{name}> comes twice in <{}>: expected one", self.name())))
            }
            None => Ok(first),
        }
    }

    /// The one child of this name, which must be there; `example` shows how it is written.
    pub(crate) fn required_child(self, name: &str, example: &str) -> Result<Self> {
        self.child(name)?.ok_or_else(|| {
            self.fault(format!(
                "<{}> lacks its <{name}>: expected {example}",
                self.name()
            ))
        })
    }

    pub(crate) fn attr_node(self, name: &str) -> Option<Attribute<'a, 't>> {
        self.node.attribute_node(name)
    }

    /// The attribute of this name and no namespace.
    pub(crate) fn attr(self, name: &str) -> Option<&'a str> {
        self.node.attribute(name)
    }

    pub(crate) fn attrs(self) -> impl Iterator<Item = Attribute<'a, 't>> {
        self.node.attributes()
    }

    /// An attribute that must be there and not empty; `meaning` says what it is.
    pub(crate) fn required(self, name: &str, meaning: &str) -> Result<&'a str> {
        match self.attr(name) {
            Some("") => Err(self.attr_fault(
                name,
                format!("the attribute '{name}' is empty: expected {meaning}"),
            )),
            Some(value) => Ok(value),
            None => Err(self.fault(format!(
                "<{}> lacks the attribute '{name}': expected {name}='…', {meaning}",
                self.name()
            ))),
        }
    }

    /// A yes-or-no attribute.
    pub(crate) fn yes_no(self, name: &str) -> Result<Option<bool>> {
        Ok(match self.attr(name) {
            None => None,
            Some(_) => Some(self.choice(name, &[("yes", true), ("no", false)])?),
        })
    }

    /// What the value of an attribute that is there stands for.
    pub(crate) fn choice<T: Copy>(self, name: &str, known: &[(&str, T)]) -> Result<T> {
        let value = self.attr(name).unwrap_or_default();
        let found = known.iter().find(|(word, _)| *word == value);
        found.map(|(_, meaning)| *meaning).ok_or_else(|| {
            let words: Vec<String> = known.iter().map(|(word, _)| format!("'{word}'")).collect();
            self.attr_fault(
                name,
                format!("{name}='{value}' is not known: expected {}", list(&words, "or")),
            )
        })
    }

    /// The text directly inside, without white space at its ends.
    pub(crate) fn text(self) -> String {
        let texts = self.node.children().filter(Node::is_text);
        let whole: String = texts.filter_map(|t| t.text()).collect();
        whole.trim_matches(WHITE).to_owned()
    }

    /// Refuses attributes that nobody reads.
    pub(crate) fn only_attrs(self, known: &[&str]) -> Result<()> {
        for attr in self.node.attributes() {
            if attr.namespace().is_none() && known.contains(&attr.name()) {
                continue;
            }
            let names: Vec<String> = known.iter().map(|k| format!("'{k}'")).collect();
            let expected = if names.is_empty() {
                "none".to_owned()
            } else {
                list(&names, "or")
            };
            let error = self.fault_at(
                attr.range().start,
                ErrorKind::Invalid,
                format!(
                    "<{}> has no attribute '{}': expected {expected}",
                    self.name(),
                    attr.name()
                ),
            );
            return Err(suggest(error, attr.name(), known, |near| format!("'{near}'")));
        }
        Ok(())
    }

    /// Refuses child elements that nobody reads, and text between them.
    pub(crate) fn only_children(self, namespace: Option<&str>, known: &[&str]) -> Result<()> {
        self.only_children_and(namespace, known, &[])
    }

    /// The same, where elements of some other names are let through without a word.
    pub(crate) fn only_children_and(
        self,
        namespace: Option<&str>,
        known: &[&str],
        skipped: &[&str],
    ) -> Result<()> {
        for child in self.children() {
            let name = child.name();
            if child.namespace() == namespace && (known.contains(&name) || skipped.contains(&name)) {
                continue;
            }
            return Err(child.unexpected(self, namespace, known));
        }
        let stray = self.node.children().find(|node| {
            node.is_text()
                && node
                    .text()
                    .is_some_and(|text| !text.trim_matches(WHITE).is_empty())
        });
        match stray {
            None => Ok(()),
            Some(node) => Err(self.fault_at(
                node.range().start,
                ErrorKind::Invalid,
                format!(
                    "text directly inside <{}>: expected {}",
                    self.name(),
                    elements(known)
                ),
            )),
        }
    }

    fn unexpected(self, parent: Self, namespace: Option<&str>, known: &[&str]) -> Error {
        let found = match self.namespace() {
            uri if uri == namespace => format!("unknown element <{}>", self.name()),
            None => format!(
                "<{}> outside the namespace '{}'",
                self.name(),
                namespace.unwrap_or("")
            ),
            Some(uri) => format!("unknown element <{}> of the namespace '{uri}'", self.name()),
        };
        let error = self.fault(format!(
            "{found} in <{}>: expected {}",
            parent.name(),
            elements(known)
        ));
        suggest(error, self.name(), known, |near| format!("<{near}>"))
    }

    /// An error at this element.
    pub(crate) fn fault(self, message: String) -> Error {
        self.fault_at(self.range().start, ErrorKind::Invalid, message)
    }

    /// An error at an attribute of this element.
    pub(crate) fn attr_fault(self, name: &str, message: String) -> Error {
        let place = self
            .attr_node(name)
            .map_or(self.range().start, |attr| attr.range().start);
        self.fault_at(place, ErrorKind::Invalid, message)
    }

    fn fault_at(self, offset: usize, kind: ErrorKind, message: String) -> Error {
        let (line, column) = limits::position(self.node.document().input_text(), offset);
        Error::new(kind, message)
            .with("line", line)
            .with("column", column)
            .with("element", self.name())
    }
}

/// XML's white space; other Unicode white space is content.
pub(crate) const WHITE: [char; 4] = [' ', '\t', '\r', '\n'];

fn suggest(error: Error, wrong: &str, known: &[&str], show: impl Fn(&str) -> String) -> Error {
    let near = known
        .iter()
        .map(|name| {
            (
                strsim::damerau_levenshtein(&wrong.to_lowercase(), &name.to_lowercase()),
                name,
            )
        })
        .filter(|(distance, name)| *distance > 0 && *distance * 2 < name.chars().count().max(2))
        .min_by_key(|(distance, _)| *distance);
    match near {
        Some((_, name)) => error.hint(format!("Did you mean {}?", show(name))),
        None => error,
    }
}

fn elements(names: &[&str]) -> String {
    let names: Vec<String> = names.iter().map(|name| format!("<{name}>")).collect();
    if names.is_empty() {
        "no element".to_owned()
    } else {
        list(&names, "or")
    }
}

/// `a, b or c`
fn list(items: &[String], word: &str) -> String {
    match items {
        [] => String::new(),
        [one] => one.clone(),
        [init @ .., last] => format!("{} {word} {last}", init.join(", ")),
    }
}
