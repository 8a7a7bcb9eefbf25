//! Prepare and abort, called directly.

use std::sync::Arc;

use disksnap_core::{DiskRequest, Prepared, SnapshotId};

use crate::Fixture;
use crate::cases::paint;
use crate::stage::{Context, Stage, Step, Verdict, ensure, name};

pub(super) async fn prepare_covers(fixture: &Arc<dyn Fixture>) -> Verdict {
    let stage = Stage::new(fixture, 2).await?;
    let targets = stage.targets(2);
    let requests = stage.disk_requests(&targets).await?;
    let id = SnapshotId::random();
    let probes = stage
        .provider()
        .probe(&*stage.control().await?, &requests)
        .await
        .context("probing")?;
    let prepared = prepare(&stage, id, &requests).await?;
    for (target, probe) in targets.iter().zip(probes) {
        let of_disk: Vec<&Prepared> = prepared.iter().filter(|p| p.targets.contains(target)).collect();
        ensure!(
            of_disk.len() == 1,
            "{target} is in {} prepared units",
            of_disk.len()
        );
        ensure!(
            of_disk[0].unit == probe.unit,
            "{target} was probed into unit {} and prepared in {}",
            probe.unit,
            of_disk[0].unit
        );
    }
    let count: usize = prepared.iter().map(|p| p.targets.len()).sum();
    ensure!(
        count == targets.len(),
        "{count} targets were prepared for {} disks",
        targets.len()
    );
    abort(&stage, id, &requests, Some(&prepared)).await?;
    stage.finish().await
}

pub(super) async fn prepare_again(fixture: &Arc<dyn Fixture>) -> Verdict {
    let stage = Stage::new(fixture, 2).await?;
    let requests = stage.disk_requests(&stage.targets(2)).await?;
    let id = SnapshotId::random();
    let first = prepare(&stage, id, &requests).await?;
    let things = stage.things().await?;
    let second = prepare(&stage, id, &requests).await.context("the second time")?;
    // Warnings tell the moment (free space), not the request.
    let answer = |all: &[Prepared]| -> Vec<Prepared> {
        let silent = |p: &Prepared| Prepared {
            warnings: Vec::new(),
            ..p.clone()
        };
        all.iter().map(silent).collect()
    };
    ensure!(
        answer(&first) == answer(&second),
        "prepared again: {second:?} after {first:?}"
    );
    let now = stage.things().await?;
    ensure!(now == things, "prepared again, there is {now:?} after {things:?}");
    abort(&stage, id, &requests, Some(&second)).await?;
    stage.finish().await
}

pub(super) async fn take_plan_pure(fixture: &Arc<dyn Fixture>) -> Verdict {
    let stage = Stage::new(fixture, 1).await?;
    let requests = stage.disk_requests(&stage.targets(1)).await?;
    let id = SnapshotId::random();
    let prepared = prepare(&stage, id, &requests).await?;
    let things = stage.things().await?;
    for unit in &prepared {
        let first = stage.provider().take_plan(unit).context("planning the take")?;
        let second = stage
            .provider()
            .take_plan(unit)
            .context("planning the take again")?;
        ensure!(first == second, "planned again: {second:?} after {first:?}");
    }
    ensure!(
        stage.things().await? == things,
        "planning the take made something"
    );
    abort(&stage, id, &requests, Some(&prepared)).await?;
    stage.finish().await
}

pub(super) async fn abort_undoes(fixture: &Arc<dyn Fixture>) -> Verdict {
    let stage = Stage::new(fixture, 2).await?;
    let requests = stage.disk_requests(&stage.targets(2)).await?;
    let id = SnapshotId::random();
    let prepared = prepare(&stage, id, &requests).await?;
    abort(&stage, id, &requests, Some(&prepared)).await?;
    stage.nothing_left("by abort").await?;
    let prepared = prepare(&stage, id, &requests)
        .await
        .context("the same request after abort")?;
    abort(&stage, id, &requests, Some(&prepared)).await?;
    stage.finish().await
}

pub(super) async fn abort_twice(fixture: &Arc<dyn Fixture>) -> Verdict {
    let stage = Stage::new(fixture, 1).await?;
    let requests = stage.disk_requests(&stage.targets(1)).await?;
    let id = SnapshotId::random();
    let prepared = prepare(&stage, id, &requests).await?;
    abort(&stage, id, &requests, Some(&prepared)).await?;
    abort(&stage, id, &requests, Some(&prepared))
        .await
        .context("the second time")?;
    abort(&stage, id, &requests, None)
        .await
        .context("the third time, without the record")?;
    stage.finish().await
}

pub(super) async fn abort_without_record(fixture: &Arc<dyn Fixture>) -> Verdict {
    let stage = Stage::new(fixture, 2).await?;
    let requests = stage.disk_requests(&stage.targets(2)).await?;
    let id = SnapshotId::random();
    prepare(&stage, id, &requests).await?;
    abort(&stage, id, &requests, None).await?;
    stage.finish().await
}

pub(super) async fn abort_before_anything(fixture: &Arc<dyn Fixture>) -> Verdict {
    let stage = Stage::new(fixture, 1).await?;
    let requests = stage.disk_requests(&stage.targets(1)).await?;
    abort(&stage, SnapshotId::random(), &requests, None).await?;
    stage.finish().await
}

pub(super) async fn abort_spares_others(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 1).await?;
    let (targets, target) = (stage.targets(1), stage.first());
    let requests = stage.disk_requests(&targets).await?;
    let (one, other) = (SnapshotId::random(), SnapshotId::random());
    let first = prepare(&stage, one, &requests).await?;
    let alone = stage.things().await?;
    let second = prepare(&stage, other, &requests)
        .await
        .context("beside another request")?;
    abort(&stage, other, &requests, Some(&second)).await?;
    let now = stage.things().await?;
    ensure!(
        now == alone,
        "beside another request, abort left {now:?} of {alone:?}"
    );
    paint::picture(&stage, &target, 1).await?;
    let content = stage.live(&target).await?;
    let kept = name("kept");
    stage.create(&kept, &targets).await?;
    abort(&stage, one, &requests, Some(&first))
        .await
        .context("beside a snapshot")?;
    paint::scribble(&stage, &target, 0xee).await?;
    stage.must_hold(&kept, &target, &content).await?;
    prepare(&stage, one, &requests)
        .await
        .context("beside a snapshot")?;
    abort(&stage, one, &requests, None)
        .await
        .context("beside a snapshot, without the record")?;
    stage.must_hold(&kept, &target, &content).await?;
    stage.delete_now(&kept).await?;
    stage.finish().await
}

async fn prepare(stage: &Stage, id: SnapshotId, requests: &[DiskRequest]) -> Step<Vec<Prepared>> {
    let control = stage.control().await?;
    let prepared = stage.provider().prepare(&*control, id, requests).await;
    prepared.context("preparing")
}

async fn abort(
    stage: &Stage,
    id: SnapshotId,
    requests: &[DiskRequest],
    prepared: Option<&[Prepared]>,
) -> Verdict {
    let control = stage.control().await?;
    let aborted = stage.provider().abort(&*control, id, requests, prepared).await;
    aborted.context("aborting")
}
