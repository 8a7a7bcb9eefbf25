//! Images that are NBD exports: opening one, and whether its server is there.

use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::time::Duration;

pub(crate) use disksnap_image_file::export::{source, uri, uri_of};
use disksnap_nbd::{Address, Uri};
use serde_json::{Value, json};

/// How long a server may take to be reached, when it is looked at.
const PATIENCE: Duration = Duration::from_secs(2);

/// What opens it (`BlockdevOptionsNbd`).
pub(crate) fn options(uri: &Uri) -> Value {
    let server = match uri.address() {
        Address::Tcp { host, port } => json!({ "type": "inet", "host": host, "port": port.to_string() }),
        Address::Unix(socket) => json!({ "type": "unix", "path": socket }),
        _ => Value::Null,
    };
    json!({ "driver": "nbd", "server": server, "export": uri.export() })
}

/// Why its server cannot be reached, if it cannot.
pub(crate) fn unreachable(uri: &Uri) -> Option<String> {
    let reached = match uri.address() {
        Address::Unix(socket) => UnixStream::connect(socket).map(drop),
        Address::Tcp { host, port } => (host.as_str(), *port).to_socket_addrs().and_then(|mut all| {
            let first = all.next().ok_or(std::io::ErrorKind::NotFound)?;
            TcpStream::connect_timeout(&first, PATIENCE).map(drop)
        }),
        _ => Ok(()),
    };
    reached
        .err()
        .map(|error| format!("the server of {uri} cannot be reached: {error}"))
}
