//! Error texts, exactly: each names the place, the element and what was expected.

use disksnap_core::{Error, ErrorKind};
use disksnap_xml::{DomainDocument, export_request, snapshot_request};
use insta::assert_snapshot;

/// What the user reads: the line, and the next step where there is one.
fn shown(error: &Error) -> String {
    assert_eq!(error.kind(), ErrorKind::Invalid);
    match error.next_step() {
        Some(hint) => format!("{error}\n{hint}"),
        None => error.to_string(),
    }
}

fn domain(text: &str) -> String {
    shown(&DomainDocument::parse(text).unwrap_err())
}

/// A fault in a domain's one disk.
fn disk(content: &str) -> String {
    domain(&format!(
        "<domain>\n  <name>a</name>\n  <devices>\n    {content}\n  </devices>\n</domain>"
    ))
}

fn metadata(content: &str) -> String {
    domain(&format!(
        "<domain><name>a</name><metadata>\n<d:domain xmlns:d='urn:disksnap:domain:1'>{content}</d:domain></metadata></domain>"
    ))
}

fn snapshot(content: &str) -> String {
    shown(
        &snapshot_request(&format!(
            "<domainblocksnapshot>\n  {content}\n</domainblocksnapshot>"
        ))
        .unwrap_err(),
    )
}

fn export(attributes: &str, content: &str) -> String {
    let text = format!("<blockexport {attributes}>\n  {content}\n</blockexport>");
    shown(&export_request(&text).unwrap_err())
}

#[test]
fn text_that_is_not_well_formed() {
    assert_snapshot!(domain(""), @"");
    assert_snapshot!(domain("  \n"), @"");
    assert_snapshot!(domain("hello"), @"");
    assert_snapshot!(domain("<domain>\n  <name>a</nam>\n</domain>"), @"");
    assert_snapshot!(domain("<domain>\n  <devices>\n    <disk type='file'>\n"), @"");
    assert_snapshot!(domain("<domain>\n  <disk typ"), @"");
    assert_snapshot!(domain("<domain><name>a</name></domain><domain/>"), @"");
    assert_snapshot!(domain("<domain a='1' a='2'/>"), @"");
    assert_snapshot!(domain("<domain a=1/>"), @"");
    assert_snapshot!(domain("<domain a='<'/>"), @"");
    assert_snapshot!(domain("<domain><q:x/></domain>"), @"");
    assert_snapshot!(domain("<domain>\0</domain>"), @"");
    assert_snapshot!(domain("<domain><name>a & b</name></domain>"), @"");
}

#[test]
fn no_dtd_and_no_entities() {
    let laughs = "<?xml version='1.0'?>\n<!DOCTYPE lolz [<!ENTITY lol 'lol'>]>\n<domain>&lol;</domain>";
    assert_snapshot!(domain(laughs), @"");
    assert_snapshot!(domain("<!DOCTYPE domain SYSTEM 'file:///etc/passwd'><domain/>"), @"");
    assert_snapshot!(domain("<domain>\n<name>&xxe;</name></domain>"), @"");
}

#[test]
fn the_root_of_a_domain() {
    assert_snapshot!(domain("<?xml version='1.0'?>\n<domstatus><domain/></domstatus>"), @"");
    assert_snapshot!(domain("<domain type='kvm'/>"), @"");
    assert_snapshot!(domain("<domain><name> </name></domain>"), @"");
    assert_snapshot!(domain("<domain><name>a/b</name></domain>"), @"");
    assert_snapshot!(domain("<domain><name>a</name><name>b</name></domain>"), @"");
    assert_snapshot!(domain("<domain><name>a</name><uuid>12-34</uuid></domain>"), @"");
    let named = DomainDocument::parse_named("<domain/>", "vm.xml").unwrap_err();
    assert_snapshot!(named, @"");
}

#[test]
fn disks() {
    assert_snapshot!(disk("<disk/>"), @"");
    assert_snapshot!(disk("<disk><target bus='virtio'/></disk>"), @"");
    assert_snapshot!(disk("<disk><target dev=''/></disk>"), @"");
    assert_snapshot!(disk("<disk><target dev='../x'/></disk>"), @"");
    assert_snapshot!(disk("<disk><target dev='a'/></disk>\n    <disk><target dev='a'/></disk>"), @"");
    assert_snapshot!(disk("<disk device='disc'><target dev='a'/></disk>"), @"");
    assert_snapshot!(disk("<disk><source file='a.img'/><target dev='a'/></disk>"), @"");
    assert_snapshot!(disk("<disk><source/><source/><target dev='a'/></disk>"), @"");
    assert_snapshot!(disk("<disk type='network'><source name='x'/><target dev='a'/></disk>"), @"");
    assert_snapshot!(
        disk("<disk type='network'><source protocol='nbd'><host name='h' port='+1'/></source><target dev='a'/></disk>"), @"");
    assert_snapshot!(
        disk("<disk type='network'><source protocol='nbd'><host transport='udp'/></source><target dev='a'/></disk>"), @"");
    assert_snapshot!(disk("<disk type='volume'><source pool='p'/><target dev='a'/></disk>"), @"");
    assert_snapshot!(disk("<disk><target dev='a'/><backingStore type='file'/></disk>"), @"");
    assert_snapshot!(disk("<disk><target dev='a'/><diskSnapshot/></disk>"), @"");
    assert_snapshot!(disk("<disk><target dev='a'/><diskSnapshot method='m'>text</diskSnapshot></disk>"), @"");
    assert_snapshot!(
        disk("<disk><target dev='a'/><diskSnapshot method='m'><a.b/></diskSnapshot></disk>"), @"");
    assert_snapshot!(
        disk("<disk><target dev='a'/><diskSnapshot method='m'><b xmlns='urn:b'/></diskSnapshot></disk>"), @"");
}

#[test]
fn metadata_is_ours_and_so_strict() {
    assert_snapshot!(metadata("<d:moniter path='/m'/>"), @"");
    assert_snapshot!(metadata("<monitor path='/m'/>"), @"");
    assert_snapshot!(metadata("<d:monitor/>"), @"");
    assert_snapshot!(metadata("<d:monitor path='m'/>"), @"");
    assert_snapshot!(metadata("<d:agent pth='/m'/>"), @"");
    assert_snapshot!(metadata("<d:disk target='a'/><d:disk target='a'/>"), @"");
    assert_snapshot!(metadata("stray"), @"");
}

#[test]
fn snapshots() {
    assert_snapshot!(snapshot("<snapshots disk='a'/>"), @"");
    assert_snapshot!(snapshot("<snapshot/>"), @"");
    assert_snapshot!(snapshot("<snapshot disk='a'/>\n  <snapshot disk='a'/>"), @"");
    assert_snapshot!(snapshot("<snapshot disk='a' method='lvm'/>"), @"");
    assert_snapshot!(snapshot("<snapshot disk='a'><flece file='/f'/></snapshot>"), @"");
    assert_snapshot!(
        snapshot("<snapshot disk='a'>\n    <fleece file='/f'/>\n    <diskSnapshot method='m'/></snapshot>"), @"");
    assert_snapshot!(snapshot("<name>a/b</name>"), @"");
    assert_snapshot!(snapshot("<quiesce/>"), @"");
    assert_snapshot!(snapshot("<quiesce mode='maybe'/>"), @"");
    assert_snapshot!(shown(&snapshot_request("<domainsnapshot/>").unwrap_err()), @"");
}

#[test]
fn exports() {
    let local = "<listen type='address' address='127.0.0.1'/>";
    assert_snapshot!(export("", "<disk name='a'/>"), @"");
    assert_snapshot!(export("type='iscsi'", "<disk name='a'/>"), @"");
    assert_snapshot!(export("type='nbd' ports='1'", "<disk name='a'/>"), @"");
    assert_snapshot!(export("type='nbd' port='1'", "<disk name='a'/>"), @"");
    assert_snapshot!(export("type='nbd'", &format!("{local}<disk name='a'/>")), @"");
    assert_snapshot!(export("type='nbd' port='65536'", &format!("{local}<disk name='a'/>")), @"");
    assert_snapshot!(export("type='nbd' port='0'", &format!("{local}<disk name='a'/>")), @"");
    assert_snapshot!(export("type='nbd' port='1'", "<listen type='socket' socket='/s'/><disk name='a'/>"), @"");
    assert_snapshot!(export("type='nbd'", "<listen type='socket' socket='s'/><disk name='a'/>"), @"");
    assert_snapshot!(export("type='nbd' port='1'", "<listen type='address' address='localhost'/>"), @"");
    assert_snapshot!(export("type='nbd' port='1'", "<listen type='network' network='default'/>"), @"");
    assert_snapshot!(export("type='nbd' port='1'", local), @"");
    assert_snapshot!(export("type='nbd'", "<disk name='a'/><disk name='a'/>"), @"");
    assert_snapshot!(export("type='nbd'", "<disk/>"), @"");
    assert_snapshot!(export("type='nbd'", "<disk name='a'/><tls credentials='/c'/>"), @"");
    let verify = format!("{local}<tls credentials='/c' verify='maybe'/><disk name='a'/>");
    assert_snapshot!(export("type='nbd' port='1'", &verify), @"");
}

#[test]
fn a_checkpoint_in_an_export_is_not_supported_yet() {
    let text = "<blockexport type='nbd'>\n  <disk name='a' checkpoint='c'/>\n</blockexport>";
    let error = export_request(text).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_snapshot!(error, @"");
    assert_snapshot!(error.next_step().unwrap(), @"");
}

#[test]
fn the_context_is_there_for_programs() {
    let error = DomainDocument::parse("<domain>\n <name/></domain>").unwrap_err();
    let context: Vec<_> = error.context().collect();
    assert_eq!(context, [("line", "2"), ("column", "2"), ("element", "name")]);
}
