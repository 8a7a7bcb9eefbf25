//! What makes a machine of its disks, and the document of one that was restored.

use std::path::PathBuf;

use disksnap_core::{ErrorKind, Source};
use disksnap_xml::{DomainDocument, EfiVariables, RestoredAs, RestoredDisk, Tpm, TpmPlace};
use insta::assert_snapshot;
use uuid::Uuid;

use crate::schema::Schema;
use crate::{ACTIVE, MACHINE, SOURCES};

fn around(os: &str, devices: &str) -> DomainDocument {
    DomainDocument::parse(format!(
        "<domain type='kvm'><name>a</name><uuid>5768a388-c1c4-414c-ac4e-eab216ba7c0c</uuid>\
         <os><type>hvm</type>{os}</os><devices>{devices}</devices></domain>"
    ))
    .unwrap()
}

fn restored(target: &str, file: &str, format: &str) -> RestoredDisk {
    RestoredDisk {
        target: target.to_owned(),
        source: Source::File { file: file.into() },
        format: format.to_owned(),
    }
}

fn second() -> Uuid {
    Uuid::from_u128(0x1111_2222_3333_4444_5555_6666_7777_8888)
}

#[test]
fn where_the_efi_variables_are() {
    let file = |path: &str| Some(Source::File { file: path.into() });
    let template = Some(PathBuf::from("/t.fd"));
    let cases = [
        ("", None),
        (
            "<loader>/c.fd</loader><nvram>/v.fd</nvram>",
            Some((file("/v.fd"), None)),
        ),
        (
            "<nvram template='/t.fd' format='qcow2'>\n /v &amp;.fd\n</nvram>",
            Some((file("/v &.fd"), template.clone())),
        ),
        ("<nvram template='/t.fd'/>", Some((None, template.clone()))),
        (
            "<nvram type='file'><source file='/v.fd'/></nvram>",
            Some((file("/v.fd"), None)),
        ),
        (
            "<nvram type='block'><source dev='/dev/v'/></nvram>",
            Some((Some(Source::Block { dev: "/dev/v".into() }), None)),
        ),
        (
            "<varstore path='/v.json' template='/t.fd'/>",
            Some((file("/v.json"), template)),
        ),
    ];
    for (os, expected) in cases {
        let found = around(os, "").efi_variables().unwrap();
        let expected = expected.map(|(source, template)| EfiVariables { source, template });
        assert_eq!(found, expected, "{os}");
    }
    let error = around("<nvram>v.fd</nvram>", "").efi_variables().unwrap_err();
    assert_snapshot!(error, @"'v.fd': expected an absolute path (line 1, column 103, element nvram)");
}

#[test]
fn where_the_tpm_keeps_its_state() {
    let default = "/var/lib/libvirt/swtpm/5768a388-c1c4-414c-ac4e-eab216ba7c0c";
    let of = |name: &str| TpmPlace::Directory(format!("{default}/{name}").into());
    let emulated = |places: Vec<TpmPlace>, named| Some(Tpm::Emulated { places, named });
    let cases = [
        ("", None),
        (
            "<tpm><backend type='emulator' version='2.0'/></tpm>",
            emulated(vec![of("tpm2")], false),
        ),
        (
            "<tpm><backend type='emulator' version='1.2'/></tpm>",
            emulated(vec![of("tpm1.2")], false),
        ),
        (
            "<tpm><backend type='emulator'/></tpm>",
            emulated(vec![of("tpm2"), of("tpm1.2")], false),
        ),
        (
            "<tpm><backend type='emulator'><source type='dir' path='/d'/></backend></tpm>",
            emulated(vec![TpmPlace::Directory("/d".into())], true),
        ),
        (
            "<tpm><backend type='emulator'><source type='file' path='/f'/></backend></tpm>",
            emulated(vec![TpmPlace::File("/f".into())], true),
        ),
        (
            "<tpm><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>",
            Some(Tpm::Other {
                kind: "passthrough".to_owned(),
            }),
        ),
        (
            "<tpm model='spapr-tpm-proxy'><backend type='passthrough'/></tpm>\
             <tpm><backend type='emulator' version='2.0'/></tpm>",
            emulated(vec![of("tpm2")], false),
        ),
    ];
    for (devices, expected) in cases {
        assert_eq!(around("", devices).tpm().unwrap(), expected, "{devices}");
    }
    let nameless = "<domain><name>a</name><devices><tpm><backend type='emulator'/></tpm></devices></domain>";
    let found = DomainDocument::parse(nameless).unwrap().tpm().unwrap();
    assert_eq!(found, emulated(Vec::new(), false));
    let wrong = "<tpm><backend type='emulator'><source type='ftp' path='/d'/></backend></tpm>";
    assert_eq!(around("", wrong).tpm().unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn the_same_machine_again() {
    let document = DomainDocument::parse(ACTIVE).unwrap();
    let machine = RestoredAs {
        disks: vec![
            restored("vda", "/restored/vda.qcow2", "qcow2"),
            restored("sda", "/restored/sda.raw", "raw"),
        ],
        efi_variables: Some("/restored/nvram.fd".into()),
        ..RestoredAs::default()
    };
    let (again, warnings) = document.restored(&machine).unwrap();
    assert_snapshot!(changed(ACTIVE, again.text()), @"
    -      <ds:disk target='sda'>
    -        <ds:diskSnapshot method='qemu-fleece'>
    -          <ds:fleece file='/var/lib/fleece/sda.img'/>
    -        </ds:diskSnapshot>
    -      </ds:disk>
    -    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>/var/lib/libvirt/qemu/nvram/web-1_VARS.fd</nvram>
    +    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>/restored/nvram.fd</nvram>
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
    -        </backingStore>
    -      </backingStore>
    +      <source file='/restored/vda.qcow2'/>
    -    <disk type='block' device='disk'>
    +    <disk type='file' device='disk'>
    -      <source dev='/dev/vg0/web-1-data' index='2'/>
    -      <backingStore/>
    +      <source file='/restored/sda.raw'/>
    ");
    assert_eq!(warnings, [""; 0]);
    assert_eq!(again.restored(&machine).unwrap().0, again);
}

#[test]
fn a_second_machine() {
    let document = DomainDocument::parse(MACHINE).unwrap();
    let machine = RestoredAs {
        disks: vec![restored("vda", "/restored/vda.raw", "raw")],
        tpm: Some(TpmPlace::Directory("/restored/tpm".into())),
        name: Some("web & 2".to_owned()),
        uuid: Some(second()),
        ..RestoredAs::default()
    };
    let (clone, warnings) = document.restored(&machine).unwrap();
    assert_snapshot!(changed(MACHINE, clone.text()), @"
    -  <name>web-1</name>
    -  <uuid>5768a388-c1c4-414c-ac4e-eab216ba7c0c</uuid>
    -  <genid>43dc0cf8-809b-4adb-9bea-a9abb5f3d90e</genid>
    +  <name>web &amp; 2</name>
    +  <uuid>11112222-3333-4444-5555-666677778888</uuid>
    +  <genid/>
    -      <disksnap:monitor path='/run/web-1/qmp.sock'/>
    -      <disksnap:agent path='/run/web-1/agent.sock'/>
    -      <disksnap:disk target='vda'>
    -        <disksnap:diskSnapshot method='lvm'/>
    -      </disksnap:disk>
    -      <entry name='uuid'>5768a388-c1c4-414c-ac4e-eab216ba7c0c</entry>
    +      <entry name='uuid'>11112222-3333-4444-5555-666677778888</entry>
    -    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd' templateFormat='raw' type='file' format='qcow2'>
    -      <source file='/var/lib/libvirt/qemu/nvram/web-1_VARS.qcow2'/>
    +    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd' templateFormat='raw' format='qcow2'>
    -    <disk type='block' device='lun' rawio='yes'>
    -      <driver name='qemu' type='qcow2' discard_no_unref='on'>
    -        <metadata_cache>
    -          <max_size unit='bytes'>1048576</max_size>
    -        </metadata_cache>
    +    <disk type='file' device='disk'>
    +      <driver name='qemu' type='raw'>
    -      <source dev='/dev/vg0/web-1'>
    -        <encryption format='luks'>
    -          <secret type='passphrase' uuid='0a81f5b2-8403-7b23-c8d6-21ccc2f80d6f'/>
    -        </encryption>
    -      </source>
    +      <source file='/restored/vda.raw'/>
    -      <checkpoint name='monday'/>
    -      <diskSnapshot method='lvm'/>
    -      <checkpoint name='monday'/>
    -      <mac address='52:54:00:12:34:56'/>
    -      <mac address='52:54:00:12:34:57'/>
    -        <source type='dir' path='/srv/swtpm/web-1'/>
    +        <source type='dir' path='/restored/tpm'/>
    -    <blockexport type='nbd' port='8001'>
    -      <listen type='address' address='127.0.0.1'/>
    -      <disk name='virtio-disk0-backup'/>
    -    </blockexport>
    ");
    assert_snapshot!(warnings.join("\n"), @"
    the disk 'vda' was a SCSI unit passed through; as a file it is a plain disk
    the EFI variables were not restored: the guest's firmware begins with new ones
    the disk 'vdb' was not restored: it stays what it was, /dev/vg0/web-1-data, which both machines then use
    ");
    assert_eq!(clone.domain().id.name, "web & 2");
    assert_eq!(clone.domain().id.uuid, second());
}

#[test]
fn nothing_restored_changes_nothing_of_a_document_without_state() {
    let document = DomainDocument::parse(SOURCES).unwrap();
    let (same, warnings) = document.restored(&RestoredAs::default()).unwrap();
    assert_eq!(same, document);
    assert_eq!(warnings.len(), document.domain().disks.len());
}

#[test]
fn impossible_wishes_are_refused() {
    let document = DomainDocument::parse(ACTIVE).unwrap();
    let unknown = RestoredAs {
        disks: vec![restored("vdz", "/x", "raw")],
        ..RestoredAs::default()
    };
    assert_eq!(
        document.restored(&unknown).unwrap_err().kind(),
        ErrorKind::NotFound
    );
    for name in ["", "a/b", "a\nb", " a"] {
        let bad = RestoredAs {
            name: Some(name.to_owned()),
            ..RestoredAs::default()
        };
        assert_eq!(
            document.restored(&bad).unwrap_err().kind(),
            ErrorKind::Invalid,
            "{name:?}"
        );
    }
}

#[test]
fn restored_documents_pass_libvirts_schema() {
    let Some(schema) = Schema::find("domain.rng") else {
        return;
    };
    // What the schemas of the tests do not know yet stands in documents of its own.
    for sample in [ACTIVE, SOURCES] {
        let document = DomainDocument::parse(sample).unwrap();
        let all = &document.domain().disks;
        for format in ["raw", "qcow2"] {
            let disks = all
                .iter()
                .filter(|disk| disk.source.as_ref().is_some_and(|at| at.kind() != "dir"))
                .map(|disk| restored(&disk.target, &format!("/r/{}", disk.target), format));
            let machine = RestoredAs {
                disks: disks.collect(),
                efi_variables: Some("/r/nvram.fd".into()),
                name: Some("again".to_owned()),
                uuid: Some(second()),
                ..RestoredAs::default()
            };
            let (text, _) = document.restored(&machine).unwrap();
            schema.check(text.text()).unwrap();
        }
    }
}

#[test]
fn efi_variables_move_in_every_form() {
    let machine = RestoredAs {
        efi_variables: Some("/new.fd".into()),
        ..RestoredAs::default()
    };
    let without = RestoredAs {
        uuid: Some(second()),
        ..RestoredAs::default()
    };
    let cases = [
        (
            "<nvram template='/t'>/v.fd</nvram>",
            "<nvram template='/t'>/new.fd</nvram>",
            "<nvram template='/t'></nvram>",
        ),
        (
            "<nvram template=\"/t\"/>",
            "<nvram template=\"/t\">/new.fd</nvram>",
            "<nvram template=\"/t\"/>",
        ),
        (
            "<nvram type='file'><source file='/v.fd'/></nvram>",
            "<nvram type='file'><source file='/new.fd'/></nvram>",
            "<nvram></nvram>",
        ),
        (
            "<nvram type='block' format='raw'><source dev='/dev/v'/></nvram>",
            "<nvram type='file' format='raw'><source file='/new.fd'/></nvram>",
            "<nvram format='raw'></nvram>",
        ),
        (
            "<varstore template='/t' path='/v.json'/>",
            "<varstore template='/t' path='/new.fd'/>",
            "<varstore template='/t'/>",
        ),
    ];
    for (old, moved, gone) in cases {
        let document = around(old, "");
        let with = |new: &str| document.text().replace(old, new);
        let (found, warnings) = document.restored(&machine).unwrap();
        assert_eq!(found.text(), with(moved));
        assert_eq!(warnings, [""; 0]);
        let (found, warnings) = document.restored(&without).unwrap();
        let uuid = document.domain().id.uuid.to_string();
        assert_eq!(found.text(), with(gone).replace(&uuid, &second().to_string()));
        assert_eq!(warnings.len(), 1, "{warnings:?}");
    }
}

/// The lines that are gone and those that came, in order.
fn changed(old: &str, new: &str) -> String {
    let (old, new): (Vec<_>, Vec<_>) = (old.lines().collect(), new.lines().collect());
    let mut longest = vec![vec![0_u32; new.len() + 1]; old.len() + 1];
    for (i, a) in old.iter().enumerate().rev() {
        for (j, b) in new.iter().enumerate().rev() {
            longest[i][j] = if a == b {
                longest[i + 1][j + 1] + 1
            } else {
                longest[i + 1][j].max(longest[i][j + 1])
            };
        }
    }
    let (mut i, mut j, mut out) = (0, 0, Vec::new());
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            (i, j) = (i + 1, j + 1);
        } else if j == new.len() || i < old.len() && longest[i + 1][j] >= longest[i][j + 1] {
            out.push(format!("-{}", old[i]));
            i += 1;
        } else {
            out.push(format!("+{}", new[j]));
            j += 1;
        }
    }
    out.join("\n")
}
