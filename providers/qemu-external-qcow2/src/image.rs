//! The overlay as a file: where it goes, and what it begins with.

use std::fs::File;
use std::io;
use std::path::Path;

use disksnap_core::{DiskRequest, Host, Result, SnapshotId, Source};
use disksnap_image_file::{Backing, Called, MadeFile, write_empty_qcow2};

use crate::layer::Layer;
use crate::settings::Settings;

/// What errors call it.
pub(crate) const CALLED: Called = Called {
    what: "overlay",
    option: "source.file",
    filled_by: "all that the guest writes from now on goes there, and its writes fail when it is full",
    too_large: "Use a method that makes no qcow2 image of it.",
};

/// Where the overlay of this request goes; follows from the request alone.
pub(crate) fn locate(host: &dyn Host, id: SnapshotId, request: &DiskRequest) -> Result<MadeFile> {
    if let Some(path) = Settings::read(request)?.file {
        return Ok(MadeFile::chosen(path, id));
    }
    let path = if let Some(Source::File { file }) = &request.disk.source {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        file.with_file_name(format!("{}.{}", original(&name), id.short()))
    } else {
        // Nobody wants an image among devices.
        let target = request.disk.target.chars();
        let plain: String = target.filter(char::is_ascii_alphanumeric).collect();
        host.image_dir().join(format!("{id}-{plain}.qcow2"))
    };
    Ok(MadeFile::own(path))
}

/// The name without the id of an earlier snapshot: names must not grow with each.
fn original(name: &str) -> &str {
    let is_id = |text: &str| text.len() == 12 && text.chars().all(|c| c.is_ascii_hexdigit());
    match name.rsplit_once('.') {
        Some((first, last)) if is_id(last) && !first.is_empty() => first,
        _ => name,
    }
}

/// Whether an image has a name that this method gives where the caller gave none: then no user has made it.
pub(crate) fn is_named_here(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    original(&name) != name
}

/// Makes the empty file `file` an overlay that is going to be at `path`.
pub(crate) fn fill_in(file: &File, path: &Path, base: &Layer, size: u64) -> io::Result<()> {
    let name = base.name_from(path);
    let backing = Backing {
        name: &name,
        format: &base.format,
    };
    write_empty_qcow2(file, size, Some(backing))?;
    // QEMU flushes what it writes; that the image exists at all must be as durable.
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_grow_with_each_snapshot() {
        assert_eq!(original("vda.qcow2"), "vda.qcow2");
        assert_eq!(original("vda.qcow2.0123456789ab"), "vda.qcow2");
        assert_eq!(original(".0123456789ab"), ".0123456789ab");
    }
}
