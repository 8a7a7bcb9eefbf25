//! Domains by the path of a document, or by the name or UUID under which one was made known.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use disksnap_core::{Definition, DomainId, Error, ErrorKind, Result};
use disksnap_xml::{DomainDocument, MAX_BYTES, text_of};

use crate::Disksnap;

impl Disksnap {
    /// The domain that `given` means: the path of a `<domain>` document when it holds a `/`, ends in
    /// `.xml` or is a file; else the name or UUID of one made known with [`Disksnap::define`].
    ///
    /// # Errors
    /// `NotFound` for a file or a name that is not there; `Invalid` for a document that is not one,
    /// with line and column; `Denied`, `Io` as the operating system says.
    pub async fn load(&self, given: &str) -> Result<DomainDocument> {
        if is_path(given) {
            return DomainDocument::parse_named(read_document(Path::new(given))?, given);
        }
        let definition = self.definition(given).await?;
        DomainDocument::parse_named(definition.document, format!("the definition of {given}"))
    }

    /// Makes a domain known by its name and UUID, or replaces what is known of the same UUID.
    ///
    /// # Errors
    /// `AlreadyExists` when another domain has the name.
    pub async fn define(&self, document: &DomainDocument) -> Result<DomainId> {
        let definition = Definition {
            id: document.domain().id.clone(),
            document: document.text().to_owned(),
        };
        self.dispatcher().catalog().define(&definition).await?;
        Ok(definition.id)
    }

    /// Forgets a domain, given by name or UUID. Its document and its disks are not touched.
    ///
    /// # Errors
    /// `NotFound` when none is known by that; `Busy` while it has snapshots.
    pub async fn undefine(&self, given: &str) -> Result<DomainId> {
        let id = self.definition(given).await?.id;
        self.dispatcher().catalog().undefine(&id).await?;
        Ok(id)
    }

    async fn definition(&self, given: &str) -> Result<Definition> {
        let mut all = self.dispatcher().catalog().definitions().await?;
        let uuid = given.parse().ok();
        let found = all
            .iter()
            .position(|d| Some(d.id.uuid) == uuid)
            .or_else(|| all.iter().position(|d| d.id.name == given));
        match found {
            Some(n) => Ok(all.swap_remove(n)),
            None => Err(unknown(given, &all)),
        }
    }
}

/// Whether a domain is meant by the path of its document.
pub(crate) fn is_path(given: &str) -> bool {
    let named = Path::new(given);
    let xml = named.extension().is_some_and(|e| e.eq_ignore_ascii_case("xml"));
    given.contains('/') || xml || named.is_file()
}

fn unknown(given: &str, known: &[Definition]) -> Error {
    let mut names: Vec<&str> = known.iter().map(|d| d.id.name.as_str()).collect();
    names.truncate(8);
    let error = Error::new(ErrorKind::NotFound, format!("no domain '{given}' is known"));
    error.hint(if names.is_empty() {
        "Give the path of its XML, or make it known: `disksnap domain define FILE`.".to_owned()
    } else {
        format!(
            "Known domains: {}. Give the path of an XML, or make one known: `disksnap domain define FILE`.",
            names.join(", ")
        )
    })
}

/// Reads a document from a file, or from standard input for `-`; at most as much as a document may hold.
///
/// # Errors
/// `NotFound`, `Denied`, `Io` as the operating system says; `Invalid` for a document that is too long
/// or is not UTF-8.
pub fn read_document(path: &Path) -> Result<String> {
    let named = |error: Error| error.with("document", path.display());
    let failed = |error: io::Error| named(Error::io("cannot read the document", error));
    let bytes = if path == Path::new("-") {
        at_most(io::stdin().lock())
    } else {
        File::open(path).and_then(at_most)
    };
    text_of(bytes.map_err(failed)?).map_err(named)
}

/// One byte more than is allowed shows that it is too much, without reading all of it.
fn at_most(from: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}
