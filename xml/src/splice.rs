//! Edits in place: each is a range of the text and what comes there instead.

use std::ops::Range;

use disksnap_core::Result;

use crate::limits::{Scanner, tag_name};
use crate::tree::{Elem, WHITE};
use crate::write::{Element, Layout, escape};

/// A text and the changes to be made in it.
#[derive(Debug)]
pub(crate) struct Edit<'t> {
    text: &'t str,
    splices: Vec<(Range<usize>, String)>,
}

impl<'t> Edit<'t> {
    pub(crate) fn new(text: &'t str) -> Self {
        Self {
            text,
            splices: Vec::new(),
        }
    }

    /// The text with all changes made. Changes at one place come in the order they were asked for.
    pub(crate) fn apply(mut self) -> String {
        self.splices.sort_by_key(|(range, _)| (range.start, range.end));
        let mut out = String::with_capacity(self.text.len());
        let mut done = 0;
        for (range, new) in &self.splices {
            out.push_str(&self.text[done..range.start]);
            out.push_str(new);
            done = range.end;
        }
        out.push_str(&self.text[done..]);
        out
    }

    fn put(&mut self, range: Range<usize>, new: String) {
        self.splices.push((range, new));
    }

    /// How the line is indented that begins with this element; `None` when it begins with something else.
    pub(crate) fn layout(&self, elem: Elem<'_, '_>) -> Option<Layout> {
        let (newline, indent) = line_start(self.text, elem.range().start)?;
        let above = elem.parent().and_then(|p| line_start(self.text, p.range().start));
        let unit = above
            .and_then(|(_, outer)| indent.strip_prefix(outer))
            .filter(|unit| !unit.is_empty());
        Some(Layout {
            newline,
            indent: indent.to_owned(),
            unit: unit.unwrap_or("  ").to_owned(),
        })
    }

    /// Puts elements where one is now.
    pub(crate) fn replace(&mut self, old: Elem<'_, '_>, new: &[Element]) -> Result<()> {
        let layout = self.layout(old);
        let mut text = String::new();
        for (n, element) in new.iter().enumerate() {
            if let (Some(layout), true) = (&layout, n > 0) {
                layout.line_break(&mut text);
            }
            text.push_str(&element.render(layout.as_ref())?);
        }
        self.put(old.range(), text);
        Ok(())
    }

    /// Takes an element out, and its line with it when nothing else is on it before.
    pub(crate) fn remove(&mut self, elem: Elem<'_, '_>) {
        let Range { start, end } = elem.range();
        let start = match line_start(self.text, start) {
            Some((newline, indent)) => start - indent.len() - newline.len(),
            None => start,
        };
        self.put(start..end, String::new());
    }

    /// Puts elements before a sibling.
    pub(crate) fn insert_before(&mut self, sibling: Elem<'_, '_>, new: &[Element]) -> Result<()> {
        let layout = self.layout(sibling);
        let at = sibling.range().start;
        let mut text = String::new();
        for element in new {
            text.push_str(&element.render(layout.as_ref())?);
            if let Some(layout) = &layout {
                layout.line_break(&mut text);
            }
        }
        self.put(at..at, text);
        Ok(())
    }

    /// Puts elements after a sibling.
    pub(crate) fn insert_after(&mut self, sibling: Elem<'_, '_>, new: &[Element]) -> Result<()> {
        let layout = self.layout(sibling);
        let at = sibling.range().end;
        let text = broken(new, layout.as_ref())?;
        self.put(at..at, text);
        Ok(())
    }

    /// Puts elements at the end of a parent.
    pub(crate) fn append(&mut self, parent: Elem<'_, '_>, new: &[Element]) -> Result<()> {
        if let Some(last) = parent.children().next_back() {
            return self.insert_after(last, new);
        }
        let outer = self.layout(parent);
        let inner = outer.as_ref().map(Layout::deeper);
        let mut text = broken(new, inner.as_ref())?;
        let Range { start, end } = parent.range();
        let raw = &self.text[start..end];
        if let Some(open) = raw.strip_suffix("/>") {
            if let Some(outer) = &outer {
                outer.line_break(&mut text);
            }
            let close = format!(">{text}</{}>", tag_name(&raw[1..]));
            self.put(start + open.len()..end, close);
            return Ok(());
        }
        let close = start + raw.rfind("</").unwrap_or(raw.len());
        let content = self.text[..close].trim_end_matches(WHITE).len();
        if self.text[content..close].contains('\n') {
            self.put(content..content, text);
        } else {
            if let Some(outer) = &outer {
                outer.line_break(&mut text);
            }
            self.put(content..close, text);
        }
        Ok(())
    }

    /// Puts a text in the place of all that is inside an element.
    pub(crate) fn set_text(&mut self, elem: Elem<'_, '_>, text: &str) -> Result<()> {
        let text = escape(text)?;
        let Range { start, end } = elem.range();
        let raw = &self.text[start..end];
        if let Some(open) = raw.strip_suffix("/>") {
            let close = format!(">{text}</{}>", tag_name(&raw[1..]));
            self.put(start + open.len()..end, close);
            return Ok(());
        }
        let open = Scanner::new(raw).next().map_or(0, |tag| tag.end);
        let close = raw.rfind("</").unwrap_or(raw.len());
        self.put(start + open..start + close, text);
        Ok(())
    }

    /// Sets an attribute where it stands, or else adds it as the first.
    pub(crate) fn set_attr(&mut self, elem: Elem<'_, '_>, name: &str, value: &str) -> Result<()> {
        let value = escape(value)?;
        if let Some(attr) = elem.attr_node(name) {
            let range = attr.range();
            let raw = &self.text[range.clone()];
            let quote = raw.find(['\'', '"']).unwrap_or(raw.len());
            self.put(range.start + quote + 1..range.end - 1, value);
            return Ok(());
        }
        let start = elem.range().start + 1;
        let at = start + tag_name(&self.text[start..]).len();
        self.put(at..at, format!(" {name}='{value}'"));
        Ok(())
    }

    /// Takes an attribute out, with the white space before it.
    pub(crate) fn remove_attr(&mut self, elem: Elem<'_, '_>, name: &str) {
        if let Some(attr) = elem.attr_node(name) {
            let Range { start, end } = attr.range();
            let start = self.text[..start].trim_end_matches(WHITE).len();
            self.put(start..end, String::new());
        }
    }
}

/// Elements, each on a line of its own that begins in the text.
fn broken(new: &[Element], layout: Option<&Layout>) -> Result<String> {
    let mut text = String::new();
    for element in new {
        if let Some(layout) = layout {
            layout.line_break(&mut text);
        }
        text.push_str(&element.render(layout)?);
    }
    Ok(text)
}

/// The line break and the indentation before a place, when nothing else is between.
fn line_start(text: &str, at: usize) -> Option<(&'static str, &str)> {
    let before = &text[..at];
    let line = before.rfind('\n').map_or(0, |n| n + 1);
    let indent = &before[line..];
    if !indent.trim_start_matches([' ', '\t']).is_empty() {
        return None;
    }
    match line {
        0 if at > 0 => None,
        0 if text.contains("\r\n") => Some(("\r\n", indent)),
        0 => Some(("\n", indent)),
        _ if before[..line].ends_with("\r\n") => Some(("\r\n", indent)),
        _ => Some(("\n", indent)),
    }
}
