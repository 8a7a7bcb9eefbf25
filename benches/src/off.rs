//! A domain that is off, with one raw disk, and takes of it.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use disksnap_core::{
    Alias, Connector, Control, Disk, DiskRequest, DiskSnapshot, Domain, DomainId, Driver, Options,
    SnapshotId, Sockets, Source,
};
use disksnap_hypervisor::{Paths, QemuConnector};
use tokio::runtime::Runtime;

use crate::race::Measures;

/// The domain.
pub(crate) struct Off {
    runtime: Runtime,
    control: Arc<dyn Control>,
    request: DiskRequest,
}

impl Off {
    /// One whose disk is there, and whose method is told this; `dir` is the directory for images.
    pub(crate) fn new(dir: &Path, source: Source, options: Options) -> Result<Self> {
        let runtime = Runtime::new()?;
        let disk = Disk {
            driver: Driver {
                name: None,
                format: Some("raw".to_owned()),
            },
            ..Disk::new("vda", source)
        };
        let domain = Domain {
            id: DomainId::new("off", None),
            disks: vec![disk.clone()],
            sockets: Sockets::default(),
        };
        let connector: Arc<dyn Connector> = Arc::new(QemuConnector::new(Paths {
            images: dir.to_owned(),
            run: dir.to_owned(),
        }));
        Ok(Self {
            control: runtime.block_on(connector.control(&domain))?,
            runtime,
            request: DiskRequest {
                disk,
                alias: Alias("vda-backup".to_owned()),
                options,
            },
        })
    }

    /// One take, measured; what must be done before and after it is not.
    pub(crate) fn take(&self, method: &dyn DiskSnapshot) -> Result<Measures> {
        let (id, disks) = (SnapshotId::random(), std::slice::from_ref(&self.request));
        let prepared = self.runtime.block_on(method.prepare(&*self.control, id, disks))?;
        let take = || {
            self.runtime.block_on(method.take(&*self.control, &prepared[0]))?;
            Ok(())
        };
        let took = timed(take)?;
        let aborted = method.abort(&*self.control, id, disks, Some(&prepared));
        self.runtime.block_on(aborted)?;
        Ok(took)
    }
}

/// How long something takes, in milliseconds.
pub(crate) fn timed(act: impl FnOnce() -> Result<()>) -> Result<Measures> {
    let since = Instant::now();
    act()?;
    Ok(Measures::from([("ms", since.elapsed().as_secs_f64() * 1e3)]))
}
