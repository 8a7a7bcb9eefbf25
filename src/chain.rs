//! Writing into a domain's document which images its disks stand on, as the images' own headers say: with the domain off nothing that
//! only a header names is opened, and this is how an operator says that it may be.

use disksnap_core::{BackingStore, DataStore, Disk, Error, ErrorKind, Result, Source};
use disksnap_image_file::ByHeaders;
use disksnap_xml::DomainDocument;

use crate::Disksnap;

/// What was added to a disk in a domain's document.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct AddedChain {
    /// The disk's target.
    pub target: String,
    /// Where the top image keeps the data, if the document did not say it.
    pub data_store: Option<DataStore>,
    /// The layers that the document did not name, nearest first; each without those below it.
    pub layers: Vec<BackingStore>,
}

impl Disksnap {
    /// Writes into a domain's document the layers that the headers of its disks' images name and it does not, where `given` leads, as
    /// for [`Disksnap::load`]; and what it has added. All else in it stays, byte for byte. Idempotent. The headers are believed by this:
    /// whoever asks for it has looked at what they name.
    ///
    /// # Errors
    /// `Invalid` where the document says that nothing is below an image (`<backingStore/>`), or names another one than the header; `Unsupported` where the headers cannot be followed to the end. Nothing is changed then. As
    /// [`Disksnap::rewrite`].
    pub async fn add_chains(&self, given: &str) -> Result<(DomainDocument, Vec<AddedChain>)> {
        let mut added = Vec::new();
        let document = self
            .rewrite(given, |mut document| {
                for disk in document.domain().disks.clone() {
                    let chain = add_chain(&mut document, &disk).map_err(|e| e.with("disk", &disk.target))?;
                    added.extend(chain);
                }
                Ok(document)
            })
            .await?;
        Ok((document, added))
    }
}

fn add_chain(document: &mut DomainDocument, disk: &Disk) -> Result<Option<AddedChain>> {
    let headers = ByHeaders::of(disk);
    let mut new = disk.clone();
    let data_store = added_data(&mut new, &headers)?;
    let said: Vec<&BackingStore> = layers(disk.backing.as_ref()).collect();
    agree(&said, &headers)?;
    let layers = headers.below.get(said.len()..).unwrap_or_default().to_vec();
    if let Some(why) = &headers.stopped {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("the headers of the disk's images cannot be followed: {why}"),
        )
        .hint("Nothing was changed."));
    }
    if layers.is_empty() && data_store.is_none() {
        return Ok(None);
    }
    if !layers.is_empty() {
        if document.ends_chain(&disk.target)? {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("the domain's document says where the chain ends (<backingStore/>), and by the headers it is {headers}"),
            )
            .hint("Nothing was changed. If the headers are right, remove the <backingStore/> from the document."));
        }
        new.backing = append(disk.backing.as_ref(), &layers);
    }
    *document = document.with_disk(&disk.target, &new)?;
    Ok(Some(AddedChain {
        target: disk.target.clone(),
        data_store,
        layers,
    }))
}

fn added_data(new: &mut Disk, headers: &ByHeaders) -> Result<Option<DataStore>> {
    match (&headers.data_store, &new.data_store) {
        (Some(found), Some(said)) if !is_same(&found.source, &said.source) => {
            Err(differs(&said.source, &found.source))
        }
        (Some(found), None) => {
            new.data_store = Some(found.clone());
            Ok(Some(found.clone()))
        }
        _ => Ok(None),
    }
}

/// What both tell must be the same.
fn agree(said: &[&BackingStore], headers: &ByHeaders) -> Result<()> {
    for (said, found) in said.iter().zip(&headers.below) {
        if !is_same(&said.source, &found.source) {
            return Err(differs(&said.source, &found.source));
        }
    }
    Ok(())
}

fn differs(said: &Source, found: &Source) -> Error {
    Error::new(
        ErrorKind::Invalid,
        format!("the domain's document names {said}, and the header of the image above {found}"),
    )
    .hint("Nothing was changed. Correct the one that is wrong: the document, or the header (`qemu-img rebase -u`).")
}

fn is_same(one: &Source, other: &Source) -> bool {
    let real = |source: &Source| source.path().and_then(|path| path.canonicalize().ok());
    one == other
        || real(one)
            .zip(real(other))
            .is_some_and(|(one, other)| one == other)
}

fn layers(top: Option<&BackingStore>) -> impl Iterator<Item = &BackingStore> {
    std::iter::successors(top, |layer| layer.backing.as_deref())
}

/// The layers that the document has, and these below them.
fn append(said: Option<&BackingStore>, more: &[BackingStore]) -> Option<BackingStore> {
    let all: Vec<&BackingStore> = layers(said).chain(more).collect();
    all.into_iter().rev().fold(None, |below, layer| {
        Some(BackingStore {
            backing: below.map(Box::new),
            ..layer.clone()
        })
    })
}
