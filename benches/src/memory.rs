//! Part `memory`: the most memory that an act takes, on a disk of 1 GiB and on one of 1 TiB.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::Result;
use disksnap_core::{ExportDisk, ExportRequest, Listen};
use disksnap_nbd::Uri;
use disksnap_test_support::pattern::bytes;
use disksnap_test_support::{DiskSpec, GIB, KIB, MIB};

use crate::child::{self, memory_of};
use crate::race::{Contender, Measures, race};
use crate::report::{Table, ratio};
use crate::scene::{Holder, Scene};

/// The disks, smallest first: their size, and how far apart their pieces of data are. Also the smaller has
/// more data than a reader holds at once.
const DISKS: [(&str, u64, u64); 2] = [("1 GiB", GIB, MIB), ("1 TiB", GIB << 10, 64 * MIB)];
const PIECE: u64 = 64 * KIB;
const ROUNDS: usize = 3;
const ACTS: [&str; 5] = ["create", "list", "extents", "read", "delete"];

pub(crate) fn run(scratch: &Path) -> Result<()> {
    let dir = tempfile::tempdir_in(scratch)?;
    let stages = DISKS
        .iter()
        .map(|(name, size, stride)| Stage::new(&dir.path().join(name.replace(' ', "-")), *size, *stride))
        .collect::<Result<Vec<_>>>()?;
    let contenders = stages
        .iter()
        .zip(DISKS)
        .map(|(stage, (name, ..))| Contender::new(name, || stage.turn()))
        .collect();
    let rounds = race(ROUNDS, contenders)?;
    let [(small, ..), (large, ..)] = DISKS;
    let mut table = Table::new(
        "Memory",
        "The most memory that a process of its own holds at once (VmHWM, MiB), on a disk of 1 GiB with 1 024 pieces \
         of 64 KiB and on one of 1 TiB with 16 384. Goal: the same.",
        &["act", "MiB, 1 GiB disk", "MiB, 1 TiB disk", "ratio"],
    );
    for act in ACTS {
        let mib = |name| format!("{:.1}", rounds.middle(name, act) / 1024.0);
        let ratio = ratio(rounds.ratio((large, act), (small, act)));
        table.row(&[act, &mib(small), &mib(large), &ratio]);
    }
    table.print();
    Ok(())
}

/// A storage daemon with one sparse disk.
struct Stage {
    holder: Holder,
    dir: PathBuf,
}

impl Stage {
    fn new(dir: &Path, size: u64, stride: u64) -> Result<Self> {
        std::fs::create_dir(dir)?;
        let image = dir.join("sparse.raw");
        let file = File::create_new(&image)?;
        file.set_len(size)?;
        let data = bytes(5, usize::try_from(PIECE)?);
        for place in 0..size / stride {
            file.write_all_at(&data, place * stride)?;
        }
        let holder = Holder::daemon(&[DiskSpec::new("vda", size).image(&image)]);
        std::fs::write(dir.join("domain.xml"), holder.domain_xml())?;
        Ok(Self {
            holder,
            dir: dir.to_owned(),
        })
    }

    fn act(&self, verb: &str) -> Result<f64> {
        let path = |name: &str| self.dir.join(name).display().to_string();
        memory_of(&[child::ACT, &path("state"), &path("domain.xml"), verb])
    }

    fn turn(&self) -> Result<Measures> {
        let mut measures = Measures::from([("create", self.act("create")?), ("list", self.act("list")?)]);
        let uri = self.export()?;
        measures.insert("extents", memory_of(&[child::EXTENTS, &uri])?);
        measures.insert("read", memory_of(&[child::READ, &uri])?);
        measures.insert("delete", self.act("delete")?);
        Ok(measures)
    }

    /// Exports the snapshot; the delete ends it.
    fn export(&self) -> Result<String> {
        let scene = Scene::new(&self.holder.domain_xml(), &self.dir.join("state"))?;
        let name = child::NAME.parse()?;
        let shown = scene.dispatcher.show(&scene.domain, &name);
        let snapshot = scene.runtime.block_on(shown)?.snapshot;
        let socket = self.dir.join("export.sock");
        let request = ExportRequest {
            listen: Some(Listen::Unix(socket.clone())),
            tls: None,
            allow_remote: false,
            disks: vec![ExportDisk {
                alias: snapshot.disks[0].alias.clone(),
                name: Some("disk".to_owned()),
                checkpoint: None,
            }],
        };
        scene
            .runtime
            .block_on(scene.dispatcher.start_exports(&scene.domain, &request))?;
        Ok(Uri::unix(socket, "disk").to_string())
    }
}
