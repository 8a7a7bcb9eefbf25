//! Properties: what is written is read the same, edits leave all else alone, nothing panics.

use std::path::PathBuf;

use disksnap_core::{
    Alias, BackingStore, CheckpointName, DataStore, DeviceKind, Disk, Domain, DomainId, Driver, Error,
    ExportDisk, ExportRequest, Listen, MethodChoice, NbdServer, NetworkHost, Options, Result, Sockets,
    Source, Tls,
};
use disksnap_xml::{
    DOMAIN_NAMESPACE, DomainDocument, Element, disk_snapshot_element, export_request,
    export_request_document, new_disk_element, snapshot_request,
};
use proptest::prelude::*;
use uuid::Uuid;

use crate::{ACTIVE, SOURCES};

/// Text that XML can hold, with all that needs care in it.
fn text() -> impl Strategy<Value = String> {
    let odd = prop::sample::select(vec![
        '&',
        '<',
        '>',
        '\'',
        '"',
        '\n',
        '\r',
        '\t',
        ' ',
        ']',
        'ä',
        '\u{1f600}',
        '=',
    ]);
    let c = prop_oneof![3 => odd, 5 => prop::char::range('!', '~')];
    prop::collection::vec(c, 1..12).prop_map(|cs| cs.into_iter().collect())
}

fn trimmed() -> impl Strategy<Value = String> {
    text()
        .prop_map(|t| t.trim_matches([' ', '\t', '\r', '\n']).to_owned())
        .prop_filter("not empty", |t| !t.is_empty())
}

fn path() -> impl Strategy<Value = PathBuf> {
    text().prop_map(|t| PathBuf::from(format!("/{t}")))
}

fn checkpoint() -> impl Strategy<Value = CheckpointName> {
    "[a-zA-Z0-9_-][a-zA-Z0-9_.-]{0,12}".prop_map(|name| name.parse().expect("a checkpoint can be called so"))
}

fn host() -> impl Strategy<Value = NetworkHost> {
    prop_oneof![
        path().prop_map(|socket| NetworkHost::Unix { socket }),
        (text(), prop::option::of(1..=u16::MAX)).prop_map(|(name, port)| NetworkHost::Tcp { name, port }),
    ]
}

fn source() -> impl Strategy<Value = Source> {
    let network = (
        text(),
        prop::option::of(text()),
        prop::collection::vec(host(), 0..3),
        any::<bool>(),
    );
    prop_oneof![
        path().prop_map(|file| Source::File { file }),
        path().prop_map(|dev| Source::Block { dev }),
        path().prop_map(|dir| Source::Dir { dir }),
        (text(), text()).prop_map(|(pool, volume)| Source::Volume { pool, volume }),
        network.prop_map(|(protocol, name, hosts, tls)| Source::Network {
            protocol,
            name,
            hosts,
            tls
        }),
    ]
}

fn backing() -> impl Strategy<Value = Option<BackingStore>> {
    // Nothing is below a raw layer, and a layer without a format is not written.
    let layer = ("[a-z0-9]{1,4}", source()).prop_filter("has layers below", |(f, _)| f != "raw");
    prop::collection::vec(layer, 0..4).prop_map(|layers| {
        layers.into_iter().fold(None, |below, (format, source)| {
            Some(BackingStore {
                format: Some(format),
                source,
                data_store: None,
                backing: below.map(Box::new),
            })
        })
    })
}

fn data_store() -> impl Strategy<Value = DataStore> {
    (prop::option::of("[a-z0-9]{1,4}"), source()).prop_map(|(format, source)| DataStore { format, source })
}

fn key() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        "[a-c]",
        "[a-z_][a-z0-9_-]{0,4}",
        Just("xmlns".to_owned()),
        Just("method".to_owned())
    ];
    prop::collection::vec(part, 1..4).prop_map(|parts| parts.join("."))
}

fn options() -> impl Strategy<Value = Options> {
    let value = prop_oneof![trimmed(), Just(String::new())];
    prop::collection::vec((key(), value), 0..6).prop_map(Options::from_iter)
}

fn method() -> impl Strategy<Value = MethodChoice> {
    (text(), options()).prop_map(|(method, options)| MethodChoice { method, options })
}

prop_compose! {
    fn disk(target: String)(
        bus in prop::option::of(text()),
        device in prop::sample::select(vec![DeviceKind::Disk, DeviceKind::Cdrom, DeviceKind::Floppy, DeviceKind::Lun]),
        alias in prop::option::of(text()),
        names in (prop::option::of(text()), prop::option::of(text())),
        source in prop::option::of(source()),
        data in prop::option::of(data_store()),
        backing in backing(),
        serial in prop::option::of(trimmed()),
        flags in any::<[bool; 2]>(),
        method in prop::option::of(method()),
    ) -> Disk {
        Disk {
            target: target.clone(),
            bus, device, alias,
            driver: Driver { name: names.0, format: names.1 },
            data_store: data.filter(|_| source.is_some()),
            source, backing, serial,
            read_only: flags[0],
            shareable: flags[1],
            encrypted: false,
            method,
        }
    }
}

prop_compose! {
    fn domain()(
        name in "[^/\\p{C}\\s][^/\\p{C}]{0,10}[^/\\p{C}\\s]",
        uuid in any::<[u8; 16]>(),
        disks in (0..4_usize).prop_flat_map(|n| {
            (0..n).map(|n| disk(format!("vd{n}"))).collect::<Vec<_>>()
        }),
        monitor in prop::option::of(path()),
        agent in prop::option::of(path()),
    ) -> Domain {
        Domain {
            id: DomainId { name, uuid: Uuid::from_bytes(uuid) },
            disks,
            sockets: Sockets { monitor, agent },
        }
    }
}

/// A document that says what the value says, written with what the crate offers.
fn written(domain: &Domain) -> Result<String> {
    let socket = |name: &str, path: &Option<PathBuf>| {
        path.as_ref()
            .map(|path| Element::new(format!("d:{name}")).attr("path", path.display()))
    };
    let ours = Element::new("d:domain")
        .attr("xmlns:d", DOMAIN_NAMESPACE)
        .children(socket("monitor", &domain.sockets.monitor))
        .children(socket("agent", &domain.sockets.agent));
    let disks = domain.disks.iter().map(|disk| {
        let method = disk.method.as_ref().map(disk_snapshot_element).transpose()?;
        Ok::<_, Error>(new_disk_element(disk)?.children(method))
    });
    Element::new("domain")
        .attr("type", "kvm")
        .child(Element::new("name").text(&domain.id.name))
        .child(Element::new("uuid").text(domain.id.uuid))
        .child(Element::new("metadata").child(ours))
        .child(Element::new("devices").children(disks.collect::<Result<Vec<_>>>()?))
        .to_document()
}

/// Whether the new text is the old one with one piece put in.
fn one_insertion(old: &str, new: &str) -> bool {
    let start = old.bytes().zip(new.bytes()).take_while(|(a, b)| a == b).count();
    new.len() > old.len() && new.as_bytes().ends_with(&old.as_bytes()[start..])
}

fn server() -> impl Strategy<Value = NbdServer> {
    (listen(), prop::option::of(tls())).prop_map(|(listen, tls)| NbdServer {
        tls: tls.filter(|_| matches!(listen, Listen::Tcp { .. })),
        listen,
        explicit: false,
        instance: None,
    })
}

fn listen() -> impl Strategy<Value = Listen> {
    prop_oneof![
        path().prop_map(Listen::Unix),
        (any::<std::net::IpAddr>(), 1..=u16::MAX).prop_map(|(address, port)| Listen::Tcp { address, port }),
    ]
}

fn tls() -> impl Strategy<Value = Tls> {
    let name = "(C=[A-Z]{2},)?CN=[a-z<&'\" é]{0,9}x".prop_map(|name| name.parse().unwrap());
    (path(), any::<bool>(), prop::collection::vec(name, 0..3)).prop_map(
        |(credentials, verify_client, names)| {
            let allowed = if verify_client { names } else { Vec::new() };
            Tls {
                credentials,
                verify_client,
                allowed,
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_domain_is_read_as_it_was_written(domain in domain()) {
        let text = written(&domain).unwrap();
        let document = DomainDocument::parse(text.as_str()).unwrap();
        prop_assert_eq!(document.domain(), &domain);
        prop_assert_eq!(document.text(), text);
    }

    #[test]
    fn a_changed_disk_is_read_as_it_was_given(domain in domain(), new in disk("vd0".to_owned())) {
        prop_assume!(!domain.disks.is_empty());
        let document = DomainDocument::parse(written(&domain).unwrap()).unwrap();
        // What an edit does not touch stays; what it does is the new disk's.
        let old = &domain.disks[0];
        let disk = Disk { driver: new.driver, source: new.source, data_store: new.data_store, backing: new.backing, ..old.clone() };
        let after = document.with_disk("vd0", &disk).unwrap();
        prop_assert_eq!(&after.domain().disks[0], &disk);
        prop_assert_eq!(&after.domain().disks[1..], &domain.disks[1..]);
        prop_assert_eq!(&document.with_disk("vd0", old).unwrap(), &document);
        let back = after.with_disk("vd0", old).unwrap();
        prop_assert_eq!(back.domain(), &domain);
    }

    #[test]
    fn insertions_leave_every_other_byte(
        sample in prop::sample::select(vec![ACTIVE, SOURCES]),
        windows in any::<bool>(),
        server in server(),
        choice in method(),
        names in prop::collection::vec(checkpoint(), 1..4),
    ) {
        let sample = if windows { sample.replace('\n', "\r\n") } else { sample.to_owned() };
        let document = DomainDocument::parse(sample).unwrap();
        let target = "vda";
        let edits = [
            (document.with_exports(Some(&server), &[]), 0),
            (document.with_checkpoints(target, &names), 1),
            (document.with_method(target, Some(&choice)), 2),
        ];
        for (edited, which) in edits {
            let edited = edited.unwrap();
            prop_assert!(one_insertion(document.text(), edited.text()));
            let undone = match which {
                0 => edited.with_exports(None, &[]),
                1 => edited.with_checkpoints(target, &[]),
                _ => edited.with_method(target, None),
            };
            prop_assert_eq!(&undone.unwrap(), &document);
        }
    }

    #[test]
    fn a_method_is_read_as_it_was_written(choice in method()) {
        let element = disk_snapshot_element(&choice).unwrap().to_document().unwrap();
        let text = format!("<domainblocksnapshot><snapshot disk='a'>{element}</snapshot></domainblocksnapshot>");
        let disksnap_core::Disks::Named(disks) = snapshot_request(&text).unwrap().disks else { unreachable!() };
        prop_assert_eq!(disks[0].method.as_ref(), Some(&choice));
    }

    #[test]
    fn an_export_request_is_read_as_it_was_written(
        server in prop::option::of(server()),
        names in prop::collection::btree_map(text(), (prop::option::of(text()), prop::option::of(checkpoint())), 1..4),
    ) {
        let disks = names.into_iter().map(|(alias, name)| ExportDisk { alias: Alias(alias), name: name.0, checkpoint: name.1 });
        let request = ExportRequest {
            tls: server.as_ref().and_then(|s| s.tls.clone()),
            listen: server.map(|s| s.listen),
            allow_remote: false,
            disks: disks.collect(),
        };
        let text = export_request_document(&request).unwrap();
        prop_assert_eq!(export_request(&text).unwrap(), request);
    }

    #[test]
    fn any_text_is_answered(text in ".{0,200}") {
        let _ = DomainDocument::parse(text.as_str());
        let _ = snapshot_request(&text);
        let _ = export_request(&text);
    }

    /// Nearly right documents: a sample with one piece cut out, doubled or replaced.
    #[test]
    fn a_damaged_document_is_answered(
        sample in prop::sample::select(vec![ACTIVE, SOURCES]),
        a in any::<prop::sample::Index>(),
        length in 0..40_usize,
        junk in "[<>/='\"&a-z! -]{0,6}",
    ) {
        let from = sample.floor_char_boundary(a.index(sample.len()));
        let to = sample.ceil_char_boundary((from + length).min(sample.len()));
        let damaged = format!("{}{junk}{}", &sample[..from], &sample[to..]);
        if let Err(error) = DomainDocument::parse(damaged) {
            prop_assert!(error.context().any(|(key, _)| key == "line"), "{error}");
        }
    }
}
