//! Records of checkpoints: defined as a whole or not at all, and never lost by mistake.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod scene;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use disksnap_core::{
    Catalog, Change, Checkpoint, CheckpointDisk, Error, ErrorKind, Mark, Redefine, Redefined, Result,
    RunState,
};
use uuid::Uuid;

use scene::{FakeMethod, Plan, Scene};

const PLAIN: Redefine = Redefine {
    replace: false,
    leave_out: false,
    validate: false,
};
const REPLACE: Redefine = Redefine {
    replace: true,
    leave_out: false,
    validate: false,
};

fn scene() -> Scene {
    Scene::new(RunState::Off, [FakeMethod::new("a", Plan::Atomic)])
}

fn at(second: u64) -> SystemTime {
    UNIX_EPOCH + Duration::new(1_700_000_000 + second, 5)
}

fn disk(target: &str, bitmap: &str) -> CheckpointDisk {
    CheckpointDisk {
        target: target.to_owned(),
        id: None,
        size: Some(1 << 30),
        mark: Mark::Bitmap(bitmap.to_owned()),
        volatile: false,
        anew: false,
    }
}

fn checkpoint(name: &str, parent: Option<&str>, second: u64, targets: &[&str]) -> Checkpoint {
    Checkpoint {
        name: name.parse().unwrap(),
        parent: parent.map(|parent| parent.parse().unwrap()),
        created: at(second),
        description: None,
        disks: targets.iter().map(|target| disk(target, name)).collect(),
    }
}

fn line() -> Vec<Checkpoint> {
    vec![
        checkpoint("mon", None, 1, &["vda"]),
        checkpoint("tue", Some("mon"), 2, &["vda", "vdb"]),
        checkpoint("wed", Some("tue"), 3, &["vdb", "vda"]),
    ]
}

async fn redefine(scene: &Scene, set: Vec<Checkpoint>, how: Redefine) -> Result<Redefined> {
    scene.dispatcher.redefine(&scene.domain, set, how).await
}

async fn known(scene: &Scene) -> Vec<Checkpoint> {
    let lineage = scene.dispatcher.checkpoints(&scene.domain).await.unwrap();
    lineage.into_checkpoints()
}

/// It is refused, and what was known before is known still.
async fn refused(scene: &Scene, set: Vec<Checkpoint>, how: Redefine) -> Error {
    let before = known(scene).await;
    let error = redefine(scene, set, how).await.unwrap_err();
    assert_eq!(known(scene).await, before);
    error
}

fn names(names: &[impl std::fmt::Display]) -> Vec<String> {
    names.iter().map(ToString::to_string).collect()
}

#[tokio::test]
async fn a_set_comes_in_any_order_and_twice() {
    let scene = scene();
    assert_eq!(known(&scene).await, []);
    let mut set = line();
    set.reverse();
    let done = redefine(&scene, set.clone(), PLAIN).await.unwrap();
    assert_eq!(names(&done.added), ["mon", "tue", "wed"]);
    assert_eq!(known(&scene).await, line());
    for how in [PLAIN, REPLACE] {
        let again = redefine(&scene, set.clone(), how).await.unwrap();
        assert_eq!(names(&again.kept), ["mon", "tue", "wed"]);
        let nothing_else = Redefined {
            kept: again.kept.clone(),
            ..Redefined::default()
        };
        assert_eq!(again, nothing_else);
    }
    let mut more = line();
    more.push(checkpoint("thu", Some("wed"), 4, &["vda"]));
    let done = redefine(&scene, more.clone(), PLAIN).await.unwrap();
    assert_eq!((names(&done.added), done.kept.len()), (vec!["thu".to_owned()], 3));
    assert_eq!(known(&scene).await, more);
}

#[tokio::test]
async fn a_set_that_is_not_sound_is_refused_whole() {
    let scene = scene();
    redefine(&scene, line(), PLAIN).await.unwrap();
    let mut cycle = line();
    cycle[0].parent = Some("wed".parse().unwrap());
    let error = refused(&scene, cycle, REPLACE).await;
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let error = refused(&scene, line().split_off(1), REPLACE).await;
    assert!(error.message().contains("'mon' is not in the set"), "{error}");
}

#[tokio::test]
async fn nobody_loses_a_checkpoint_by_mistake() {
    let scene = scene();
    redefine(&scene, line(), PLAIN).await.unwrap();
    let mut fewer = line();
    fewer.truncate(1);
    let error = refused(&scene, fewer.clone(), PLAIN).await;
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert!(error.message().contains("'tue', 'wed'"), "{error}");
    assert!(error.next_step().unwrap().contains("--replace"));
    let done = redefine(&scene, fewer.clone(), REPLACE).await.unwrap();
    assert_eq!(names(&done.forgotten), ["tue", "wed"]);
    assert_eq!(known(&scene).await, fewer);
    let gone = scene.dispatcher.forget_checkpoints(&scene.domain).await.unwrap();
    assert_eq!(names(&gone), ["mon"]);
    let gone = scene.dispatcher.forget_checkpoints(&scene.domain).await.unwrap();
    assert_eq!(names(&gone), Vec::<String>::new());
}

#[tokio::test]
async fn what_contradicts_is_refused_and_what_says_less_is_completed() {
    let scene = scene();
    let mut full = line();
    full[1].description = Some("before the upgrade".to_owned());
    full[1].disks[0].id = Some(Uuid::from_u128(7));
    full[1].disks[1].volatile = true;
    redefine(&scene, full.clone(), PLAIN).await.unwrap();

    // What libvirt's form and oVirt's tables cannot tell.
    let mut less = full.clone();
    less[1].description = None;
    less[1].created = UNIX_EPOCH + Duration::from_secs(1_700_000_002);
    for disk in &mut less[1].disks {
        (disk.id, disk.size, disk.volatile) = (None, None, false);
    }
    less[1].disks.reverse();
    let done = redefine(&scene, less.clone(), PLAIN).await.unwrap();
    assert_eq!(done.kept.len(), 3, "{done:?}");
    assert_eq!(known(&scene).await, full);

    let contradict = |change: fn(&mut Checkpoint)| {
        let mut set = full.clone();
        change(&mut set[1]);
        set
    };
    for (set, word) in [
        (
            contradict(|c| c.disks[0].mark = Mark::Bitmap("x".to_owned())),
            "vda",
        ),
        (contradict(|c| c.disks[0].size = Some(1)), "vda"),
        (contradict(|c| c.disks[0].id = Some(Uuid::nil())), "vda"),
        (contradict(|c| drop(c.disks.pop())), "nothing of the disk vdb"),
        (
            contradict(|c| c.description = Some("?".to_owned())),
            "description",
        ),
        (
            contradict(|c| c.created += Duration::from_secs(9)),
            "another time",
        ),
    ] {
        let error = refused(&scene, set.clone(), PLAIN).await;
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert!(
            error.message().contains("'tue'") && error.message().contains(word),
            "{error}"
        );
        let done = redefine(&scene, set.clone(), REPLACE).await.unwrap();
        assert_eq!(names(&done.replaced), ["tue"]);
        assert_eq!(known(&scene).await, set);
        redefine(&scene, full.clone(), REPLACE).await.unwrap();
    }
    // With --replace the set is what it says, and no more.
    redefine(&scene, less.clone(), REPLACE).await.unwrap();
    assert_eq!(known(&scene).await, less);
    // What becomes known is no contradiction.
    let done = redefine(&scene, full, PLAIN).await;
    assert!(done.unwrap_err().message().contains("another time"));
}

#[tokio::test]
async fn disks_that_the_domain_does_not_have() {
    let scene = scene();
    let mut set = line();
    set[0].disks.push(disk("vdc", "mon"));
    set[2].disks.push(disk("vdc", "wed"));
    for how in [PLAIN, REPLACE] {
        let error = refused(&scene, set.clone(), how).await;
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.context().any(|c| c == ("disk", "vdc")), "{error}");
    }
    let leave_out = Redefine {
        leave_out: true,
        validate: false,
        ..PLAIN
    };
    let done = redefine(&scene, set.clone(), leave_out).await.unwrap();
    assert_eq!(
        done.left_out.into_iter().collect::<Vec<_>>(),
        [("vdc".to_owned(), 2)]
    );
    assert_eq!(known(&scene).await, line());

    // A disk that was taken away later stays in what is known.
    let mut smaller = scene.domain.clone();
    smaller.disks.pop();
    let done = scene.dispatcher.redefine(&smaller, line(), PLAIN).await.unwrap();
    assert_eq!(done.kept.len(), 3);
    let done = scene
        .dispatcher
        .redefine(&smaller, line(), leave_out)
        .await
        .unwrap();
    assert_eq!((done.kept.len(), done.left_out.len()), (3, 0));
}

#[tokio::test]
async fn a_set_that_somebody_broke_is_told_and_can_be_replaced() {
    let scene = scene();
    let broken = [Change::SetCheckpoints(line().split_off(1))];
    scene
        .catalog
        .settle(Uuid::nil(), &scene.domain.id, &broken)
        .await
        .unwrap();
    let error = scene.dispatcher.checkpoints(&scene.domain).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken);
    assert!(error.next_step().unwrap().contains("--replace"));
    redefine(&scene, line(), REPLACE).await.unwrap();
    assert_eq!(known(&scene).await, line());
}
