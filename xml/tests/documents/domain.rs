//! What is read from a `<domain>`.

use disksnap_core::{BackingStore, DeviceKind, Driver, NetworkHost, Options, Source};
use disksnap_xml::DomainDocument;

use crate::{ACTIVE, SOURCES};

fn file(path: &str) -> Source {
    Source::File { file: path.into() }
}

#[test]
fn an_active_domain() {
    let document = DomainDocument::parse(ACTIVE).unwrap();
    assert_eq!(document.text(), ACTIVE);
    let domain = document.domain();
    assert_eq!(domain.id.name, "web-1");
    assert_eq!(domain.id.uuid.to_string(), "5768a388-c1c4-414c-ac4e-eab216ba7c0c");
    assert_eq!(
        domain.sockets.monitor.as_deref(),
        Some("/run/disksnap/web-1.monitor".as_ref())
    );
    assert_eq!(
        domain.sockets.agent.as_deref(),
        Some("/run/disksnap/web-1.agent".as_ref())
    );
    let targets: Vec<_> = domain.disks.iter().map(|d| d.target.as_str()).collect();
    assert_eq!(targets, ["vda", "sda", "sdb"]);

    let vda = domain.disk("vda").unwrap();
    assert_eq!(vda.bus.as_deref(), Some("virtio"));
    assert_eq!(vda.alias.as_deref(), Some("virtio-disk0"));
    assert_eq!(vda.serial.as_deref(), Some("WEB1-ROOT"));
    assert_eq!(vda.driver.name.as_deref(), Some("qemu"));
    assert_eq!(vda.driver.format.as_deref(), Some("qcow2"));
    assert_eq!(
        vda.source,
        Some(file("/var/lib/libvirt/images/web-1.today.qcow2"))
    );
    let template = BackingStore {
        format: Some("raw".to_owned()),
        source: Source::Block {
            dev: "/dev/vg0/template".into(),
        },
        data_store: None,
        backing: None,
    };
    let below = BackingStore {
        format: Some("qcow2".to_owned()),
        source: file("/var/lib/libvirt/images/web-1.qcow2"),
        data_store: None,
        backing: Some(Box::new(template)),
    };
    assert_eq!(vda.backing, Some(below));
    assert_eq!(vda.method, None);

    let sda = domain.disk("sda").unwrap();
    assert_eq!(sda.backing, None);
    let method = sda.method.as_ref().expect("the metadata names one");
    assert_eq!(method.method, "qemu-fleece");
    assert_eq!(
        method.options,
        Options::from_iter([("fleece.file", "/var/lib/fleece/sda.img")])
    );

    let sdb = domain.disk("sdb").unwrap();
    assert_eq!(sdb.device, DeviceKind::Cdrom);
    assert!(sdb.read_only && sdb.source.is_none());
    assert!(document.warnings().is_empty());
}

#[test]
fn sources_of_every_type() {
    let document = DomainDocument::parse(SOURCES).unwrap();
    let of = |target: &str| document.domain().disk(target).unwrap().source.clone().unwrap();
    let tcp = |name: &str, port| NetworkHost::Tcp {
        name: name.to_owned(),
        port: Some(port),
    };
    let network = |protocol: &str, name: Option<&str>, hosts, tls| Source::Network {
        protocol: protocol.to_owned(),
        name: name.map(str::to_owned),
        hosts,
        tls,
    };
    let monitors = vec![tcp("mon1.example.org", 6321), tcp("2001:db8::1", 6322)];
    assert_eq!(of("vda"), network("rbd", Some("pool/image"), monitors, false));
    let server = vec![tcp("backup.example.org", 10809)];
    assert_eq!(of("vdb"), network("nbd", Some("export"), server, true));
    let socket = vec![NetworkHost::Unix {
        socket: "/run/nbd.sock".into(),
    }];
    assert_eq!(of("vdc"), network("nbd", None, socket, false));
    let volume = Source::Volume {
        pool: "default".to_owned(),
        volume: "data.img".to_owned(),
    };
    assert_eq!(of("vdd"), volume);
    assert_eq!(of("vde").kind(), "nvme");
    assert_eq!(of("vdf").kind(), "vhostuser");
    let dir = Source::Dir {
        dir: "/var/lib/floppy".into(),
    };
    assert_eq!(of("fda"), dir);
    assert_eq!(of("vdg"), file("/images/secret.qcow2"));
    let dev = Source::Block {
        dev: "/dev/disk/by-id/scsi-36001405".into(),
    };
    assert_eq!(of("sda"), dev);
    assert_eq!(of("hda"), file("/images/plain & \"odd'.img"));

    let disks = &document.domain().disks;
    let those = |pick: fn(&disksnap_core::Disk) -> bool| -> Vec<&str> {
        disks
            .iter()
            .filter(|d| pick(d))
            .map(|d| d.target.as_str())
            .collect()
    };
    assert_eq!(those(|d| d.encrypted), ["vdg"]);
    assert_eq!(those(|d| d.shareable), ["vdc"]);
    assert_eq!(those(|d| d.device == DeviceKind::Lun), ["sda"]);
    assert_eq!(those(|d| d.device == DeviceKind::Floppy), ["fda"]);
    assert_eq!(document.domain().disk("hda").unwrap().driver, Driver::default());
}

#[test]
fn a_secret_layer_below_makes_the_disk_encrypted() {
    let text = "<domain><name>a</name><devices><disk><source file='/o'/><backingStore type='file'>\
        <format type='qcow2'/><source file='/b'><encryption format='luks'/></source></backingStore>\
        <target dev='vda'/></disk></devices></domain>";
    assert!(DomainDocument::parse(text).unwrap().domain().disks[0].encrypted);
}

#[test]
fn without_a_uuid_the_same_name_is_the_same_domain() {
    let id = |text: &str| DomainDocument::parse(text).unwrap().domain().id.clone();
    let first = id("<domain><name>a</name></domain>");
    assert_eq!(first, id("<domain>\n<name>\n a </name><devices/></domain>"));
    assert_ne!(first.uuid, id("<domain><name>b</name></domain>").uuid);
    let dashed = id("<domain><name>a</name><uuid>{}</uuid></domain>"
        .replace("{}", "5768a388c1c4-414cac4e-eab216ba7c0c")
        .as_str());
    assert_eq!(dashed.uuid.to_string(), "5768a388-c1c4-414c-ac4e-eab216ba7c0c");
}

const TWO_METHODS: &str = "<domain>
  <name>a</name>
  <metadata>
    <domain xmlns='urn:disksnap:domain:1'>
      <disk target='vda'><diskSnapshot method='from-metadata'><x y='1'/></diskSnapshot></disk>
      <disk target='vdx'><diskSnapshot method='lvm'/></disk>
    </domain>
  </metadata>
  <devices>
    <disk><target dev='vda'/>OWN</disk>
  </devices>
</domain>";

#[test]
fn the_disks_own_method_wins_and_a_stray_one_is_told() {
    let method = |text: &str| {
        let document = DomainDocument::parse(text).unwrap();
        assert_eq!(
            document.warnings(),
            ["<metadata> names the method 'lvm' for the disk 'vdx', which the domain does not have"]
        );
        document.domain().disks[0].method.clone().unwrap()
    };
    let from_metadata = method(&TWO_METHODS.replace("OWN", ""));
    assert_eq!(from_metadata.method, "from-metadata");
    assert_eq!(from_metadata.options.get("x.y"), Some("1"));
    let own = "<diskSnapshot method='own'><volume pool='p'><id> 7 </id><thin/></volume></diskSnapshot>";
    let own = method(&TWO_METHODS.replace("OWN", own));
    assert_eq!(own.method, "own");
    let options = [("volume.pool", "p"), ("volume.id", "7"), ("volume.thin", "")];
    assert_eq!(own.options, Options::from_iter(options));
}

#[test]
fn only_the_namespace_counts_not_its_prefix() {
    // The same local names in another namespace, or in none, are somebody else's.
    for foreign in ["urn:other", ""] {
        let text = format!(
            "<domain><name>a</name><metadata><domain xmlns='{foreign}'><monitor path='/m'/></domain>\
             </metadata><devices><o:disk xmlns:o='urn:o'/></devices></domain>"
        );
        let document = DomainDocument::parse(text).unwrap();
        assert_eq!(document.domain().sockets.monitor, None);
        assert!(document.domain().disks.is_empty());
    }
    // A default namespace makes even <name> foreign.
    let error = DomainDocument::parse("<domain xmlns='urn:x'><name>a</name></domain>").unwrap_err();
    assert_eq!(
        error.message(),
        "expected a document whose root is <domain>, found <domain> in the namespace 'urn:x'"
    );
}

#[test]
fn bytes_that_are_no_text_are_refused_where_they_begin() {
    let error = disksnap_xml::text_of(b"<a>\n <b\xff/></a>".to_vec()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the document is not UTF-8: expected UTF-8, whatever its XML declaration says (line 2, column 4)"
    );
    let error = disksnap_xml::text_of(vec![b' '; disksnap_xml::MAX_BYTES + 1]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the document has more than 4194304 bytes (bytes 4194305)"
    );
    assert_eq!(disksnap_xml::text_of(b"<a/>".to_vec()).unwrap(), "<a/>");
}
