//! What is written of disks passes libvirt's own schema.
//!
//! `DISKSNAP_LIBVIRT_SCHEMAS` names the directory with `domain.rng`; otherwise it is looked for where
//! libvirt installs it. `xmllint` checks.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use disksnap_core::{BackingStore, Disk, Driver, NetworkHost, Source};
use disksnap_xml::{DomainDocument, Element, disk_element, new_disk_element};

use crate::{ACTIVE, SOURCES};

/// One of libvirt's schemas.
pub(crate) struct Schema {
    xmllint: PathBuf,
    schema: PathBuf,
}

impl Schema {
    /// The schema, or `None` after saying why not; a panic where `REQUIRE` lists `libvirt-schemas`.
    #[expect(clippy::print_stderr, reason = "this is the report of a skipped test")]
    pub(crate) fn find(name: &str) -> Option<Self> {
        let named = std::env::var_os("DISKSNAP_LIBVIRT_SCHEMAS").map(PathBuf::from);
        let installed = PathBuf::from("/usr/share/libvirt/schemas");
        let schema = named.unwrap_or(installed).join(name);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let xmllint = std::env::split_paths(&path)
            .map(|dir| dir.join("xmllint"))
            .find(|p| p.is_file());
        let why = match xmllint {
            Some(xmllint) if schema.is_file() => return Some(Self { xmllint, schema }),
            Some(_) => format!("there is no {}", schema.display()),
            None => "the program xmllint is not installed".to_owned(),
        };
        let required = std::env::var("REQUIRE").unwrap_or_default();
        let listed = required
            .split(',')
            .map(str::trim)
            .any(|x| x == "all" || x == "libvirt-schemas");
        assert!(
            !listed,
            "REQUIRE lists libvirt-schemas, but this test cannot run here: {why}"
        );
        eprintln!("SKIPPED: libvirt-schemas: {why}");
        None
    }

    pub(crate) fn check(&self, text: &str) -> Result<(), String> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("document.xml");
        std::fs::write(&file, text).unwrap();
        let output = Command::new(&self.xmllint)
            .args(["--noout", "--nonet", "--relaxng"])
            .args([&self.schema, &file])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        if output.status.success() {
            return Ok(());
        }
        Err(format!("{text}\n{}", String::from_utf8_lossy(&output.stderr)))
    }
}

/// A domain with these disks alone, as little as the schema allows.
fn around(disks: &str) -> String {
    format!(
        "<domain type='kvm'><name>a</name><memory>1024</memory><os><type>hvm</type></os>\
         <devices>{disks}</devices></domain>"
    )
}

#[test]
fn the_schema_can_tell_right_from_wrong() {
    let Some(schema) = Schema::find("domain.rng") else {
        return;
    };
    schema.check(ACTIVE).unwrap();
    schema.check(SOURCES).unwrap();
    schema
        .check(&around(
            "<disk><source file='relative'/><target dev='vda'/></disk>",
        ))
        .unwrap_err();
}

fn sources() -> Vec<Source> {
    let network = |protocol: &str, name: Option<&str>, host, tls| Source::Network {
        protocol: protocol.to_owned(),
        name: name.map(str::to_owned),
        hosts: vec![host],
        tls,
    };
    let tcp = |name: &str| NetworkHost::Tcp {
        name: name.to_owned(),
        port: Some(10809),
    };
    vec![
        Source::File {
            file: "/images/a & b.qcow2".into(),
        },
        Source::Block {
            dev: "/dev/vg/lv".into(),
        },
        Source::Volume {
            pool: "default".to_owned(),
            volume: "v.img".to_owned(),
        },
        network("nbd", Some("x"), tcp("backup.example.org"), true),
        network("nbd", None, tcp("::1"), false),
        network(
            "nbd",
            Some("x"),
            NetworkHost::Unix {
                socket: "/run/nbd.sock".into(),
            },
            false,
        ),
        network("rbd", Some("pool/image"), tcp("mon.example.org"), false),
    ]
}

#[test]
fn a_disk_written_anew() {
    let Some(schema) = Schema::find("domain.rng") else {
        return;
    };
    let formats = [Some("qcow2"), Some("raw"), None];
    for source in sources() {
        for format in formats {
            let below = BackingStore {
                format: format.map(str::to_owned),
                source: source.clone(),
                data_store: None,
                backing: None,
            };
            let disk = Disk {
                bus: Some("virtio".to_owned()),
                alias: Some("virtio-disk0".to_owned()),
                serial: Some("ABC-1".to_owned()),
                read_only: true,
                shareable: true,
                driver: Driver {
                    name: Some("qemu".to_owned()),
                    format: Some("qcow2".to_owned()),
                },
                backing: Some(BackingStore {
                    format: Some("qcow2".to_owned()),
                    source: source.clone(),
                    data_store: None,
                    backing: Some(Box::new(below)),
                }),
                ..Disk::new("vda", source.clone())
            };
            let element = new_disk_element(&disk).unwrap();
            schema.check(&around(&element.to_document().unwrap())).unwrap();
        }
    }
    let empty = Disk {
        source: None,
        ..Disk::new("vda", sources()[0].clone())
    };
    let devices = Element::new("devices").child(new_disk_element(&empty).unwrap());
    let text = around("").replace("<devices></devices>", &devices.to_document().unwrap());
    schema.check(&text).unwrap();
}

#[test]
fn every_disk_moved_to_every_source() {
    let Some(schema) = Schema::find("domain.rng") else {
        return;
    };
    for sample in [ACTIVE, SOURCES] {
        let document = DomainDocument::parse(sample).unwrap();
        for disk in &document.domain().disks {
            let kept = disk_element(&document, &disk.target, disk).unwrap();
            schema.check(&around(&kept)).unwrap();
            for source in sources() {
                // libvirt knows no SCSI unit in a file, no FAT disk but a directory, no network encryption here.
                let fits = match disk.target.as_str() {
                    "sda" if sample == SOURCES => !matches!(source, Source::File { .. }),
                    "fda" | "vda" => source.kind() == "file",
                    _ => true,
                };
                if !fits {
                    continue;
                }
                let mut new = disk.clone();
                new.backing = disk.source.clone().map(|source| BackingStore {
                    format: Some("qcow2".to_owned()),
                    source,
                    data_store: None,
                    backing: disk.backing.clone().map(Box::new),
                });
                new.source = Some(source);
                let element = disk_element(&document, &disk.target, &new).unwrap();
                schema.check(&around(&element)).unwrap();
            }
        }
    }
}
