//! Reading the block graph: five queries in one go, and what is kept of their answers.

use super::{
    BTreeMap, BTreeSet, Bitmap, Child, Command, Device, Error, ErrorKind, ExportedNode, Graph, Host, Job,
};
use super::{Node, Path, PathBuf, Result, Value, json};

impl Graph {
    /// Reads the graph of the domain's hypervisor. Changes nothing.
    ///
    /// # Errors
    /// The monitor's; `Protocol` when an answer is not what the protocol says.
    pub async fn read(host: &dyn Host) -> Result<Self> {
        let ask = vec![
            Command::new("query-named-block-nodes", json!({"flat": true})),
            Command::bare("query-block"),
            Command::bare("query-block-jobs"),
            Command::bare("query-block-exports"),
            Command::bare("x-debug-query-block-graph"),
        ];
        let mut answers = host.monitor_each(ask).await?.into_iter();
        let mut next = || {
            let lost = || Err(Error::new(ErrorKind::Internal, "an answer was lost"));
            answers.next().unwrap_or_else(lost)
        };
        let (nodes, devices, jobs, exports) = (next()?, next()?, next()?, next()?);
        // A command for debugging may go; the nodes of the QEMUs where it could tell their children themselves.
        let edges = next().ok();
        Self::parse(&nodes, &devices, &jobs, &exports, edges.as_ref())
    }

    pub(crate) fn parse(
        nodes: &Value,
        devices: &Value,
        jobs: &Value,
        exports: &Value,
        edges: Option<&Value>,
    ) -> Result<Self> {
        let nodes = list(nodes, "query-named-block-nodes")?.iter().filter_map(node);
        let mut graph = Self {
            nodes: nodes.map(|n| (n.name.clone(), n)).collect(),
            devices: list(devices, "query-block")?.iter().filter_map(device).collect(),
            jobs: list(jobs, "query-block-jobs")?.iter().filter_map(job).collect(),
            exports: list(exports, "query-block-exports")?
                .iter()
                .filter_map(export)
                .collect(),
        };
        if let Some(edges) = edges {
            graph.connect(edges);
        }
        if graph.nodes.len() > 1 && graph.nodes.values().all(|n| n.children.is_empty()) && edges.is_none() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "this hypervisor does not tell how its block nodes are connected",
            )
            .hint("It has neither x-debug-query-block-graph nor children in query-named-block-nodes."));
        }
        Ok(graph)
    }

    /// Adds the edges of `x-debug-query-block-graph` (`XDbgBlockGraph`).
    fn connect(&mut self, graph: &Value) {
        let ids: BTreeMap<u64, (&str, &str)> = items(graph, "nodes")
            .filter_map(|n| Some((n["id"].as_u64()?, (n["type"].as_str()?, n["name"].as_str()?))))
            .collect();
        let end = |edge: &Value, key: &str| edge[key].as_u64().and_then(|id| ids.get(&id).copied());
        let mut job_nodes: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for edge in items(graph, "edges") {
            let (Some(parent), Some((_, child))) = (end(edge, "parent"), end(edge, "child")) else {
                continue;
            };
            let role = edge["name"].as_str().unwrap_or_default();
            match parent {
                ("block-driver", name) => {
                    if let Some(node) = self.nodes.get_mut(name) {
                        let child = Child {
                            role: role.to_owned(),
                            node: child.to_owned(),
                        };
                        if !node.children.contains(&child) {
                            node.children.push(child);
                        }
                    }
                }
                ("block-job", id) => {
                    job_nodes.entry(id).or_default().insert(child);
                }
                _ => {}
            }
        }
        for job in &mut self.jobs {
            let nodes = job_nodes.remove(job.id.as_str()).unwrap_or_default();
            job.nodes = nodes.into_iter().map(str::to_owned).collect();
        }
    }
}

fn list<'a>(value: &'a Value, command: &str) -> Result<&'a Vec<Value>> {
    value.as_array().ok_or_else(|| {
        Error::new(
            ErrorKind::Protocol,
            "the monitor answered with something other than a list",
        )
        .with("command", command)
    })
}

fn items<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value[key]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default()
        .iter()
}

fn text(value: &Value, key: &str) -> String {
    value[key].as_str().unwrap_or_default().to_owned()
}

fn is(value: &Value, key: &str) -> bool {
    value[key].as_bool().unwrap_or_default()
}

fn node(info: &Value) -> Option<Node> {
    let name = info["node-name"].as_str()?.to_owned();
    let driver = text(info, "drv");
    let filename = text(info, "file");
    let child = |c: &Value| {
        Some(Child {
            role: c["child"].as_str().or_else(|| c["name"].as_str())?.to_owned(),
            node: c["node-name"].as_str()?.to_owned(),
        })
    };
    Some(Node {
        path: own_path(&driver, &filename),
        size: info["image"]["virtual-size"].as_u64().unwrap_or_default(),
        encrypted: is(info, "encrypted") || driver == "luks",
        read_only: is(info, "ro"),
        children: items(info, "children").filter_map(child).collect(),
        bitmaps: items(info, "dirty-bitmaps").filter_map(bitmap).collect(),
        info: info.clone(),
        name,
        driver,
        filename,
    })
}

/// The path that a node of these drivers opens; QEMU writes it plain, with `file:` or as `json:{…}`.
fn own_path(driver: &str, filename: &str) -> Option<PathBuf> {
    if !matches!(driver, "file" | "host_device" | "host_cdrom") {
        return None;
    }
    if let Some(options) = filename.strip_prefix("json:") {
        let options: Value = serde_json::from_str(options).ok()?;
        return options["filename"].as_str().map(PathBuf::from);
    }
    let prefixed = [format!("{driver}:"), "file:".to_owned()];
    let bare = prefixed.iter().find_map(|p| filename.strip_prefix(p.as_str()));
    let path = bare.unwrap_or(filename);
    (!path.is_empty()).then(|| Path::new(path).to_owned())
}

fn bitmap(info: &Value) -> Option<Bitmap> {
    Some(Bitmap {
        name: info["name"].as_str()?.to_owned(),
        granularity: info["granularity"].as_u64()?,
        count: info["count"].as_u64()?,
        recording: is(info, "recording"),
        persistent: is(info, "persistent"),
        busy: is(info, "busy"),
        inconsistent: is(info, "inconsistent"),
    })
}

fn device(info: &Value) -> Option<Device> {
    // The id of the device, or its path where the block layer hangs on a part of it (virtio-blk's backend).
    let qdev = info["qdev"].as_str().filter(|q| !q.is_empty())?;
    let (id, qom_path) = match qdev.strip_prefix("/machine/peripheral/") {
        Some(rest) => (rest.split('/').next().map(str::to_owned), qdev.to_owned()),
        None if qdev.starts_with('/') => (None, qdev.to_owned()),
        None => (Some(qdev.to_owned()), format!("/machine/peripheral/{qdev}")),
    };
    let node = info["inserted"]["node-name"].as_str().map(str::to_owned);
    Some(Device { id, qom_path, node })
}

fn job(info: &Value) -> Option<Job> {
    Some(Job {
        id: info["device"].as_str()?.to_owned(),
        kind: text(info, "type"),
        status: text(info, "status"),
        nodes: Vec::new(),
    })
}

fn export(info: &Value) -> Option<ExportedNode> {
    Some(ExportedNode {
        id: info["id"].as_str()?.to_owned(),
        kind: text(info, "type"),
        node: text(info, "node-name"),
        shutting_down: is(info, "shutting-down"),
    })
}
