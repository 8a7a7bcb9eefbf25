//! Reverts whose process is killed at every command of lvm2: before it, while it runs, and after it.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use disksnap_conformance::InactiveConnector;
use disksnap_core::{Connector, DiskSnapshot, SnapshotId, Unit};
use disksnap_lvm::LogicalVolume;

use crate::support::{Group, Rig, block, device, fill, is_full_of, run, try_run};

const MIB: usize = 1 << 20;
/// What the volume holds before a revert, and what the snapshot holds.
const NOW: u8 = 7;
const THEN: u8 = 1;
/// More commands than any revert runs.
const LIMIT: u32 = 50;

/// Stands for lvm2: at the command with the number in `DISKSNAP_KILL_AT` it kills who runs it.
const KILLER: &str = r#"#!/bin/sh
count=$(($(cat "$DISKSNAP_KILL_COUNT") + 1))
echo $count > "$DISKSNAP_KILL_COUNT"
[ $count = "$DISKSNAP_KILL_AT" ] || exec /bin/lvm "$@"
case "$DISKSNAP_KILL_WHEN" in
before) kill -9 $PPID ;;
during) kill -9 $PPID; exec /bin/lvm "$@" ;;
after) /bin/lvm "$@"; kill -9 $PPID ;;
esac
"#;

/// What the other tests here have killed.
#[tokio::test]
#[ignore = "runs in the guest"]
async fn one_revert() {
    let Some(record) = std::env::var_os("DISKSNAP_KILL_RECORD") else {
        return;
    };
    let record = std::fs::read(record).unwrap();
    let (id, unit, dir): (SnapshotId, Unit, PathBuf) = serde_json::from_slice(&record).unwrap();
    let domain = Rig::new(Vec::new()).domain;
    let control = InactiveConnector::new(dir).control(&domain).await.unwrap();
    let revert = LogicalVolume.revert(&unit).unwrap();
    revert.revert(&*control, id, &unit, &[]).await.unwrap();
}

/// A snapshot that is to be put back by another process, which is killed.
struct Revert<'a> {
    rig: &'a Rig,
    disk: &'a Path,
    id: SnapshotId,
    unit: Unit,
}

impl Revert<'_> {
    /// Whether the process was killed; otherwise it ran to its end.
    fn killed(&self, when: &str, at: u32) -> bool {
        let place = |name: &str| self.rig.dir.path().join(name);
        let (lvm, count, record) = (place("lvm"), place("count"), place("record"));
        std::fs::write(&lvm, KILLER).unwrap();
        std::fs::set_permissions(&lvm, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::write(&count, "0").unwrap();
        let told = serde_json::to_vec(&(self.id, &self.unit, self.rig.dir.path())).unwrap();
        std::fs::write(&record, told).unwrap();
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "kills::one_revert", "--ignored", "--nocapture"])
            .env("DISKSNAP_LVM", &lvm)
            .env("DISKSNAP_KILL_COUNT", &count)
            .env("DISKSNAP_KILL_RECORD", &record)
            .env("DISKSNAP_KILL_AT", at.to_string())
            .env("DISKSNAP_KILL_WHEN", when)
            .output()
            .unwrap();
        if output.status.signal() == Some(9) {
            return true;
        }
        let text = String::from_utf8_lossy;
        let told = format!("{}{}", text(&output.stdout), text(&output.stderr));
        assert!(output.status.success() && told.contains("1 passed"), "{told}");
        false
    }

    /// The disk's name leads to all of the one content or all of the other.
    fn is_whole(&self, at: &str) {
        let holds = |byte| is_full_of(self.disk, 0, 2 * MIB, byte);
        assert!(holds(NOW) || holds(THEN), "{at}: the disk is neither");
    }

    /// What recover, and every next act on the domain, does.
    async fn finish(&self, at: &str) {
        let control = self.rig.control().await;
        let revert = LogicalVolume.revert(&self.unit).unwrap();
        let done = revert.revert(&*control, self.id, &self.unit, &[]).await;
        let done = done.unwrap_or_else(|error| panic!("{at}: {error}"));
        assert_eq!(done.deferred, None, "{at}");
        assert!(is_full_of(self.disk, 0, 2 * MIB, THEN), "{at}: not put back");
    }
}

/// Kills reverts at every command, and finishes each; `prepare` gives the next snapshot to put back.
async fn at_every_command<'a>(
    group: &Group,
    stays: &[String],
    mut prepare: impl AsyncFnMut(&str) -> Revert<'a>,
) {
    for when in ["before", "during", "after"] {
        let mut at = 1;
        loop {
            let name = format!("{when}-{at}");
            let revert = prepare(&name).await;
            let killed = revert.killed(when, at);
            if when != "during" {
                revert.is_whole(&name);
            }
            revert.finish(&name).await;
            assert_eq!(group.volumes(), stays, "{name}");
            let left = left_files(revert.rig);
            assert!(left.is_empty(), "{name}: {left:?}");
            if !killed {
                break;
            }
            at += 1;
            assert!(at < LIMIT, "a revert has no end");
        }
        assert!(at > 2, "{when}: nothing was killed");
    }
}

/// What the method left in the image directory.
fn left_files(rig: &Rig) -> Vec<String> {
    let all = std::fs::read_dir(rig.dir.path()).unwrap();
    let names = all.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("lvm-")).collect()
}

/// LVM cuts the tie between a thin volume and its other snapshots at a merge; this gives one that is cut off.
async fn cut_off(group: &Group, disk: &Path, rig: &Rig) -> disksnap_core::Snapshot {
    rig.create("first").await;
    fill(disk, 0, 2 * MIB, THEN);
    let snapshot = rig.create("later").await;
    let first = "first".parse().unwrap();
    rig.dispatcher.revert(&rig.domain, &first, &[]).await.unwrap();
    let volume = device(&snapshot, "vda");
    let name = volume.file_name().unwrap().to_str().unwrap();
    assert_eq!(group.field(name, "origin"), "", "it is not cut off");
    snapshot
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn an_exchange_of_thin_volumes() {
    let group = Group::new("vg", "-s 64k");
    group.pool("pool", 32);
    let disk = group.thin("pool", "thin", 2);
    run("lvchange --addtag mine vg/thin");
    let rig = Rig::new(vec![block("vda", &disk)]);
    let snapshot = cut_off(&group, &disk, &rig).await;
    let stays = group.volumes();
    assert_eq!(stays.len(), 3);
    let prepare = async |_: &str| {
        fill(&disk, 0, 2 * MIB, NOW);
        Revert {
            rig: &rig,
            disk: &disk,
            id: snapshot.id,
            unit: snapshot.units[0].unit.clone(),
        }
    };
    at_every_command(&group, &stays, prepare).await;
    assert!(is_full_of(&device(&snapshot, "vda"), 0, 2 * MIB, THEN));
    assert_eq!(group.field("thin", "lv_tags"), "mine");
    rig.delete("later").await;
    assert_eq!(group.volumes(), ["pool", "thin"]);
}

/// Where lvm2 itself dies between two of its commands.
#[tokio::test]
#[ignore = "runs in the guest"]
async fn an_exchange_that_lvm2_did_not_finish() {
    let group = Group::new("vg", "-s 64k");
    group.pool("pool", 32);
    let disk = group.thin("pool", "thin", 2);
    let rig = Rig::new(vec![block("vda", &disk)]);
    let snapshot = cut_off(&group, &disk, &rig).await;
    let revert = Revert {
        rig: &rig,
        disk: &disk,
        id: snapshot.id,
        unit: snapshot.units[0].unit.clone(),
    };
    let (stays, taken) = (group.volumes(), device(&snapshot, "vda"));
    let own = group.field(taken.file_name().unwrap().to_str().unwrap(), "lv_uuid");
    let own: String = own.replace('-', "").chars().take(10).collect();
    let [back, old] =
        ["back", "old"].map(|purpose| format!("disksnap.{purpose}.{}.{own}", snapshot.id.short()));
    let commands = [
        format!("lvcreate -y -s -kn -ay -prw -n {back} {}", taken.display()),
        format!("lvrename vg thin {old}"),
        format!("lvrename vg {back} thin"),
        format!("lvremove -y vg/{old}"),
    ];
    for done in 0..=commands.len() {
        fill(&disk, 0, 2 * MIB, NOW);
        commands[..done].iter().map(String::as_str).for_each(|line| {
            run(line);
        });
        let at = format!("after {done} commands");
        if done != 2 {
            revert.is_whole(&at);
        }
        revert.finish(&at).await;
        assert_eq!(group.volumes(), stays, "{at}");
    }
    rig.delete("later").await;
    assert_eq!(group.volumes(), ["pool", "thin"]);
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn a_merge_of_either_kind() {
    let group = Group::new("vg", "-s 64k");
    group.pool("pool", 32);
    let stays = ["plain", "pool", "thin"].map(str::to_owned);
    let disks = [group.thin("pool", "thin", 2), group.plain("plain", 2)];
    for disk in disks {
        let rig = Rig::new(vec![block("vda", &disk)]);
        merges(&group, &stays, &disk, &rig).await;
    }
}

async fn merges(group: &Group, stays: &[String], disk: &Path, rig: &Rig) {
    let prepare = async |name: &str| {
        fill(disk, 0, 2 * MIB, THEN);
        let whole = [("snapshot.size", "100%ORIGIN")];
        let options = if disk.ends_with("plain") { &whole[..] } else { &[] };
        let snapshot = rig.try_create(name, options).await.unwrap();
        fill(disk, 0, 2 * MIB, NOW);
        Revert {
            rig,
            disk,
            id: snapshot.id,
            unit: snapshot.units[0].unit.clone(),
        }
    };
    at_every_command(group, stays, prepare).await;
    // No lvm2 is left that would still work on it.
    try_run(&["lvchange", "-an", disk.to_str().unwrap()]).unwrap();
}
