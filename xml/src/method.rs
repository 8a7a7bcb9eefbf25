//! `<diskSnapshot method='…'>` and the options inside it.
//!
//! Reading flattens the element: an attribute is a pair, a text is a pair, an element with nothing
//! in it is a pair with an empty value; the key is the path, joined by dots. Writing is the inverse:
//! what is read again is the same pairs in the same order.

use disksnap_core::{Error, ErrorKind, MethodChoice, Options, Result};

use crate::tree::{Elem, WHITE};
use crate::write::{Element, is_name};

/// Reads a `<diskSnapshot>`; elements inside must be of its own namespace or of none.
pub(crate) fn read(elem: Elem<'_, '_>) -> Result<MethodChoice> {
    let method = elem.required("method", "the name of a snapshot method")?;
    Ok(MethodChoice {
        method: method.to_owned(),
        options: flatten(elem, "", &["method"])?,
    })
}

/// The pairs of an element; keys begin with `prefix`, attributes in `skip` are left out.
pub(crate) fn flatten(elem: Elem<'_, '_>, prefix: &str, skip: &[&str]) -> Result<Options> {
    let mut options = Options::default();
    collect(elem, elem, prefix, skip, &mut options)?;
    Ok(options)
}

fn collect(
    top: Elem<'_, '_>,
    elem: Elem<'_, '_>,
    path: &str,
    skip: &[&str],
    options: &mut Options,
) -> Result<()> {
    let key = |name: &str| {
        if path.is_empty() {
            name.to_owned()
        } else {
            format!("{path}.{name}")
        }
    };
    for attr in elem.attrs() {
        if skip.contains(&attr.name()) && attr.namespace().is_none() {
            continue;
        }
        if attr.namespace().is_some() || attr.name().contains('.') {
            return Err(elem.fault(format!(
                "the attribute '{}' cannot be an option: expected a name without a dot and of no namespace",
                attr.name()
            )));
        }
        options.push(key(attr.name()), attr.value());
    }
    let text = elem.text();
    if !text.is_empty() {
        if path.is_empty() {
            return Err(elem.fault(format!(
                "text directly inside <{}>: expected elements",
                elem.name()
            )));
        }
        options.push(path, text);
    } else if !path.is_empty() && elem.children().next().is_none() && elem.attrs().next().is_none() {
        options.push(path, "");
    }
    for child in elem.children() {
        let ours = child.namespace().is_none() || child.namespace() == top.namespace();
        if !ours || child.name().contains('.') {
            return Err(child.fault(format!(
                "<{}> cannot be an option: expected a name without a dot and of no other namespace",
                child.name()
            )));
        }
        collect(top, child, &key(child.name()), &[], options)?;
    }
    Ok(())
}

/// `<diskSnapshot method='…'>` with its options.
///
/// # Errors
/// `Unsupported` for an option that XML cannot hold: a key whose parts are not names, or a value with
/// white space at its ends where only text can hold it.
pub fn disk_snapshot_element(choice: &MethodChoice) -> Result<Element> {
    element(choice, "")
}

/// The same, all elements with this namespace prefix (`disksnap:`).
pub(crate) fn element(choice: &MethodChoice, prefix: &str) -> Result<Element> {
    let mut root = Element::new(format!("{prefix}diskSnapshot")).attr("method", &choice.method);
    // The element that was begun last and can take more attributes, and its path.
    let mut open: Option<(&str, Element)> = None;
    for (key, value) in choice.options.iter() {
        if !key.split('.').all(|part| is_name(part) && !part.contains(':')) {
            return Err(unwritable(key, "its parts are not names in XML"));
        }
        let (parent, name) = key.rsplit_once('.').unwrap_or(("", key));
        let attribute_fits = |owner: &Element| !reserved(name, parent) && !owner.has_attr(name);
        if parent.is_empty() && open.is_none() && !root.has_content() && attribute_fits(&root) {
            root.push_attr(name, value);
            continue;
        }
        if let Some((path, owner)) = &mut open
            && *path == parent
            && attribute_fits(owner)
        {
            owner.push_attr(name, value);
            continue;
        }
        root.push_open(open.take(), prefix);
        if parent.is_empty() || reserved(name, parent) {
            root.push(nest(key, text_leaf(key, value, prefix)?, prefix));
        } else {
            let leaf = Element::new(qualified(prefix, parent)).attr(name, value);
            open = Some((parent, leaf));
        }
    }
    root.push_open(open, prefix);
    Ok(root)
}

impl Element {
    fn push_open(&mut self, open: Option<(&str, Element)>, prefix: &str) {
        if let Some((path, leaf)) = open {
            self.push(nest(path, leaf, prefix));
        }
    }
}

fn qualified(prefix: &str, path: &str) -> String {
    let name = path.rsplit('.').next().unwrap_or(path);
    format!("{prefix}{name}")
}

/// A leaf inside the elements that its path names.
fn nest(path: &str, leaf: Element, prefix: &str) -> Element {
    let outer = path.rsplit('.').skip(1);
    outer.fold(leaf, |inner, name| {
        Element::new(format!("{prefix}{name}")).child(inner)
    })
}

fn text_leaf(key: &str, value: &str, prefix: &str) -> Result<Element> {
    let leaf = Element::new(qualified(prefix, key));
    if value.is_empty() {
        Ok(leaf)
    } else if value.trim_matches(WHITE) == value {
        Ok(leaf.text(value))
    } else {
        Err(unwritable(key, "its value has white space at an end"))
    }
}

/// Names that an attribute in that place would not be read as an option for.
fn reserved(name: &str, parent: &str) -> bool {
    name == "xmlns" || (parent.is_empty() && name == "method")
}

fn unwritable(key: &str, why: &str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("the option {key:?} cannot be written as XML: {why}"),
    )
}
