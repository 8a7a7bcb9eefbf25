//! What the tests of the catalog share: a state directory, and records of every kind.

#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

pub(crate) mod second;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::{Duration, SystemTime};

use disksnap_catalog::{SqliteCatalog, StateDir};
use disksnap_core::{
    Access, Act, Alias, Checkpoint, CheckpointDisk, Consistency, Definition, Disk, DiskSnapshotRecord,
    Domain, DomainId, Export, Intent, Listen, Mark, NbdServer, ServeNode, Snapshot, SnapshotId, SnapshotName,
    Sockets, Source, Unit, UnitRecord, Why, WindowReport,
};
use tempfile::TempDir;
use uuid::Uuid;

pub(crate) fn state(dir: &Path) -> StateDir {
    StateDir::open(Some(&dir.join("state"))).unwrap()
}

pub(crate) async fn catalog() -> (TempDir, SqliteCatalog) {
    let temp = tempfile::tempdir().unwrap();
    let catalog = SqliteCatalog::open(state(temp.path())).await.unwrap();
    (temp, catalog)
}

pub(crate) fn domain(name: &str) -> DomainId {
    DomainId::new(name, None)
}

pub(crate) fn name(name: &str) -> SnapshotName {
    name.parse().unwrap()
}

/// The n-th second of the test's own time.
pub(crate) fn second(n: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000 + n, 123_456_789)
}

pub(crate) fn snapshot(domain: &DomainId, called: &str, at: u64) -> Snapshot {
    let source = Source::File {
        file: "/var/lib/images/vda.qcow2".into(),
    };
    Snapshot {
        id: SnapshotId::random(),
        name: name(called),
        domain: domain.clone(),
        created: second(at),
        consistency: Consistency::Unquiesced {
            reason: "no agent".to_owned(),
        },
        window: WindowReport::default(),
        disks: vec![DiskSnapshotRecord {
            target: "vda".to_owned(),
            alias: Alias("vda-backup".to_owned()),
            method: "memory".to_owned(),
            why: Why::Default,
            unit: 0,
            modified_disk: Some(Disk::new("vda", source)),
            access: Access::Node("node".to_owned()),
            size: Some(1 << 40),
            details: BTreeMap::from([("way".to_owned(), "filter".to_owned())]),
            written: None,
            untold: false,
            inherited: Vec::new(),
            shares: std::collections::BTreeMap::new(),
        }],
        units: vec![UnitRecord {
            method: "memory".to_owned(),
            unit: Unit {
                unit: "vda".to_owned(),
                disks: Vec::new(),
                data: serde_json::json!({"nodes": ["a", "b"], "big": u64::MAX}),
            },
        }],
        skipped: Vec::new(),
        warnings: vec!["a \"quoted\" warning\n".to_owned()],
        checkpoint: None,
        after: None,
        pinned: false,
    }
}

/// A checkpoint of these disks, with everything that can be known of it.
pub(crate) fn checkpoint(called: &str, parent: Option<&str>, at: u64, disks: usize) -> Checkpoint {
    let disk = |n: usize| CheckpointDisk {
        target: format!("vd{n}"),
        id: Some(Uuid::from_u128(n as u128)),
        size: Some(u64::MAX - n as u64),
        mark: if n % 16 == 15 {
            Mark::Pinned(SnapshotId(Uuid::from_u128(7)))
        } else {
            Mark::Bitmap(called.to_owned())
        },
        volatile: n % 16 == 1,
        anew: n % 16 == 2,
    };
    Checkpoint {
        name: called.parse().unwrap(),
        parent: parent.map(|parent| parent.parse().unwrap()),
        created: second(at),
        description: Some("\"quoted\"\n".to_owned()),
        disks: (0..disks).map(disk).collect(),
    }
}

pub(crate) fn intent(domain: &DomainId, called: &str) -> Intent {
    Intent {
        id: Uuid::new_v4(),
        domain: Domain {
            id: domain.clone(),
            disks: Vec::new(),
            sockets: Sockets::default(),
        },
        since: second(0),
        act: Act::Create {
            name: name(called),
            parts: Vec::new(),
            starts: Vec::new(),
        },
    }
}

pub(crate) fn definition(id: &DomainId) -> Definition {
    Definition {
        id: id.clone(),
        document: format!("<domain>\n<name>{}</name></domain>", id.name),
    }
}

pub(crate) fn server(port: u16) -> NbdServer {
    NbdServer {
        listen: Listen::Tcp {
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port,
        },
        tls: None,
        explicit: true,
        instance: Some("7".to_owned()),
    }
}

pub(crate) fn export(alias: &str, target: &str) -> Export {
    Export {
        alias: Alias(alias.to_owned()),
        snapshot: SnapshotId::random(),
        target: target.to_owned(),
        node: ServeNode {
            id: format!("export-{alias}"),
            node: "node".to_owned(),
            name: alias.to_owned(),
            bitmap: None,
        },
        lease: Some(Uuid::new_v4()),
        image: None,
        attached: None,
        changes: None,
    }
}
