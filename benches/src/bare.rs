//! The baseline of a create: the least that brings a QEMU to the same state. A client that knows all names
//! beforehand sends one command after the other, waits for each answer, checks nothing and writes nothing down.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Which way a snapshot is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Filter,
    Job,
    Classic,
}

impl Way {
    pub(crate) const ALL: [Self; 3] = [Self::Filter, Self::Job, Self::Classic];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Job => "job",
            Self::Classic => "classic",
        }
    }
}

/// A disk, by all the names that the commands need.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// Bytes.
    pub(crate) size: u64,
    pub(crate) format_node: String,
    pub(crate) seat: Seat,
    pub(crate) image: PathBuf,
}

/// Where the filter goes.
#[derive(Debug, Clone)]
pub(crate) enum Seat {
    /// Below the device with this path.
    Device(String),
    /// Below this raw node.
    Wrapper(String),
}

/// A connection to a monitor.
#[derive(Debug)]
pub(crate) struct Client(BufReader<UnixStream>);

impl Client {
    pub(crate) fn connect(path: &Path) -> Result<Self> {
        let stream =
            UnixStream::connect(path).with_context(|| format!("cannot connect to {}", path.display()))?;
        stream.set_read_timeout(Some(Duration::from_mins(1)))?;
        let mut client = Self(BufReader::with_capacity(64 << 10, stream));
        client.line()?;
        client.run("qmp_capabilities", &Value::Null)?;
        Ok(client)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }

    /// One command and its answer; events in between are passed over.
    pub(crate) fn run(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let message = if arguments.is_null() {
            json!({ "execute": command })
        } else {
            json!({ "execute": command, "arguments": arguments })
        };
        self.0.get_mut().write_all(format!("{message}\n").as_bytes())?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                bail!("{command} {arguments}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    fn jobs(&mut self) -> Result<Vec<Value>> {
        let jobs = self.run("query-jobs", &Value::Null)?;
        Ok(jobs.as_array().cloned().unwrap_or_default())
    }

    fn add(&mut self, node: &Value) -> Result<()> {
        self.run("blockdev-add", node).map(drop)
    }

    fn remove(&mut self, node: &str) -> Result<()> {
        self.run("blockdev-del", &json!({ "node-name": node })).map(drop)
    }
}

/// Makes a snapshot of all disks; returns how long the guest stood still.
pub(crate) fn create(client: &mut Client, way: Way, places: &[Place]) -> Result<Duration> {
    for place in places {
        let file = File::create_new(&place.image)?;
        file.set_len(if way == Way::Classic { 0 } else { place.size })?;
    }
    for (n, place) in places.iter().enumerate() {
        prepare(client, way, n, place)?;
    }
    let stood = if way == Way::Filter {
        seat(client, places, |n, _| format!("bare{n}-cbw"))?
    } else {
        let actions: Vec<Value> = places
            .iter()
            .enumerate()
            .map(|(n, place)| backup(n, place))
            .collect();
        client.run("transaction", &json!({ "actions": actions }))?;
        Duration::ZERO
    };
    if way != Way::Classic {
        for n in 0..places.len() {
            client.add(
                &json!({ "driver": "snapshot-access", "node-name": format!("bare{n}-acc"),
                "file": format!("bare{n}-cbw") }),
            )?;
        }
    }
    Ok(stood)
}

fn prepare(client: &mut Client, way: Way, n: usize, place: &Place) -> Result<()> {
    let file = json!({ "driver": "file", "filename": place.image, "discard": "unmap" });
    let fleece =
        json!({ "driver": "raw", "node-name": format!("bare{n}-fl"), "discard": "unmap", "file": file });
    match way {
        Way::Filter => client.add(&json!({
            "driver": "copy-before-write", "node-name": format!("bare{n}-cbw"), "discard": "unmap",
            "on-cbw-error": "break-snapshot", "cbw-timeout": 20, "target": fleece,
            "file": { "driver": "raw", "node-name": format!("bare{n}-raw"), "discard": "unmap", "file": place.format_node },
        })),
        Way::Job => client.add(&fleece),
        Way::Classic => {
            let img = format!("bare{n}-img");
            let mut node = file;
            node["node-name"] = json!(img);
            client.add(&node)?;
            let options = json!({ "driver": "qcow2", "file": img, "size": place.size });
            client.run("blockdev-create", &json!({ "job-id": "bare-mk", "options": options }))?;
            while !client.jobs()?.iter().any(|job| job["id"] == "bare-mk" && job["status"] == "concluded") {}
            client.run("job-dismiss", &json!({ "id": "bare-mk" }))?;
            client.add(&json!({ "driver": "qcow2", "node-name": format!("bare{n}-fl"), "discard": "unmap",
                "file": img, "backing": place.format_node }))
        }
    }
}

fn backup(n: usize, place: &Place) -> Value {
    json!({ "type": "blockdev-backup", "data": {
        "job-id": format!("bare{n}-job"), "device": place.format_node, "target": format!("bare{n}-fl"),
        "sync": "none", "filter-node-name": format!("bare{n}-cbw") } })
}

/// Puts a node under each disk, all at one instant; returns how long the guest stood still for it.
fn seat(client: &mut Client, places: &[Place], node: impl Fn(usize, &Place) -> String) -> Result<Duration> {
    let mut options = Vec::new();
    let since = Instant::now();
    for (n, place) in places.iter().enumerate() {
        match &place.seat {
            Seat::Device(path) => {
                if n == 0 {
                    client.run("stop", &Value::Null)?;
                }
                let set = json!({ "path": path, "property": "drive", "value": node(n, place) });
                client.run("qom-set", &set)?;
                if n + 1 == places.len() {
                    client.run("cont", &Value::Null)?;
                }
            }
            Seat::Wrapper(wrapper) => options.push(json!({
                "driver": "raw", "node-name": wrapper, "discard": "unmap", "file": node(n, place) })),
        }
    }
    if !options.is_empty() {
        client.run("blockdev-reopen", &json!({ "options": options }))?;
    }
    Ok(since.elapsed())
}

/// Takes the snapshot apart again.
pub(crate) fn delete(client: &mut Client, way: Way, places: &[Place]) -> Result<()> {
    if way != Way::Classic {
        for n in 0..places.len() {
            client.remove(&format!("bare{n}-acc"))?;
        }
    }
    if way == Way::Filter {
        unseat(client, places)?;
    } else {
        for n in 0..places.len() {
            client.run("job-cancel", &json!({ "id": format!("bare{n}-job") }))?;
        }
        while !client.jobs()?.is_empty() {}
    }
    for (n, place) in places.iter().enumerate() {
        match way {
            Way::Filter => client.remove(&format!("bare{n}-cbw"))?,
            Way::Job => client.remove(&format!("bare{n}-fl"))?,
            Way::Classic => {
                client.remove(&format!("bare{n}-fl"))?;
                client.remove(&format!("bare{n}-img"))?;
            }
        }
        fs::remove_file(&place.image)?;
    }
    Ok(())
}

/// One after the other: nothing needs to be one instant here.
fn unseat(client: &mut Client, places: &[Place]) -> Result<()> {
    for place in places {
        match &place.seat {
            Seat::Device(path) => {
                let set = json!({ "path": path, "property": "drive", "value": place.format_node });
                client.run("qom-set", &set)?;
            }
            Seat::Wrapper(wrapper) => {
                let options = json!({ "driver": "raw", "node-name": wrapper, "discard": "unmap",
                    "file": place.format_node });
                client.run("blockdev-reopen", &json!({ "options": [options] }))?;
            }
        }
    }
    Ok(())
}
