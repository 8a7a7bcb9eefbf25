//! TLS with real servers: who is let in, and who is trusted.

use std::fs;
use std::path::Path;

use disksnap_nbd::{Client, CommandFlags, ConnectOptions, Error, Refusal, TlsCredentials, list_exports};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
    date_time_ymd,
};
use tempfile::TempDir;

use crate::server::{Server, directory, noise};

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str) -> Authority {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

const SERVER_SERIAL: u64 = 4711;

/// A certificate and its key, as QEMU names them.
fn issue(ca: &Authority, directory: &Path, side: &str) {
    let names = ["vault.example".to_owned(), "127.0.0.1".to_owned()];
    let mut params = CertificateParams::new(names).unwrap();
    params.distinguished_name.push(DnType::CommonName, side);
    params.serial_number = (side == "server").then(|| SerialNumber::from(SERVER_SERIAL));
    params.key_usages = vec![
        KeyUsagePurpose::DigitalSignature,
        KeyUsagePurpose::KeyEncipherment,
    ];
    params.extended_key_usages = vec![match side {
        "server" => ExtendedKeyUsagePurpose::ServerAuth,
        _ => ExtendedKeyUsagePurpose::ClientAuth,
    }];
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, ca).unwrap();
    fs::write(directory.join("ca-cert.pem"), ca.pem()).unwrap();
    fs::write(directory.join(format!("{side}-cert.pem")), certificate.pem()).unwrap();
    fs::write(directory.join(format!("{side}-key.pem")), key.serialize_pem()).unwrap();
}

/// A server that insists on TLS and on a client certificate, and a directory for its clients.
struct Secured {
    ca: Authority,
    client: TempDir,
    server: Server,
}

fn arguments(directory: &Path) -> [String; 5] {
    let object = format!(
        "tls-creds-x509,id=tls,endpoint=server,verify-peer=yes,dir={}",
        directory.display()
    );
    [
        "--object".into(),
        object,
        "--tls-creds=tls".into(),
        "--image-opts".into(),
        "driver=null-co,size=8M,read-zeroes=on".into(),
    ]
}

fn secured(start: fn(&[&str]) -> Server) -> Secured {
    let ca = authority("the authority");
    let (server_dir, client) = (directory(), directory());
    issue(&ca, server_dir.path(), "server");
    issue(&ca, client.path(), "client");
    let server = start(&arguments(server_dir.path()).each_ref().map(String::as_str));
    Secured { ca, client, server }
}

impl Secured {
    async fn connect(&self, directory: &Path) -> Result<Client, Error> {
        self.connect_as("vault.example", directory).await
    }

    async fn connect_as(&self, name: &str, directory: &Path) -> Result<Client, Error> {
        let uri = self.server.uri.clone().with_tls().with_tls_hostname(name);
        Client::connect(&uri, &with_tls(directory)).await
    }
}

fn with_tls(directory: &Path) -> ConnectOptions {
    let tls = Some(TlsCredentials::from_directory(directory).unwrap());
    ConnectOptions {
        tls,
        ..ConnectOptions::default()
    }
}

#[tokio::test]
async fn both_sides_known_to_each_other() {
    let secured = secured(Server::qemu_nbd);
    let client = secured.connect(secured.client.path()).await.unwrap();
    let data = noise(1, 3 << 20);
    client.write(512, data, CommandFlags::empty()).await.unwrap();
    assert_eq!(client.read(1000, 3 << 20).await.unwrap().len(), 3 << 20);
    client.disconnect().await;
    let uri = secured
        .server
        .uri
        .clone()
        .with_tls()
        .with_tls_hostname("vault.example");
    let exports = list_exports(&uri, &with_tls(secured.client.path()))
        .await
        .unwrap();
    assert_eq!(exports.len(), 1);
}

#[tokio::test]
async fn over_tcp_the_host_is_the_name() {
    let secured = secured(Server::qemu_nbd_tcp);
    let uri = secured.server.uri.clone().with_tls();
    assert_eq!(uri.tls_server_name(), Some("127.0.0.1"));
    let client = Client::connect(&uri, &with_tls(secured.client.path()))
        .await
        .unwrap();
    assert_eq!(client.size(), 8 << 20);
}

#[tokio::test]
async fn a_server_of_another_authority_is_not_trusted() {
    let secured = secured(Server::qemu_nbd);
    let other = directory();
    issue(&authority("someone else"), other.path(), "client");
    let error = secured.connect(other.path()).await.unwrap_err();
    assert!(matches!(error, Error::Tls { .. }), "{error:?}");
    let error = secured
        .connect_as("other.example", secured.client.path())
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Tls { .. }), "{error:?}");
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("other.example"), "{source}");
}

#[tokio::test]
async fn a_client_without_a_certificate_is_told_so() {
    let secured = secured(Server::qemu_nbd);
    let bare = directory();
    fs::write(bare.path().join("ca-cert.pem"), secured.ca.pem()).unwrap();
    let error = secured.connect(bare.path()).await.unwrap_err();
    assert!(matches!(error, Error::Tls { .. }), "{error:?}");
    // A certificate of another authority does no better.
    let forged = directory();
    issue(&authority("someone else"), forged.path(), "client");
    fs::write(forged.path().join("ca-cert.pem"), secured.ca.pem()).unwrap();
    let error = secured.connect(forged.path()).await.unwrap_err();
    assert!(matches!(error, Error::Tls { .. }), "{error:?}");
}

#[tokio::test]
async fn a_certificate_that_was_taken_back() {
    let secured = secured(Server::qemu_nbd);
    let params = |serial: u64| CertificateRevocationListParams {
        this_update: date_time_ymd(2024, 1, 1),
        next_update: date_time_ymd(2099, 1, 1),
        crl_number: SerialNumber::from(1_u64),
        issuing_distribution_point: None,
        revoked_certs: vec![RevokedCertParams {
            serial_number: SerialNumber::from(serial),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: None,
            invalidity_date: None,
        }],
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let crl = secured.client.path().join("ca-crl.pem");
    fs::write(
        &crl,
        params(SERVER_SERIAL + 1)
            .signed_by(&secured.ca)
            .unwrap()
            .pem()
            .unwrap(),
    )
    .unwrap();
    secured.connect(secured.client.path()).await.unwrap();
    fs::write(
        &crl,
        params(SERVER_SERIAL)
            .signed_by(&secured.ca)
            .unwrap()
            .pem()
            .unwrap(),
    )
    .unwrap();
    let error = secured.connect(secured.client.path()).await.unwrap_err();
    assert!(matches!(error, Error::Tls { .. }), "{error:?}");
}

#[tokio::test]
async fn plain_and_secure_do_not_mix() {
    let secured = secured(Server::qemu_nbd);
    let error = Client::connect(&secured.server.uri, &ConnectOptions::default())
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::Refused {
                refusal: Refusal::TlsRequired,
                ..
            }
        ),
        "{error:?}"
    );
    assert!(error.to_string().contains("nbds"), "{error}");

    let plain = Server::qemu_nbd(&["--image-opts", "driver=null-co,size=8M"]);
    let uri = plain.uri.clone().with_tls().with_tls_hostname("vault.example");
    let error = Client::connect(&uri, &with_tls(secured.client.path()))
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::Refused {
                refusal: Refusal::NoTls,
                ..
            }
        ),
        "{error:?}"
    );

    let error = Client::connect(&uri, &ConnectOptions::default())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("ConnectOptions::tls"), "{error}");
    let nameless = plain.uri.clone().with_tls();
    let error = Client::connect(&nameless, &with_tls(secured.client.path()))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("tls-hostname"), "{error}");
}

#[test]
fn credentials_that_are_not_whole() {
    let ca = authority("the authority");
    let reason = |directory: &TempDir| {
        TlsCredentials::from_directory(directory.path())
            .unwrap_err()
            .to_string()
    };
    let dir = directory();
    assert!(
        reason(&dir).contains("ca-cert.pem: there is no such file"),
        "{}",
        reason(&dir)
    );
    fs::write(dir.path().join("ca-cert.pem"), "not a certificate").unwrap();
    assert!(reason(&dir).contains("no certificate in it"), "{}", reason(&dir));
    issue(&ca, dir.path(), "client");
    assert!(TlsCredentials::from_directory(dir.path()).is_ok());
    fs::remove_file(dir.path().join("client-key.pem")).unwrap();
    assert!(
        reason(&dir).contains("client-key.pem: it is missing"),
        "{}",
        reason(&dir)
    );
    issue(&ca, dir.path(), "client");
    let key = KeyPair::generate().unwrap().serialize_pem();
    fs::write(dir.path().join("client-key.pem"), key).unwrap();
    assert!(reason(&dir).contains("client-key.pem"), "{}", reason(&dir));
}
