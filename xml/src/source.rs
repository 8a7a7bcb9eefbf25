//! `<source>` and `<backingStore>`: where a disk's bytes are, as libvirt's domain format says it.

use std::path::{Path, PathBuf};

use disksnap_core::{BackingStore, DataStore, Error, ErrorKind, NetworkHost, Result, Source};

use crate::tree::Elem;
use crate::write::Element;

/// Reads a `<source>`, whose kind is the `type` attribute of the element around it.
///
/// `None` where it names nothing: an empty drive.
pub(crate) fn read(source: Elem<'_, '_>, kind: &str) -> Result<Option<Source>> {
    Ok(match kind {
        "file" => path(source, "file")?.map(|file| Source::File { file }),
        "block" => path(source, "dev")?.map(|dev| Source::Block { dev }),
        "dir" => path(source, "dir")?.map(|dir| Source::Dir { dir }),
        "network" => Some(network(source)?),
        "volume" => Some(Source::Volume {
            pool: source.required("pool", "the name of a storage pool")?.to_owned(),
            volume: source
                .required("volume", "the name of a volume in the pool")?
                .to_owned(),
        }),
        other => Some(Source::Other {
            kind: other.to_owned(),
        }),
    })
}

fn path(elem: Elem<'_, '_>, name: &str) -> Result<Option<PathBuf>> {
    match elem.attr(name) {
        None => Ok(None),
        Some(_) => absolute(elem, name).map(Some),
    }
}

/// A path in an attribute, which must be absolute.
pub(crate) fn absolute(elem: Elem<'_, '_>, name: &str) -> Result<PathBuf> {
    let path = Path::new(elem.required(name, "an absolute path")?);
    if path.is_absolute() {
        return Ok(path.to_path_buf());
    }
    Err(elem.attr_fault(
        name,
        format!("{name}='{}': expected an absolute path", path.display()),
    ))
}

fn network(source: Elem<'_, '_>) -> Result<Source> {
    Ok(Source::Network {
        protocol: source
            .required("protocol", "such as nbd, rbd or iscsi")?
            .to_owned(),
        name: source.attr("name").map(str::to_owned),
        hosts: source.all("host").map(host).collect::<Result<_>>()?,
        tls: source.yes_no("tls")?.unwrap_or(false),
    })
}

fn host(elem: Elem<'_, '_>) -> Result<NetworkHost> {
    let unix = match elem.attr("transport") {
        None => false,
        Some(_) => elem.choice("transport", &[("tcp", false), ("rdma", false), ("unix", true)])?,
    };
    if unix {
        return Ok(NetworkHost::Unix {
            socket: absolute(elem, "socket")?,
        });
    }
    let port = match elem.attr("port") {
        None => None,
        Some(_) => Some(port(elem)?),
    };
    Ok(NetworkHost::Tcp {
        name: elem.required("name", "a host name or address")?.to_owned(),
        port,
    })
}

/// A TCP port, from 1 to 65535.
pub(crate) fn port(elem: Elem<'_, '_>) -> Result<u16> {
    let text = elem.required("port", "a number from 1 to 65535")?;
    match text.parse() {
        Ok(port) if port != 0 && text.bytes().all(|b| b.is_ascii_digit()) => Ok(port),
        _ => Err(elem.attr_fault(
            "port",
            format!("port='{text}': expected a number from 1 to 65535"),
        )),
    }
}

/// Reads a `<backingStore>` and all below it; `None` where it is empty, which ends the chain.
pub(crate) fn read_backing(elem: Elem<'_, '_>) -> Result<Option<BackingStore>> {
    let format = elem.child("format")?;
    let Some(source) = elem.child("source")? else {
        if format.is_none() && elem.attr("type").is_none() {
            return Ok(None);
        }
        return Err(
            elem.fault("<backingStore> lacks its <source>: expected one, or <backingStore/>".to_owned())
        );
    };
    let kind = elem.attr("type").unwrap_or("file");
    let below = elem
        .child("backingStore")?
        .map(read_backing)
        .transpose()?
        .flatten();
    Ok(Some(BackingStore {
        format: format
            .map(|f| f.required("type", "an image format"))
            .transpose()?
            .map(str::to_owned),
        source: read(source, kind)?.ok_or_else(|| {
            source.fault("<source> in <backingStore> names nothing: expected an image".to_owned())
        })?,
        data_store: read_data_store(source)?,
        backing: below.map(Box::new),
    }))
}

/// Reads the `<dataStore>` of a `<source>`, if it has one: libvirt's, since 10.10.
pub(crate) fn read_data_store(source: Elem<'_, '_>) -> Result<Option<DataStore>> {
    let Some(elem) = source.child("dataStore")? else {
        return Ok(None);
    };
    let place = elem.required_child("source", "<source>, where the data is")?;
    let format = elem.child("format")?;
    let named = read(place, elem.attr("type").unwrap_or("file"))?;
    Ok(Some(DataStore {
        format: format
            .map(|f| f.required("type", "an image format"))
            .transpose()?
            .map(str::to_owned),
        source: named.ok_or_else(|| {
            place.fault("<source> in <dataStore> names nothing: expected a place".to_owned())
        })?,
    }))
}

/// `<dataStore>` as libvirt's schema wants it.
///
/// # Errors
/// As [`source_element`].
pub(crate) fn data_store_element(data: &DataStore, carry: Carry<'_>) -> Result<Element> {
    let format = data.format.as_ref();
    let place = match carry(&data.source) {
        Some(Carried { text, indent, .. }) => Element::verbatim(text, indent),
        None => source_element(&data.source)?,
    };
    Ok(Element::new("dataStore")
        .attr("type", data.source.kind())
        .children(format.map(|format| Element::new("format").attr("type", format)))
        .child(place))
}

/// Where a piece of a source stands in an existing document, for carrying it over.
pub(crate) type Carry<'c> = &'c dyn Fn(&Source) -> Option<Carried>;

/// A source's own text in a document.
#[derive(Debug, Clone)]
pub(crate) struct Carried {
    /// The `<source>` element.
    pub(crate) text: String,
    /// How its line is indented.
    pub(crate) indent: String,
    /// Its `<dataStore>`.
    pub(crate) data: Option<DataStore>,
    /// Whether the document says that nothing is below this layer.
    pub(crate) last: bool,
}

/// `<source …/>` as libvirt's schema wants it; its kind ([`Source::kind`]) is the `type` attribute of
/// the element around it.
///
/// # Errors
/// `Unsupported` for [`Source::Other`], which disksnap does not look into, and for a path that is not
/// Unicode or has characters that XML cannot hold.
pub fn source_element(source: &Source) -> Result<Element> {
    let element = Element::new("source");
    Ok(match source {
        Source::File { file } => element.attr("file", unicode(file)?),
        Source::Block { dev } => element.attr("dev", unicode(dev)?),
        Source::Dir { dir } => element.attr("dir", unicode(dir)?),
        Source::Volume { pool, volume } => element.attr("pool", pool).attr("volume", volume),
        Source::Network {
            protocol,
            name,
            hosts,
            tls,
        } => element
            .attr("protocol", protocol)
            .attr_if("name", name.as_ref())
            .attr_if("tls", tls.then_some("yes"))
            .children(hosts.iter().map(host_element).collect::<Result<Vec<_>>>()?),
        other => {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("a source of the type '{}' cannot be written anew", other.kind()),
            )
            .hint("Sources of this type are only carried over from the domain's own document."));
        }
    })
}

fn host_element(host: &NetworkHost) -> Result<Element> {
    let element = Element::new("host");
    Ok(match host {
        NetworkHost::Unix { socket } => element.attr("transport", "unix").attr("socket", unicode(socket)?),
        NetworkHost::Tcp { name, port } => element.attr("name", name).attr_if("port", *port),
    })
}

/// A path as text.
///
/// # Errors
/// `Unsupported` when it is not Unicode.
pub(crate) fn unicode(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            format!(
                "the path {} is not Unicode, and XML cannot hold it",
                path.display()
            ),
        )
    })
}

/// `<backingStore>` as libvirt's schema wants it, with all layers below.
///
/// A layer whose format is not known, and what is below it, is left out: libvirt then looks into the
/// image above, where it would refuse a `<backingStore>` without a `<format>`. Below a raw layer
/// there is nothing, and `<backingStore/>` says so. `None` when nothing is left to write.
///
/// # Errors
/// As [`source_element`].
pub fn backing_store_element(backing: &BackingStore) -> Result<Option<Element>> {
    backing_with(backing, &|_| None)
}

pub(crate) fn backing_with(backing: &BackingStore, carry: Carry<'_>) -> Result<Option<Element>> {
    let Some(format) = &backing.format else {
        return Ok(None);
    };
    let carried = carry(&backing.source);
    let last = carried.as_ref().is_some_and(|c| c.last) || format == "raw";
    let element = Element::new("backingStore")
        .attr("type", backing.source.kind())
        .child(Element::new("format").attr("type", format));
    let data = backing.data_store.as_ref();
    let element = if let Some(Carried { text, indent, .. }) = carried.filter(|c| c.data.as_ref() == data) {
        element.child(Element::verbatim(text, indent))
    } else {
        let data = data.map(|data| data_store_element(data, carry)).transpose()?;
        element.child(source_element(&backing.source)?.children(data))
    };
    Ok(Some(match &backing.backing {
        Some(below) => element.children(backing_with(below, carry)?),
        None if last => element.child(Element::new("backingStore")),
        None => element,
    }))
}
