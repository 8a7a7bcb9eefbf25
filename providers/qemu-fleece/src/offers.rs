//! What the QEMU at hand can do, asked of its schema and never of its version.

use disksnap_core::{Host, Result};
use disksnap_hypervisor::Schema;
use serde::{Deserialize, Serialize};

use crate::settings::Way;

/// Which ways a QEMU offers, and what more it can.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Offers {
    ways: Vec<Way>,
    /// Jobs can be told to break the snapshot instead of the guest's write (QEMU 10.1).
    safe_job: bool,
    /// A fleece image can be encrypted.
    pub(crate) encryption: bool,
}

/// What keeps a full or failing fleece image from failing the guest's writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Sparing {
    /// Our filter breaks the snapshot.
    Filter,
    /// The job's filter does, when it is told to.
    Job,
    /// Nothing: the guest's write fails.
    Nothing,
}

impl Offers {
    /// Asks the schema.
    pub(crate) async fn of(host: &dyn Host) -> Result<Self> {
        let schema = Schema::of(host).await?;
        // snapshot-access read wrong data in 7.2, and assertions of the filter were mended until 9.1;
        // `discard-source` came with 9.1, so it tells the QEMUs in which both are sound.
        let sound = schema.command_has_arg("blockdev-backup", "discard-source")
            && schema.has_driver("snapshot-access")
            && schema.has_driver("copy-before-write");
        let breaks = schema.has("blockdev-add/+copy-before-write/on-cbw-error/^break-snapshot");
        let transaction = schema.has("transaction/actions/+blockdev-backup");
        let offered = |way: &Way| match way {
            Way::Filter => sound && breaks,
            Way::Job => sound && transaction,
            Way::Classic => transaction,
        };
        Ok(Self {
            ways: Way::ALL.into_iter().filter(offered).collect(),
            safe_job: schema.command_has_arg("blockdev-backup", "on-cbw-error"),
            encryption: schema.has_driver("luks") && schema.has_command("object-add"),
        })
    }

    /// Whether this QEMU can go this way at all.
    pub(crate) fn has(&self, way: Way) -> bool {
        self.ways.contains(&way)
    }

    /// What spares the guest on this way.
    pub(crate) fn sparing(&self, way: Way) -> Sparing {
        match way {
            Way::Filter => Sparing::Filter,
            _ if self.safe_job => Sparing::Job,
            _ => Sparing::Nothing,
        }
    }
}
