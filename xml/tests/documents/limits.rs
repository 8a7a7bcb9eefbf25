//! Hostile documents within the limits are answered in a time that a user would call at once.
//! Nothing is asserted of the time: a parser that is quadratic here would not end before the test runner's patience.

use disksnap_xml::{
    DomainDocument, MAX_ATTRIBUTES, MAX_BYTES, MAX_DEPTH, MAX_NAMESPACES, export_request, snapshot_request,
};

fn domain(content: &str) -> String {
    format!("<domain><name>a</name>{content}</domain>")
}

fn repeated(n: usize, piece: impl Fn(usize) -> String) -> String {
    (0..n).fold(String::new(), |text, i| text + &piece(i))
}

#[test]
fn many_of_everything() {
    let disks = repeated(30_000, |n| format!("<disk><target dev='a{n}'/></disk>"));
    let many = DomainDocument::parse(domain(&format!("<devices>{disks}</devices>"))).unwrap();
    assert_eq!(many.domain().disks.len(), 30_000);
    let methods = repeated(20_000, |n| {
        format!("<d:disk target='b{n}'><d:diskSnapshot method='m'/></d:disk>")
    });
    let ours = format!("<metadata><d:domain xmlns:d='urn:disksnap:domain:1'>{methods}</d:domain></metadata>");
    assert_eq!(
        DomainDocument::parse(domain(&ours)).unwrap().warnings().len(),
        20_000
    );
    let snapshots = repeated(90_000, |n| format!("<snapshot disk='a{n}'/>"));
    snapshot_request(&format!("<domainblocksnapshot>{snapshots}</domainblocksnapshot>")).unwrap();
    let exports = repeated(90_000, |n| format!("<disk name='a{n}'/>"));
    export_request(&format!("<blockexport type='nbd'>{exports}</blockexport>")).unwrap();
}

#[test]
fn wide_and_deep() {
    let attributes = repeated(MAX_ATTRIBUTES, |n| format!(" a{n}=''"));
    let elements = format!("<x{attributes}/>").repeat(300);
    DomainDocument::parse(domain(&elements)).unwrap();
    let namespaces =
        repeated(MAX_NAMESPACES, |n| format!("<x xmlns:p{n}='u{n}'>")) + &"</x>".repeat(MAX_NAMESPACES);
    DomainDocument::parse(domain(&namespaces)).unwrap();
    let chain = MAX_DEPTH - 3;
    let layers = "<backingStore type='file'><format type='qcow2'/><source file='/b'/>".repeat(chain)
        + &"</backingStore>".repeat(chain);
    let disk = format!("<devices><disk>{layers}<target dev='a'/></disk></devices>");
    let document = DomainDocument::parse(domain(&disk)).unwrap();
    let disk = &document.domain().disks[0];
    assert_eq!(document.with_disk("a", disk).unwrap(), document);
    let text = "&lt;".repeat(MAX_BYTES / 4 - 20);
    DomainDocument::parse(domain(&format!("<title>{text}</title>"))).unwrap();
}
