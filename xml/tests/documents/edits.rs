//! Edits in place: what they put where, and that every other byte stays.

use disksnap_core::{
    Alias, BackingStore, CheckpointName, Consistency, DataStore, Export, Listen, MethodChoice, NbdServer,
    Options, ServeNode, Snapshot, SnapshotId, Source, WindowReport,
};
use disksnap_xml::{DomainDocument, SnapshotView, disk_element};
use insta::assert_snapshot;

use crate::{ACTIVE, SOURCES};

fn server(listen: &str) -> NbdServer {
    NbdServer {
        listen: listen.parse::<Listen>().unwrap(),
        tls: None,
        explicit: false,
        instance: None,
    }
}

fn export(alias: &str, name: &str) -> Export {
    Export {
        alias: Alias(alias.to_owned()),
        snapshot: SnapshotId::random(),
        target: "vda".to_owned(),
        node: ServeNode {
            id: "x".to_owned(),
            node: "n".to_owned(),
            name: name.to_owned(),
            bitmap: None,
        },
        lease: None,
        image: None,
        attached: None,
        changes: None,
    }
}

/// The lines that differ, as `diff` would tell them; fails where a line of the old text is touched
/// that `allowed` does not name.
fn difference(old: &str, new: &str) -> String {
    let (old, new): (Vec<_>, Vec<_>) = (old.lines().collect(), new.lines().collect());
    let same_start = old.iter().zip(&new).take_while(|(a, b)| a == b).count();
    let rest = old.len().min(new.len()) - same_start;
    let ends = old.iter().rev().zip(new.iter().rev());
    let same_end = ends.take(rest).take_while(|(a, b)| a == b).count();
    let gone = old[same_start..old.len() - same_end]
        .iter()
        .map(|l| format!("-{l}"));
    let come = new[same_start..new.len() - same_end]
        .iter()
        .map(|l| format!("+{l}"));
    gone.chain(come).collect::<Vec<_>>().join("\n")
}

#[test]
fn exports_come_and_change_and_go() {
    let document = DomainDocument::parse(ACTIVE).unwrap();
    let exports = [
        export("virtio-disk0-backup", "virtio-disk0-backup"),
        export("scsi0-0-0-0-backup", "data"),
    ];
    let server_a = server("10.0.2.10:8001");
    let active = document.with_exports(Some(&server_a), &exports).unwrap();
    assert_snapshot!(difference(ACTIVE, active.text()), @"
    +    <blockexport type='nbd' port='8001'>
    +      <listen type='address' address='10.0.2.10'/>
    +      <disk name='virtio-disk0-backup'/>
    +      <disk name='scsi0-0-0-0-backup' exportname='data'/>
    +    </blockexport>
    ");
    assert_eq!(active.with_exports(Some(&server_a), &exports).unwrap(), active);
    let moved = active
        .with_exports(Some(&server("unix:/run/nbd.sock")), &exports[..1])
        .unwrap();
    assert_snapshot!(difference(ACTIVE, moved.text()), @"
    +    <blockexport type='nbd'>
    +      <listen type='socket' socket='/run/nbd.sock'/>
    +      <disk name='virtio-disk0-backup'/>
    +    </blockexport>
    ");
    assert_eq!(moved.with_exports(None, &[]).unwrap(), document);
    assert_eq!(document.with_exports(None, &[]).unwrap(), document);
}

#[test]
fn checkpoints_come_and_go() {
    let document = DomainDocument::parse(ACTIVE).unwrap();
    let names: Vec<CheckpointName> = ["monday", "tues-day"]
        .iter()
        .map(|n| n.parse().unwrap())
        .collect();
    let with = document.with_checkpoints("vda", &names).unwrap();
    assert_snapshot!(difference(ACTIVE, with.text()), @"
    +      <checkpoint name='monday'/>
    +      <checkpoint name='tues-day'/>
    ");
    assert_eq!(with.with_checkpoints("vda", &names).unwrap(), with);
    let fewer = with.with_checkpoints("vda", &names[1..]).unwrap();
    assert_eq!(fewer, document.with_checkpoints("vda", &names[1..]).unwrap());
    assert_eq!(with.with_checkpoints("vda", &[]).unwrap(), document);
}

#[test]
fn an_overlay_becomes_the_disk() {
    let document = DomainDocument::parse(ACTIVE).unwrap();
    let mut disk = document.domain().disk("vda").unwrap().clone();
    disk.backing = Some(BackingStore {
        format: disk.driver.format.clone(),
        source: disk.source.clone().unwrap(),
        data_store: None,
        backing: disk.backing.map(Box::new),
    });
    disk.source = Some(Source::File {
        file: "/images/over&lay.qcow2".into(),
    });
    let after = document.with_disk("vda", &disk).unwrap();
    assert_eq!(*after.domain().disk("vda").unwrap(), disk);
    assert_snapshot!(difference(ACTIVE, after.text()), @"
    -      <source file='/var/lib/libvirt/images/web-1.today.qcow2' index='3'>
    -        <seclabel model='dac' relabel='no'/>
    -      </source>
    -      <backingStore type='file' index='4'>
    -        <format type='qcow2'/>
    -        <source file='/var/lib/libvirt/images/web-1.qcow2'/>
    -        <backingStore type='block' index='5'>
    -          <format type='raw'/>
    -          <source dev='/dev/vg0/template'/>
    -          <backingStore/>
    +      <source file='/images/over&amp;lay.qcow2'/>
    +      <backingStore type='file'>
    +        <format type='qcow2'/>
    +        <source file='/var/lib/libvirt/images/web-1.today.qcow2' index='3'>
    +          <seclabel model='dac' relabel='no'/>
    +        </source>
    +        <backingStore type='file'>
    +          <format type='qcow2'/>
    +          <source file='/var/lib/libvirt/images/web-1.qcow2'/>
    +          <backingStore type='block'>
    +            <format type='raw'/>
    +            <source dev='/dev/vg0/template'/>
    +            <backingStore/>
    +          </backingStore>
    ");
    // And back: the top image gets its own text again.
    let before = document.domain().disk("vda").unwrap();
    let back = after.with_disk("vda", before).unwrap();
    assert_eq!(back.domain(), document.domain());
    assert_snapshot!(difference(ACTIVE, back.text()), @"
    -      <backingStore type='file' index='4'>
    -        <format type='qcow2'/>
    -        <source file='/var/lib/libvirt/images/web-1.qcow2'/>
    -        <backingStore type='block' index='5'>
    +      <backingStore type='file'>
    +        <format type='qcow2'/>
    +        <source file='/var/lib/libvirt/images/web-1.qcow2'/>
    +        <backingStore type='block'>
    ");
}

#[test]
fn a_disk_moves_to_another_kind_of_place() {
    let document = DomainDocument::parse(ACTIVE).unwrap();
    let mut disk = document.domain().disk("sda").unwrap().clone();
    disk.source = Some(Source::File {
        file: "/images/data.qcow2".into(),
    });
    disk.driver.format = Some("qcow2".to_owned());
    let after = document.with_disk("sda", &disk).unwrap();
    assert_snapshot!(difference(ACTIVE, after.text()), @"
    -    <disk type='block' device='disk'>
    -      <driver name='qemu' type='raw' cache='none' io='native'/>
    -      <source dev='/dev/vg0/web-1-data' index='2'/>
    -      <backingStore/>
    +    <disk type='file' device='disk'>
    +      <driver name='qemu' type='qcow2' cache='none' io='native'/>
    +      <source file='/images/data.qcow2'/>
    ");
    assert_eq!(*after.domain().disk("sda").unwrap(), disk);
    assert_eq!(
        document
            .with_disk("sda", document.domain().disk("sda").unwrap())
            .unwrap(),
        document
    );
}

#[test]
fn a_disk_that_says_little_gets_what_it_lacks() {
    let document = DomainDocument::parse(SOURCES).unwrap();
    let mut disk = document.domain().disk("hda").unwrap().clone();
    disk.driver.format = Some("qcow2".to_owned());
    disk.backing = Some(BackingStore {
        format: Some("raw".to_owned()),
        source: disk.source.clone().unwrap(),
        data_store: None,
        backing: None,
    });
    disk.source = Some(Source::Block {
        dev: "/dev/vg/over".into(),
    });
    let after = document.with_disk("hda", &disk).unwrap();
    assert_snapshot!(difference(SOURCES, after.text()), @"
    -    <disk>
    -      <source file='/images/plain &amp; &quot;odd&apos;.img'/>
    +    <disk type='block'>
    +      <source dev='/dev/vg/over'/>
    +      <driver type='qcow2'/>
    +      <backingStore type='file'>
    +        <format type='raw'/>
    +        <source file='/images/plain &amp; &quot;odd&apos;.img'/>
    +        <backingStore/>
    +      </backingStore>
    ");
}

#[test]
fn a_secret_stays_with_an_encrypted_disk() {
    let document = DomainDocument::parse(SOURCES).unwrap();
    let mut disk = document.domain().disk("vdg").unwrap().clone();
    disk.source = Some(Source::File {
        file: "/images/other.qcow2".into(),
    });
    let after = document.with_disk("vdg", &disk).unwrap();
    assert!(after.domain().disk("vdg").unwrap().encrypted);
    assert_snapshot!(difference(SOURCES, after.text()), @"
    -      <source file='/images/secret.qcow2'>
    +      <source file='/images/other.qcow2'>
    ");
}

#[test]
fn what_is_not_looked_into_is_carried_or_refused() {
    let document = DomainDocument::parse(SOURCES).unwrap();
    let mut disk = document.domain().disk("vde").unwrap().clone();
    disk.backing = Some(BackingStore {
        format: Some("raw".to_owned()),
        source: disk.source.clone().unwrap(),
        data_store: None,
        backing: None,
    });
    disk.source = Some(Source::File {
        file: "/images/over.qcow2".into(),
    });
    let after = document.with_disk("vde", &disk).unwrap();
    assert!(after.text().contains("<backingStore type='nvme'>"));
    assert!(
        after
            .text()
            .contains("<source type='pci' managed='yes' namespace='1'>")
    );
    disk.source = Some(Source::Other {
        kind: "vhostuser".to_owned(),
    });
    let error = document.with_disk("vde", &disk).unwrap_err();
    assert_snapshot!(error, @"a source of the type 'vhostuser' cannot be written anew");
    let error = document.with_disk("vdf", &disk).unwrap_err();
    assert_snapshot!(error, @"the disk 'vdf' cannot be replaced by the disk 'vde'");
    assert_snapshot!(document.with_disk("vdz", &disk).unwrap_err(), @"the domain has no disk 'vdz' (domain every-source)");
}

#[test]
fn a_method_is_set_where_it_stands() {
    let document = DomainDocument::parse(ACTIVE).unwrap();
    let choice = MethodChoice {
        method: "lvm".to_owned(),
        options: Options::from_iter([
            ("device.path", "/dev/vg/lv4"),
            ("device.size", "10%"),
            ("thin", "yes"),
        ]),
    };
    let in_disk = document.with_method("vda", Some(&choice)).unwrap();
    assert_snapshot!(difference(ACTIVE, in_disk.text()), @"
    +      <diskSnapshot method='lvm'>
    +        <device path='/dev/vg/lv4' size='10%'/>
    +        <thin>yes</thin>
    +      </diskSnapshot>
    ");
    assert_eq!(
        in_disk.domain().disk("vda").unwrap().method.as_ref(),
        Some(&choice)
    );
    assert_eq!(in_disk.with_method("vda", None).unwrap(), document);
    let in_metadata = document.with_method("sda", Some(&choice)).unwrap();
    assert_snapshot!(difference(ACTIVE, in_metadata.text()), @"
    -        <ds:diskSnapshot method='qemu-fleece'>
    -          <ds:fleece file='/var/lib/fleece/sda.img'/>
    +        <ds:diskSnapshot method='lvm'>
    +          <ds:device path='/dev/vg/lv4' size='10%'/>
    +          <ds:thin>yes</ds:thin>
    ");
    assert_eq!(
        in_metadata.domain().disk("sda").unwrap().method.as_ref(),
        Some(&choice)
    );
    let none = document.with_method("sda", None).unwrap();
    assert_eq!(none.domain().disk("sda").unwrap().method, None);
}

#[test]
fn line_ends_and_tabs_and_single_lines_are_kept() {
    let windows = ACTIVE.replace('\n', "\r\n");
    let document = DomainDocument::parse(windows.as_str()).unwrap();
    let active = document
        .with_exports(Some(&server("[::1]:8001")), &[export("a", "a")])
        .unwrap();
    assert_eq!(
        active.text().matches('\n').count(),
        active.text().matches("\r\n").count()
    );
    let tabs = "<domain>\n\t<name>a</name>\n\t<devices/>\n</domain>";
    let tabs = DomainDocument::parse(tabs).unwrap();
    let tabs = tabs
        .with_exports(Some(&server("[::1]:8001")), &[export("a", "a")])
        .unwrap();
    assert_snapshot!(tabs.text().replace('\t', "→"), @"
    <domain>
    →<name>a</name>
    →<devices>
    →→<blockexport type='nbd' port='8001'>
    →→→<listen type='address' address='::1'/>
    →→→<disk name='a'/>
    →→</blockexport>
    →</devices>
    </domain>
    ");
    let line = DomainDocument::parse(
        "<domain><name>a</name><devices><disk><target dev='a'/></disk></devices></domain>",
    );
    let line = line
        .unwrap()
        .with_exports(Some(&server("[::1]:8001")), &[])
        .unwrap();
    let line = line.with_checkpoints("a", &["x".parse().unwrap()]).unwrap();
    assert_snapshot!(line.text(), @"<domain><name>a</name><devices><disk><target dev='a'/><checkpoint name='x'/></disk><blockexport type='nbd' port='8001'><listen type='address' address='::1'/></blockexport></devices></domain>");
    let bare = DomainDocument::parse("<domain>\n  <name>a</name>\n</domain>\n").unwrap();
    let bare = bare.with_exports(Some(&server("unix:/s")), &[]).unwrap();
    assert_snapshot!(bare.text(), @"
    <domain>
      <name>a</name>
      <devices>
        <blockexport type='nbd'>
          <listen type='socket' socket='/s'/>
        </blockexport>
      </devices>
    </domain>
    ");
    let comment = "<domain>\n  <name>a</name>\n  <devices>\n    <!-- none -->\n  </devices>\n</domain>\n";
    let comment = DomainDocument::parse(comment).unwrap();
    let comment = comment.with_exports(Some(&server("unix:/s")), &[]).unwrap();
    assert_snapshot!(comment.text(), @"
    <domain>
      <name>a</name>
      <devices>
        <!-- none -->
        <blockexport type='nbd'>
          <listen type='socket' socket='/s'/>
        </blockexport>
      </devices>
    </domain>
    ");
}

#[test]
fn the_modified_disk_alone_starts_at_the_margin() {
    let document = DomainDocument::parse(ACTIVE).unwrap();
    let choice = MethodChoice {
        method: "lvm".to_owned(),
        options: Options::default(),
    };
    let document = document.with_method("sda", None).unwrap();
    let document = document.with_method("vda", Some(&choice)).unwrap();
    let document = document.with_checkpoints("vda", &["c".parse().unwrap()]).unwrap();
    let disk = document.domain().disk("vda").unwrap();
    assert_snapshot!(disk_element(&document, "vda", disk).unwrap(), @"
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none' io='native' discard='unmap'/>
      <source file='/var/lib/libvirt/images/web-1.today.qcow2' index='3'>
        <seclabel model='dac' relabel='no'/>
      </source>
      <backingStore type='file' index='4'>
        <format type='qcow2'/>
        <source file='/var/lib/libvirt/images/web-1.qcow2'/>
        <backingStore type='block' index='5'>
          <format type='raw'/>
          <source dev='/dev/vg0/template'/>
          <backingStore/>
        </backingStore>
      </backingStore>
      <target dev='vda' bus='virtio'/>
      <serial>WEB1-ROOT</serial>
      <alias name='virtio-disk0'/>
      <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>
    </disk>
    ");
}

#[test]
fn snapshots_come_and_go_beside_exports() {
    let snapshot = Snapshot {
        id: SnapshotId::random(),
        name: "nightly".parse().unwrap(),
        domain: DomainDocument::parse(ACTIVE).unwrap().domain().id.clone(),
        created: std::time::UNIX_EPOCH,
        consistency: Consistency::Inactive,
        window: WindowReport::default(),
        disks: Vec::new(),
        units: Vec::new(),
        skipped: Vec::new(),
        warnings: Vec::new(),
        checkpoint: None,
        after: None,
        pinned: false,
    };
    let view = [SnapshotView::new(&snapshot)];
    let document = DomainDocument::parse(ACTIVE).unwrap();
    let exports = document.with_exports(Some(&server("[::1]:8001")), &[]).unwrap();
    let both = exports.with_snapshots(&view).unwrap();
    assert_snapshot!(difference(exports.text(), both.text()), @"
    +    <domainblocksnapshot>
    +      <name>nightly</name>
    +      <creationTime>0</creationTime>
    +      <domain name='web-1' uuid='5768a388-c1c4-414c-ac4e-eab216ba7c0c'/>
    +      <consistency level='inactive'/>
    +      <window unit='us' frozen='0' paused='0' taken='0'/>
    +    </domainblocksnapshot>
    ");
    assert_eq!(both.with_snapshots(&view).unwrap(), both);
    let snapshots = both.with_exports(None, &[]).unwrap();
    assert_eq!(snapshots, document.with_snapshots(&view).unwrap());
    assert_eq!(snapshots.with_snapshots(&[]).unwrap(), document);
}

/// libvirt 10.10 and later: a qcow2 that keeps its data in another place.
#[test]
fn a_raw_disk_goes_through_a_qcow2_and_back() {
    let text = "<domain type='kvm'>\n  <name>a</name>\n  <devices>\n    <disk type='block' device='disk'>\n      \
                <driver name='qemu' type='raw' cache='none'/>\n      <source dev='/dev/vg/a'>\n        <seclabel \
                model='dac' relabel='no'/>\n      </source>\n      <target dev='vda' bus='virtio'/>\n    </disk>\n  \
                </devices>\n</domain>\n";
    let document = DomainDocument::parse(text).unwrap();
    let raw = document.domain().disk("vda").unwrap().clone();
    let mut through = raw.clone();
    through.data_store = raw.source.clone().map(|source| DataStore {
        format: raw.driver.format.clone(),
        source,
    });
    through.source = Some(Source::File {
        file: "/srv/a.qcow2".into(),
    });
    through.driver.format = Some("qcow2".to_owned());
    let after = document.with_disk("vda", &through).unwrap();
    assert_snapshot!(after.text(), @"
    <domain type='kvm'>
      <name>a</name>
      <devices>
        <disk type='file' device='disk'>
          <driver name='qemu' type='qcow2' cache='none'/>
          <source file='/srv/a.qcow2'>
            <dataStore type='block'>
              <format type='raw'/>
              <source dev='/dev/vg/a'>
                <seclabel model='dac' relabel='no'/>
              </source>
            </dataStore>
          </source>
          <target dev='vda' bus='virtio'/>
        </disk>
      </devices>
    </domain>
    ");
    assert_eq!(after.domain().disk("vda").unwrap(), &through);
    let back = after.with_disk("vda", &raw).unwrap();
    assert_eq!(back.text(), text);
}

#[test]
fn a_place_for_data_that_names_nothing_is_a_fault() {
    for (inside, said) in [
        (
            "<dataStore type='file'><format type='raw'/></dataStore>",
            "<source>",
        ),
        ("<dataStore type='file'><source/></dataStore>", "names nothing"),
    ] {
        let text = format!(
            "<domain type='kvm'><name>a</name><devices><disk type='file'><source file='/a.qcow2'>{inside}</source>\
             <target dev='vda'/></disk></devices></domain>"
        );
        let error = DomainDocument::parse(text).unwrap_err();
        assert!(error.to_string().contains(said), "{error}");
    }
}
