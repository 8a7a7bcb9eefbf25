//! Putting a snapshot back: each image becomes a clone of the one in the snapshot.
//!
//! Not the subvolume: what else is in it, other domains' images among it, would go back too; its root may be
//! a mount point, which cannot be replaced; and what is nested in it would be lost. The snapshot stays.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use async_trait::async_trait;
use disksnap_core::{Affected, Error, ErrorKind, Health, Host, Peer, Result, Revert, SnapshotId, Unit};
use disksnap_image_file::{PutBack, can_put_back, put_back};

use crate::snapshot::Made;
use crate::{blocking, remembered};

/// What puts the unit's images back, with the domain off.
#[derive(Debug)]
pub(crate) struct PutBackImages(Made);

impl PutBackImages {
    pub(crate) fn of(unit: &Unit) -> Option<Self> {
        let made: Made = remembered(&unit.data).ok()?;
        (!made.root.as_os_str().is_empty()).then_some(Self(made))
    }
}

#[async_trait]
impl Revert for PutBackImages {
    /// Other snapshots are subvolumes of their own, and nothing to them.
    async fn revert(&self, host: &dyn Host, id: SnapshotId, unit: &Unit, _: &[Peer]) -> Result<Affected> {
        let made = self.0.clone();
        let files = made.files();
        let targets = made.images.iter().map(|image| image.target.as_str());
        can_put_back(host, targets.zip(files.iter().map(|file| file.image.as_path()))).await?;
        let warnings = blocking(move || made.put_back(id)).await?;
        Ok(Affected {
            unit: Some(unit.clone()),
            warnings,
            ..Affected::default()
        })
    }
}

impl Made {
    fn put_back(&self, id: SnapshotId) -> Result<Vec<String>> {
        if let Health::Broken(why) | Health::Gone(why) = self.health() {
            return Err(Error::new(ErrorKind::Broken, why).hint("The images are left as they are."));
        }
        let mut files = self.files();
        // Nobody writes to a layer but a commit; where none did, it is left alone.
        let layers = files.split_off(self.images.len());
        let layers: Vec<PutBack> = layers.into_iter().filter(|layer| !is_as_it_was(layer)).collect();
        let mut warnings: Vec<String> = layers.iter().map(has_changed).collect();
        files.extend(layers);
        warnings.extend(put_back(&files, id)?);
        Ok(warnings)
    }

    /// The disks' images, in their order, then the layers below them that are no disk's image, each once.
    pub(crate) fn files(&self) -> Vec<PutBack> {
        let snapshot = self.dir.join(&self.name);
        let file = |from: &Path| PutBack {
            from: from.to_owned(),
            image: self.root.join(from.strip_prefix(&snapshot).unwrap_or(from)),
        };
        let mut files: Vec<PutBack> = self.images.iter().map(|image| file(&image.file)).collect();
        for (layer, _) in self.images.iter().flat_map(|image| &image.below) {
            let layer = file(layer);
            if !files.contains(&layer) {
                files.push(layer);
            }
        }
        files
    }
}

/// Whether a layer is still the one in the snapshot.
fn is_as_it_was(layer: &PutBack) -> bool {
    let seen = |path: &Path| {
        let found = path.symlink_metadata().ok()?;
        Some((found.ino(), found.len(), found.mtime(), found.mtime_nsec()))
    };
    let then = seen(&layer.from);
    then.is_some() && then == seen(&layer.image)
}

fn has_changed(layer: &PutBack) -> String {
    let shown = layer.image.display();
    format!("{shown} has changed since, and is put back too: whatever else stands on it reads it so")
}
