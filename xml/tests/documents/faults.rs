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
    assert_snapshot!(domain(""), @"the document is empty: expected an element (line 1, column 1)");
    assert_snapshot!(domain("  \n"), @"the document is empty: expected an element (line 1, column 1)");
    assert_snapshot!(domain("hello"), @"expected one root element, and nothing else beside it (line 1, column 1)");
    assert_snapshot!(domain("<domain>\n  <name>a</nam>\n</domain>"), @"expected </name>, found </nam> (line 2, column 10, element name)");
    assert_snapshot!(domain("<domain>\n  <devices>\n    <disk type='file'>\n"), @"the document ends inside <disk>, which was opened in line 3 (line 3, column 23, element disk)");
    assert_snapshot!(domain("<domain>\n  <disk typ"), @"the document ends in the middle of a tag (line 2, column 12, element domain)");
    assert_snapshot!(domain("<domain><name>a</name></domain><domain/>"), @"expected one root element, and nothing else beside it (line 1, column 32, element domain)");
    assert_snapshot!(domain("<domain a='1' a='2'/>"), @"the attribute 'a' is given twice (line 1, column 15, element domain)");
    assert_snapshot!(domain("<domain a=1/>"), @"malformed XML: expected a quote not '1' (line 1, column 11, element domain)");
    assert_snapshot!(domain("<domain a='<'/>"), @"a '<' in an attribute's value: write &lt; (line 1, column 12, element domain)");
    assert_snapshot!(domain("<domain><q:x/></domain>"), @"the namespace prefix 'q' is not declared: expected xmlns:q='…' (line 1, column 10, element q:x)");
    assert_snapshot!(domain("<domain>\0</domain>"), @r"malformed XML: a non-XML character '\0' found (line 1, column 9, element domain)");
    assert_snapshot!(domain("<domain><name>a & b</name></domain>"), @"a '&' that begins no entity: only &amp; &lt; &gt; &quot; &apos; and numbers such as &#10; are read (line 1, column 17, element name)");
}

#[test]
fn no_dtd_and_no_entities() {
    let laughs = "<?xml version='1.0'?>\n<!DOCTYPE lolz [<!ENTITY lol 'lol'>]>\n<domain>&lol;</domain>";
    assert_snapshot!(domain(laughs), @"a document type declaration (<!DOCTYPE …>) is not accepted (line 2, column 1)");
    assert_snapshot!(domain("<!DOCTYPE domain SYSTEM 'file:///etc/passwd'><domain/>"), @"a document type declaration (<!DOCTYPE …>) is not accepted (line 1, column 1)");
    assert_snapshot!(domain("<domain>\n<name>&xxe;</name></domain>"), @"unknown entity '&xxe;': only &amp; &lt; &gt; &quot; &apos; and numbers such as &#10; are read (line 2, column 7, element name)");
}

#[test]
fn the_root_of_a_domain() {
    assert_snapshot!(domain("<?xml version='1.0'?>\n<domstatus><domain/></domstatus>"), @"expected a document whose root is <domain>, found <domstatus> (line 2, column 1, element domstatus)");
    assert_snapshot!(domain("<domain type='kvm'/>"), @"<domain> lacks its <name>: expected <name>…</name> (line 1, column 1, element domain)");
    assert_snapshot!(domain("<domain><name> </name></domain>"), @"the domain's name is empty: expected one (line 1, column 9, element name)");
    assert_snapshot!(domain("<domain><name>a/b</name></domain>"), @"the domain's name has a '/' or a control character: expected one without (line 1, column 9, element name)");
    assert_snapshot!(domain("<domain><name>a</name><name>b</name></domain>"), @"<name> comes twice in <domain>: expected one (line 1, column 23, element name)");
    assert_snapshot!(domain("<domain><name>a</name><uuid>12-34</uuid></domain>"), @"'12-34' is no UUID: expected 32 hexadecimal digits (line 1, column 23, element uuid)");
    let named = DomainDocument::parse_named("<domain/>", "vm.xml").unwrap_err();
    assert_snapshot!(named, @"<domain> lacks its <name>: expected <name>…</name> (line 1, column 1, element domain, document vm.xml)");
}

#[test]
fn disks() {
    assert_snapshot!(disk("<disk/>"), @"<disk> lacks its <target>: expected <target dev='vda'/>, the disk's name in the guest (line 4, column 5, element disk)");
    assert_snapshot!(disk("<disk><target bus='virtio'/></disk>"), @"<target> lacks the attribute 'dev': expected dev='…', the disk's name in the guest, such as vda (line 4, column 11, element target)");
    assert_snapshot!(disk("<disk><target dev=''/></disk>"), @"the attribute 'dev' is empty: expected the disk's name in the guest, such as vda (line 4, column 19, element target)");
    assert_snapshot!(disk("<disk><target dev='../x'/></disk>"), @"dev='../x' cannot be a disk's name: expected up to 64 letters, digits, '_', '-', '.' or ':' (line 4, column 19, element target)");
    assert_snapshot!(disk("<disk><target dev='a'/></disk>\n    <disk><target dev='a'/></disk>"), @"two disks have the target 'a': expected one (line 5, column 19, element target)");
    assert_snapshot!(disk("<disk device='disc'><target dev='a'/></disk>"), @"device='disc' is not known: expected 'disk', 'cdrom', 'floppy' or 'lun' (line 4, column 11, element disk)");
    assert_snapshot!(disk("<disk><source file='a.img'/><target dev='a'/></disk>"), @"file='a.img': expected an absolute path (line 4, column 19, element source)");
    assert_snapshot!(disk("<disk><source/><source/><target dev='a'/></disk>"), @"<source> comes twice in <disk>: expected one (line 4, column 20, element source)");
    assert_snapshot!(disk("<disk type='network'><source name='x'/><target dev='a'/></disk>"), @"<source> lacks the attribute 'protocol': expected protocol='…', such as nbd, rbd or iscsi (line 4, column 26, element source)");
    assert_snapshot!(
        disk("<disk type='network'><source protocol='nbd'><host name='h' port='+1'/></source><target dev='a'/></disk>"), @"port='+1': expected a number from 1 to 65535 (line 4, column 64, element host)");
    assert_snapshot!(
        disk("<disk type='network'><source protocol='nbd'><host transport='udp'/></source><target dev='a'/></disk>"), @"transport='udp' is not known: expected 'tcp', 'rdma' or 'unix' (line 4, column 55, element host)");
    assert_snapshot!(disk("<disk type='volume'><source pool='p'/><target dev='a'/></disk>"), @"<source> lacks the attribute 'volume': expected volume='…', the name of a volume in the pool (line 4, column 25, element source)");
    assert_snapshot!(disk("<disk><target dev='a'/><backingStore type='file'/></disk>"), @"<backingStore> lacks its <source>: expected one, or <backingStore/> (line 4, column 28, element backingStore)");
    assert_snapshot!(disk("<disk><target dev='a'/><diskSnapshot/></disk>"), @"<diskSnapshot> lacks the attribute 'method': expected method='…', the name of a snapshot method (line 4, column 28, element diskSnapshot)");
    assert_snapshot!(disk("<disk><target dev='a'/><diskSnapshot method='m'>text</diskSnapshot></disk>"), @"text directly inside <diskSnapshot>: expected elements (line 4, column 28, element diskSnapshot)");
    assert_snapshot!(
        disk("<disk><target dev='a'/><diskSnapshot method='m'><a.b/></diskSnapshot></disk>"), @"<a.b> cannot be an option: expected a name without a dot and of no other namespace (line 4, column 53, element a.b)");
    assert_snapshot!(
        disk("<disk><target dev='a'/><diskSnapshot method='m'><b xmlns='urn:b'/></diskSnapshot></disk>"), @"<b> cannot be an option: expected a name without a dot and of no other namespace (line 4, column 53, element b)");
}

#[test]
fn metadata_is_ours_and_so_strict() {
    assert_snapshot!(metadata("<d:moniter path='/m'/>"), @"
    unknown element <moniter> in <domain>: expected <monitor>, <agent> or <disk> (line 2, column 43, element moniter)
    Did you mean <monitor>?
    ");
    assert_snapshot!(metadata("<monitor path='/m'/>"), @"<monitor> outside the namespace 'urn:disksnap:domain:1' in <domain>: expected <monitor>, <agent> or <disk> (line 2, column 43, element monitor)");
    assert_snapshot!(metadata("<d:monitor/>"), @"<monitor> lacks the attribute 'path': expected path='…', an absolute path (line 2, column 43, element monitor)");
    assert_snapshot!(metadata("<d:monitor path='m'/>"), @"path='m': expected an absolute path (line 2, column 54, element monitor)");
    assert_snapshot!(metadata("<d:agent pth='/m'/>"), @"
    <agent> has no attribute 'pth': expected 'path' (line 2, column 52, element agent)
    Did you mean 'path'?
    ");
    assert_snapshot!(metadata("<d:disk target='a'/><d:disk target='a'/>"), @"the disk 'a' comes twice: expected it once (line 2, column 71, element disk)");
    assert_snapshot!(metadata("stray"), @"text directly inside <domain>: expected <monitor>, <agent> or <disk> (line 2, column 43, element domain)");
}

#[test]
fn snapshots() {
    assert_snapshot!(snapshot("<snapshots disk='a'/>"), @"
    unknown element <snapshots> in <domainblocksnapshot>: expected <name>, <snapshot>, <quiesce> or <checkpoint> (line 2, column 3, element snapshots)
    Did you mean <snapshot>?
    ");
    assert_snapshot!(snapshot("<snapshot/>"), @"<snapshot> lacks the attribute 'disk': expected disk='…', the disk's name in the guest, such as vda (line 2, column 3, element snapshot)");
    assert_snapshot!(snapshot("<snapshot disk='a'/>\n  <snapshot disk='a'/>"), @"the disk 'a' comes twice: expected it once (line 3, column 13, element snapshot)");
    assert_snapshot!(snapshot("<snapshot disk='a' method='lvm'/>"), @"<snapshot> has no attribute 'method': expected 'disk' (line 2, column 22, element snapshot)");
    assert_snapshot!(snapshot("<snapshot disk='a'><flece file='/f'/></snapshot>"), @"
    unknown element <flece> in <snapshot>: expected <fleece> or <diskSnapshot> (line 2, column 22, element flece)
    Did you mean <fleece>?
    ");
    assert_snapshot!(
        snapshot("<snapshot disk='a'>\n    <fleece file='/f'/>\n    <diskSnapshot method='m'/></snapshot>"), @"<diskSnapshot> beside <fleece>: expected one of them, since each names the method (line 4, column 5, element diskSnapshot)");
    assert_snapshot!(snapshot("<name>a/b</name>"), @r#"
    the snapshot name "a/b" has a '/' (line 2, column 3, element name)
    Names have 1 to 128 characters, no control characters, no '/', and do not start with '-' or '.'.
    "#);
    assert_snapshot!(snapshot("<name>a<b/></name>"), @"<b> in <name>: expected text alone (line 2, column 10, element b)");
    assert_snapshot!(snapshot("<quiesce/>"), @"<quiesce> lacks the attribute 'mode': expected mode='…', 'none', 'try' or 'require' (line 2, column 3, element quiesce)");
    assert_snapshot!(snapshot("<quiesce mode='maybe'/>"), @"mode='maybe' is not known: expected 'none', 'try' or 'require' (line 2, column 12, element quiesce)");
    assert_snapshot!(shown(&snapshot_request("<domainsnapshot/>").unwrap_err()), @"expected a document whose root is <domainblocksnapshot>, found <domainsnapshot> (line 1, column 1, element domainsnapshot)");
}

#[test]
fn exports() {
    let local = "<listen type='address' address='127.0.0.1'/>";
    assert_snapshot!(export("", "<disk name='a'/>"), @"<blockexport> lacks the attribute 'type': expected type='…', the protocol 'nbd' (line 1, column 1, element blockexport)");
    assert_snapshot!(export("type='iscsi'", "<disk name='a'/>"), @"type='iscsi' is not known: expected 'nbd' (line 1, column 14, element blockexport)");
    assert_snapshot!(export("type='nbd' ports='1'", "<disk name='a'/>"), @"
    <blockexport> has no attribute 'ports': expected 'type' or 'port' (line 1, column 25, element blockexport)
    Did you mean 'port'?
    ");
    assert_snapshot!(export("type='nbd' port='1'", "<disk name='a'/>"), @"a port without an address: expected <listen type='address' address='127.0.0.1'/> with it (line 1, column 25, element blockexport)");
    assert_snapshot!(export("type='nbd'", &format!("{local}<disk name='a'/>")), @"<blockexport> lacks the attribute 'port': expected port='…', a number from 1 to 65535 (line 1, column 1, element blockexport)");
    assert_snapshot!(export("type='nbd' port='65536'", &format!("{local}<disk name='a'/>")), @"port='65536': expected a number from 1 to 65535 (line 1, column 25, element blockexport)");
    assert_snapshot!(export("type='nbd' port='0'", &format!("{local}<disk name='a'/>")), @"port='0': expected a number from 1 to 65535 (line 1, column 25, element blockexport)");
    assert_snapshot!(export("type='nbd' port='1'", "<listen type='socket' socket='/s'/><disk name='a'/>"), @"a unix socket has no port: expected none with <listen type='socket'> (line 1, column 25, element blockexport)");
    assert_snapshot!(export("type='nbd'", "<listen type='socket' socket='s'/><disk name='a'/>"), @"socket='s': expected an absolute path (line 2, column 25, element listen)");
    assert_snapshot!(export("type='nbd' port='1'", "<listen type='address' address='localhost'/>"), @"address='localhost': expected an IP address, such as 127.0.0.1 or ::1 (line 2, column 26, element listen)");
    assert_snapshot!(export("type='nbd' port='1'", "<listen type='network' network='default'/>"), @"type='network' is not known: expected 'address' or 'socket' (line 2, column 11, element listen)");
    assert_snapshot!(export("type='nbd' port='1'", local), @"<blockexport> lacks its <disk>: expected <disk name='…'/> with the alias of a disk in a snapshot (line 1, column 1, element blockexport)");
    assert_snapshot!(export("type='nbd'", "<disk name='a'/><disk name='a'/>"), @"the disk 'a' comes twice: expected it once (line 2, column 25, element disk)");
    assert_snapshot!(export("type='nbd'", "<disk/>"), @"<disk> lacks the attribute 'name': expected name='…', the alias of a disk in a snapshot (line 2, column 3, element disk)");
    assert_snapshot!(export("type='nbd'", "<disk name='a'/><tls credentials='/c'/>"), @"<tls> without a TCP address: expected <listen type='address' …/> with it (line 2, column 19, element tls)");
    let verify = format!("{local}<tls credentials='/c' verify='maybe'/><disk name='a'/>");
    let clients = |verify: &str, client: &str| {
        let text = format!("{local}<tls credentials='/c' {verify}><client {client}/></tls><disk name='a'/>");
        export("type='nbd' port='1'", &text)
    };
    assert_snapshot!(clients("verify='no'", "name='CN=x'"), @"<client> with verify='no': expected verify='yes', since only a verified client has a name (line 2, column 69, element tls)");
    assert_snapshot!(clients("", ""), @"<client> lacks the attribute 'name': expected name='…', the distinguished name of a client's certificate (line 2, column 70, element client)");
    assert_snapshot!(clients("", "name='backup'"), @r#""backup" is no distinguished name: it has no parts such as CN=backup (line 2, column 78, element client)"#);
    assert_snapshot!(clients("", "dn='CN=x'"), @"<client> has no attribute 'dn': expected 'name' (line 2, column 78, element client)");
    assert_snapshot!(export("type='nbd' port='1'", &verify), @"verify='maybe' is not known: expected 'yes' or 'no' (line 2, column 69, element tls)");
}

#[test]
fn a_checkpoint_in_an_export_has_a_checkpoints_name() {
    let text = "<blockexport type='nbd'>\n  <disk name='a' checkpoint='c/d'/>\n</blockexport>";
    let error = export_request(text).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_snapshot!(error, @"the checkpoint name \"c/d\" has '/' (line 2, column 18, element disk)");
}

#[test]
fn the_context_is_there_for_programs() {
    let error = DomainDocument::parse("<domain>\n <name/></domain>").unwrap_err();
    let context: Vec<_> = error.context().collect();
    assert_eq!(context, [("line", "2"), ("column", "2"), ("element", "name")]);
}
