//! Putting a clone back: the image becomes a clone of it. The clone stays, and reads as before.

use async_trait::async_trait;
use disksnap_core::{Affected, Error, ErrorKind, Health, Host, Peer, Result, Revert, SnapshotId, Unit};
use disksnap_image_file::{PutBack, can_put_back, put_back};

use crate::clone::Made;
use crate::{blocking, remembered};

/// What puts the unit's clone back into its image, with the domain off.
#[derive(Debug)]
pub(crate) struct PutBackClone(Made);

impl PutBackClone {
    pub(crate) fn of(unit: &Unit) -> Option<Self> {
        let made: Made = remembered(&unit.data).ok()?;
        (!made.image.as_os_str().is_empty()).then_some(Self(made))
    }
}

#[async_trait]
impl Revert for PutBackClone {
    /// Other snapshots are files of their own, and nothing to them.
    async fn revert(&self, host: &dyn Host, id: SnapshotId, unit: &Unit, _: &[Peer]) -> Result<Affected> {
        let made = self.0.clone();
        let targets = unit.disks.iter().map(|disk| disk.target.as_str());
        can_put_back(host, targets.map(|target| (target, made.image.as_path()))).await?;
        if let Health::Broken(why) | Health::Gone(why) = made.health() {
            return Err(Error::new(ErrorKind::Broken, why).hint("The image is left as it is."));
        }
        let clone = PutBack {
            from: made.file,
            image: made.image,
        };
        let warnings = blocking(move || put_back(&[clone], id)).await?;
        Ok(Affected {
            unit: Some(unit.clone()),
            warnings,
            ..Affected::default()
        })
    }
}
