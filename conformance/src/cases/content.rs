//! What is in a snapshot, while the domain goes on.

use std::sync::Arc;

use crate::Fixture;
use crate::cases::paint;
use crate::stage::{Context, Stage, Verdict, ensure, name, same};

pub(super) async fn edges(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 1).await?;
    let target = stage.first();
    paint::picture(&stage, &target, 1).await?;
    let content = stage.live(&target).await?;
    let snapshot = name("edges");
    stage.create(&snapshot, &stage.targets(1)).await?;
    stage
        .must_hold(&snapshot, &target, &content)
        .await
        .context("untouched")?;
    for round in [0xe1, 0xe2] {
        paint::scribble(&stage, &target, round).await?;
        stage.must_hold(&snapshot, &target, &content).await?;
    }
    stage.delete_now(&snapshot).await?;
    stage.finish().await
}

pub(super) async fn zeroes(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 1).await?;
    let target = stage.first();
    let size = stage.setting.size(&target);
    stage.write(&target, 0, size, 0x5a).await?;
    let content = stage.live(&target).await?;
    let snapshot = name("zeroes");
    stage.create(&snapshot, &stage.targets(1)).await?;
    for (offset, len) in paint::edges(size).into_iter().chain(paint::holes()) {
        stage.zero(&target, offset, len).await?;
    }
    stage.must_hold(&snapshot, &target, &content).await?;
    paint::scribble(&stage, &target, 0xe3).await?;
    stage
        .must_hold(&snapshot, &target, &content)
        .await
        .context("written after")?;
    stage.delete_now(&snapshot).await?;
    stage.finish().await
}

pub(super) async fn overwrite(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 1).await?;
    let target = stage.first();
    paint::picture(&stage, &target, 2).await?;
    let content = stage.live(&target).await?;
    let snapshot = name("overwrite");
    stage.create(&snapshot, &stage.targets(1)).await?;
    let size = stage.setting.size(&target);
    stage.write(&target, 0, size, 0xe4).await?;
    stage.must_hold(&snapshot, &target, &content).await?;
    stage.zero(&target, 0, size).await?;
    stage
        .must_hold(&snapshot, &target, &content)
        .await
        .context("zeroed")?;
    stage.delete_now(&snapshot).await?;
    stage.finish().await
}

pub(super) async fn several_disks(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 3).await?;
    let targets = stage.targets(3);
    let mut contents = Vec::new();
    for (target, seed) in targets.iter().zip(1..) {
        paint::picture(&stage, target, seed).await?;
        contents.push(stage.live(target).await?);
    }
    ensure!(
        contents[0] != contents[1] && contents[1] != contents[2],
        "the fixture's disks are one and the same"
    );
    let snapshot = name("several");
    let record = stage.create(&snapshot, &targets).await?;
    let found: Vec<&str> = record.disks.iter().map(|d| d.target.as_str()).collect();
    ensure!(
        found == targets,
        "the snapshot has the disks {found:?} of {targets:?}"
    );
    for target in &targets {
        paint::scribble(&stage, target, 0xe5).await?;
    }
    for (target, content) in targets.iter().zip(&contents) {
        stage.must_hold(&snapshot, target, content).await?;
    }
    stage.delete_now(&snapshot).await?;
    stage.finish().await
}

/// Which of two snapshots is deleted first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum First {
    Older,
    Newer,
}

pub(super) async fn two_snapshots(fixture: &Arc<dyn Fixture>, first: First) -> Verdict {
    let mut stage = Stage::new(fixture, 1).await?;
    let (targets, target) = (stage.targets(1), stage.first());
    let (older, newer) = (name("older"), name("newer"));
    paint::picture(&stage, &target, 1).await?;
    let before = stage.live(&target).await?;
    stage.create(&older, &targets).await?;
    paint::picture(&stage, &target, 2).await?;
    let between = stage.live(&target).await?;
    stage.create(&newer, &targets).await?;
    paint::scribble(&stage, &target, 0xe6).await?;
    stage
        .must_hold(&older, &target, &before)
        .await
        .context("beside the newer")?;
    stage
        .must_hold(&newer, &target, &between)
        .await
        .context("beside the older")?;
    let (gone, left, content) = match first {
        First::Older => (&older, &newer, &between),
        First::Newer => (&newer, &older, &before),
    };
    stage.delete_now(gone).await?;
    stage.must_hold(left, &target, content).await.context("alone")?;
    paint::picture(&stage, &target, 3).await?;
    stage
        .must_hold(left, &target, content)
        .await
        .context("alone, after writes")?;
    stage.delete_now(left).await?;
    stage.finish().await
}

pub(super) async fn domain_goes_on(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 1).await?;
    let target = stage.first();
    let snapshot = name("passing");
    paint::picture(&stage, &target, 1).await?;
    let content = stage.live(&target).await?;
    stage.create(&snapshot, &stage.targets(1)).await?;
    let after = stage.live(&target).await?;
    same(&content, &after).context("the snapshot changed the disk")?;
    paint::scribble(&stage, &target, 0xe7).await?;
    let content = stage.live(&target).await?;
    stage.delete_now(&snapshot).await?;
    let after = stage.live(&target).await?;
    same(&content, &after).context("deleting the snapshot changed the disk")?;
    let size = stage.setting.size(&target);
    stage.write(&target, 0, size, 0xe8).await?;
    stage.finish().await
}
