//! Takes a snapshot of a running domain's disks, reads the first one, deletes the snapshot:
//! `cargo run --example embed -- DOMAIN.xml STATE-DIRECTORY OUTPUT`.

use std::path::Path;

use anyhow::Context;
use disksnap::{Disksnap, SnapshotRequest};

fn main() -> anyhow::Result<()> {
    disksnap::run_if_asked();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [domain, state_dir, output] = arguments.as_slice() else {
        anyhow::bail!("usage: embed DOMAIN.xml STATE-DIRECTORY OUTPUT");
    };
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(backup(domain, Path::new(state_dir), Path::new(output)))
}

async fn backup(domain: &str, state_dir: &Path, output: &Path) -> anyhow::Result<()> {
    let disksnap = Disksnap::open(Some(state_dir)).await?;
    let document = disksnap.load(domain).await?;
    let domain = document.domain();

    let request = SnapshotRequest::default();
    let snapshot = disksnap.dispatcher().create(domain, &request).await?;
    let disk = snapshot.disks.first().context("no disk")?;

    let reader = disksnap.read(domain, &snapshot.name, &disk.target).await?;
    let saved = reader.save_to(output, 0, reader.size(), |_| {}).await;
    reader.close().await?;

    disksnap.dispatcher().delete(domain, &snapshot.name).await?;
    Ok(saved?)
}
