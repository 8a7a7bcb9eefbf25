//! What changed in an image, from ranges that somebody tells: a bitmap in a file of its own, which the daemon takes over
//! and which is gone before anything is served.
//!
//! The daemon's own server could be fed: a node that records what is written to it, and a write for each range. It is
//! the clients' server though, and whoever finds the name there could write too. A file is seen by nobody, costs one
//! command instead of one request a range, and what a kill leaves of it is a file.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use disksnap_core::{Changed, Command, Error, ErrorKind, NodeBitmap, Result, faults};
use disksnap_hypervisor::Session;
use disksnap_image_file::{ChangedBlocks, write_bitmap_qcow2};
use futures_util::TryStreamExt;
use serde_json::{Value, json};

use crate::{bitmaps, nodes};

/// What the bitmap is called in the file.
const NAME: &str = "changed";

/// The name of the node through which the daemon reads the file.
pub(crate) fn reader(node: &str) -> String {
    format!("{node}-f")
}

/// Ranges that have come to their end, as blocks in a file.
#[derive(Debug)]
pub(crate) struct Told {
    file: PathBuf,
    size: u64,
    granularity: u64,
}

impl Told {
    /// Reads the ranges to their end, and only then writes the file.
    ///
    /// # Errors
    /// What comes from the ranges, and the operating system's. Half a file may be left then.
    pub(crate) async fn read(changed: Changed, file: PathBuf) -> Result<Self> {
        let mut blocks = ChangedBlocks::new(changed.size);
        let mut ranges = changed.ranges;
        while let Some(range) = ranges.try_next().await? {
            blocks.mark(&range);
        }
        drop(ranges);
        faults::around("file", "write changes", || write(&file, &blocks))
            .map_err(|e| Error::io("cannot write down what has changed", e).with("path", file.display()))?;
        Ok(Self {
            file,
            size: blocks.size(),
            granularity: blocks.granularity(),
        })
    }

    /// Gives the image `node` its bitmap of this name, on a node of its own. The file is no longer needed then.
    ///
    /// # Errors
    /// `Broken` where it is told of a disk of another size.
    pub(crate) async fn hold(&self, session: &Session, node: &str, name: &str) -> Result<NodeBitmap> {
        let nodes = nodes::all(session).await?;
        let image = nodes.iter().find(|image| image["node-name"] == node);
        let size = image.map_or(&Value::Null, |image| &image["image"]["virtual-size"]);
        if *size != self.size {
            let what = format!(
                "what has changed is told of a disk of {} bytes, and the image is one of {size}",
                self.size
            );
            return Err(Error::new(ErrorKind::Broken, what)
                .hint("Take a full backup from this snapshot, or export it without the checkpoint."));
        }
        let reader = reader(node);
        let file = json!({ "driver": "file", "filename": text(&self.file)?, "read-only": true,
            "auto-read-only": false, "locking": "off" });
        let add = json!({ "driver": "qcow2", "node-name": reader, "read-only": true, "file": file });
        session.execute(Command::new("blockdev-add", add)).await?;
        let source = json!({ "node": reader, "name": NAME });
        let held = bitmaps::hold(session, node, name, self.size, self.granularity, &[source]).await?;
        let delete = Command::new("blockdev-del", json!({ "node-name": reader }));
        session.execute(delete).await?;
        Ok(held)
    }
}

fn write(path: &Path, blocks: &ChangedBlocks) -> std::io::Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    write_bitmap_qcow2(&file, NAME, blocks)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        Error::new(
            ErrorKind::Invalid,
            "the path of the state directory must be UTF-8",
        )
        .with("path", path.display())
    })
}
