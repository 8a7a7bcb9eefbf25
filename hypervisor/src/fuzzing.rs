//! Doors for fuzz targets: what a monitor says, line by line, and the answers that are looked into. Not
//! part of the interface.

use serde_json::Value;

use crate::graph::Graph;
use crate::{Schema, qmp};

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
