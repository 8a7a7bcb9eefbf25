//! A disk that another host, or another program, serves over NBD.

use std::ops::Deref;
use std::path::Path;

use disksnap_core::{Error, ErrorKind, Result};
use disksnap_nbd::{ConnectOptions, TlsCredentials, Uri, dirty_bitmap_context, list_meta_contexts};

use crate::disk::{DiskReader, Of, of_nbd};

/// What the contexts of dirty bitmaps begin with.
const BITMAPS: &str = "qemu:dirty-bitmap:";

/// An NBD export, open for reading: a disk of a snapshot that disksnap exports on another host, or that of any other server.
///
/// Whether the export stands still is the server's affair: disksnap's exports do.
#[derive(Debug)]
pub struct RemoteDisk {
    disk: DiskReader,
}

/// Everything that is read.
impl Deref for RemoteDisk {
    type Target = DiskReader;

    fn deref(&self) -> &DiskReader {
        &self.disk
    }
}

impl RemoteDisk {
    /// Connects to the export of an NBD URI (the NBD project's `doc/uri.md`: `nbd://HOST:PORT/NAME`, `nbds://` for TLS,
    /// `nbd+unix:///NAME?socket=PATH`).
    ///
    /// `tls` is a directory of ca-cert.pem and, for a server that verifies clients, client-cert.pem and client-key.pem; with
    /// one, TLS is required whatever the URI says. `bitmap` is the dirty bitmap that tells what has changed: the checkpoint's
    /// name, where disksnap exports a snapshot with a checkpoint.
    ///
    /// # Errors
    /// `Invalid` for a URI that is none; `Unavailable` when nothing answers; `Denied` for certificates that are not accepted;
    /// `Refused` when the server has no such export; `NotFound` for a bitmap that it does not export with the disk, naming
    /// those that it does; `Timeout`, `Protocol`.
    pub async fn connect(uri: &str, tls: Option<&Path>, bitmap: Option<&str>) -> Result<Self> {
        let of = Of::Export { uri: uri.to_owned() };
        let told = |error: Error| {
            let of = Of::Export { uri: uri.to_owned() };
            of.told(error)
        };
        let uri: Uri = uri.parse().map_err(|e| told(of_nbd(e)))?;
        let disk = DiskReader::connect(&uri, tls, bitmap, of).await.map_err(told)?;
        let remote = Self { disk };
        let Some(bitmap) = bitmap else {
            return Ok(remote);
        };
        if !remote.contexts().contains(&dirty_bitmap_context(bitmap)) {
            remote.disk.disconnect().await;
            return Err(told(no_bitmap(bitmap, &bitmaps(&uri, tls).await)));
        }
        Ok(remote)
    }

    /// Ends the connections. Dropping it does so too, without waiting for the server.
    pub async fn close(self) {
        self.disk.disconnect().await;
    }
}

/// The bitmaps that are exported with the disk, as far as the server tells.
async fn bitmaps(uri: &Uri, tls: Option<&Path>) -> Vec<String> {
    let options = ConnectOptions {
        tls: tls.and_then(|directory| TlsCredentials::from_directory(directory).ok()),
        ..ConnectOptions::default()
    };
    let found = list_meta_contexts(uri, &options, &[BITMAPS.to_owned()]).await;
    let found = found.unwrap_or_default().into_iter();
    found
        .filter_map(|context| Some(context.strip_prefix(BITMAPS)?.to_owned()))
        .collect()
}

fn no_bitmap(bitmap: &str, found: &[String]) -> Error {
    let message = format!("the export has no dirty bitmap '{bitmap}'");
    let there = match found {
        [] => "It has none".to_owned(),
        some => format!("It has: {}", some.join(", ")),
    };
    Error::new(ErrorKind::NotFound, message).hint(format!(
        "{there}. Export the snapshot with a checkpoint: `disksnap export start … --checkpoint NAME`."
    ))
}
