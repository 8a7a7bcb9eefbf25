//! The one metadata snapshot that a pool has: somebody else's is left alone, ours never stays, whatever dies.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use disksnap_conformance::InactiveConnector;
use disksnap_core::{Capability, Connector, DiskSnapshot, ErrorKind, Peer, Snapshot, SnapshotId};
use disksnap_lvm::LogicalVolume;
use futures_util::TryStreamExt;

use crate::comparing::{changed, held, peer, pool, proven, thin};
use crate::support::{Group, Rig, block, fill, run};

const RESERVE: &str = "dmsetup message vg-pool-tpool 0 reserve_metadata_snap";
const RELEASE: &str = "dmsetup message vg-pool-tpool 0 release_metadata_snap";
/// Changes something in the pool.
const CHANGE: &str = "lvcreate -qq -y -V 2m --thinpool vg/pool -n other";
/// More commands than any comparison runs.
const LIMIT: u32 = 30;

/// Stands for `dmsetup`: at the command with the number in `DISKSNAP_KILL_AT` it kills who runs it, after it.
const KILLER: &str = r#"#!/bin/sh
count=$(($(cat "$DISKSNAP_KILL_COUNT") + 1))
echo $count > "$DISKSNAP_KILL_COUNT"
[ $count = "$DISKSNAP_KILL_AT" ] || exec /bin/dmsetup "$@"
/bin/dmsetup "$@"
kill -9 $PPID
"#;

/// What the other tests here run in a process of its own.
#[tokio::test]
#[ignore = "runs in the guest"]
async fn one_comparison() {
    let Some(record) = std::env::var_os("DISKSNAP_COMPARED") else {
        return;
    };
    let record = std::fs::read(record).unwrap();
    let (earlier, later, dir): (Peer, Peer, PathBuf) = serde_json::from_slice(&record).unwrap();
    let domain = Rig::new(Vec::new()).domain;
    let control = InactiveConnector::new(dir).control(&domain).await.unwrap();
    let compare = LogicalVolume.compare(&later.unit).unwrap();
    let told = compare.changed(&*control, &earlier, &later, "vda").await;
    let told =
        told.unwrap_or_else(|error| panic!("{}: {error} {:?}", error.kind().as_str(), error.next_step()));
    told.ranges.try_collect::<Vec<_>>().await.unwrap();
}

/// The same, for a probe.
#[tokio::test]
#[ignore = "runs in the guest"]
async fn one_probe() {
    let Some(disk) = std::env::var_os("DISKSNAP_PROBED") else {
        return;
    };
    let rig = Rig::new(vec![block("vda", &PathBuf::from(disk))]);
    let told = rig.probe(&[]).await;
    assert!(told[0].capabilities.contains(&Capability::Revert), "{told:?}");
    assert!(!told[0].capabilities.contains(&Capability::Compare), "{told:?}");
}

/// Two snapshots to compare, in this process or in another.
struct Two {
    rig: Rig,
    first: Snapshot,
    second: Snapshot,
    disk: PathBuf,
    _group: Group,
}

impl Two {
    async fn new() -> Self {
        let group = Group::new("vg", "-s 64k");
        pool(&group, "pool");
        let disk = thin(&group, "pool", "disk", 2 << 20);
        let rig = Rig::new(vec![block("vda", &disk)]);
        let first = rig.create("first").await;
        fill(&disk, 300 << 10, 1 << 20, 1);
        let second = rig.create("second").await;
        Self {
            rig,
            first,
            second,
            disk,
            _group: group,
        }
    }

    /// A program to be run in the place of another.
    fn program(&self, name: &str, text: &str) -> PathBuf {
        let path = self.rig.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// What is run in the place of `thin_delta`, of the same version.
    fn thin_delta(&self, acts: &str) -> PathBuf {
        let version = "[ \"$1\" = --version ] && exec /bin/thin_delta --version";
        self.program("thin_delta", &format!("#!/bin/sh\n{version}\n{acts}\n"))
    }

    /// Compares in a process of its own, with these in its environment.
    fn elsewhere(&self, variables: &[(&str, &str)]) -> Output {
        let record = self.rig.dir.path().join("record");
        let peers = (
            peer(&self.first, "vda"),
            peer(&self.second, "vda"),
            self.rig.dir.path(),
        );
        std::fs::write(&record, serde_json::to_vec(&peers).unwrap()).unwrap();
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "metadata::one_comparison", "--ignored", "--nocapture"])
            .env("DISKSNAP_COMPARED", &record)
            .envs(variables.iter().copied())
            .output()
            .unwrap()
    }

    /// What a comparison that fails there says.
    fn fails(&self, variables: &[(&str, &str)]) -> String {
        let output = self.elsewhere(variables);
        assert_eq!(output.status.code(), Some(101), "{output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    }

    /// A comparison finds what differs, and leaves nothing.
    async fn works(&self) {
        let ranges = proven(&self.rig, &self.first, &self.second).await;
        assert_eq!(ranges.len(), 1, "{ranges:?}");
        assert_eq!(
            (ranges[0].start, ranges[0].end),
            (256 << 10, (1 << 20) + (384 << 10))
        );
        assert_eq!(self.noted(), None);
    }

    /// How much is noted of a metadata snapshot.
    fn noted(&self) -> Option<u64> {
        let all = std::fs::read_dir(self.rig.dir.path())
            .unwrap()
            .map(Result::unwrap);
        let mut noted = all.filter(|entry| entry.path().extension().is_some_and(|x| x == "metadata"));
        noted.next().map(|entry| entry.metadata().unwrap().len())
    }

    /// A comparison is refused, and what is held stays.
    async fn is_busy(&self, at: &str) {
        let before = held("pool");
        let error = changed(&self.rig, (&self.first, &self.second), "vda")
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{at}: {error}");
        let hint = error.next_step().unwrap();
        assert!(hint.contains(RELEASE), "{at}: {hint}");
        assert!(before.is_some() && held("pool") == before, "{at}: {before:?}");
        assert_eq!(self.noted(), None, "{at}");
    }

    /// Waits until no program that the killed one ran has its file open.
    fn until_unread(&self) {
        let all = std::fs::read_dir(self.rig.dir.path())
            .unwrap()
            .map(Result::unwrap);
        let mut paths = all.map(|entry| entry.path());
        let noted = paths.find(|path| path.extension().is_some_and(|x| x == "metadata"));
        let noted = std::fs::File::open(noted.unwrap()).unwrap();
        rustix::fs::flock(&noted, rustix::fs::FlockOperation::LockExclusive).unwrap();
    }

    /// A comparison that is killed while `thin_delta` runs, which goes on for as long as there is the file `hold`.
    fn killed_in_the_middle(&self) {
        let hold = self.rig.dir.path().join("hold");
        let wait = format!("while [ -e {} ]; do usleep 20000; done", hold.display());
        let acts = format!("kill -9 $PPID\n{wait}\nexec /bin/thin_delta \"$@\"");
        let thin_delta = self.thin_delta(&acts);
        let output = self.elsewhere(&[("DISKSNAP_THIN_DELTA", thin_delta.to_str().unwrap())]);
        assert_eq!(output.status.signal(), Some(9), "{output:?}");
        assert!(held("pool").is_some());
        assert_eq!(self.noted(), Some(4096));
    }
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn somebody_elses_is_left_alone() {
    let two = Two::new().await;
    two.works().await;
    run(RESERVE);
    two.is_busy("reserved by hand").await;
    run(RELEASE);
    two.works().await;
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn what_a_killed_comparison_left_is_released_by_the_next() {
    let two = Two::new().await;
    two.killed_in_the_middle();
    two.works().await;

    // Not where somebody reads it.
    two.killed_in_the_middle();
    let metadata = std::fs::File::open("/dev/mapper/vg-pool_tmeta").unwrap();
    let error = changed(&two.rig, (&two.first, &two.second), "vda")
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert!(held("pool").is_some() && two.noted() == Some(4096));
    drop(metadata);
    two.works().await;

    // Nor where it is no more, and somebody else's is in its place, which may be the same block.
    two.killed_in_the_middle();
    run(RELEASE);
    fill(&two.disk, 0, 4096, 2);
    run(RESERVE);
    two.is_busy("reserved by hand after a kill").await;
    run(RELEASE);
    two.works().await;

    // And what was released by hand does not stand in the way.
    two.killed_in_the_middle();
    run(RELEASE);
    two.works().await;

    // A create and a delete give it back as well.
    two.killed_in_the_middle();
    two.until_unread();
    two.rig.create("third").await;
    assert_eq!((held("pool"), two.noted()), (None, None));
    // Not while the killed one's program may still read, and they do not wait for it.
    let hold = two.rig.dir.path().join("hold");
    std::fs::write(&hold, "").unwrap();
    two.killed_in_the_middle();
    two.rig.create("fourth").await;
    two.rig.delete("fourth").await;
    assert_eq!((held("pool").is_some(), two.noted()), (true, Some(4096)));
    std::fs::remove_file(&hold).unwrap();
    two.until_unread();
    two.rig.delete("third").await;
    assert_eq!((held("pool"), two.noted()), (None, None));
    two.works().await;

    // So does undoing a create, wherever it was, and deleting what is gone.
    two.killed_in_the_middle();
    two.until_unread();
    let control = two.rig.control().await;
    let undone = LogicalVolume.abort(&*control, SnapshotId::random(), &[], None);
    undone.await.unwrap();
    assert_eq!((held("pool"), two.noted()), (None, None));
    two.killed_in_the_middle();
    two.until_unread();
    let (id, mut gone) = (two.first.id, two.first.units[0].unit.clone());
    gone.data["group"] = "gone".into();
    LogicalVolume.delete(&*control, id, &gone).await.unwrap();
    assert_eq!((held("pool"), two.noted()), (None, None));
    two.works().await;
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn it_is_released_whatever_thin_delta_does() {
    let two = Two::new().await;
    let cut = "/bin/thin_delta \"$@\" | head -n 4";
    for (acts, word) in [
        (cut, "only the beginning"),
        ("echo garbage", "printed something else"),
        ("/bin/thin_delta \"$@\"; echo worse >&2; exit 3", "worse"),
        ("/bin/thin_delta \"$@\"; kill -9 $$", "signal: 9"),
        (
            "exec /bin/thin_delta -m --thin1 1 --thin2 1 /dev/mapper/vg-pool_tmeta",
            "left is 1",
        ),
        ("yes '<superblock>'", "data_block_size"),
        (
            "exec /bin/thin_delta -m --thin1 1 --thin2 99 /dev/mapper/vg-pool_tmeta",
            "snap2 (99)",
        ),
        (RELEASE, "only the beginning"),
    ] {
        let path = two.thin_delta(acts);
        let said = two.fails(&[("DISKSNAP_THIN_DELTA", path.to_str().unwrap())]);
        assert!(said.contains(word), "{acts}: {said}");
        assert_eq!((held("pool"), two.noted()), (None, None), "{acts}");
    }
    // All was printed, of what was taken away meanwhile.
    let path = two.thin_delta(&format!("/bin/thin_delta \"$@\"\n{RELEASE}\n{CHANGE}\n{RESERVE}"));
    let said = two.fails(&[("DISKSNAP_THIN_DELTA", path.to_str().unwrap())]);
    assert!(said.contains("released the metadata snapshot"), "{said}");
    assert!(
        held("pool").is_some() && two.noted().is_none(),
        "it is left alone"
    );
    run(RELEASE);
    let path = two.program("thin_delta", "#!/bin/sh\necho thin_delta 1.0.5\n");
    let said = two.fails(&[("DISKSNAP_THIN_DELTA", path.to_str().unwrap())]);
    assert!(said.contains("unavailable") && said.contains("1.0.6"), "{said}");
    let said = two.fails(&[("DISKSNAP_THIN_DELTA", "/no/such/thin_delta")]);
    for word in [
        "unavailable",
        "thin-provisioning-tools",
        "device-mapper-persistent-data",
    ] {
        assert!(said.contains(word), "{said}");
    }
    two.works().await;
}

/// A snapshot that would never be compared is not offered as one.
#[tokio::test]
#[ignore = "runs in the guest"]
async fn nothing_is_offered_without_what_does_it() {
    let two = Two::new().await;
    let old = two.program("thin_delta", "#!/bin/sh\necho thin_delta 1.0.5\n");
    for (variable, program) in [
        ("DISKSNAP_THIN_DELTA", old.to_str().unwrap()),
        ("DISKSNAP_THIN_DELTA", "/no/such/thin_delta"),
        ("DISKSNAP_DMSETUP", "/no/such/dmsetup"),
    ] {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "metadata::one_probe", "--ignored", "--nocapture"])
            .env("DISKSNAP_PROBED", &two.disk)
            .env(variable, program)
            .output()
            .unwrap();
        assert!(output.status.success(), "{program}: {output:?}");
    }
    two.works().await;
}

/// Ctrl-C ends what is in the terminal's process group, but not who runs it.
#[tokio::test]
#[ignore = "runs in the guest"]
async fn what_it_runs_is_out_of_reach_of_a_terminal_and_may_die() {
    let two = Two::new().await;
    let apart = "read -r pid name state parent group rest < /proc/$$/stat\n[ $group = $$ ] || exit 9";
    let reserved = "/bin/dmsetup \"$@\" || exit\ncase \"$*\" in *reserve_metadata_snap) kill -9 $$ ;; esac";
    let dmsetup = two.program("dmsetup", &format!("#!/bin/sh\n{apart}\n{reserved}\n"));
    let thin_delta = two.thin_delta(&format!("{apart}\nexec /bin/thin_delta \"$@\""));
    let output = two.elsewhere(&[
        ("DISKSNAP_DMSETUP", dmsetup.to_str().unwrap()),
        ("DISKSNAP_THIN_DELTA", thin_delta.to_str().unwrap()),
    ]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!((held("pool"), two.noted()), (None, None));
}

#[tokio::test]
#[ignore = "runs in the guest"]
async fn kills_at_any_command() {
    let two = Two::new().await;
    let dmsetup = two.program("dmsetup", KILLER);
    let count = two.rig.dir.path().join("count");
    let (mut left, mut at) = (0, 1);
    loop {
        std::fs::write(&count, "0").unwrap();
        let output = two.elsewhere(&[
            ("DISKSNAP_DMSETUP", dmsetup.to_str().unwrap()),
            ("DISKSNAP_KILL_COUNT", count.to_str().unwrap()),
            ("DISKSNAP_KILL_AT", &at.to_string()),
        ]);
        let killed = output.status.signal() == Some(9);
        assert!(killed || output.status.success(), "{at}: {output:?}");
        if !killed {
            break;
        }
        // Only between these it cannot be known whose it is: an operator's word is needed.
        if held("pool").is_some() && two.noted() == Some(0) {
            left += 1;
            two.is_busy(&format!("after {at}")).await;
            run(RELEASE);
        }
        two.works().await;
        at += 1;
        assert!(at < LIMIT, "a comparison has no end");
    }
    assert!(at > 8, "only {at} commands");
    assert!((1..=2).contains(&left), "{left} of them");
}
