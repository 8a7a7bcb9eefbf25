//! Exports: served to real NBD clients, listed, stopped; on unix sockets, TCP and TLS.

use std::path::Path;
use std::process::Command;

use disksnap_test_support::{DiskSpec, MIB, StorageDaemon, StorageDaemonBuilder, need, pattern, tools};
use serde_json::json;

use crate::programs::program as client;
use crate::site::{Site, arg};

/// A daemon whose disks hold something, its XML, and a snapshot `nightly` of it.
fn with_snapshot() -> (Site, StorageDaemon, String) {
    let disks = ["vda", "vdb"].map(|target| DiskSpec::new(target, 8 * MIB).qcow2());
    let daemon = disks
        .into_iter()
        .fold(StorageDaemon::builder(), StorageDaemonBuilder::disk)
        .start();
    daemon.disk("vda").write(MIB - 5, &pattern::bytes(1, 2 << 20));
    daemon.disk("vdb").write(3 * MIB, &pattern::bytes(2, 70_000));
    let (site, xml) = (Site::new(), arg(&daemon.domain_xml_file()));
    site.ok(&["snapshot", "create", "-d", &xml, "--name", "nightly"]);
    (site, daemon, xml)
}

fn copied(uri: &str, to: &Path) -> String {
    client("nbdcopy", &[uri, to.to_str().unwrap()]);
    pattern::digest_file(to)
}

/// A TCP port that nobody uses just now.
pub(crate) fn port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

#[test]
fn exported_over_a_unix_socket_and_read_by_nbd_clients() {
    need!("fuse");
    let (site, daemon, xml) = with_snapshot();
    let before = ["vda", "vdb"].map(|target| daemon.disk(target).digest());
    let started = site.json(&["export", "start", "-d", &xml, "nightly"]);
    daemon.disk("vda").fill(0, 8 * MIB, 5);
    for (n, export) in started["exports"].as_array().unwrap().iter().enumerate() {
        let uri = export["uri"].as_str().unwrap();
        assert!(client("nbdinfo", &[uri]).contains("export-size: 8388608"));
        assert_eq!(copied(uri, &site.path(&format!("copy{n}"))), before[n]);
    }
    assert_eq!(site.json(&["export", "list", "-d", &xml]), started);
    let text = site.fails(4, &["export", "start", "-d", &xml, "nightly", "--disk", "vda"]);
    assert!(text.contains("is being exported already"), "{text}");
    let alias = started["exports"][0]["alias"].as_str().unwrap();
    assert_eq!(
        site.ok(&["export", "stop", "-d", &xml, alias]),
        format!("stopped  {alias}\n")
    );
    assert_eq!(
        site.json(&["export", "list", "-d", &xml])["exports"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert_eq!(
        site.json(&["export", "stop", "-d", &xml, "nightly"])["stopped"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert_eq!(
        site.ok(&["export", "stop", "-d", &xml, "nightly"]),
        "Nothing was being served.\n"
    );
    assert_eq!(
        site.json(&["export", "list", "-d", &xml]),
        json!({ "server": null, "exports": [] })
    );
    site.ok(&["snapshot", "delete", "-d", &xml, "nightly"]);
}

#[test]
fn exported_from_xml_over_tcp_and_only_there() {
    need!("fuse");
    let (site, daemon, xml) = with_snapshot();
    let port = port();
    let alias = site.json(&["snapshot", "show", "-d", &xml, "nightly"])["disks"][1]["alias"].clone();
    let alias = alias.as_str().unwrap();
    let request = format!(
        "<blockexport type='nbd' port='{port}'>\n  <listen type='address' address='127.0.0.1'/>\n  \
         <disk name='{alias}'/>\n</blockexport>\n"
    );
    let file = site.file("export.xml", &request);
    assert_eq!(
        site.ok(&["export", "start", "-d", &xml, "--xml", &file, "--output", "xml"]),
        request
    );
    assert_eq!(
        site.ok(&["export", "list", "-d", &xml, "--output", "xml"]),
        request
    );
    let uri = format!("nbd://127.0.0.1:{port}/{alias}");
    assert_eq!(copied(&uri, &site.path("copy")), daemon.disk("vdb").digest());
    let elsewhere = [
        "export",
        "start",
        "-d",
        &xml,
        "nightly",
        "--disk",
        "vda",
        "--listen",
        "unix:/tmp/x.sock",
    ];
    let text = site.fails(6, &elsewhere);
    assert!(text.contains(&format!("listens on 127.0.0.1:{port}")), "{text}");
    // Without an address it goes to the server that runs; reading goes there too.
    site.ok(&["export", "start", "-d", &xml, "nightly", "--disk", "vda"]);
    let to = site.path("read");
    site.ok(&["read", "-d", &xml, "nightly", "vda", "--to", to.to_str().unwrap()]);
    assert_eq!(pattern::digest_file(&to), daemon.disk("vda").digest());
    assert_eq!(
        site.json(&["export", "list", "-d", &xml])["exports"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    site.ok(&["export", "stop", "-d", &xml, "--all"]);
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err());
    site.ok(&["snapshot", "delete", "-d", &xml, "nightly"]);
}

#[test]
fn the_server_by_itself_stays_until_it_is_stopped() {
    need!("fuse");
    let (site, _daemon, xml) = with_snapshot();
    let listen = format!("127.0.0.1:{}", port());
    let server = site.json(&["export", "server", "start", "-d", &xml, "--listen", &listen]);
    assert_eq!(
        (&server["listen"], &server["explicit"]),
        (&json!(listen), &json!(true))
    );
    site.ok(&["export", "start", "-d", &xml, "nightly"]);
    let text = site.fails(6, &["export", "server", "stop", "-d", &xml]);
    assert!(text.contains("the NBD server serves 2 exports"), "{text}");
    site.ok(&["export", "stop", "-d", &xml, "--all"]);
    assert_eq!(
        site.json(&["export", "list", "-d", &xml])["server"]["listen"],
        listen
    );
    for _ in 0..2 {
        assert_eq!(
            site.ok(&["export", "server", "stop", "-d", &xml]),
            "The NBD server does not run.\n"
        );
    }
    assert!(std::net::TcpStream::connect(&listen).is_err());
}

/// A CA, a server's certificate for 127.0.0.1 and a client's, as QEMU wants them in one directory. Another client's are in `other`
/// in there. Their names are `O=Example,CN=server`, `client` and `other`.
pub(crate) fn credentials(dir: &Path) {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
    std::fs::create_dir_all(dir.join("other")).unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let other = dir.join("other");
    for (who, dir, side) in [
        ("server", dir, "server"),
        ("client", dir, "client"),
        ("other", &other, "client"),
    ] {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::OrganizationName, "Example");
        params.distinguished_name.push(DnType::CommonName, who);
        let cert = params.signed_by(&key, &ca).unwrap();
        std::fs::write(dir.join("ca-cert.pem"), ca.pem()).unwrap();
        std::fs::write(dir.join(format!("{side}-cert.pem")), cert.pem()).unwrap();
        std::fs::write(dir.join(format!("{side}-key.pem")), key.serialize_pem()).unwrap();
    }
}

/// Whether a client with the certificates in this directory is let in.
pub(crate) fn is_let_in(uri: &str, directory: &Path) -> bool {
    let uri = format!("{uri}?tls-certificates={}", directory.display());
    let asked = Command::new(tools::program("nbdinfo"))
        .args(["--size", &uri])
        .output();
    asked.unwrap().status.success()
}

#[test]
fn of_the_verified_clients_only_those_on_the_list_are_let_in() {
    need!("fuse");
    let (site, _daemon, xml) = with_snapshot();
    let dir = site.path("pki");
    credentials(&dir);
    let (pki, listen) = (dir.to_str().unwrap(), format!("127.0.0.1:{}", port()));
    let start = [
        "export", "start", "-d", &xml, "nightly", "--disk", "vda", "--listen", &listen,
    ];
    let start = [&start[..], &["--tls-credentials", pki]].concat();
    let text = site.fails(2, &[&start[..], &["--allow-client", "client"]].concat());
    assert!(text.contains("no parts such as CN=backup"), "{text}");
    let text = site.fails(
        2,
        &[&start[..], &["--allow-client", "CN=x", "--no-verify-client"]].concat(),
    );
    assert!(text.contains("cannot be used with"), "{text}");
    let only = [&start[..], &["--allow-client", "O=Example,CN=client"]].concat();
    let served = site.json(&only);
    assert_eq!(
        served["server"]["tls"]["allowedClients"],
        json!(["O=Example,CN=client"])
    );
    let uri = served["exports"][0]["uri"].as_str().unwrap();
    assert!(is_let_in(uri, &dir));
    assert!(!is_let_in(uri, &dir.join("other")));
    let text = site.ok(&["export", "list", "-d", &xml]);
    assert!(text.contains("only for O=Example,CN=client"), "{text}");
    // With another list it would be another server.
    let text = site.fails(
        6,
        &[
            "export",
            "start",
            "-d",
            &xml,
            "nightly",
            "--disk",
            "vdb",
            "--listen",
            &listen,
            "--tls-credentials",
            pki,
            "--allow-client",
            "O=Example,CN=other",
        ],
    );
    assert!(text.contains("one NBD server"), "{text}");
    // What is listed can be asked for again, as a document.
    let document = site.path("export.xml");
    std::fs::write(
        &document,
        site.ok(&["export", "list", "-d", &xml, "--output", "xml"]),
    )
    .unwrap();
    site.ok(&["export", "stop", "-d", &xml, "--all"]);
    site.ok(&["export", "start", "-d", &xml, "--xml", document.to_str().unwrap()]);
    assert!(is_let_in(uri, &dir));
    assert!(!is_let_in(uri, &dir.join("other")));
    site.ok(&["export", "stop", "-d", &xml, "--all"]);
}

#[test]
fn tls_is_spoken_to_clients_that_are_verified() {
    need!("fuse");
    let (site, daemon, xml) = with_snapshot();
    let dir = site.path("pki");
    credentials(&dir);
    let (dir, listen) = (dir.to_str().unwrap().to_owned(), format!("127.0.0.1:{}", port()));
    let start = [
        "export", "start", "-d", &xml, "nightly", "--disk", "vda", "--listen", &listen,
    ];
    let served = site.json(&[&start[..], &["--tls-credentials", &dir]].concat());
    assert_eq!(served["server"]["tls"]["verifyClient"], true);
    let uri = served["exports"][0]["uri"].as_str().unwrap();
    assert!(uri.starts_with("nbds://127.0.0.1:"), "{uri}");
    let with_certificates = format!("{uri}?tls-certificates={dir}");
    assert_eq!(
        copied(&with_certificates, &site.path("copy")),
        daemon.disk("vda").digest()
    );
    let plain = uri.replacen("nbds", "nbd", 1);
    assert!(
        !Command::new(tools::program("nbdinfo"))
            .arg(&plain)
            .output()
            .unwrap()
            .status
            .success()
    );
    let to = site.path("read");
    site.ok(&["read", "-d", &xml, "nightly", "vda", "--to", to.to_str().unwrap()]);
    assert_eq!(pattern::digest_file(&to), daemon.disk("vda").digest());
    // Without a client's certificate the reader is turned away, and the exports are as before.
    std::fs::remove_file(Path::new(&dir).join("client-cert.pem")).unwrap();
    std::fs::remove_file(Path::new(&dir).join("client-key.pem")).unwrap();
    let refused = site.run(&["read", "-d", &xml, "nightly", "vda", "--length", "1"]);
    assert!(matches!(refused.code, Some(7 | 8)), "{refused:?}");
    assert_eq!(site.json(&["export", "list", "-d", &xml]), served);
    site.ok(&["snapshot", "delete", "-d", &xml, "nightly"]);
}
