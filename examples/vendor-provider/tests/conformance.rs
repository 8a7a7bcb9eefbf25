//! ACME's provider keeps disksnap's contract, and is found by its name in a domain's XML.

use std::path::Path;
use std::sync::Arc;

use acme_disksnap::AcmeCopy;
use disksnap_conformance::{InactiveConnector, MemoryCatalog, RawFiles, assert_conforms};
use disksnap_core::{Capability, Dispatcher, Options, Registry, SnapshotRequest, Why};
use disksnap_xml::DomainDocument;

/// The suite's own fixture makes raw files in a directory. To ACME that is an array, and each a volume.
#[test]
fn conforms() {
    let parent = tempfile::tempdir().unwrap();
    let capabilities = [
        Capability::Active,
        Capability::Inactive,
        Capability::DirectRead,
        Capability::GuestSafe,
    ];
    let fixture = RawFiles::new(parent.path(), capabilities, || Arc::new(AcmeCopy)).with_options(volume);
    assert_conforms(fixture);
}

/// How a caller names the volume that is this file.
fn volume(image: &Path) -> Options {
    let array = image.parent().unwrap().display().to_string();
    let id = image.file_name().unwrap().to_string_lossy().into_owned();
    [("volume.array", array), ("volume.id", id)].into_iter().collect()
}

/// Nothing here names the provider: linking the crate registers it, and the XML chooses it.
#[tokio::test]
async fn is_chosen_by_a_domains_xml() {
    let array = tempfile::tempdir().unwrap();
    let file = array.path().join("vol-7");
    std::fs::write(&file, vec![7; 4096]).unwrap();
    let xml = format!(
        "<domain type='kvm'><name>vm</name><devices><disk type='file' device='disk'>
           <driver name='qemu' type='raw'/><source file='{file}'/><target dev='vda'/>
           <diskSnapshot method='acme-copy'><volume array='{array}'><id>vol-7</id></volume></diskSnapshot>
         </disk></devices></domain>",
        file = file.display(),
        array = array.path().display()
    );
    let domain = DomainDocument::parse(xml).unwrap().domain().clone();
    let dispatcher = Dispatcher::new(
        Registry::linked().unwrap(),
        Arc::new(MemoryCatalog::new()),
        Arc::new(InactiveConnector::new(array.path())),
    );
    let request = SnapshotRequest::default();
    let snapshot = dispatcher.create(&domain, &request).await.unwrap();
    assert_eq!(snapshot.disks[0].method, "acme-copy");
    assert_eq!(snapshot.disks[0].why, Why::Disk);
    std::fs::write(&file, vec![8; 4096]).unwrap();
    let opened = dispatcher.open(&domain, &snapshot.name, "vda").await.unwrap();
    assert_eq!(
        std::fs::read(opened.source.path().unwrap()).unwrap(),
        vec![7; 4096]
    );
    dispatcher.delete(&domain, &snapshot.name).await.unwrap();
    assert_eq!(
        std::fs::read_dir(array.path()).unwrap().count(),
        1,
        "the volume alone is left"
    );
}
