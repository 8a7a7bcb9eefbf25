//! TLS: x509 credentials from a directory laid out as QEMU's `tls-creds-x509` wants it, and the
//! upgrade of a connection.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::client::{ClientConfig, WebPkiServerVerifier};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName,
};
use tokio_rustls::rustls::{self, RootCertStore};

use crate::error::{Error, Result};
use crate::handshake::BoxedStream;

const CA_CERT: &str = "ca-cert.pem";
const CA_CRL: &str = "ca-crl.pem";
const CLIENT_CERT: &str = "client-cert.pem";
const CLIENT_KEY: &str = "client-key.pem";

/// Whom we trust, and who we are.
#[derive(Clone)]
pub struct TlsCredentials {
    directory: PathBuf,
    config: Arc<ClientConfig>,
}

impl fmt::Debug for TlsCredentials {
    /// Shows where they came from, never the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsCredentials")
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

impl TlsCredentials {
    /// Reads the files of QEMU's `tls-creds-x509` (its documentation: "TLS setup for network
    /// services") from `directory`:
    ///
    /// - `ca-cert.pem`, required: the server's certificate must come from this authority;
    /// - `ca-crl.pem`, if there: certificates that the authority took back;
    /// - `client-cert.pem` and `client-key.pem`, both or neither: what we show to a server that asks.
    ///
    /// The files are read once, here. A key with a password is not supported.
    ///
    /// # Errors
    /// [`Error::Credentials`], with the file that is missing or wrong.
    pub fn from_directory(directory: impl Into<PathBuf>) -> Result<Self> {
        let directory = directory.into();
        let verifier = verifier(&directory)?;
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| wrong(&directory, &error))?
            .with_webpki_verifier(verifier);
        let config = match client_identity(&directory)? {
            Some((chain, key)) => builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| wrong(&directory.join(CLIENT_KEY), &error))?,
            None => builder.with_no_client_auth(),
        };
        Ok(Self {
            directory,
            config: Arc::new(config),
        })
    }

    /// Secures `stream`. The server's certificate must carry `name`.
    pub(crate) async fn secure(&self, stream: BoxedStream, name: &str) -> io::Result<BoxedStream> {
        let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
        let connector = TlsConnector::from(Arc::clone(&self.config));
        Ok(Box::new(connector.connect(name, stream).await?))
    }
}

/// Whether the TLS library is what failed, and not the connection below it.
pub(crate) fn is_tls_error(error: &io::Error) -> bool {
    error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>())
        .is_some()
}

fn verifier(directory: &Path) -> Result<Arc<WebPkiServerVerifier>> {
    let path = directory.join(CA_CERT);
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&path)? {
        roots.add(certificate).map_err(|error| wrong(&path, &error))?;
    }
    let provider = Arc::new(ring::default_provider());
    let builder = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider);
    let crl_path = directory.join(CA_CRL);
    let builder = match read(&crl_path)? {
        // An authority further up may have no list: that is no reason to refuse.
        Some(pem) => builder
            .with_crls(
                CertificateRevocationListDer::pem_slice_iter(&pem)
                    .collect::<Result<Vec<_>, _>>()
                    .map_err(|error| wrong(&crl_path, &error))?,
            )
            .allow_unknown_revocation_status(),
        None => builder,
    };
    builder.build().map_err(|error| wrong(&path, &error))
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn client_identity(directory: &Path) -> Result<Option<Identity>> {
    let (cert_path, key_path) = (directory.join(CLIENT_CERT), directory.join(CLIENT_KEY));
    match (read(&cert_path)?, read(&key_path)?) {
        (None, None) => Ok(None),
        (Some(_), None) => Err(wrong(&key_path, &format!("it is missing beside {CLIENT_CERT}"))),
        (None, Some(_)) => Err(wrong(&cert_path, &format!("it is missing beside {CLIENT_KEY}"))),
        (Some(_), Some(key)) => {
            let key = PrivateKeyDer::from_pem_slice(&key).map_err(|error| wrong(&key_path, &error))?;
            Ok(Some((certificates(&cert_path)?, key)))
        }
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let pem = read(path)?.ok_or_else(|| wrong(path, &"there is no such file"))?;
    let certificates = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| wrong(path, &error))?;
    if certificates.is_empty() {
        return Err(wrong(path, &"there is no certificate in it"));
    }
    Ok(certificates)
}

/// The file's contents, or nothing if there is no such file.
fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(wrong(path, &error)),
    }
}

fn wrong(path: &Path, reason: &dyn fmt::Display) -> Error {
    Error::Credentials {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}
