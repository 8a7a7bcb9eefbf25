//! Where an export is: the NBD URI, read and written as the NBD project's `doc/uri.md` defines it.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};

use crate::error::{Error, Result};
use crate::wire::MAX_STRING;

/// The port that IANA assigned to NBD.
pub const DEFAULT_PORT: u16 = 10809;

/// What stands for itself in the path and in a query value.
const KEPT: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~')
    .remove(b'/')
    .remove(b':')
    .remove(b'@');

/// What stands for itself in a host: a slash would end it, and before an `@` stands a user's name. A zone (`fe80::1%eth0`) is written
/// with an escaped percent sign, by RFC 6874.
const IN_HOST: &AsciiSet = &KEPT.add(b'/').add(b'@');

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// A TCP port.
    Tcp {
        /// A name or an address; an IPv6 address without its brackets.
        host: String,
        /// The port; [`DEFAULT_PORT`] when the URI has none.
        port: u16,
    },
    /// A unix socket. A path that begins with a NUL byte is a name in Linux's abstract namespace.
    Unix(PathBuf),
}

/// One export of one NBD server.
///
/// Four schemes: `nbd://HOST[:PORT]/EXPORT`, `nbd+unix:///EXPORT?socket=PATH`, and `nbds…` of either,
/// which *requires* TLS. `tls-hostname=NAME` says which name the server's certificate must carry when
/// it is not the host's. Other parameters are refused.
///
/// ```
/// use disksnap_nbd::Uri;
/// let uri: Uri = "nbd+unix:///vda?socket=/run/disk.sock".parse()?;
/// assert_eq!(uri.export(), "vda");
/// assert_eq!(uri, Uri::unix("/run/disk.sock", "vda"));
/// assert_eq!(uri.to_string(), "nbd+unix:///vda?socket=/run/disk.sock");
/// # Ok::<(), disksnap_nbd::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Uri {
    address: Address,
    export: String,
    tls: bool,
    tls_hostname: Option<String>,
}

impl Uri {
    /// An export behind a TCP port, without TLS. An empty `export` is the server's default export.
    #[must_use]
    pub fn tcp(host: impl Into<String>, port: u16, export: impl Into<String>) -> Self {
        let address = Address::Tcp {
            host: host.into(),
            port,
        };
        Self {
            address,
            export: export.into(),
            tls: false,
            tls_hostname: None,
        }
    }

    /// An export behind a unix socket, without TLS. An empty `export` is the server's default export.
    #[must_use]
    pub fn unix(socket: impl Into<PathBuf>, export: impl Into<String>) -> Self {
        let address = Address::Unix(socket.into());
        Self {
            address,
            export: export.into(),
            tls: false,
            tls_hostname: None,
        }
    }

    /// The same export, with TLS required.
    #[must_use]
    pub fn with_tls(mut self) -> Self {
        self.tls = true;
        self
    }

    /// The same export, whose server's certificate must carry `name`.
    #[must_use]
    pub fn with_tls_hostname(mut self, name: impl Into<String>) -> Self {
        self.tls_hostname = Some(name.into());
        self
    }

    /// The same server, another export.
    #[must_use]
    pub fn with_export(mut self, export: impl Into<String>) -> Self {
        self.export = export.into();
        self
    }

    /// Where the server listens.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The export's name; empty for the server's default export.
    #[must_use]
    pub fn export(&self) -> &str {
        &self.export
    }

    /// Whether TLS is required (`nbds`, `nbds+unix`).
    #[must_use]
    pub fn tls(&self) -> bool {
        self.tls
    }

    /// The name that the server's certificate must carry: `tls-hostname`, or else the TCP host.
    #[must_use]
    pub fn tls_server_name(&self) -> Option<&str> {
        match (&self.tls_hostname, &self.address) {
            (Some(name), _) => Some(name),
            (None, Address::Tcp { host, .. }) => Some(host),
            (None, Address::Unix(_)) => None,
        }
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = percent_encode(self.export.as_bytes(), KEPT);
        let tls = if self.tls { "s" } else { "" };
        let mut separator = '?';
        match &self.address {
            Address::Tcp { host, port } => {
                let (open, close) = if host.contains(':') { ("[", "]") } else { ("", "") };
                let host = percent_encode(host.as_bytes(), IN_HOST);
                write!(f, "nbd{tls}://{open}{host}{close}:{port}/{export}")?;
            }
            Address::Unix(path) => {
                let path = percent_encode(path.as_os_str().as_bytes(), KEPT);
                write!(f, "nbd{tls}+unix:///{export}?socket={path}")?;
                separator = '&';
            }
        }
        match &self.tls_hostname {
            Some(name) => {
                write!(
                    f,
                    "{separator}tls-hostname={}",
                    percent_encode(name.as_bytes(), KEPT)
                )
            }
            None => Ok(()),
        }
    }
}

impl FromStr for Uri {
    type Err = Error;

    /// # Errors
    /// [`Error::InvalidUri`], naming the part that is wrong.
    fn from_str(text: &str) -> Result<Self> {
        parse(text).map_err(|reason| Error::InvalidUri {
            uri: text.to_owned(),
            reason,
        })
    }
}

type Parsed<T> = std::result::Result<T, String>;

fn parse(text: &str) -> Parsed<Uri> {
    let (scheme, rest) = text.split_once(':').ok_or("it has no scheme, such as nbd://")?;
    let (tls, unix) = match scheme.to_ascii_lowercase().as_str() {
        "nbd" => (false, false),
        "nbds" => (true, false),
        "nbd+unix" => (false, true),
        "nbds+unix" => (true, true),
        other => {
            return Err(format!(
                "unknown scheme {other:?}: nbd, nbds, nbd+unix and nbds+unix are known"
            ));
        }
    };
    let rest = rest
        .strip_prefix("//")
        .ok_or_else(|| format!("expected // after {scheme}:"))?;
    if rest.contains('#') {
        return Err("it has a fragment (#…); write %23 for a # in a name".to_owned());
    }
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let export = decode_string(path, "the export's name")?;
    let query = Query::parse(query)?;
    let address = match (unix, query.socket) {
        (false, None) => parse_authority(authority)?,
        (true, Some(_)) if !authority.is_empty() => {
            return Err(format!(
                "a unix socket has no host: write {scheme}:///EXPORT?socket=PATH"
            ));
        }
        (true, Some(socket)) => Address::Unix(socket),
        (true, None) => return Err("a unix socket's path is missing: add ?socket=PATH".to_owned()),
        (false, Some(_)) => return Err(format!("socket= belongs to {scheme}+unix")),
    };
    Ok(Uri {
        address,
        export,
        tls,
        tls_hostname: query.tls_hostname,
    })
}

#[derive(Default)]
struct Query {
    socket: Option<PathBuf>,
    tls_hostname: Option<String>,
}

impl Query {
    fn parse(text: &str) -> Parsed<Self> {
        let mut query = Self::default();
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let repeated = match key {
                "socket" => query.socket.replace(decode_path(value)?).is_some(),
                "tls-hostname" => query
                    .tls_hostname
                    .replace(decode_string(value, "tls-hostname")?)
                    .is_some(),
                "tls-type" if value == "x509" => false,
                "tls-type" => return Err(format!("tls-type={value} is not supported, only x509 is")),
                "tls-verify-peer" if value == "1" => false,
                "tls-verify-peer" => return Err("the server's certificate is always verified".to_owned()),
                _ => {
                    return Err(format!(
                        "unknown parameter {key:?}: socket and tls-hostname are known"
                    ));
                }
            };
            if repeated {
                return Err(format!("{key} is given twice"));
            }
        }
        Ok(query)
    }
}

fn parse_authority(authority: &str) -> Parsed<Address> {
    if authority.contains('@') {
        return Err("a user name is not supported".to_owned());
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest.split_once(']').ok_or("the IPv6 address has no closing ]")?;
            let port = match after.strip_prefix(':') {
                Some(port) => Some(port),
                None if after.is_empty() => None,
                None => return Err(format!("unexpected {after:?} after the IPv6 address")),
            };
            (host, port)
        }
        None => match authority.split_once(':') {
            Some((_, port)) if port.contains(':') => {
                return Err("an IPv6 address must stand in brackets: [::1]".to_owned());
            }
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    let host = decode_string(host, "the host")?;
    let port = match port {
        None | Some("") => DEFAULT_PORT,
        Some(port) => port.parse().map_err(|_| format!("{port:?} is no port"))?,
    };
    let host = if host.is_empty() {
        "localhost".to_owned()
    } else {
        host
    };
    Ok(Address::Tcp { host, port })
}

fn decode_bytes(text: &str) -> Parsed<Vec<u8>> {
    let bytes = text.as_bytes();
    for (at, _) in text.match_indices('%') {
        let escape = bytes.get(at + 1..at + 3);
        if !escape.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit)) {
            return Err("a % is not followed by two hexadecimal digits (write %25 for a %)".to_owned());
        }
    }
    Ok(percent_decode_str(text).collect())
}

fn decode_string(text: &str, what: &str) -> Parsed<String> {
    let name = String::from_utf8(decode_bytes(text)?).map_err(|_| format!("{what} is not UTF-8"))?;
    if name.contains('\0') {
        return Err(format!("{what} contains a NUL character"));
    }
    if name.len() > MAX_STRING {
        return Err(format!("{what} is longer than {MAX_STRING} bytes"));
    }
    Ok(name)
}

fn decode_path(text: &str) -> Parsed<PathBuf> {
    let bytes = decode_bytes(text)?;
    // Only the first byte may be NUL: it marks Linux's abstract namespace.
    if bytes.is_empty() || bytes.iter().skip(1).any(|byte| *byte == 0) {
        return Err("the socket's path is empty or contains a NUL character".to_owned());
    }
    Ok(Path::new(&OsString::from_vec(bytes)).to_path_buf())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

    use proptest::prelude::*;

    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap()
    }

    fn reason(text: &str) -> String {
        match text.parse::<Uri>() {
            Err(Error::InvalidUri { reason, .. }) => reason,
            other => panic!("{text:?} gave {other:?}"),
        }
    }

    #[test]
    fn the_examples_of_the_specification() {
        for (text, export) in [
            ("nbd://example.com/disk", "disk"),
            ("nbd+unix:///disk?socket=sock", "disk"),
            ("nbd://example.com/", ""),
            ("nbd://example.com", ""),
            ("nbd://example.com//disk", "/disk"),
            ("nbd://example.com/hello%20world", "hello world"),
        ] {
            assert_eq!(uri(text).export(), export, "{text}");
        }
    }

    #[test]
    fn addresses() {
        assert_eq!(uri("nbd://h"), Uri::tcp("h", DEFAULT_PORT, ""));
        assert_eq!(uri("nbd://[::1]:7/x"), Uri::tcp("::1", 7, "x"));
        assert_eq!(uri("nbds://h:7/x"), Uri::tcp("h", 7, "x").with_tls());
        assert_eq!(uri("NBD+UNIX:///?socket=%00name"), Uri::unix("\0name", ""));
        let named = uri("nbds+unix:///x?socket=/s&tls-hostname=vault");
        assert_eq!(named.tls_server_name(), Some("vault"));
        assert_eq!(uri("nbd://h/").tls_server_name(), Some("h"));
        assert_eq!(uri("nbd+unix:///?socket=/s").tls_server_name(), None);
    }

    /// A host that is written as something else would be another host.
    #[test]
    fn an_odd_host_stays_in_its_place() {
        for (text, host) in [
            ("nbd://x%5d0%0a%3a", "x]0\n:"),
            ("nbd://1.%409", "1.@9"),
            ("nbd://a%2fb", "a/b"),
        ] {
            let read = uri(text);
            assert_eq!(read, Uri::tcp(host, DEFAULT_PORT, ""));
            assert_eq!(uri(&read.to_string()), read, "{read}");
        }
        assert_eq!(
            Uri::tcp("fe80::1%eth0", 7, "x").to_string(),
            "nbd://[fe80::1%25eth0]:7/x"
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            ("/dev/nbd0", "scheme"),
            ("http://h/", "unknown scheme"),
            ("nbd:h", "expected //"),
            ("nbd+unix:///x", "?socket=PATH"),
            ("nbd+unix://h/x?socket=/s", "no host"),
            ("nbd://h/x?socket=/s", "belongs to nbd+unix"),
            ("nbd://h:99999/", "no port"),
            ("nbd://::1/", "brackets"),
            ("nbd://[::1/", "closing ]"),
            ("nbd://u@h/", "user name"),
            ("nbd://h/%zz", "hexadecimal"),
            ("nbd://h/%00", "NUL"),
            ("nbd://h/%ff", "UTF-8"),
            ("nbd://h/?color=red", "unknown parameter"),
            ("nbd://h/?tls-verify-peer=0", "always verified"),
            ("nbd+unix:///?socket=/a&socket=/b", "twice"),
            ("nbd://h/#x", "fragment"),
        ] {
            assert!(reason(text).contains(part), "{text}: {}", reason(text));
        }
    }

    proptest! {
        #[test]
        fn written_and_read_again(
            host in "[a-z0-9.-]{1,20}|::1|fe80::1%eth0|[^\0]{1,9}",
            port: u16,
            socket in "\0?[^\0]{1,30}",
            export in "[^\0]{0,40}",
            tls: bool,
            hostname in proptest::option::of("[^\0]{0,12}"),
        ) {
            for mut uri in [Uri::tcp(host, port, export.clone()), Uri::unix(socket, export)] {
                uri.tls = tls;
                uri.tls_hostname = hostname.clone();
                let text = uri.to_string();
                prop_assert_eq!(text.parse::<Uri>().unwrap(), uri, "{}", text);
            }
        }

        #[test]
        fn no_text_panics(text in "(nbds?(\\+unix)?://)?.{0,60}") {
            let _ = text.parse::<Uri>();
        }
    }
}
