//! Measures what an act costs in the catalog, beside one bare `fsync` on the same file system:
//! `cargo run --release -p disksnap-catalog --example commit_time [DIRECTORY]`.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use disksnap_catalog::{SqliteCatalog, StateDir};
use disksnap_core::{
    Act, Catalog, Change, Consistency, Domain, DomainId, Intent, Snapshot, SnapshotId, Sockets, WindowReport,
};

const ROUNDS: u32 = 300;

fn bare_flush(dir: &Path) -> std::io::Result<Duration> {
    let file = File::create(dir.join("flushed"))?;
    // Within 1 MiB and over again, as the catalog's log is written.
    let once = || {
        for n in 0..u64::from(ROUNDS) {
            file.write_all_at(&[7; 4096], n % 256 * 4096)?;
            file.sync_all()?;
        }
        std::io::Result::Ok(())
    };
    once()?;
    let since = Instant::now();
    once()?;
    Ok(since.elapsed() / ROUNDS)
}

fn records(domain: &DomainId, n: u32) -> (Intent, Snapshot) {
    let id = SnapshotId::random();
    let name: disksnap_core::SnapshotName = id.into();
    let intent = Intent {
        id: id.0,
        domain: Domain {
            id: domain.clone(),
            disks: Vec::new(),
            sockets: Sockets::default(),
        },
        since: SystemTime::now(),
        act: Act::Create {
            name: name.clone(),
            parts: Vec::new(),
            starts: Vec::new(),
        },
    };
    let snapshot = Snapshot {
        id,
        name,
        domain: domain.clone(),
        created: SystemTime::now(),
        consistency: Consistency::Crash,
        window: WindowReport::default(),
        disks: Vec::new(),
        units: Vec::new(),
        skipped: Vec::new(),
        warnings: vec!["x".repeat(1500), n.to_string()],
        checkpoint: None,
        after: None,
        pinned: false,
    };
    (intent, snapshot)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let parent = std::env::args_os()
        .nth(1)
        .map_or_else(std::env::temp_dir, PathBuf::from);
    let temp = tempfile::tempdir_in(parent)?;
    let flush = bare_flush(temp.path())?;
    let dir = StateDir::open(Some(&temp.path().join("state")))?;
    let since = Instant::now();
    let mut catalog = SqliteCatalog::open(dir.clone()).await?;
    let made = since.elapsed();

    let domain = DomainId::new("vm", None);
    let (mut intends, mut settles) = (Duration::ZERO, Duration::ZERO);
    for n in 0..ROUNDS {
        let (intent, snapshot) = records(&domain, n);
        let since = Instant::now();
        catalog.intend(&intent).await?;
        intends += since.elapsed();
        let since = Instant::now();
        let change = Change::AddSnapshot(Box::new(snapshot));
        catalog.settle(intent.id, &domain, &[change]).await?;
        settles += since.elapsed();
    }
    let since = Instant::now();
    for _ in 0..ROUNDS {
        drop(catalog);
        catalog = SqliteCatalog::open(dir.clone()).await?;
    }
    let opened = since.elapsed() / ROUNDS;
    let (_, template) = records(&domain, 0);
    let many: Vec<Change> = (0..10_000)
        .map(|n| {
            let (_, mut snapshot) = records(&domain, n);
            snapshot.warnings.clone_from(&template.warnings);
            Change::AddSnapshot(Box::new(snapshot))
        })
        .collect();
    catalog.settle(uuid::Uuid::nil(), &domain, &many).await?;
    let since = Instant::now();
    let listed = catalog.snapshots(&domain).await?.len();
    let list = since.elapsed();

    let mut out = std::io::stdout();
    let ratio = |time: Duration| time.as_secs_f64() / flush.as_secs_f64();
    writeln!(out, "write of 4 KiB and fsync       {flush:>10.1?}  1.00")?;
    for (what, time) in [
        ("intend", intends / ROUNDS),
        ("settle", settles / ROUNDS),
        ("open", opened),
        ("make and open", made),
    ] {
        writeln!(out, "{what:<30} {time:>10.1?}  {:.2}", ratio(time))?;
    }
    writeln!(out, "list of {listed} snapshots      {list:>10.1?}")?;
    Ok(())
}
