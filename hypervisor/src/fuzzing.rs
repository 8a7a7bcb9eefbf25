//! Doors for fuzz targets: what a monitor says, line by line, the answers that are looked into, and whole conversations with a
//! monitor and with a guest agent. Not part of the interface.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use disksnap_core::{Control, Domain, DomainId, Host, Sockets};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

use crate::agent::Agent;
use crate::graph::Graph;
use crate::{Paths, QemuConnector, Schema, Timeouts, jobs, qmp};

/// Reads `data` as a monitor's lines, as the session does, up to the first that is no message.
///
/// # Panics
/// If there is no end of messages in it.
pub fn lines(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let Ok(runtime) = runtime else { return };
    runtime.block_on(async {
        let (mut reader, mut buffer) = (data, Vec::new());
        for _ in 0..=data.len() {
            if qmp::next_message(&mut reader, &mut buffer).await.is_err() {
                return;
            }
        }
        panic!("more messages than bytes");
    });
}

/// Takes `data` as the answers to the queries for the block graph and the schema, one per line.
pub fn answers(data: &[u8]) {
    let mut answers = data
        .split(|byte| *byte == b'\n')
        .map(|line| serde_json::from_slice(line).unwrap_or(Value::Null));
    let mut next = || answers.next().unwrap_or_default();
    let (nodes, devices, jobs, exports, edges) = (next(), next(), next(), next(), next());
    if let Ok(graph) = Graph::parse(&nodes, &devices, &jobs, &exports, Some(&edges)) {
        for node in graph.nodes() {
            let chain = graph.primary_chain(&node.name);
            assert!(
                chain.len() <= graph.nodes().count(),
                "a chain longer than the graph"
            );
        }
        let mut disk = disksnap_core::Disk::new(
            "vda",
            disksnap_core::Source::File {
                file: "/image".into(),
            },
        );
        disk.alias = Some("virtio-disk0".to_owned());
        let _ = graph.root_of_disk(&disk);
    }
    if let Ok(schema) = Schema::parse(next()) {
        let _ = schema.has("blockdev-add/+copy-before-write/on-cbw-error/^break-snapshot");
    }
}

/// Runs a client against a guest agent that keeps in step, and else answers with the lines of `data`, one to each command in their
/// order, and then hangs up. It is asked to freeze and to thaw.
pub async fn agent(data: &[u8]) {
    let patience = Timeouts {
        thaw: Duration::from_secs(1),
        ..Timeouts::default()
    };
    let peer = Peer::start(data, |command| {
        let id = &command["arguments"]["id"];
        (command["execute"] == "guest-sync-delimited").then(|| json!({ "return": id }))
    });
    let Some(peer) = peer else { return };
    let agent = Agent::new(peer.path.clone(), patience, Box::new(|_| ()));
    let _ = agent.freeze(&[], patience.thaw).await;
    let _ = agent.freeze(&["/srv".to_owned()], patience.thaw).await;
    let _ = agent.thaw().await;
}

/// Runs a client against a monitor that greets, and else answers with the lines of `data`, one to each command in their order, and
/// then hangs up. It is asked all that is asked of a domain that runs.
pub async fn monitor(data: &[u8]) {
    let peer = Peer::start(data, |command| {
        (command["execute"] == "qmp_capabilities").then(|| json!({"return": {}, "id": command["id"]}))
    });
    let Some(peer) = peer else { return };
    let domain = Domain {
        id: DomainId::new("vm", None),
        disks: Vec::new(),
        sockets: Sockets {
            monitor: Some(peer.path.clone()),
            agent: None,
        },
    };
    let here = std::env::temp_dir();
    let paths = Paths {
        images: here.clone(),
        run: here,
    };
    let Ok(control) = QemuConnector::new(paths).control(&domain) else {
        return;
    };
    let _ = control.state().await;
    let _ = control.served().await;
    let _ = control.unserve("export").await;
    let _ = jobs::all(&control).await;
    let _ = Schema::of(&control).await;
    let _ = Graph::read(&control).await;
    let _ = control.instance().await;
}

/// The number of the next peer's socket.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// Whoever is at the other end of a socket, in the same runtime.
struct Peer {
    path: PathBuf,
    serving: JoinHandle<()>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.serving.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Peer {
    /// Answers as `known` does, and where that has no answer with the next line. `None` where there can be no socket.
    fn start(data: &[u8], known: fn(&Value) -> Option<Value>) -> Option<Self> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("disksnap-fuzz-{}-{number}", std::process::id()));
        let listener = UnixListener::bind(&path).ok()?;
        let mut lines: VecDeque<Vec<u8>> = data.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = converse(stream, known, &mut lines).await;
            }
        });
        Some(Self { path, serving })
    }
}

/// Until there is nothing left to say. The greeting is what a monitor says, and what an agent's client reads past.
async fn converse(
    stream: UnixStream,
    known: fn(&Value) -> Option<Value>,
    lines: &mut VecDeque<Vec<u8>>,
) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    write.write_all(b"{\"QMP\": {}}\n").await?;
    let mut asked = BufReader::new(read).split(b'\n');
    while let Some(command) = asked.next_segment().await? {
        let delimited = command.first() == Some(&0xff);
        let command: Value = serde_json::from_slice(&command[usize::from(delimited)..]).unwrap_or_default();
        let mut answer = if delimited { vec![0xff] } else { Vec::new() };
        if let Some(known) = known(&command) {
            answer.extend(known.to_string().into_bytes());
        } else {
            let Some(line) = lines.pop_front() else { break };
            // Where it is an answer, it is one to this very command, unless it says otherwise.
            match serde_json::from_slice::<Value>(&line) {
                Ok(Value::Object(mut said)) if !command["id"].is_null() => {
                    said.entry("id").or_insert_with(|| command["id"].clone());
                    answer.extend(Value::Object(said).to_string().into_bytes());
                }
                _ => answer.extend(line),
            }
        }
        answer.push(b'\n');
        write.write_all(&answer).await?;
    }
    Ok(())
}
