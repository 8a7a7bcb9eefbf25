//! QEMU's NBD server, started, stopped and asked for by a real client.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command as Program;

use common::{Place, daemon_domain};
use disksnap_core::{Control, Error, ErrorKind, Listen, NbdServer, ServeNode, Tls};
use disksnap_hypervisor::QemuControl;
use disksnap_test_support::{DiskSpec, MIB, QemuVersion, StorageDaemon, need, tools};
use serde_json::json;

fn daemon(version: QemuVersion) -> StorageDaemon {
    StorageDaemon::builder()
        .version(version)
        .without_guest_side()
        .disk(DiskSpec::new("vda", 4 * MIB))
        .start()
}

fn unix(path: impl Into<PathBuf>) -> NbdServer {
    NbdServer {
        listen: Listen::Unix(path.into()),
        tls: None,
        explicit: false,
        instance: None,
    }
}

fn tcp(port: u16) -> NbdServer {
    let listen = Listen::Tcp {
        address: IpAddr::V4(Ipv4Addr::LOCALHOST),
        port,
    };
    NbdServer { listen, ..unix("") }
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0))
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

fn node(daemon: &StorageDaemon, id: &str) -> ServeNode {
    ServeNode {
        id: id.into(),
        node: daemon.format_node("vda").into(),
        name: format!("name of {id}"),
        bitmap: None,
    }
}

/// The size that an NBD client sees, or its complaint.
fn size(uri: &str) -> Result<String, String> {
    let output = Program::new(tools::program("nbdinfo"))
        .args(["--size", uri])
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr))
    }
}

fn unix_uri(socket: &Path, name: &str) -> String {
    format!(
        "nbd+unix:///{}?socket={}",
        name.replace(' ', "%20"),
        socket.display()
    )
}

async fn refused(control: &QemuControl, server: &NbdServer) -> Error {
    control.start_server(server).await.unwrap_err()
}

#[tokio::test]
async fn the_server_starts_serves_and_stops() {
    need!("nbdinfo");
    for version in [QemuVersion::V7_2, QemuVersion::V10_0] {
        let (daemon, place) = (daemon(version), Place::new());
        let control = place.control(&daemon_domain(&daemon));
        let socket = control.default_socket();
        assert!(socket.starts_with(place.dir.path()));
        let error = control.serve(&node(&daemon, "a")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        control.stop_server().await.unwrap();

        control.start_server(&unix(&socket)).await.unwrap();
        assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
        control.serve(&node(&daemon, "a")).await.unwrap();
        control.serve(&node(&daemon, "b")).await.unwrap();
        assert_eq!(size(&unix_uri(&socket, "name of a")), Ok((4 * MIB).to_string()));
        let mut served = control.served().await.unwrap();
        served.sort();
        assert_eq!(served, ["a", "b"]);
        for again in [
            node(&daemon, "a"),
            ServeNode {
                id: "c".into(),
                ..node(&daemon, "a")
            },
        ] {
            let error = control.serve(&again).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
        }
        let nowhere = ServeNode {
            node: "none".into(),
            ..node(&daemon, "d")
        };
        assert_eq!(
            control.serve(&nowhere).await.unwrap_err().kind(),
            ErrorKind::Refused
        );

        let error = refused(&control, &unix(place.dir.path().join("other"))).await;
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.next_step().unwrap().contains("one NBD server"), "{error}");

        control.unserve("a").await.unwrap();
        control.unserve("a").await.unwrap();
        control.unserve("never was").await.unwrap();
        assert_eq!(control.served().await.unwrap(), ["b"]);
        size(&unix_uri(&socket, "name of a")).unwrap_err();
        // Stopping the server ends the exports that are left.
        control.stop_server().await.unwrap();
        control.stop_server().await.unwrap();
        assert_eq!(control.served().await.unwrap(), Vec::<String>::new());
        size(&unix_uri(&socket, "name of b")).unwrap_err();
        // And it can be started again.
        control.start_server(&unix(&socket)).await.unwrap();
    }
}

/// A client that has come as far as to send requests (the NBD protocol's `NBD_OPT_EXPORT_NAME`).
fn transmitting(socket: &Path, name: &str) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    let mut hello = 3_u32.to_be_bytes().to_vec();
    hello.extend_from_slice(b"IHAVEOPT");
    hello.extend_from_slice(&1_u32.to_be_bytes());
    hello.extend_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
    hello.extend_from_slice(name.as_bytes());
    stream.write_all(&hello).unwrap();
    let mut size_and_flags = [0; 10];
    stream.read_exact(&mut size_and_flags).unwrap();
    assert_eq!(size_and_flags[..8], MIB.to_be_bytes());
    stream
}

#[tokio::test]
async fn unserving_disconnects_a_client_and_frees_the_node() {
    let (daemon, place) = (daemon(QemuVersion::default()), Place::new());
    let control = place.control(&daemon_domain(&daemon));
    let socket = control.default_socket();
    daemon.qmp(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "n", "size": MIB}),
    );
    control.start_server(&unix(&socket)).await.unwrap();
    control
        .serve(&ServeNode {
            id: "n".into(),
            node: "n".into(),
            name: "n".into(),
            bitmap: None,
        })
        .await
        .unwrap();
    let mut client = transmitting(&socket, "n");
    daemon
        .monitor()
        .try_execute("blockdev-del", &json!({"node-name": "n"}))
        .unwrap()
        .unwrap_err();
    control.unserve("n").await.unwrap();
    daemon.qmp("blockdev-del", json!({"node-name": "n"}));
    assert_eq!(client.read(&mut [0]).unwrap(), 0, "the client hears the end");
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    need!("nbdinfo");
    let (daemon, place) = (daemon(QemuVersion::default()), Place::new());
    let control = place.control(&daemon_domain(&daemon));
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let error = refused(&control, &tcp(port)).await;
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.message().contains(&format!("127.0.0.1:{port}")), "{error}");
    // An address that no host has (TEST-NET-1).
    let elsewhere = Listen::Tcp {
        address: "192.0.2.1".parse().unwrap(),
        port,
    };
    let error = refused(
        &control,
        &NbdServer {
            listen: elsewhere,
            ..tcp(port)
        },
    )
    .await;
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");

    let port = free_port();
    control.start_server(&tcp(port)).await.unwrap();
    control.serve(&node(&daemon, "a")).await.unwrap();
    assert_eq!(
        size(&format!("nbd://127.0.0.1:{port}/name%20of%20a")),
        Ok((4 * MIB).to_string())
    );
}

#[tokio::test]
async fn nothing_at_the_socket_s_path_is_overwritten() {
    let (daemon, place) = (daemon(QemuVersion::default()), Place::new());
    let control = place.control(&daemon_domain(&daemon));
    let file = place.dir.path().join("file");
    fs::write(&file, "precious").unwrap();
    assert_eq!(
        refused(&control, &unix(&file)).await.kind(),
        ErrorKind::AlreadyExists
    );
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    let link = place.dir.path().join("link");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    assert_eq!(
        refused(&control, &unix(&link)).await.kind(),
        ErrorKind::AlreadyExists
    );

    let live = place.dir.path().join("live.sock");
    let listener = UnixListener::bind(&live).unwrap();
    assert_eq!(refused(&control, &unix(&live)).await.kind(), ErrorKind::Busy);
    // Only asked, not harmed.
    UnixStream::connect(&live).unwrap();
    drop(listener);
    // Stale in our own directory: replaced. In another's: refused.
    let elsewhere = tempfile::tempdir().unwrap();
    let stale = elsewhere.path().join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    assert_eq!(
        refused(&control, &unix(&stale)).await.kind(),
        ErrorKind::AlreadyExists
    );
    control.start_server(&unix(&live)).await.unwrap();
    control.stop_server().await.unwrap();

    let missing = refused(&control, &unix(place.dir.path().join("no/such/dir.sock"))).await;
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    let long = refused(&control, &unix(place.dir.path().join("x".repeat(120)))).await;
    assert_eq!(long.kind(), ErrorKind::Invalid);
}

/// A directory for the server and one for a client that the same authority signed.
fn certificates() -> (tempfile::TempDir, tempfile::TempDir) {
    let [server, client] = signed([("server", ""), ("client", "")]);
    (server, client)
}

/// For each side and name a directory with a certificate, all by one authority. One that has a name is of the organization `Example`.
fn signed<const N: usize>(wanted: [(&str, &str); N]) -> [tempfile::TempDir; N] {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
    wanted.map(|(side, name)| {
        let dir = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
        let mut params = CertificateParams::new(names).unwrap();
        if !name.is_empty() {
            params.distinguished_name = rcgen::DistinguishedName::new();
            params
                .distinguished_name
                .push(DnType::OrganizationName, "Example");
            params.distinguished_name.push(DnType::CommonName, name);
        }
        let certificate = params.signed_by(&key, &authority).unwrap();
        fs::write(dir.path().join("ca-cert.pem"), authority.pem()).unwrap();
        fs::write(dir.path().join(format!("{side}-cert.pem")), certificate.pem()).unwrap();
        fs::write(dir.path().join(format!("{side}-key.pem")), key.serialize_pem()).unwrap();
        dir
    })
}

#[tokio::test]
async fn tls_lets_in_who_shows_a_certificate() {
    need!("nbdinfo");
    for version in [QemuVersion::V7_2, QemuVersion::V10_0] {
        let (daemon, place) = (daemon(version), Place::new());
        let control = place.control(&daemon_domain(&daemon));
        let (server, client) = certificates();
        let port = free_port();
        let tls = |dir: &Path| {
            Some(Tls {
                credentials: dir.to_owned(),
                verify_client: true,
                allowed: Vec::new(),
            })
        };
        let secure = NbdServer {
            tls: tls(server.path()),
            ..tcp(port)
        };

        let error = refused(
            &control,
            &NbdServer {
                tls: tls(client.path()),
                ..tcp(port)
            },
        )
        .await;
        assert!(error.next_step().unwrap().contains("server-cert.pem"), "{error}");
        let error = refused(
            &control,
            &NbdServer {
                tls: tls(server.path()),
                ..unix(place.dir.path().join("s"))
            },
        )
        .await;
        assert_eq!(error.kind(), ErrorKind::Invalid);
        // Left behind by a run that was killed.
        daemon.qmp(
            "object-add",
            json!({"qom-type": "tls-creds-x509", "id": "disksnap-nbd-tls",
            "dir": server.path(), "endpoint": "server"}),
        );
        control.start_server(&secure).await.unwrap();
        assert_eq!(refused(&control, &secure).await.kind(), ErrorKind::Busy);
        control.serve(&node(&daemon, "a")).await.unwrap();

        let uri = |dir: &Path| {
            format!(
                "nbds://127.0.0.1:{port}/name%20of%20a?tls-certificates={}",
                dir.display()
            )
        };
        assert_eq!(size(&uri(client.path())), Ok((4 * MIB).to_string()));
        let (_, stranger) = certificates();
        size(&uri(stranger.path())).unwrap_err();
        size(&format!("nbd://127.0.0.1:{port}/name%20of%20a")).unwrap_err();
        // A second start and a stop leave nothing behind.
        control.stop_server().await.unwrap();
        control.start_server(&secure).await.unwrap();
    }
}

/// Verified alone is not enough once there is a list; what QEMU keeps of it goes with the server.
#[tokio::test]
async fn of_the_verified_only_those_on_the_list_are_let_in() {
    need!("nbdinfo");
    for version in [QemuVersion::V7_2, QemuVersion::V10_0] {
        let (daemon, place) = (daemon(version), Place::new());
        let control = place.control(&daemon_domain(&daemon));
        let [server, backup, other] =
            signed([("server", "server"), ("client", "backup"), ("client", "other")]);
        let port = free_port();
        let only = |names: &[&str]| NbdServer {
            tls: Some(Tls {
                credentials: server.path().to_owned(),
                verify_client: true,
                allowed: names.iter().map(|name| name.parse().unwrap()).collect(),
            }),
            ..tcp(port)
        };
        let seen = |dir: &tempfile::TempDir| {
            let directory = dir.path().display();
            size(&format!(
                "nbds://127.0.0.1:{port}/name%20of%20a?tls-certificates={directory}"
            ))
        };
        // The list of a run that was killed, which would let everyone in.
        let list = json!({"qom-type": "authz-list", "id": "disksnap-nbd-clients-1", "policy": "allow"});
        daemon.qmp("object-add", list);
        control
            .start_server(&only(&["O=Example,CN=backup"]))
            .await
            .unwrap();
        control.serve(&node(&daemon, "a")).await.unwrap();
        assert_eq!(seen(&backup), Ok((4 * MIB).to_string()));
        seen(&other).unwrap_err();
        // What is asked for while it runs changes nothing.
        assert_eq!(
            refused(&control, &only(&["O=Example,CN=other"])).await.kind(),
            ErrorKind::Busy
        );
        assert_eq!(seen(&backup), Ok((4 * MIB).to_string()));
        seen(&other).unwrap_err();
        control.stop_server().await.unwrap();
        let left = daemon.qmp("qom-list", json!({"path": "/objects"}));
        assert!(!left.to_string().contains("disksnap"), "{left}");
        let both = only(&["O=Example,CN=backup", "O=Example,CN=other"]);
        control.start_server(&both).await.unwrap();
        control.serve(&node(&daemon, "a")).await.unwrap();
        assert_eq!(
            (seen(&backup), seen(&other)),
            (Ok((4 * MIB).to_string()), Ok((4 * MIB).to_string()))
        );
    }
}
