//! Images that are NBD exports: the URI by which a layer and the headers of overlays name one, and its `<source>`.

use std::path::Path;

use disksnap_core::{NetworkHost, Source};
use disksnap_nbd::{Address, Uri};

/// The port where none is named.
const PORT: u16 = 10809;

/// The URI that a layer's place is, where it is one and no path.
#[must_use]
pub fn uri_of(place: &Path) -> Option<Uri> {
    // QEMU names the default export without the slash.
    let text = place.to_str().filter(|text| text.starts_with("nbd"))?;
    text.replacen("nbd+unix://?", "nbd+unix:///?", 1).parse().ok()
}

/// The URI of a network source.
///
/// # Errors
/// Why the header of an overlay cannot name it.
pub fn uri(source: &Source) -> Result<Uri, String> {
    let Source::Network {
        protocol,
        name,
        hosts,
        tls,
    } = source
    else {
        return Err(format!("the layer {source} is neither a file nor a block device"));
    };
    if protocol != "nbd" || *tls || hosts.len() != 1 {
        return Err(format!(
            "{source} is a network disk that the header of an overlay cannot name: of those it can name NBD exports, of \
             one server, without TLS"
        ));
    }
    let export = name.clone().unwrap_or_default();
    Ok(match &hosts[0] {
        NetworkHost::Unix { socket } => Uri::unix(socket, export),
        NetworkHost::Tcp { name, port } => Uri::tcp(name, port.unwrap_or(PORT), export),
    })
}

/// As the domain's document names it.
#[must_use]
pub fn source(uri: &Uri) -> Source {
    let host = match uri.address() {
        Address::Tcp { host, port } => Some(NetworkHost::Tcp {
            name: host.clone(),
            port: Some(*port),
        }),
        Address::Unix(socket) => Some(NetworkHost::Unix {
            socket: socket.clone(),
        }),
        _ => None,
    };
    Source::Network {
        protocol: "nbd".to_owned(),
        name: Some(uri.export().to_owned()).filter(|name| !name.is_empty()),
        hosts: host.into_iter().collect(),
        tls: uri.tls(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn what_qemu_says_and_what_the_document_says_are_one() {
        for (text, name) in [
            ("nbd+unix:///vda?socket=/run/a b.sock", Some("vda")),
            ("nbd+unix://?socket=/run/s", None),
            ("nbd://localhost:10810/x", Some("x")),
        ] {
            let uri = uri_of(Path::new(text)).unwrap();
            let source = source(&uri);
            assert!(matches!(&source, Source::Network { name: found, .. } if found.as_deref() == name));
            assert_eq!(super::uri(&source).unwrap(), uri);
        }
        assert_eq!(uri_of(Path::new("/srv/nbd://x")), None);
        let rbd = Source::Network {
            protocol: "rbd".to_owned(),
            name: None,
            hosts: Vec::new(),
            tls: false,
        };
        assert!(super::uri(&rbd).is_err());
    }
}
