//! Whether a snapshot can be trusted: what it is read from must be as it was at the instant.

use disksnap_core::{Error, Health, Host, Result};
use disksnap_hypervisor::Graph;

use crate::layer::Layer;
use crate::place::Place;
use crate::record::Record;
use crate::remote;
use crate::touched;

/// Looks at the real thing.
pub(crate) async fn inspect(host: &dyn Host, record: &Record) -> Result<Health> {
    if let Some(health) = files(record)? {
        return Ok(health);
    }
    if !host.state().await?.is_active() {
        return Ok(Health::Active);
    }
    let Ok(disk) = host.domain().disk(&record.target) else {
        return Ok(Health::Active);
    };
    let graph = Graph::read(host).await?;
    // A disk that is elsewhere now does not write to the base.
    let top = Place::find(&graph, disk)
        .ok()
        .and_then(|place| place.layers.into_iter().next());
    Ok(match top {
        Some(top) if top.layer.is_at(&record.base.path) => Health::Broken(format!(
            "the domain runs on {} itself, and writes to it: it was started from an old document",
            record.base.path.display()
        )),
        _ => Health::Active,
    })
}

/// What the files alone say against it.
pub(crate) fn files(record: &Record) -> Result<Option<Health>> {
    let there = |path: &std::path::Path| match path.try_exists() {
        Err(e) => Err(Error::io(format!("cannot look at {}", path.display()), e)),
        Ok(there) => Ok(there),
    };
    if let Some(overlay) = &record.overlay
        && !there(overlay)?
    {
        return Ok(Some(Health::Gone(format!(
            "the overlay {} that stood on it is no more: it was merged",
            overlay.display()
        ))));
    }
    for uri in record.files().filter_map(Layer::remote) {
        if let Some(why) = remote::unreachable(&uri) {
            return Ok(Some(Health::Broken(why)));
        }
    }
    if record.base.remote().is_none() && !there(&record.base.path)? {
        return Ok(Some(Health::Gone(format!(
            "{} is gone",
            record.base.path.display()
        ))));
    }
    let local = record.below.iter().filter(|layer| layer.remote().is_none());
    let below = local.map(|layer| (&layer.path, "is below it"));
    let data = record.files().filter_map(|layer| layer.data.as_ref());
    for (path, what) in below.chain(data.map(|data| (data, "holds its data"))) {
        if !there(path)? {
            return Ok(Some(Health::Broken(format!(
                "{}, which {what}, is gone",
                path.display()
            ))));
        }
    }
    if let (Some(data), Some(stamp)) = (&record.base.data, &record.data_stamp)
        && let Some(differs) = stamp.differs(data)?
    {
        return Ok(Some(Health::Broken(differs)));
    }
    let Some(stamp) = &record.stamp else {
        return Ok(None);
    };
    match stamp.differs(&record.base.path)? {
        Some(_) if touched::only_streamed(&record.base.path, stamp)? => Ok(None),
        differs => Ok(differs.map(Health::Broken)),
    }
}
