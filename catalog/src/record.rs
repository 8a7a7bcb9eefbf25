//! Records: core's values as JSON, with the version of their form beside them.

use disksnap_core::{Error, ErrorKind, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The version that this program writes. Fields may be added under the same version, since unknown ones
/// are skipped; it grows when an older program would misunderstand a record.
pub(crate) const VERSION: i64 = 1;

/// The value as JSON.
pub(crate) fn write<T: Serialize>(what: &str, value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|error| {
        Error::new(
            ErrorKind::Internal,
            format!("this {what} cannot be written as a record; nothing was changed"),
        )
        .because(error)
    })
}

/// The value of a record.
///
/// # Errors
/// `Unsupported` for a record of a newer version, `Broken` for one that does not make sense.
pub(crate) fn read<T: DeserializeOwned>(what: &str, version: i64, record: &str) -> Result<T> {
    if version > VERSION {
        let message = format!(
            "a record of a {what} has version {version}, and this disksnap knows versions up to {VERSION}"
        );
        return Err(Error::new(ErrorKind::Unsupported, message)
            .hint("Use the newer disksnap that wrote it; nothing was changed."));
    }
    serde_json::from_str(record).map_err(|error| {
        Error::new(
            ErrorKind::Broken,
            format!("a record of a {what} in the catalog does not make sense; nothing was changed"),
        )
        .hint("Somebody or something has edited the catalog: put a backup in its place, or report this.")
        .because(error)
    })
}
