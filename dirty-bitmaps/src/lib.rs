//! Which blocks of a disk were written: core's [`Tracker`] over the dirty bitmaps of QEMU and of qcow2 images.
//!
//! While the domain runs the bitmaps are in the hypervisor, and it is asked (`block-dirty-bitmap-*`); while it is off
//! they are in the images, and `qemu-img bitmap` works on them.

mod chain;
#[doc(hidden)]
pub mod fuzzing;
mod live;
mod off;
mod raw;
mod widen;

use async_trait::async_trait;
use disksnap_core::{Batch, Disk, Ending, Host, RawDisks, Result, Start, Tracked, Tracker, Union};

/// Bytes per bit where nobody says otherwise: QEMU's own default for images with clusters of 64 KiB.
pub const GRANULARITY: u64 = 64 << 10;

/// Why an old image has none.
const OLD_QCOW2: &str = "a qcow2 image of the old kind (compat=0.10) keeps no bitmaps; while nobody uses it, `qemu-img amend -f qcow2 \
     -o compat=1.1` makes it one of the new kind";

/// The dirty bitmaps of QEMU.
#[derive(Debug, Clone, Copy)]
pub struct DirtyBitmaps;

#[async_trait]
impl Tracker for DirtyBitmaps {
    async fn look(&self, host: &dyn Host, disks: &[&Disk]) -> Result<Vec<Tracked>> {
        if host.state().await?.is_active() {
            live::look(host, disks).await
        } else {
            off::look(disks).await
        }
    }

    async fn start(&self, host: &dyn Host, starts: &[Start]) -> Result<Option<Batch>> {
        if host.state().await?.is_active() {
            return live::start(host, starts).await.map(Some);
        }
        off::start(starts).await?;
        Ok(None)
    }

    async fn abort(&self, host: &dyn Host, starts: &[Start]) -> Result<()> {
        if host.state().await?.is_active() {
            live::abort(host, starts).await
        } else {
            off::abort(starts).await
        }
    }

    async fn end(&self, host: &dyn Host, endings: &[Ending]) -> Result<()> {
        if host.state().await?.is_active() {
            live::end(host, endings).await
        } else {
            off::end(endings).await
        }
    }

    async fn unite(&self, host: &dyn Host, union: &Union) -> Result<()> {
        live::unite(host, union).await
    }

    async fn part(&self, host: &dyn Host, node: &str, name: &str) -> Result<()> {
        if host.state().await?.is_active() {
            live::part(host, node, name).await
        } else {
            Ok(())
        }
    }

    fn raw_disks(&self) -> Option<&dyn RawDisks> {
        Some(self)
    }
}
