//! A snapshot's life: made, seen, read, deleted; what names and ids mean.

use std::sync::Arc;
use std::time::Duration;

use disksnap_core::{Access, Capability, Deleted, Error, ErrorKind, Health, RunState, SnapshotName};

use crate::Fixture;
use crate::cases::paint;
use crate::stage::{Context, Stage, Verdict, ensure, must_fail, name};

/// One instance for all calls, and no write after the instant: this says only that it works at all,
/// and that the fixture would see what is left behind.
pub(super) async fn control(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::lenient(fixture, 1).await?;
    let target = stage.first();
    paint::picture(&stage, &target, 1).await?;
    let content = stage.live(&target).await?;
    let snapshot = name("control");
    stage.create(&snapshot, &stage.targets(1)).await?;
    ensure!(
        !stage.things().await?.is_empty(),
        "a snapshot is there and the fixture's leftovers() sees nothing: it would see nothing left behind either"
    );
    let shown = stage.show(&snapshot).await?;
    ensure!(
        shown.overall().is_good(),
        "a new snapshot is {:?}",
        shown.overall()
    );
    stage.must_hold(&snapshot, &target, &content).await?;
    stage.delete_now(&snapshot).await
}

/// The stage gives each call a new instance, and each record goes through JSON.
pub(super) async fn stateless(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 2).await?;
    let targets = stage.targets(2);
    let snapshot = name("stateless");
    let made = stage.create(&snapshot, &targets).await?;
    let shown = stage.show(&snapshot).await?;
    ensure!(
        shown.overall().is_good(),
        "another process finds it {:?}",
        shown.overall()
    );
    ensure!(shown.snapshot == made, "another process finds another record");
    stage.delete_now(&snapshot).await?;
    stage.finish().await
}

pub(super) async fn access_fits(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 1).await?;
    let target = stage.first();
    let snapshot = name("access");
    let made = stage.create(&snapshot, &stage.targets(1)).await?;
    let capabilities = fixture.expected_capabilities();
    for disk in &made.disks {
        let needed = match &disk.access {
            Access::Node(_) => Some(Capability::Export),
            Access::Source { .. } => Some(Capability::DirectRead),
            // Nobody reaches it on this host.
            Access::Inside(_) => None,
        };
        ensure!(
            needed.is_none_or(|needed| capabilities.contains(&needed)),
            "the data is reached by {:?}, without the capability for it",
            disk.access
        );
        let size = stage.setting.size(&target);
        ensure!(
            disk.size.is_none_or(|told| told == size),
            "the snapshot is said to have {:?} of {size} bytes",
            disk.size
        );
    }
    for unit in &made.units {
        let (provider, unit) = (stage.provider(), &unit.unit);
        let offers = [
            (Capability::Revert, provider.revert(unit).is_some()),
            (Capability::Merge, provider.merge(unit).is_some()),
            (Capability::Compare, provider.compare(unit).is_some()),
        ];
        for (capability, offered) in offers {
            ensure!(
                capabilities.contains(&capability) == offered,
                "a new snapshot offers '{capability}': {offered}; the capabilities say otherwise"
            );
        }
    }
    let state = stage.control().await?.state().await?;
    let needed = match state {
        RunState::Off => Capability::Inactive,
        _ => Capability::Active,
    };
    ensure!(
        capabilities.contains(&needed),
        "it was taken of a domain that is {state}, without the capability '{needed}'"
    );
    stage.delete_now(&snapshot).await?;
    stage.finish().await
}

pub(super) async fn inspect_truth(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 2).await?;
    let snapshot = name("truth");
    let made = stage.create(&snapshot, &stage.targets(2)).await?;
    for unit in &made.units {
        let control = stage.control().await?;
        let health = stage
            .provider()
            .inspect(&*control, made.id, &unit.unit)
            .await
            .context("inspecting")?;
        ensure!(health.is_good(), "a new unit is {health:?}");
    }
    stage.delete_now(&snapshot).await?;
    for unit in &made.units {
        let control = stage.control().await?;
        let health = stage
            .provider()
            .inspect(&*control, made.id, &unit.unit)
            .await
            .context("inspecting what is deleted")?;
        ensure!(matches!(health, Health::Gone(_)), "a deleted unit is {health:?}");
    }
    stage.finish().await
}

pub(super) async fn damage_is_told(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 1).await?;
    let target = stage.first();
    let snapshot = name("spoilt");
    let made = stage.create(&snapshot, &stage.targets(1)).await?;
    stage
        .setting
        .damage(&made)
        .await
        .context("damaging the snapshot")?;
    let shown = stage.show(&snapshot).await?;
    ensure!(!shown.overall().is_good(), "a spoilt snapshot is called active");
    let opened = stage.dispatcher()?.open(stage.domain(), &snapshot, &target).await;
    must_fail(opened, ErrorKind::Broken, "opening a spoilt snapshot")?;
    paint::scribble(&stage, &target, 0xe9)
        .await
        .context("beside a spoilt snapshot")?;
    stage.delete_now(&snapshot).await?;
    stage.finish().await
}

pub(super) async fn delete_twice(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 1).await?;
    let snapshot = name("twice");
    let made = stage.create(&snapshot, &stage.targets(1)).await?;
    stage.delete_now(&snapshot).await?;
    stage.nothing_left("by delete").await?;
    for unit in &made.units {
        let control = stage.control().await?;
        let deleted = stage.provider().delete(&*control, made.id, &unit.unit).await;
        deleted.context("deleting the unit again")?;
    }
    ensure!(
        stage.delete(&snapshot).await? == Deleted::Before,
        "the second delete finds something"
    );
    stage.finish().await
}

pub(super) async fn name_twice(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 1).await?;
    let (targets, target) = (stage.targets(1), stage.first());
    paint::picture(&stage, &target, 1).await?;
    let content = stage.live(&target).await?;
    let snapshot = name("nightly");
    let made = stage.create(&snapshot, &targets).await?;
    let things = stage.things().await?;
    paint::scribble(&stage, &target, 0xea).await?;
    let again = stage.request(&snapshot, &targets);
    let created = stage.try_create(&again).await?;
    must_fail(created, ErrorKind::AlreadyExists, "a second snapshot of one name")?;
    let now = stage.things().await?;
    ensure!(now == things, "refused, and there is {now:?} after {things:?}");
    ensure!(
        stage.show(&snapshot).await?.snapshot == made,
        "the record changed"
    );
    stage.must_hold(&snapshot, &target, &content).await?;
    stage.delete_now(&snapshot).await?;
    stage.finish().await
}

pub(super) async fn id_twice(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 1).await?;
    let (targets, target) = (stage.targets(1), stage.first());
    paint::picture(&stage, &target, 1).await?;
    let content = stage.live(&target).await?;
    let snapshot = name("once");
    let request = stage.request(&snapshot, &targets);
    let first = stage.try_create(&request).await?;
    let first = first.context("the first time")?;
    paint::scribble(&stage, &target, 0xeb).await?;
    let second = stage.try_create(&request).await?;
    let second = second.context("the second time")?;
    ensure!(first == second, "the second answer is another snapshot");
    stage.must_hold(&snapshot, &target, &content).await?;
    stage.delete_now(&snapshot).await?;
    stage.finish().await
}

pub(super) async fn at_once(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 1).await?;
    let (targets, target) = (stage.targets(1), stage.first());
    paint::picture(&stage, &target, 1).await?;
    let content = stage.live(&target).await?;
    let (left, right, kept) = (name("left"), name("right"), name("kept"));
    create_both(&mut stage, [&left, &right], &targets).await?;
    stage.create(&kept, &targets).await?;
    paint::scribble(&stage, &target, 0xec).await?;
    for snapshot in [&left, &right, &kept] {
        stage.must_hold(snapshot, &target, &content).await?;
    }
    delete_both(&mut stage, [&left, &right]).await?;
    let held = stage.must_hold(&kept, &target, &content).await;
    held.context("beside two deletes at once")?;
    stage.delete_now(&kept).await?;
    stage.finish().await
}

/// Two at the same time. Where the first gives the domain, which is off, another disk, the document that the second
/// was asked with is overtaken and refused; asked with the new one it succeeds.
async fn create_both(stage: &mut Stage, names: [&SnapshotName; 2], targets: &[String]) -> Verdict {
    let requests = names.map(|name| stage.request(name, targets));
    let before = stage.domain().clone();
    let dispatchers = [stage.dispatcher()?, stage.dispatcher()?];
    let (one, other) = tokio::join!(
        dispatchers[0].create(&before, &requests[0]),
        dispatchers[1].create(&before, &requests[1])
    );
    stage.follow(&[]).await?;
    for (created, request) in [one, other].into_iter().zip(&requests) {
        match created {
            Err(error) if stage.is_overtaken(&before, &error) => {
                let again = stage.try_create(request).await?;
                again.context("asked with the document as it is now")?;
            }
            created => drop(created?),
        }
    }
    Ok(())
}

async fn delete_both(stage: &mut Stage, names: [&SnapshotName; 2]) -> Verdict {
    let before = stage.domain().clone();
    let dispatchers = [stage.dispatcher()?, stage.dispatcher()?];
    let (one, other) = tokio::join!(
        dispatchers[0].delete(&before, names[0]),
        dispatchers[1].delete(&before, names[1])
    );
    for deleted in [&one, &other].into_iter().flatten() {
        stage.follow(&deleted.altered.disks).await?;
    }
    for (deleted, name) in [one, other].into_iter().zip(names) {
        match deleted {
            Err(error) if stage.is_overtaken(&before, &error) || is_for_later(&error) => {
                delete_patiently(stage, name).await?;
            }
            deleted => was_there(name, deleted?.deleted)?,
        }
    }
    Ok(())
}

fn is_for_later(error: &Error) -> bool {
    error.kind() == ErrorKind::Busy && error.is_retryable()
}

fn was_there(name: &SnapshotName, deleted: Deleted) -> Verdict {
    ensure!(deleted == Deleted::Now, "{name} was deleted before");
    Ok(())
}

/// A delete that has to merge is told to wait while another merge is under way; one that is told so for ever fails
/// the case by its time limit.
async fn delete_patiently(stage: &mut Stage, snapshot: &SnapshotName) -> Verdict {
    loop {
        match stage.try_delete(snapshot).await? {
            Err(error) if is_for_later(&error) => tokio::time::sleep(Duration::from_millis(20)).await,
            deleted => return was_there(snapshot, deleted.context(format!("deleting {snapshot}"))?),
        }
    }
}
