//! Plugging a disk over NBD into a running guest, and taking it out again (`blockdev-add`, `device_add`,
//! `device_del`).

use std::net::IpAddr;
use std::time::Duration;

use async_trait::async_trait;
use disksnap_core::{Command, Effect, Error, ErrorKind, Host, Hotplug, Listen, PlugDisk, Result};
use serde_json::{Map, Value, json};

use crate::control::QemuControl;
use crate::qmp::{Event, Events, Heard};

/// Where the devices that have an id are, in QEMU's object tree.
const PERIPHERAL: &str = "/machine/peripheral";
/// How often the device is looked for while the guest is letting it go and no event tells.
const POLL: Duration = Duration::from_millis(200);
/// For how long a node may still be held by a device that is gone.
const RELEASE: Duration = Duration::from_secs(5);

/// A place that a disk could be plugged into: the device's driver and its bus, or QEMU's own choice of one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Slot {
    driver: &'static str,
    bus: Option<String>,
}

#[async_trait]
impl Hotplug for QemuControl {
    async fn plug(&self, disk: &PlugDisk) -> Result<()> {
        let plugged = self.plug_unless_there(disk).await;
        plugged.map_err(|error| error.with("domain", &self.domain().id))
    }

    async fn unplug(&self, disk: &PlugDisk, patience: Duration) -> Result<()> {
        let unplugged = async {
            if self.has(&disk.device).await? {
                self.take_out(&disk.device, patience).await?;
            }
            self.drop_node(&disk.node).await?;
            self.drop_credentials(disk).await
        };
        unplugged
            .await
            .map_err(|error: Error| error.with("domain", &self.domain().id))
    }

    async fn plugged(&self, disk: &PlugDisk) -> Result<bool> {
        self.has(&disk.device).await
    }
}

impl QemuControl {
    async fn plug_unless_there(&self, disk: &PlugDisk) -> Result<()> {
        if self.has(&disk.device).await? {
            return Ok(());
        }
        // Left behind by a run that was killed; the server may be another one by now.
        self.drop_node(&disk.node).await?;
        self.drop_credentials(disk).await?;
        self.add_credentials(disk).await?;
        if let Err(error) = self.plug_on_node(disk).await {
            let failed = [
                self.drop_node(&disk.node).await,
                self.drop_credentials(disk).await,
            ];
            return Err(error.rollback_failed(failed.into_iter().filter_map(Result::err).collect()));
        }
        Ok(())
    }

    async fn plug_on_node(&self, disk: &PlugDisk) -> Result<()> {
        let add = Command::new("blockdev-add", node(disk)?);
        self.monitor(add)
            .await
            .map_err(|error| unreachable(error, disk))?;
        self.plug_somewhere(disk).await
    }

    /// The object that holds the client's certificate, for a server that speaks TLS.
    async fn add_credentials(&self, disk: &PlugDisk) -> Result<()> {
        let Some(tls) = &disk.tls else {
            return Ok(());
        };
        let dir = tls.credentials.to_str().ok_or_else(|| {
            Error::new(ErrorKind::Invalid, "the path of TLS credentials must be UTF-8")
                .with("credentials", tls.credentials.display())
        })?;
        let arguments = json!({"qom-type": "tls-creds-x509", "id": credentials(disk), "dir": dir,
            "endpoint": "client", "verify-peer": true});
        let added = self.monitor(Command::new("object-add", arguments)).await;
        added.map(drop).map_err(|error| {
            error.with("credentials", tls.credentials.display()).hint(
                "That domain's hypervisor must be able to read there ca-cert.pem, and client-cert.pem and client-key.pem \
                 where the server verifies its clients. Name another directory with --tls-credentials.",
            )
        })
    }

    /// Deletes that object; idempotent.
    async fn drop_credentials(&self, disk: &PlugDisk) -> Result<()> {
        if disk.tls.is_none() {
            return Ok(());
        }
        let delete = Command::new("object-del", json!({ "id": credentials(disk) }));
        match self.monitor(delete).await {
            Err(error) if !error.message().contains("not found") => Err(error),
            _ => Ok(()),
        }
    }

    /// Tries the free places one after another: which of them QEMU takes it alone knows.
    async fn plug_somewhere(&self, disk: &PlugDisk) -> Result<()> {
        let mut refused = None;
        for slot in self.slots().await? {
            let mut arguments = json!({"driver": slot.driver, "id": disk.device, "drive": disk.node,
                "serial": disk.serial});
            if let Some(bus) = &slot.bus {
                arguments["bus"] = bus.as_str().into();
            }
            match self.monitor(Command::new("device_add", arguments)).await {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Refused => refused = Some(error),
                Err(error) => return Err(error.leaving(Effect::Unknown)),
            }
        }
        let error = Error::new(
            ErrorKind::NoSpace,
            "the machine has no free place that a disk can be plugged into",
        )
        .hint(
            "Give the domain one and start it anew: <controller type='pci' model='pcie-root-port'/>, or QEMU's \
             -device pcie-root-port,id=rp1,chassis=1; or put what `disksnap attach --print` prints into its XML.",
        );
        Err(match refused {
            Some(cause) => error.because(cause),
            None => error,
        })
    }

    /// Free root ports first, then bridges, then what QEMU chooses by itself, then SCSI.
    async fn slots(&self) -> Result<Vec<Slot>> {
        let pci = self.monitor(Command::bare("query-pci")).await?;
        let (mut ports, mut bridges, mut scsi) = (Vec::new(), Vec::new(), Vec::new());
        for (id, kind) in self.devices().await? {
            let blk = |bus: &str| Slot {
                driver: "virtio-blk-pci",
                bus: Some(bus.to_owned()),
            };
            match kind.as_str() {
                "pcie-root-port" | "ioh3420" | "xio3130-downstream" if is_free(&pci, &id) => {
                    ports.push(blk(&id));
                }
                "pcie-pci-bridge" | "pci-bridge" => bridges.push(blk(&id)),
                "virtio-scsi-pci" | "virtio-scsi-pci-non-transitional" => scsi.push(Slot {
                    driver: "scsi-hd",
                    bus: Some(format!("{id}.0")),
                }),
                _ => {}
            }
        }
        let own_choice = Slot {
            driver: "virtio-blk-pci",
            bus: None,
        };
        Ok([ports, bridges, vec![own_choice], scsi].concat())
    }

    /// The devices that have an id, and what each is.
    async fn devices(&self) -> Result<Vec<(String, String)>> {
        let list = Command::new("qom-list", json!({ "path": PERIPHERAL }));
        let Value::Array(entries) = self.monitor(list).await? else {
            return Err(
                Error::new(ErrorKind::Protocol, "the monitor's list of devices is not a list")
                    .with("command", "qom-list"),
            );
        };
        let device = |entry: &Value| {
            let kind = entry["type"].as_str()?;
            let kind = kind.strip_prefix("child<")?.strip_suffix('>')?;
            Some((entry["name"].as_str()?.to_owned(), kind.to_owned()))
        };
        Ok(entries.iter().filter_map(device).collect())
    }

    async fn has(&self, device: &str) -> Result<bool> {
        Ok(self.devices().await?.iter().any(|(id, _)| id == device))
    }

    async fn take_out(&self, device: &str, patience: Duration) -> Result<()> {
        let mut events = self.session()?.subscribe();
        let ask = Command::new("device_del", json!({ "id": device }));
        match self.monitor(ask).await {
            Ok(_) => {}
            // Asked before: the guest has not answered yet.
            Err(error) if error.message().contains("in the process of unplug") => {}
            Err(error) if error.message().contains("not found") => return Ok(()),
            Err(error) => return Err(error.with("device", device)),
        }
        let gone = tokio::time::timeout(patience, self.until_gone(device, &mut events)).await;
        let gone = gone.unwrap_or_else(|_| {
            let what = format!("the guest has not let the disk go for {} s", patience.as_secs());
            Err(Error::new(ErrorKind::Timeout, what).hint(
                "It is still the guest's disk, and may be let go later. Stop using it there (unmount it, and see that \
                 the guest runs), then detach again; it also goes when that domain is shut down.",
            ))
        });
        gone.map_err(|error| error.with("device", device))
    }

    async fn until_gone(&self, device: &str, events: &mut Events) -> Result<()> {
        while self.has(device).await? {
            match tokio::time::timeout(POLL, events.next()).await {
                Ok(Heard::Event(event)) if refuses(&event, device) => {
                    let what = "the guest does not let the disk go";
                    return Err(Error::new(ErrorKind::Refused, what)
                        .hint("Stop using it there (unmount it), then detach again."));
                }
                // Any sign, or none in time: look again.
                _ => {}
            }
        }
        Ok(())
    }

    /// Deletes the node; idempotent.
    async fn drop_node(&self, node: &str) -> Result<()> {
        let delete = || Command::new("blockdev-del", json!({ "node-name": node }));
        let until = tokio::time::Instant::now() + RELEASE;
        loop {
            match self.monitor(delete()).await {
                Ok(_) => return Ok(()),
                Err(error) if error.message().contains("Failed to find node") => return Ok(()),
                // The device has gone from the list, and may be a moment away from its end.
                Err(error) if error.message().contains("in use") && tokio::time::Instant::now() < until => {
                    tokio::time::sleep(POLL / 4).await;
                }
                Err(error) => return Err(error.with("node", node)),
            }
        }
    }
}

fn refuses(event: &Event, device: &str) -> bool {
    event.name == "DEVICE_UNPLUG_GUEST_ERROR" && event.data["device"] == device
}

/// Whether nothing is behind the port: `query-pci` lists the devices of every bus within those of its bridge.
fn is_free(pci: &Value, port: &str) -> bool {
    fn find<'a>(devices: &'a Value, id: &str) -> Option<&'a Value> {
        devices.as_array()?.iter().find_map(|device| {
            if device["qdev_id"] == id {
                return Some(device);
            }
            find(&device["pci_bridge"]["devices"], id)
        })
    }
    let mut buses = pci.as_array().into_iter().flatten();
    let found = buses.find_map(|bus| find(&bus["devices"], port));
    found.is_some_and(|port| port["pci_bridge"]["devices"].as_array().is_none_or(Vec::is_empty))
}

fn node(disk: &PlugDisk) -> Result<Value> {
    let server = match &disk.listen {
        Listen::Unix(path) => {
            let path = path.to_str().ok_or_else(|| {
                Error::new(ErrorKind::Invalid, "the path of an export socket must be UTF-8")
                    .with("socket", path.display())
            })?;
            json!({"type": "unix", "path": path})
        }
        Listen::Tcp { address, port } => {
            json!({"type": "inet", "host": reachable(*address).to_string(), "port": port.to_string()})
        }
    };
    let mut node = Map::new();
    node.insert("driver".into(), "nbd".into());
    node.insert("node-name".into(), disk.node.as_str().into());
    node.insert("read-only".into(), true.into());
    node.insert("server".into(), server);
    node.insert("export".into(), disk.name.as_str().into());
    if let Some(tls) = &disk.tls {
        node.insert("tls-creds".into(), credentials(disk).into());
        if let Some(name) = &tls.hostname {
            node.insert("tls-hostname".into(), name.as_str().into());
        }
    }
    Ok(Value::Object(node))
}

/// The id of the object with a disk's TLS credentials.
fn credentials(disk: &PlugDisk) -> String {
    format!("{}-t", disk.device)
}

/// A server that listens on all addresses is reached on this host's own.
fn reachable(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) if v4.is_unspecified() => IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
        IpAddr::V6(v6) if v6.is_unspecified() => IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
        other => other,
    }
}

/// What keeps a hypervisor that runs as its own user from our socket, or one without a good certificate from a server.
fn unreachable(error: Error, disk: &PlugDisk) -> Error {
    if disk.tls.is_some() && error.kind() == ErrorKind::Refused {
        let what = format!(
            "that domain's hypervisor does not come to terms with {} on TLS",
            disk.listen
        );
        return Error::new(ErrorKind::Denied, what)
            .hint(
                "Either side may turn the other away: the server's certificate must be for the address, or for the name \
                 given with --tls-hostname, and be signed by the client's ca-cert.pem; and the client's by the server's.",
            )
            .because(error);
    }
    if error.kind() != ErrorKind::Refused || !error.message().contains("Permission denied") {
        return error.with("listen", &disk.listen);
    }
    let what = format!("that domain's hypervisor may not connect to {}", disk.listen);
    Error::new(ErrorKind::Denied, what)
        .hint(
            "It runs as another user. Start the server where it may connect: `disksnap export server start --listen \
             127.0.0.1:PORT` (with --images for what lies on this host), then attach again.",
        )
        .because(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_with_a_device_behind_it_is_not_free() {
        let pci = json!([{"bus": 0, "devices": [
            {"qdev_id": "net0"},
            {"qdev_id": "rp1", "pci_bridge": {"bus": {}, "devices": [{"qdev_id": "vda"}]}},
            {"qdev_id": "rp2", "pci_bridge": {"bus": {}}},
            {"qdev_id": "rp3", "pci_bridge": {"bus": {}, "devices": []}},
            {"qdev_id": "up", "pci_bridge": {"devices": [{"qdev_id": "down", "pci_bridge": {"devices": []}}]}},
        ]}]);
        let free = |id: &&str| is_free(&pci, id);
        let all = ["net0", "rp1", "rp2", "rp3", "up", "down", "other"];
        let found: Vec<&str> = all.into_iter().filter(free).collect();
        assert_eq!(found, ["net0", "rp2", "rp3", "down"]);
    }
}
