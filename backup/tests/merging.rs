//! Dropping points: those that stay read as before, whatever happens meanwhile.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod points;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use disksnap_backup::{
    DomainFolder, ErrorKind, Event, Held, Level, LocalStore, Merged, Repository, Result, Retention, Silent,
    VerifyOptions, Watcher, merge, merge_plan, prune, verify,
};
use disksnap_test_support::need;
use disksnap_test_support::pattern::Random;
use disksnap_test_support::small_fs;
use points::{Death, Disks, Dying, Life, check, check_with_qemu, copy_of};
use proptest::prelude::*;

fn names(names: &[&String]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).clone()).collect()
}

async fn open(dir: &Path) -> Repository {
    Repository::open(Arc::new(LocalStore::at(dir))).await.unwrap()
}

/// Nothing is there but the points that are to be there, and what belongs to them.
async fn check_left(repository: &Repository, folder: &DomainFolder, points: &BTreeMap<String, Disks>) {
    let found = verify(repository, folder, &VerifyOptions::default(), &Silent)
        .await
        .unwrap();
    let left: Vec<&String> = found.points.iter().map(|point| &point.point).collect();
    assert_eq!(left, points.keys().collect::<Vec<_>>());
    assert_eq!(
        (&found.strays[..], &found.unfinished[..], found.merging),
        (&[][..], &[][..], false)
    );
}

impl Life {
    async fn drop_points(&mut self, drop: &BTreeSet<String>) -> Result<Merged> {
        let merged = merge(&self.repository, &self.folder, drop, &Silent).await?;
        self.points.retain(|name, _| !drop.contains(name));
        Ok(merged)
    }
}

#[tokio::test]
async fn a_dropped_full_image_makes_the_next_one_full() {
    let mut life = Life::chain(1, 3).await;
    let all = life.names();
    let plan = merge_plan(&life.repository, &life.folder, &names(&[&all[0], &all[1]]))
        .await
        .unwrap();
    assert_eq!(plan.dropped, all[..2]);
    let planned = &plan.images[0];
    assert_eq!(
        (&planned.point, &planned.parent, &planned.takes),
        (&all[2], &None, &vec![all[1].clone(), all[0].clone()])
    );
    let merged = life.drop_points(&names(&[&all[0], &all[1]])).await.unwrap();
    assert_eq!(merged.dropped, [all[1].clone(), all[0].clone()]);
    let full = life.repository.manifest(&life.folder, &all[2]).await.unwrap();
    assert_eq!((full.disks[0].level, &full.disks[0].parent), (Level::Full, &None));
    let over = life.repository.manifest(&life.folder, &all[3]).await.unwrap();
    assert_eq!(
        (over.disks[0].level, over.disks[0].parent.as_ref()),
        (Level::Incremental, Some(&all[2]))
    );
    life.check().await;
    check_left(&life.repository, &life.folder, &life.points).await;
    life.check_with_qemu();
}

#[tokio::test]
async fn an_increment_takes_in_those_below_it() {
    let mut life = Life::chain(2, 4).await;
    let all = life.names();
    let merged = life.drop_points(&names(&[&all[1], &all[2]])).await.unwrap();
    assert_eq!(
        (&merged.images[0].point, merged.images[0].parent.as_ref()),
        (&all[3], Some(&all[0]))
    );
    life.check().await;
    life.check_with_qemu();
    // Twice in the same image: its file of digests goes back to its first name.
    life.drop_points(&names(&[&all[0]])).await.unwrap();
    life.check().await;
    check_left(&life.repository, &life.folder, &life.points).await;
    life.check_with_qemu();
}

#[tokio::test]
async fn points_that_nothing_is_over_just_go() {
    let mut life = Life::chain(3, 3).await;
    let all = life.names();
    let before = std::fs::metadata(life.path(&all[1], "vda.qcow2"))
        .unwrap()
        .modified()
        .unwrap();
    let heard = Heard::default();
    let drop = names(&[&all[2], &all[3]]);
    let merged = merge(&life.repository, &life.folder, &drop, &heard)
        .await
        .unwrap();
    life.points.retain(|name, _| !drop.contains(name));
    assert!(merged.images.is_empty());
    assert_eq!(
        heard.warnings.load(Ordering::SeqCst),
        1,
        "the last point of vda goes"
    );
    assert_eq!(
        std::fs::metadata(life.path(&all[1], "vda.qcow2"))
            .unwrap()
            .modified()
            .unwrap(),
        before
    );
    life.check().await;
    check_left(&life.repository, &life.folder, &life.points).await;
}

#[tokio::test]
async fn disks_with_chains_of_their_own_and_forks_are_merged_each_by_itself() {
    let mut life = Life::new(4).await;
    let first = life.full(&["vda", "vdb"]).await;
    let second = life.point(&[("vda", Some(&first)), ("vdb", None)]).await;
    let third = life.increment(&[("vdb", &second)]).await;
    let fourth = life.increment(&[("vda", &second), ("vdb", &third)]).await;
    // A second one over the same point.
    let fork = life.increment(&[("vda", &second)]).await;
    life.check().await;
    let merged = life.drop_points(&names(&[&second])).await.unwrap();
    let done: Vec<(&String, &str, Option<&String>)> = merged
        .images
        .iter()
        .map(|x| (&x.point, x.disk.as_str(), x.parent.as_ref()))
        .collect();
    assert_eq!(
        done,
        [
            (&third, "vdb", None),
            (&fourth, "vda", Some(&first)),
            (&fork, "vda", Some(&first))
        ]
    );
    life.check().await;
    check_left(&life.repository, &life.folder, &life.points).await;
    life.check_with_qemu();
}

#[tokio::test]
async fn what_is_told_of_room_is_what_it_takes() {
    let life = Life::chain(5, 6).await;
    let all = life.names();
    let drop = names(&[&all[0], &all[1], &all[3], &all[4]]);
    let plan = merge_plan(&life.repository, &life.folder, &drop).await.unwrap();
    let merged = merge(&life.repository, &life.folder, &drop, &Silent)
        .await
        .unwrap();
    assert_eq!(plan.images.len(), merged.images.len());
    for (planned, done) in plan.images.iter().zip(&merged.images) {
        let slack = planned.image_bytes.abs_diff(done.image_bytes);
        assert!(
            slack < 2 << 20,
            "planned {}, became {}",
            planned.image_bytes,
            done.image_bytes
        );
    }
    assert!(
        plan.freed.abs_diff(merged.freed) < 4 << 20,
        "planned {}, freed {}",
        plan.freed,
        merged.freed
    );
}

#[tokio::test]
async fn a_full_file_system_leaves_all_as_it_was() {
    need!("small-fs");
    let life = Life::chain(6, 3).await;
    let all = life.names();
    let small = small_fs(64 << 20);
    let done = std::process::Command::new("cp")
        .arg("-a")
        .arg(life.dir.path().join("."))
        .arg(small.path())
        .status();
    assert!(done.unwrap().success());
    let repository = open(small.path()).await;
    let filler = small.path().join("filler");
    let free = rustix::fs::statvfs(small.path()).unwrap();
    let file = std::fs::File::create(&filler).unwrap();
    rustix::fs::fallocate(
        &file,
        rustix::fs::FallocateFlags::empty(),
        0,
        free.f_bavail * free.f_frsize - 65536,
    )
    .unwrap();
    let drop = names(&[&all[0], &all[1]]);
    let error = merge(&repository, &life.folder, &drop, &Silent)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    check(&repository, &life.folder, &life.points).await;
    check_left(&repository, &life.folder, &life.points).await;
    std::mem::drop(file);
    std::fs::remove_file(&filler).unwrap();
    merge(&repository, &life.folder, &drop, &Silent).await.unwrap();
    check(&repository, &life.folder, &life.points).await;
}

#[tokio::test]
async fn what_is_not_there_or_still_needed_is_not_dropped() {
    let life = Life::chain(7, 3).await;
    let all = life.names();
    let error = merge(
        &life.repository,
        &life.folder,
        &["20200101T000000Z".to_owned()].into(),
        &Silent,
    )
    .await
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    // The second one's manifest is torn: who is over it cannot take in what is below.
    let torn = life.path(&all[1], "manifest.json");
    let text = std::fs::read(&torn).unwrap();
    std::fs::write(&torn, &text[..text.len() / 2]).unwrap();
    let error = merge(&life.repository, &life.folder, &names(&[&all[0]]), &Silent)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    let error = merge(&life.repository, &life.folder, &names(&[&all[1]]), &Silent)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    assert_eq!(
        life.repository.points(&life.folder).await.unwrap().len(),
        4,
        "nothing was dropped"
    );
    // The rules look at what can be restored, and leave the rest alone.
    let rules = Retention {
        last: 1,
        ..Retention::default()
    };
    let pruned = prune(&life.repository, &life.folder, &rules, false, &Silent)
        .await
        .unwrap();
    assert_eq!((pruned.kept.len(), pruned.dropped.len()), (1, 0));
    let doubtful: Vec<&String> = pruned.doubtful.iter().map(|doubtful| &doubtful.point).collect();
    assert_eq!(doubtful, all[1..].iter().collect::<Vec<_>>());
    // It and all that is built on it can go.
    merge(
        &life.repository,
        &life.folder,
        &names(&[&all[1], &all[2], &all[3]]),
        &Silent,
    )
    .await
    .unwrap();
    let left = BTreeMap::from([(all[0].clone(), life.points[&all[0]].clone())]);
    check_left(&life.repository, &life.folder, &left).await;
}

#[tokio::test]
async fn an_image_that_would_be_something_else_replaces_nothing() {
    let mut life = Life::chain(8, 2).await;
    let all = life.names();
    // The manifest says, by its own digest rightly, that the disk was something else at the last point.
    let mut manifest = life.repository.manifest(&life.folder, &all[2]).await.unwrap();
    manifest.disks[0].content = disksnap_backup::Digest::of(b"something else");
    std::fs::write(life.path(&all[2], "manifest.json"), manifest.to_json().unwrap()).unwrap();
    let before = std::fs::read(life.path(&all[2], "vda.qcow2")).unwrap();
    let error = life.drop_points(&names(&[&all[1]])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    assert_eq!(std::fs::read(life.path(&all[2], "vda.qcow2")).unwrap(), before);
    let found = verify(&life.repository, &life.folder, &VerifyOptions::default(), &Silent)
        .await
        .unwrap();
    assert_eq!(
        (found.points.len(), found.strays.len(), found.merging),
        (3, 0, false)
    );
    assert!(
        found.points[..2]
            .iter()
            .all(disksnap_backup::VerifiedPoint::is_whole),
        "{found:#?}"
    );
    assert!(!found.points[2].is_whole());
}

#[tokio::test]
async fn a_merge_stops_when_asked_and_is_gone_on_with() {
    let mut life = Life::chain(9, 5).await;
    let all = life.names();
    let drop = names(&[&all[0], &all[2], &all[3]]);
    let heard = Heard {
        stop_after: Some(3),
        ..Heard::default()
    };
    let error = merge(&life.repository, &life.folder, &drop, &heard)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    life.check().await;
    merge(&life.repository, &life.folder, &drop, &Silent)
        .await
        .unwrap();
    life.points.retain(|name, _| !drop.contains(name));
    life.check().await;
    check_left(&life.repository, &life.folder, &life.points).await;
}

/// Whether the journal speaks of an image that does not bear its name yet.
fn waits_for_its_name(dir: &Path, folder: &DomainFolder) -> bool {
    let folder = dir.join(&folder.key);
    let journal = std::fs::read_to_string(folder.join("merging.json")).unwrap_or_default();
    let is_new = |point: std::fs::DirEntry| point.path().join("vda.qcow2-new").exists();
    journal.contains("renewing")
        && std::fs::read_dir(folder)
            .unwrap()
            .any(|point| is_new(point.unwrap()))
}

/// Every change that a merge makes after one that was killed, and what if it were the last one, too.
async fn clear_away_everywhere(life: &Life, dir: &Path) {
    for at in 0.. {
        let copy = copy_of(dir);
        let dying = Dying::at(copy.path(), Death::Within(at));
        let other = Repository::open(Arc::new(dying.clone())).await.unwrap();
        let _ = merge(&other, &life.folder, &BTreeSet::new(), &Silent).await;
        check(&open(copy.path()).await, &life.folder, &life.points).await;
        if !dying.has_died() {
            return;
        }
    }
}

/// Every change that a merge makes, and what if it were the last one.
async fn die_everywhere(life: &Life, drop: &BTreeSet<String>, death: fn(usize) -> Death) {
    let kept: BTreeMap<String, Disks> = life
        .points
        .iter()
        .filter(|(name, _)| !drop.contains(*name))
        .map(|(a, b)| (a.clone(), b.clone()))
        .collect();
    let mut tried_again = false;
    for at in 0.. {
        let copy = copy_of(life.dir.path());
        let dying = Dying::at(copy.path(), death(at));
        let repository = Repository::open(Arc::new(dying.clone())).await.unwrap();
        let outcome = merge(&repository, &life.folder, drop, &Silent).await;
        let repository = open(copy.path()).await;
        // All that is there is whole, also what was to go.
        check(&repository, &life.folder, &life.points).await;
        let there = repository.points(&life.folder).await.unwrap();
        assert!(
            kept.keys()
                .all(|name| there.iter().any(|point| point.name == *name)),
            "a kept point has gone"
        );
        if !dying.has_died() {
            outcome.unwrap();
            check_left(&repository, &life.folder, &kept).await;
            assert!(at > 20, "a merge has more changes than {at}");
            return;
        }
        let twice = death(at) == Death::Before(at) && waits_for_its_name(copy.path(), &life.folder);
        if twice && !std::mem::replace(&mut tried_again, true) {
            clear_away_everywhere(life, copy.path()).await;
        }
        // The next one finishes it, whatever it was asked for itself.
        let asked = if at % 2 == 0 {
            drop.clone()
        } else {
            BTreeSet::new()
        };
        let done = merge(&repository, &life.folder, &asked, &Silent).await;
        if at % 2 == 0 {
            // Where nothing was written down of it, what has gone is not known: that is all that may be told.
            match done {
                Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound, "{error}"),
                Ok(_) => check_left(&repository, &life.folder, &kept).await,
            }
        }
        check(&repository, &life.folder, &life.points).await;
        let found = verify(&repository, &life.folder, &VerifyOptions::default(), &Silent)
            .await
            .unwrap();
        assert_eq!(
            (&found.strays[..], &found.unfinished[..], found.merging),
            (&[][..], &[][..], false)
        );
        if at % 8 == 0 {
            check_with_qemu(copy.path(), &life.folder, &kept);
        }
    }
}

#[tokio::test]
async fn nothing_is_dropped_below_a_point_that_cannot_be_read() {
    let life = Life::chain(13, 2).await;
    let torn = life.path(&life.names()[2], "manifest.json");
    std::fs::write(&torn, "{").unwrap();
    let rules = Retention {
        last: 1,
        ..Retention::default()
    };
    for dry_run in [true, false] {
        let told = prune(&life.repository, &life.folder, &rules, dry_run, &Silent)
            .await
            .unwrap();
        assert_eq!(told.dropped, [""; 0]);
        assert_eq!(
            told.held,
            [Held {
                point: life.names()[0].clone(),
                by: vec![life.names()[2].clone()]
            }]
        );
    }
    let error = merge(
        &life.repository,
        &life.folder,
        &names(&[&life.names()[0]]),
        &Silent,
    )
    .await
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    let there = life.repository.points(&life.folder).await.unwrap();
    assert_eq!(there.len(), 3);
}

#[tokio::test]
async fn what_is_younger_than_a_point_that_cannot_be_read_is_pruned_all_the_same() {
    let mut life = Life::chain(21, 2).await;
    let all = life.names();
    std::fs::write(life.path(&all[1], "manifest.json"), "{").unwrap();
    // The third stands on the torn one: only what begins a chain of its own can be judged.
    for _ in 0..3 {
        life.full(&["vda", "vdb"]).await;
    }
    let all = life.names();
    let rules = Retention {
        last: 1,
        ..Retention::default()
    };
    let told = prune(&life.repository, &life.folder, &rules, false, &Silent)
        .await
        .unwrap();
    assert_eq!(told.dropped, all[3..5]);
    assert_eq!(told.kept.len(), 1);
    let doubtful: Vec<&String> = told.doubtful.iter().map(|doubtful| &doubtful.point).collect();
    assert_eq!(doubtful, [&all[1], &all[2]]);
    let held: Vec<&String> = told.held.iter().map(|held| &held.point).collect();
    assert_eq!(held, [&all[0]]);
    // As the operator is told.
    merge(
        &life.repository,
        &life.folder,
        &names(&[&all[1], &all[2]]),
        &Silent,
    )
    .await
    .unwrap();
    let told = prune(&life.repository, &life.folder, &rules, false, &Silent)
        .await
        .unwrap();
    assert_eq!((told.dropped, told.held), (vec![all[0].clone()], Vec::new()));
}

#[tokio::test]
async fn a_torn_journal_is_told_and_harms_no_reader() {
    let life = Life::chain(14, 1).await;
    let journal = life.dir.path().join(&life.folder.key).join("merging.json");
    for (text, kind) in [
        ("{", ErrorKind::Broken),
        ("{\"version\": 2, \"drop\": []}", ErrorKind::Unsupported),
    ] {
        std::fs::write(&journal, text).unwrap();
        life.check().await;
        let found = verify(&life.repository, &life.folder, &VerifyOptions::default(), &Silent)
            .await
            .unwrap();
        assert!(
            found.merging && found.strays[0].object.ends_with("/merging.json"),
            "{found:#?}"
        );
        let error = merge(&life.repository, &life.folder, &BTreeSet::new(), &Silent)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
    }
    std::fs::remove_file(&journal).unwrap();
    merge(
        &life.repository,
        &life.folder,
        &names(&[&life.names()[0]]),
        &Silent,
    )
    .await
    .unwrap();
    life.check().await;
}

/// A full image that goes below two disks, and a point that nothing is over.
async fn two_disks() -> (Life, BTreeSet<String>) {
    let mut life = Life::new(10).await;
    let a = life.full(&["vda", "vdb"]).await;
    let b = life.increment(&[("vda", &a), ("vdb", &a)]).await;
    let c = life.increment(&[("vda", &b)]).await;
    let _ = life.increment(&[("vda", &b)]).await;
    (life, names(&[&a, &c]))
}

#[tokio::test]
async fn killed_before_any_change_every_point_reads_right() {
    let (life, drop) = two_disks().await;
    die_everywhere(&life, &drop, Death::Before).await;
}

#[tokio::test]
async fn killed_within_any_change_every_point_reads_right() {
    let (life, drop) = two_disks().await;
    die_everywhere(&life, &drop, Death::Within).await;
}

#[tokio::test]
async fn any_change_may_fail_and_every_point_reads_right() {
    let (life, drop) = two_disks().await;
    die_everywhere(&life, &drop, Death::OneFails).await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, max_shrink_iters: 0, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_lives(seed in any::<u64>()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(live(seed));
    }
}

/// Points come and go, merges are killed and gone on with.
async fn live(seed: u64) {
    let mut random = Random::new(seed);
    let mut life = Life::new(seed).await;
    let mut last: BTreeMap<&str, String> = BTreeMap::new();
    for _ in 0..8 {
        let mut disks = Vec::new();
        for target in ["vda", "vdb"] {
            if random.below(4) > 0 {
                disks.push((target, last.get(target).cloned().filter(|_| random.below(6) > 0)));
            }
        }
        let borrowed: Vec<(&str, Option<&str>)> = disks.iter().map(|(a, b)| (*a, b.as_deref())).collect();
        let name = life.point(&borrowed).await;
        last.extend(disks.iter().map(|(target, _)| (*target, name.clone())));
        if random.below(3) == 0 {
            let needed: BTreeSet<&String> = last.values().collect();
            let drop: BTreeSet<String> = life
                .names()
                .into_iter()
                .filter(|name| !needed.contains(name) && random.below(2) == 0)
                .collect();
            let at = usize::try_from(random.below(40)).unwrap();
            let dying = Dying::at(
                life.dir.path(),
                if random.below(2) == 0 {
                    Death::Within(at)
                } else {
                    Death::Before(at)
                },
            );
            let other = Repository::open(Arc::new(dying)).await.unwrap();
            let _ = merge(&other, &life.folder, &drop, &Silent).await;
            life.check().await;
            let there = life.repository.points(&life.folder).await.unwrap();
            life.points
                .retain(|name, _| there.iter().any(|point| point.name == *name));
        }
    }
    merge(&life.repository, &life.folder, &BTreeSet::new(), &Silent)
        .await
        .unwrap();
    let there = life.repository.points(&life.folder).await.unwrap();
    life.points
        .retain(|name, _| there.iter().any(|point| point.name == *name));
    life.check().await;
    check_left(&life.repository, &life.folder, &life.points).await;
    life.check_with_qemu();
}

#[tokio::test]
async fn a_prune_keeps_what_the_rules_say_and_the_last_point_of_each_disk() {
    let mut life = Life::new(11).await;
    let a = life.full(&["vda", "vdb"]).await;
    let b = life.increment(&[("vda", &a), ("vdb", &a)]).await;
    let c = life.increment(&[("vda", &b)]).await;
    let d = life.increment(&[("vda", &c)]).await;
    let rules = Retention {
        last: 1,
        ..Retention::default()
    };
    let before = std::fs::read(life.path(&b, "manifest.json")).unwrap();
    let told = prune(&life.repository, &life.folder, &rules, true, &Silent)
        .await
        .unwrap();
    assert!(told.dry_run);
    assert_eq!(std::fs::read(life.path(&b, "manifest.json")).unwrap(), before);
    life.check().await;
    let done = prune(&life.repository, &life.folder, &rules, false, &Silent)
        .await
        .unwrap();
    assert_eq!((&told.kept, &told.dropped), (&done.kept, &done.dropped));
    let kept: Vec<(&String, String)> = done
        .kept
        .iter()
        .map(|kept| {
            (
                &kept.point,
                kept.reasons
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join(", "),
            )
        })
        .collect();
    assert_eq!(
        kept,
        [
            (&b, "latest of vdb".to_owned()),
            (&d, "last, latest of vda".to_owned())
        ]
    );
    assert_eq!(done.dropped, [a.clone(), c.clone()]);
    life.points.retain(|name, _| *name == b || *name == d);
    life.check().await;
    check_left(&life.repository, &life.folder, &life.points).await;
    life.check_with_qemu();
    // Again: there is nothing to do.
    let again = prune(&life.repository, &life.folder, &rules, false, &Silent)
        .await
        .unwrap();
    assert!(again.dropped.is_empty() && again.freed == 0);
    let error = prune(
        &life.repository,
        &life.folder,
        &Retention::default(),
        false,
        &Silent,
    )
    .await
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[tokio::test]
async fn nothing_is_merged_under_a_reader() {
    let life = Life::chain(12, 1).await;
    let all = life.names();
    let held = life.repository.lock(&life.folder, true).await.unwrap();
    let error = merge(&life.repository, &life.folder, &names(&[&all[0]]), &Silent)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert!(
        error.to_string().contains(&std::process::id().to_string()),
        "who holds it is named: {error}"
    );
    // Others can read meanwhile.
    life.check().await;
    drop(held);
    merge(&life.repository, &life.folder, &names(&[&all[0]]), &Silent)
        .await
        .unwrap();
}

/// Counts warnings, and stops after so many pieces.
#[derive(Debug, Default)]
struct Heard {
    warnings: AtomicUsize,
    pieces: AtomicUsize,
    stop_after: Option<usize>,
}

impl Watcher for Heard {
    fn event(&self, event: &Event<'_>) {
        match event {
            Event::Warning { .. } => self.warnings.fetch_add(1, Ordering::SeqCst),
            Event::Done { .. } => self.pieces.fetch_add(1, Ordering::SeqCst),
            _ => 0,
        };
    }

    fn stop(&self) -> bool {
        self.stop_after
            .is_some_and(|most| self.pieces.load(Ordering::SeqCst) >= most)
    }
}
