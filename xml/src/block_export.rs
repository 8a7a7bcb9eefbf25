//! `<blockexport>`: what is to be exported and where, and what is being exported.

use std::collections::HashSet;
use std::net::IpAddr;

use disksnap_core::{
    Alias, CheckpointName, ClientName, Export, ExportDisk, ExportRequest, Listen, NbdServer, Result, Serving,
    Tls,
};

use crate::source::{absolute, port, unicode};
use crate::tree::{Elem, Tree};
use crate::write::Element;

/// Reads a `<blockexport>` document (`seeds/fleecing-pull-backup-rfc.txt`, section 2).
///
/// `allow_remote` is never set: only the caller can say that.
///
/// # Errors
/// `Invalid` for a fault of the document.
pub fn export_request(text: &str) -> Result<ExportRequest> {
    let tree = Tree::parse(text)?;
    let root = tree.root_named("blockexport")?;
    root.only_attrs(&["type", "port"])?;
    root.only_children(None, &["listen", "disk", "tls"])?;
    root.required("type", "the protocol 'nbd'")?;
    root.choice("type", &[("nbd", ())])?;
    let listen = listen(root)?;
    let tls = root
        .child("tls")?
        .map(|elem| tls(elem, listen.as_ref()))
        .transpose()?;
    let (mut disks, mut seen) = (Vec::new(), HashSet::new());
    for elem in root.all("disk") {
        let disk = disk(elem)?;
        if !seen.insert(disk.alias.clone()) {
            return Err(elem.attr_fault(
                "name",
                format!("the disk '{}' comes twice: expected it once", disk.alias),
            ));
        }
        disks.push(disk);
    }
    if disks.is_empty() {
        return Err(root.fault(
            "<blockexport> lacks its <disk>: expected <disk name='…'/> with the alias of a disk in a snapshot"
                .to_owned(),
        ));
    }
    Ok(ExportRequest {
        listen,
        tls,
        allow_remote: false,
        disks,
    })
}

fn listen(root: Elem<'_, '_>) -> Result<Option<Listen>> {
    let Some(elem) = root.child("listen")? else {
        return match root.attr("port") {
            None => Ok(None),
            Some(_) => Err(root.attr_fault(
                "port",
                "a port without an address: expected <listen type='address' address='127.0.0.1'/> with it"
                    .to_owned(),
            )),
        };
    };
    elem.only_children(None, &[])?;
    elem.required("type", "'address' or 'socket'")?;
    if elem.choice("type", &[("address", false), ("socket", true)])? {
        elem.only_attrs(&["type", "socket"])?;
        if root.attr("port").is_some() {
            return Err(root.attr_fault(
                "port",
                "a unix socket has no port: expected none with <listen type='socket'>".to_owned(),
            ));
        }
        return absolute(elem, "socket").map(Listen::Unix).map(Some);
    }
    elem.only_attrs(&["type", "address"])?;
    let address = elem.required("address", "an IP address of this host")?;
    let address: IpAddr = address.parse().map_err(|_| {
        elem.attr_fault(
            "address",
            format!("address='{address}': expected an IP address, such as 127.0.0.1 or ::1"),
        )
    })?;
    Ok(Some(Listen::Tcp {
        address,
        port: port(root)?,
    }))
}

fn tls(elem: Elem<'_, '_>, listen: Option<&Listen>) -> Result<Tls> {
    elem.only_attrs(&["credentials", "verify"])?;
    elem.only_children(None, &["client"])?;
    if !matches!(listen, Some(Listen::Tcp { .. })) {
        return Err(
            elem.fault("<tls> without a TCP address: expected <listen type='address' …/> with it".to_owned())
        );
    }
    let tls = Tls {
        credentials: absolute(elem, "credentials")?,
        verify_client: elem.yes_no("verify")?.unwrap_or(true),
        allowed: elem.all("client").map(client).collect::<Result<_>>()?,
    };
    if !tls.verify_client && !tls.allowed.is_empty() {
        return Err(elem.attr_fault(
            "verify",
            "<client> with verify='no': expected verify='yes', since only a verified client has a name"
                .to_owned(),
        ));
    }
    Ok(tls)
}

fn client(elem: Elem<'_, '_>) -> Result<ClientName> {
    elem.only_attrs(&["name"])?;
    elem.only_children(None, &[])?;
    let name = elem.required("name", "the distinguished name of a client's certificate")?;
    name.parse()
        .map_err(|error: disksnap_core::Error| elem.attr_fault("name", error.message().to_owned()))
}

fn disk(elem: Elem<'_, '_>) -> Result<ExportDisk> {
    elem.only_attrs(&["name", "exportname", "checkpoint"])?;
    elem.only_children(None, &[])?;
    let alias = elem.required("name", "the alias of a disk in a snapshot")?;
    let checkpoint = elem.attr("checkpoint").map(|name| {
        let wrong = |error: disksnap_core::Error| elem.attr_fault("checkpoint", error.message().to_owned());
        name.parse::<CheckpointName>().map_err(wrong)
    });
    let checkpoint = checkpoint.transpose()?;
    let name = match elem.attr("exportname") {
        None => None,
        Some(_) => Some(
            elem.required("exportname", "the name that NBD clients ask for")?
                .to_owned(),
        ),
    };
    Ok(ExportDisk {
        alias: Alias(alias.to_owned()),
        name,
        checkpoint,
    })
}

/// A `<blockexport>` document of what a domain serves. Read by [`export_request`] it asks for the same.
///
/// # Errors
/// `Unsupported` for a path or name that XML cannot hold.
pub fn export_document(server: &NbdServer, exports: &[Export]) -> Result<String> {
    export_element(server, exports)?.to_document()
}

/// What a domain serves: its `<blockexport>` where one server runs, else `<blockexports>` with one for each.
///
/// # Errors
/// `Unsupported` for a path or name that XML cannot hold.
pub fn serving_document(serving: &Serving) -> Result<String> {
    match serving_elements(serving)?.as_slice() {
        [one] => one.to_document(),
        all => Element::new("blockexports").children(all.to_vec()).to_document(),
    }
}

pub(crate) fn serving_elements(serving: &Serving) -> Result<Vec<Element>> {
    let servers = serving.by_server();
    servers
        .iter()
        .map(|(server, exports)| export_element(server, exports))
        .collect()
}

/// A `<blockexport>` document of a request.
///
/// # Errors
/// `Unsupported` for a path or name that XML cannot hold.
pub fn export_request_document(request: &ExportRequest) -> Result<String> {
    let disks = request
        .disks
        .iter()
        .map(|d| (&d.alias, d.name.as_deref(), d.checkpoint.as_ref()));
    element(request.listen.as_ref(), request.tls.as_ref(), disks)?.to_document()
}

pub(crate) fn export_element(server: &NbdServer, exports: &[Export]) -> Result<Element> {
    let disks = exports.iter().map(|export| {
        let name = export.node.name.as_str();
        let since = export.changes.as_ref().map(|changes| &changes.since);
        (&export.alias, (name != export.alias.0).then_some(name), since)
    });
    element(Some(&server.listen), server.tls.as_ref(), disks)
}

fn element<'a>(
    listen: Option<&Listen>,
    tls: Option<&Tls>,
    disks: impl Iterator<Item = (&'a Alias, Option<&'a str>, Option<&'a CheckpointName>)>,
) -> Result<Element> {
    let root = Element::new("blockexport").attr("type", "nbd");
    let root = match listen {
        None => root,
        Some(Listen::Tcp { address, port }) => root.attr("port", port).child(
            Element::new("listen")
                .attr("type", "address")
                .attr("address", address),
        ),
        Some(Listen::Unix(path)) => root.child(
            Element::new("listen")
                .attr("type", "socket")
                .attr("socket", unicode(path)?),
        ),
    };
    let tls = tls.map(|tls| {
        let verify = if tls.verify_client { "yes" } else { "no" };
        Ok(Element::new("tls")
            .attr("credentials", unicode(&tls.credentials)?)
            .attr("verify", verify)
            .children(
                tls.allowed
                    .iter()
                    .map(|name| Element::new("client").attr("name", name)),
            ))
    });
    Ok(root
        .children(tls.transpose()?)
        .children(disks.map(|(alias, name, since)| {
            Element::new("disk")
                .attr("name", alias)
                .attr_if("exportname", name)
                .attr_if("checkpoint", since)
        })))
}
