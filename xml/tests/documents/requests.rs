//! `<domainblocksnapshot>` and `<blockexport>` as requests.

use disksnap_core::{DiskChoice, Disks, Listen, Options, Quiesce, Tls};
use disksnap_xml::{export_request, snapshot_request};

#[test]
fn the_rfcs_minimal_snapshot() {
    let request = snapshot_request(
        r#"<domainblocksnapshot>
  <snapshot disk='sda'>
    <fleece file="/path/to/fleece-image-sda"/>
  </snapshot>
  <snapshot disk='sdb'>
    <fleece file="/path/to/fleece-image-sdb" way="classic"/>
  </snapshot>
</domainblocksnapshot>"#,
    )
    .unwrap();
    assert_eq!(request.name, None);
    assert_eq!(request.quiesce, Quiesce::None);
    let Disks::Named(disks) = request.disks else {
        panic!("two are named");
    };
    assert_eq!(disks[0].target, "sda");
    let method = disks[0].method.as_ref().unwrap();
    assert_eq!(method.method, "qemu-fleece");
    let file = [("fleece.file", "/path/to/fleece-image-sda")];
    assert_eq!(method.options, Options::from_iter(file));
    let options = &disks[1].method.as_ref().unwrap().options;
    assert_eq!(options.get("fleece.way"), Some("classic"));
    assert!(disks[1].options.is_empty());
}

#[test]
fn names_methods_and_quiesce() {
    let request = snapshot_request(
        "<domainblocksnapshot><name> nightly </name><quiesce mode='require'/><snapshot disk='vda'/>\
         <snapshot disk='vdb'><diskSnapshot method='lvm'><device path='/dev/vg/lv4'/></diskSnapshot></snapshot>\
         <snapshot disk='vdc'><fleece/></snapshot></domainblocksnapshot>",
    )
    .unwrap();
    assert_eq!(request.name.unwrap().as_str(), "nightly");
    assert_eq!(request.quiesce, Quiesce::Require);
    let Disks::Named(disks) = request.disks else {
        panic!("three are named");
    };
    assert_eq!(disks[0], DiskChoice::new("vda"));
    let lvm = disks[1].method.as_ref().unwrap();
    assert_eq!(
        (lvm.method.as_str(), lvm.options.get("device.path")),
        ("lvm", Some("/dev/vg/lv4"))
    );
    let fleece = disks[2].method.as_ref().unwrap();
    assert_eq!(fleece.method, "qemu-fleece");
    assert!(fleece.options.is_empty());
}

#[test]
fn no_disk_is_all_writable_disks_and_ids_are_fresh() {
    let first = snapshot_request("<domainblocksnapshot/>").unwrap();
    assert_eq!(first.disks, Disks::Writable);
    assert_ne!(first.id, snapshot_request("<domainblocksnapshot/>").unwrap().id);
}

#[test]
fn the_rfcs_export() {
    let request = export_request(
        r#"<blockexport type="nbd" port="8001">
  <listen type="address" address="10.0.2.10"/>
  <disk name="scsi0-0-0-1-backup"/>
</blockexport>"#,
    )
    .unwrap();
    assert_eq!(request.listen, Some("10.0.2.10:8001".parse().unwrap()));
    assert_eq!((request.tls, request.allow_remote), (None, false));
    assert_eq!(request.disks.len(), 1);
    assert_eq!(request.disks[0].alias.0, "scsi0-0-0-1-backup");
    assert_eq!(request.disks[0].name, None);
}

#[test]
fn sockets_export_names_and_tls() {
    let request = export_request(
        "<blockexport type='nbd'><listen type='socket' socket='/run/n b.sock'/>\
         <disk name='a' exportname='root disk'/><disk name='b'/></blockexport>",
    )
    .unwrap();
    assert_eq!(request.listen, Some(Listen::Unix("/run/n b.sock".into())));
    assert_eq!(request.disks[0].name.as_deref(), Some("root disk"));
    let tls = |verify: &str, clients: &str| {
        let text = format!(
            "<blockexport type='nbd' port='10809'><listen type='address' address='::'/>\
             <tls credentials='/etc/pki/qemu' {verify}>{clients}</tls><disk name='a'/></blockexport>"
        );
        export_request(&text).unwrap().tls.unwrap()
    };
    let expected = |verify_client| Tls {
        credentials: "/etc/pki/qemu".into(),
        verify_client,
        allowed: Vec::new(),
    };
    assert_eq!(tls("", ""), expected(true));
    assert_eq!(tls("verify='yes'", ""), expected(true));
    assert_eq!(tls("verify='no'", ""), expected(false));
    let only = tls("", "<client name='O=A &amp; B,CN=backup'/><client name='CN=x'/>").allowed;
    let only: Vec<String> = only.iter().map(ToString::to_string).collect();
    assert_eq!(only, ["O=A & B,CN=backup", "CN=x"]);
    let nowhere = export_request("<blockexport type='nbd'><disk name='a'/></blockexport>").unwrap();
    assert_eq!(nowhere.listen, None);
}
