//! How to connect: the options, opening the stream, and what can be asked of a server without
//! entering an export.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use crate::error::{Error, Result};
use crate::handshake::{BoxedStream, Negotiation};
use crate::tls::TlsCredentials;
use crate::uri::{Address, Uri};
use crate::wire::ListedExport;

/// How to connect.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// The metadata contexts to ask for, such as [`BASE_ALLOCATION`](crate::BASE_ALLOCATION) and
    /// `qemu:dirty-bitmap:NAME`. One that the server does not have is no error until it is used:
    /// [`Client::has_context`](crate::Client::has_context) tells.
    pub meta_contexts: Vec<String>,
    /// Credentials for TLS. With them, and with a `nbds` URI, TLS is required: there is no falling
    /// back to plain text.
    pub tls: Option<TlsCredentials>,
    /// How long connecting may take, and again how long the handshake may take.
    pub handshake_timeout: Duration,
    /// Leave a connection whose first request is not answered in this time, and connect anew, a few times before it is waited for:
    /// see [`Client::connect`](crate::Client::connect). `None`: no request is made before the first that is wanted.
    pub first_answer: Option<Duration>,
    /// How long the server may send nothing at all while it has requests to answer. `None`: for ever.
    pub idle_timeout: Option<Duration>,
    /// How many bytes of reads and writes may be in flight on a connection. Further requests wait.
    pub max_in_flight: usize,
}

impl Default for ConnectOptions {
    /// No contexts, no TLS, 10 s for the handshake, 60 s of silence, 64 MiB in flight.
    fn default() -> Self {
        Self {
            meta_contexts: Vec::new(),
            tls: None,
            handshake_timeout: Duration::from_secs(10),
            first_answer: None,
            idle_timeout: Some(Duration::from_mins(1)),
            max_in_flight: 64 << 20,
        }
    }
}

/// The exports of a server, in its order (`NBD_OPT_LIST`). The URI's own export plays no part.
///
/// # Errors
/// Those of [`Client::connect`](crate::Client::connect); [`Refusal::Policy`](crate::Refusal::Policy) from a server that does
/// not list its exports.
pub async fn list_exports(uri: &Uri, options: &ConnectOptions) -> Result<Vec<ListedExport>> {
    let uri = uri.clone().with_export("");
    let (target, negotiation) = negotiate(&uri, options).await?;
    within(options.handshake_timeout, &target, HANDSHAKE, negotiation.list()).await
}

/// The metadata contexts of an export that match the queries (`NBD_OPT_LIST_META_CONTEXT`), such as
/// `base:` or `qemu:dirty-bitmap:`. No query means all. [`ConnectOptions::meta_contexts`] plays no part.
///
/// # Errors
/// Those of [`Client::connect`](crate::Client::connect).
pub async fn list_meta_contexts(
    uri: &Uri,
    options: &ConnectOptions,
    queries: &[String],
) -> Result<Vec<String>> {
    let (target, negotiation) = negotiate(uri, options).await?;
    let listing = negotiation.list_contexts(uri.export(), queries);
    within(options.handshake_timeout, &target, HANDSHAKE, listing).await
}

pub(crate) const HANDSHAKE: &str = "the handshake went on";

async fn negotiate(uri: &Uri, options: &ConnectOptions) -> Result<(Arc<str>, Negotiation)> {
    let target: Arc<str> = uri.to_string().into();
    let stream = open(uri, &target, options.handshake_timeout).await?;
    let begin = Negotiation::begin(stream, uri, Arc::clone(&target), options.tls.as_ref());
    let negotiation = within(options.handshake_timeout, &target, HANDSHAKE, begin).await?;
    Ok((target, negotiation))
}

pub(crate) async fn open(uri: &Uri, target: &Arc<str>, patience: Duration) -> Result<BoxedStream> {
    let opening = async {
        let opened: io::Result<BoxedStream> = match uri.address() {
            Address::Unix(path) => UnixStream::connect(path).await.map(|s| Box::new(s) as _),
            Address::Tcp { host, port } => match TcpStream::connect((host.as_str(), *port)).await {
                // Small requests must not wait for one another's acknowledgements.
                Ok(stream) => stream.set_nodelay(true).map(|()| Box::new(stream) as _),
                Err(error) => Err(error),
            },
        };
        opened.map_err(|e| Error::Connect {
            target: Arc::clone(target),
            source: Arc::new(e),
        })
    };
    within(patience, target, "connecting to it", opening).await
}

pub(crate) async fn within<T>(
    patience: Duration,
    target: &Arc<str>,
    during: &'static str,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    match timeout(patience, work).await {
        Ok(result) => result,
        Err(_) => Err(Error::Timeout {
            target: Arc::clone(target),
            during,
            after: patience,
        }),
    }
}
