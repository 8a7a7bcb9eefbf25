//! What is written of snapshots, exports, plans and methods, exactly.

use std::collections::BTreeMap;
use std::time::{Duration, UNIX_EPOCH};

use disksnap_core::{
    Access, Alias, Capability, Consistency, Disk, DiskRequest, DiskSnapshotRecord, Disks, DomainId, Driver,
    ErrorKind, Export, FileInside, Fit, Health, Inside, Listen, Method, MethodChoice, NbdServer, NetworkHost,
    OptionDoc, Options, Plan, PlannedDisk, Probe, ServeNode, Skipped, Snapshot, SnapshotId, Source, Tls, Why,
    WindowReport,
};
use disksnap_xml::{
    DomainDocument, Element, SnapshotView, export_document, export_request, methods_document, plan_document,
    snapshot_document, snapshot_request, snapshots_document,
};
use insta::assert_snapshot;

use crate::ACTIVE;

fn record(target: &str, method: &str, access: Access) -> DiskSnapshotRecord {
    DiskSnapshotRecord {
        target: target.to_owned(),
        alias: Alias(format!("{target}-backup")),
        method: method.to_owned(),
        why: Why::Default,
        unit: 0,
        modified_disk: None,
        access,
        size: None,
        details: BTreeMap::new(),
        written: None,
        untold: false,
        inherited: Vec::new(),
        shares: std::collections::BTreeMap::new(),
    }
}

fn snapshot() -> Snapshot {
    let mut fleece = record("vda", "qemu-fleece", Access::Node("acc".to_owned()));
    fleece.size = Some(1 << 30);
    fleece.details = BTreeMap::from([
        ("fleece.file".to_owned(), "/f/vda.img".to_owned()),
        ("way".to_owned(), "filter".to_owned()),
    ]);
    let source = Source::Block {
        dev: "/dev/vg0/web-1-data".into(),
    };
    let mut overlay = record(
        "sda",
        "qemu-external-qcow2",
        Access::Source {
            source,
            format: "raw".to_owned(),
            backing: None,
        },
    );
    overlay.modified_disk = Some(Disk {
        driver: Driver {
            name: Some("qemu".to_owned()),
            format: Some("qcow2".to_owned()),
        },
        ..Disk::new(
            "sda",
            Source::File {
                file: "/o/sda.qcow2".into(),
            },
        )
    });
    Snapshot {
        id: SnapshotId::random(),
        name: "nightly <3>".parse().unwrap(),
        domain: DomainId {
            uuid: "5768a388-c1c4-414c-ac4e-eab216ba7c0c".parse().unwrap(),
            name: "web-1".to_owned(),
        },
        created: UNIX_EPOCH + Duration::from_millis(1_700_000_000_500),
        consistency: Consistency::Filesystem {
            filesystems: 2,
            mountpoints: vec!["/".to_owned(), "/srv".to_owned()],
        },
        window: WindowReport {
            frozen_us: 41_000,
            paused_us: 0,
            taken_us: 900,
        },
        disks: vec![fleece, overlay],
        units: Vec::new(),
        skipped: vec![Skipped {
            target: "sdb".to_owned(),
            reason: "a CD-ROM drive".to_owned(),
        }],
        warnings: vec!["little space: 1 GiB & falling".to_owned()],
        checkpoint: None,
        after: None,
        pinned: false,
    }
}

fn nbd(socket: &str, name: &str) -> Source {
    Source::Network {
        protocol: "nbd".to_owned(),
        name: Some(name.to_owned()),
        hosts: vec![NetworkHost::Unix {
            socket: socket.into(),
        }],
        tls: false,
    }
}

#[test]
fn a_snapshot_in_full() {
    let (snapshot, document) = (snapshot(), DomainDocument::parse(ACTIVE).unwrap());
    let health = [Health::Active, Health::Broken("the image is full".to_owned())];
    let view = SnapshotView {
        health: &health,
        backup_sources: BTreeMap::from([("vda".to_owned(), nbd("/run/nbd.sock", "vda-backup"))]),
        document: Some(&document),
        ..SnapshotView::new(&snapshot)
    };
    assert_snapshot!(snapshot_document(&view).unwrap(), @"
    <domainblocksnapshot>
      <name>nightly &lt;3&gt;</name>
      <creationTime>1700000000</creationTime>
      <domain name='web-1' uuid='5768a388-c1c4-414c-ac4e-eab216ba7c0c'/>
      <consistency level='filesystem' filesystems='2'>
        <filesystem mountpoint='/'/>
        <filesystem mountpoint='/srv'/>
      </consistency>
      <window unit='us' frozen='41000' paused='0' taken='900'/>
      <snapshot disk='vda'>
        <fleece file='/f/vda.img'/>
        <alias name='vda-backup'/>
        <size unit='bytes'>1073741824</size>
        <health state='active'/>
        <detail name='way' value='filter'/>
        <backupSource type='network'>
          <format type='raw'/>
          <source protocol='nbd' name='vda-backup'>
            <host transport='unix' socket='/run/nbd.sock'/>
          </source>
        </backupSource>
      </snapshot>
      <snapshot disk='sda'>
        <diskSnapshot method='qemu-external-qcow2'/>
        <alias name='sda-backup'/>
        <health state='broken'>the image is full</health>
        <modifiedDisk>
          <disk type='file' device='disk'>
            <driver name='qemu' type='qcow2' cache='none' io='native'/>
            <source file='/o/sda.qcow2'/>
            <target dev='sda' bus='scsi'/>
            <alias name='scsi0-0-0-0'/>
            <address type='drive' controller='0' bus='0' target='0' unit='0'/>
          </disk>
        </modifiedDisk>
        <backupSource type='block'>
          <format type='raw'/>
          <source dev='/dev/vg0/web-1-data'/>
        </backupSource>
      </snapshot>
      <skipped disk='sdb'>a CD-ROM drive</skipped>
      <warning>little space: 1 GiB &amp; falling</warning>
    </domainblocksnapshot>
    ");
}

#[test]
fn a_snapshot_alone_and_in_a_list() {
    let mut snapshot = snapshot();
    snapshot.consistency = Consistency::Unquiesced {
        reason: "the agent is silent".to_owned(),
    };
    snapshot.skipped.clear();
    snapshot.warnings.clear();
    let view = SnapshotView::new(&snapshot);
    let alone = snapshot_document(&view).unwrap();
    assert_snapshot!(alone, @"
    <domainblocksnapshot>
      <name>nightly &lt;3&gt;</name>
      <creationTime>1700000000</creationTime>
      <domain name='web-1' uuid='5768a388-c1c4-414c-ac4e-eab216ba7c0c'/>
      <consistency level='unquiesced'>the agent is silent</consistency>
      <window unit='us' frozen='41000' paused='0' taken='900'/>
      <snapshot disk='vda'>
        <fleece file='/f/vda.img'/>
        <alias name='vda-backup'/>
        <size unit='bytes'>1073741824</size>
        <detail name='way' value='filter'/>
      </snapshot>
      <snapshot disk='sda'>
        <diskSnapshot method='qemu-external-qcow2'/>
        <alias name='sda-backup'/>
        <modifiedDisk>
          <disk type='file' device='disk'>
            <driver name='qemu' type='qcow2'/>
            <source file='/o/sda.qcow2'/>
            <target dev='sda'/>
          </disk>
        </modifiedDisk>
        <backupSource type='block'>
          <format type='raw'/>
          <source dev='/dev/vg0/web-1-data'/>
        </backupSource>
      </snapshot>
    </domainblocksnapshot>
    ");
    let list = snapshots_document(&[view.clone(), view]).unwrap();
    let indented = format!("  {}\n", alone.trim_end().replace('\n', "\n  "));
    assert_eq!(
        list,
        format!("<domainblocksnapshots>\n{indented}{indented}</domainblocksnapshots>\n")
    );
    assert_eq!(snapshots_document(&[]).unwrap(), "<domainblocksnapshots/>\n");
}

#[test]
fn what_is_told_of_a_snapshot_asks_for_it_again() {
    let (snapshot, document) = (snapshot(), DomainDocument::parse(ACTIVE).unwrap());
    let view = SnapshotView {
        health: &[Health::Active, Health::Gone("deleted".to_owned())],
        document: Some(&document),
        ..SnapshotView::new(&snapshot)
    };
    let request = snapshot_request(&snapshot_document(&view).unwrap()).unwrap();
    assert_eq!(request.name, Some(snapshot.name));
    let Disks::Named(disks) = request.disks else {
        panic!("two are named");
    };
    let choice = |method: &str, options: &[(&str, &str)]| {
        Some(MethodChoice {
            method: method.to_owned(),
            options: options.iter().copied().collect(),
        })
    };
    let got: Vec<_> = disks.into_iter().map(|d| (d.target, d.method)).collect();
    let fleece = choice("qemu-fleece", &[("fleece.file", "/f/vda.img")]);
    let overlay = choice("qemu-external-qcow2", &[]);
    assert_eq!(got, [("vda".to_owned(), fleece), ("sda".to_owned(), overlay)]);
}

#[test]
fn exports() {
    let mut server = NbdServer {
        listen: "10.0.2.10:8001".parse().unwrap(),
        tls: Some(Tls {
            credentials: "/etc/pki/qemu".into(),
            verify_client: true,
            allowed: Vec::new(),
        }),
        explicit: true,
        instance: Some("1".to_owned()),
    };
    let export = |alias: &str, name: &str| Export {
        alias: Alias(alias.to_owned()),
        snapshot: SnapshotId::random(),
        target: "vda".to_owned(),
        node: ServeNode {
            id: "i".to_owned(),
            node: "n".to_owned(),
            name: name.to_owned(),
            bitmap: None,
        },
        lease: None,
        image: None,
        attached: None,
        changes: None,
    };
    let exports = [
        export("vda-backup", "vda-backup"),
        export("vdb-backup", "data & more"),
    ];
    let text = export_document(&server, &exports).unwrap();
    assert_snapshot!(text, @"
    <blockexport type='nbd' port='8001'>
      <listen type='address' address='10.0.2.10'/>
      <tls credentials='/etc/pki/qemu' verify='yes'/>
      <disk name='vda-backup'/>
      <disk name='vdb-backup' exportname='data &amp; more'/>
    </blockexport>
    ");
    let request = export_request(&text).unwrap();
    assert_eq!(
        (Some(&server.listen), &server.tls),
        (request.listen.as_ref(), &request.tls)
    );
    assert_eq!(request.disks[1].name.as_deref(), Some("data & more"));
    server.tls = None;
    server.listen = Listen::Unix("/run/a'b".into());
    assert_snapshot!(export_document(&server, &[]).unwrap(), @"
    <blockexport type='nbd'>
      <listen type='socket' socket='/run/a&apos;b'/>
    </blockexport>
    ");
}

#[test]
fn a_plan_and_the_methods() {
    let document = DomainDocument::parse(ACTIVE).unwrap();
    let planned = |target: &str, method: Option<&str>, probe| PlannedDisk {
        request: DiskRequest {
            disk: document.domain().disk(target).unwrap().clone(),
            alias: Alias(format!("{target}-backup")),
            options: Options::from_iter([("fleece.file", "/f")]),
        },
        method: method.map(str::to_owned),
        why: Why::Override,
        probe,
    };
    let good = Probe {
        fit: Fit::Natural,
        unit: "vda".to_owned(),
        capabilities: vec![Capability::Active, Capability::GuestSafe],
        effect: "Old data is copied to /f.".to_owned(),
        details: BTreeMap::from([("way".to_owned(), "filter".to_owned())]),
        warnings: vec!["little space".to_owned()],
    };
    let plan = Plan {
        disks: vec![
            planned("vda", Some("qemu-fleece"), good),
            planned("sda", None, Probe::unfit("no running domain")),
        ],
        skipped: vec![Skipped {
            target: "sdb".to_owned(),
            reason: "a CD-ROM drive".to_owned(),
        }],
    };
    assert_snapshot!(plan_document(document.domain(), &plan).unwrap(), @"
    <diskSnapshotPlan>
      <domain name='web-1' uuid='5768a388-c1c4-414c-ac4e-eab216ba7c0c'/>
      <snapshot disk='vda' method='qemu-fleece' why='override' fit='natural' unit='vda'>
        <alias name='vda-backup'/>
        <effect>Old data is copied to /f.</effect>
        <option name='fleece.file' value='/f'/>
        <capability name='active'/>
        <capability name='guest-safe'/>
        <detail name='way' value='filter'/>
        <warning>little space</warning>
      </snapshot>
      <snapshot disk='sda' why='override' fit='unfit'>
        <alias name='sda-backup'/>
        <reason>no running domain</reason>
        <option name='fleece.file' value='/f'/>
      </snapshot>
      <skipped disk='sdb'>a CD-ROM drive</skipped>
    </diskSnapshotPlan>
    ");
    let method = Method {
        name: "qemu-fleece".to_owned(),
        aliases: Vec::new(),
        summary: "Copy before write inside QEMU".to_owned(),
        options: vec![OptionDoc {
            key: "fleece.file".to_owned(),
            help: "where old data goes".to_owned(),
        }],
        capabilities: vec![Capability::Export],
    };
    assert_snapshot!(methods_document([&method]).unwrap(), @"
    <diskSnapshotMethods>
      <method name='qemu-fleece'>
        <summary>Copy before write inside QEMU</summary>
        <capability name='export'/>
        <option name='fleece.file'>where old data goes</option>
      </method>
    </diskSnapshotMethods>
    ");
}

/// No `<source>` gives its bytes: it is said where it is, and why nobody mounts that.
#[test]
fn an_image_inside_a_device_is_told_as_such() {
    let mut snapshot = snapshot();
    let file = |path: &str, format: &str| FileInside {
        path: path.into(),
        format: format.to_owned(),
    };
    snapshot.disks.remove(0);
    snapshot.disks[0].modified_disk = None;
    snapshot.disks[0].access = Access::Inside(Inside {
        device: "/dev/vg0/disksnap.1".into(),
        file_system: "btrfs".to_owned(),
        image: file("/vms/a.qcow2", "qcow2"),
        below: vec![file("/vms/base.raw", "raw")],
        options: "ro,rescue=nologreplay".to_owned(),
        why: "a second btrfs of the same id must not be mounted".to_owned(),
    });
    let text = snapshot_document(&SnapshotView::new(&snapshot)).unwrap();
    assert!(!text.contains("<backupSource"), "{text}");
    let inside = &text[text.find("    <inside").unwrap()..text.find("  </snapshot>").unwrap()];
    assert_snapshot!(inside, @"
    <inside device='/dev/vg0/disksnap.1' filesystem='btrfs' options='ro,rescue=nologreplay' path='/vms/a.qcow2'>
      <format type='qcow2'/>
      <layer path='/vms/base.raw'>
        <format type='raw'/>
      </layer>
      <reason>a second btrfs of the same id must not be mounted</reason>
    </inside>
    ");
    let request = snapshot_request(&text).unwrap();
    assert!(matches!(request.disks, Disks::Named(disks) if disks.len() == 1));
}

/// What records from before [`Access::Inside`] say.
#[test]
fn an_older_record_of_a_file_in_a_device_has_no_backup_source() {
    let mut snapshot = snapshot();
    snapshot.disks[1].access = Access::Source {
        source: Source::Other {
            kind: "file-in-device".to_owned(),
        },
        format: "raw".to_owned(),
        backing: None,
    };
    snapshot.disks[1].details = BTreeMap::from([("path-inside".to_owned(), "/vms/a.raw".to_owned())]);
    let text = snapshot_document(&SnapshotView::new(&snapshot)).unwrap();
    assert!(
        text.contains("/vms/a.raw") && !text.contains("<backupSource"),
        "{text}"
    );
}

#[test]
fn what_xml_cannot_hold_is_refused() {
    let error = Element::new("a").text("bell \u{7}").to_document().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_snapshot!(error, @r#"XML cannot hold the character '\u{7}' of "bell \u{7}""#);
    assert_snapshot!(Element::new("a b").to_document().unwrap_err(), @r#""a b" cannot be the name of an element or attribute in XML"#);
    assert_snapshot!(Element::new("a").attr("1", "x").to_document().unwrap_err(), @r#""1" cannot be the name of an element or attribute in XML"#);
}

#[test]
fn snapshots_come_into_the_active_document_and_go() {
    let document = DomainDocument::parse(crate::ACTIVE).unwrap();
    let (first, mut second) = (snapshot(), snapshot());
    second.name = "second".parse().unwrap();
    let views = [SnapshotView::new(&first), SnapshotView::new(&second)];
    let active = document.with_snapshots(&views).unwrap();
    assert_eq!(active.domain(), document.domain());
    assert_eq!(active.text().matches("<domainblocksnapshot>").count(), 2);
    assert_eq!(active.with_snapshots(&views).unwrap(), active);
    let fewer = active.with_snapshots(&views[..1]).unwrap();
    assert_eq!(fewer, document.with_snapshots(&views[..1]).unwrap());
    assert_eq!(active.with_snapshots(&[]).unwrap(), document);
}

#[test]
fn an_endangered_snapshot_is_active_and_says_why() {
    let snapshot = snapshot();
    let health = [
        Health::Endangered("vg/s is 85 % full".to_owned()),
        Health::Gone("deleted".to_owned()),
    ];
    let view = SnapshotView {
        health: &health,
        ..SnapshotView::new(&snapshot)
    };
    let document = snapshot_document(&view).unwrap();
    assert!(
        document.contains("<health state='active'>vg/s is 85 % full</health>"),
        "{document}"
    );
}
