//! What differs between two snapshots, for the methods that can tell.

use std::ops::Range;
use std::sync::Arc;

use disksnap_core::{Capability, Peer, Precision, Snapshot, SnapshotName};
use futures_util::TryStreamExt;

use crate::Fixture;
use crate::cases::paint;
use crate::stage::{Context, Failure, Stage, Step, Verdict, ensure, name, same};

/// What was told of one pair.
struct Told {
    ranges: Vec<Range<u64>>,
    precision: Precision,
}

/// Whether the method says that it compares; where it does not, it must not.
async fn compares(fixture: &Arc<dyn Fixture>, stage: &mut Stage) -> Step<bool> {
    let expected = fixture.expected_capabilities().contains(&Capability::Compare);
    if !expected {
        let snapshot = name("incomparable");
        let made = stage.create(&snapshot, &stage.targets(1)).await?;
        let offered = stage.provider().compare(&made.units[0].unit).is_some();
        ensure!(
            !offered,
            "it compares without the capability '{}'",
            Capability::Compare
        );
        stage.delete_now(&snapshot).await?;
        stage.finish().await?;
    }
    Ok(expected)
}

pub(super) async fn content(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 1).await?;
    if !compares(fixture, &mut stage).await? {
        return Ok(());
    }
    let (targets, target) = (stage.targets(1), stage.first());
    let size = stage.setting.size(&target);
    paint::picture(&stage, &target, 1).await?;
    let names = ["first", "same", "written", "zeroed"].map(name);
    stage.create(&names[0], &targets).await?;
    stage.create(&names[1], &targets).await?;
    let written = [(0, 512), (size / 2 / 512 * 512, 4096), (size - 512, 512)];
    for (offset, len) in written {
        stage.write(&target, offset, len, 0x77).await?;
    }
    stage.create(&names[2], &targets).await?;
    for (offset, len) in written {
        stage.zero(&target, offset, len).await?;
    }
    stage.create(&names[3], &targets).await?;
    let nothing = compared(&stage, &names[0], &names[1]).await?;
    only(&nothing, &[]).context("nothing was written")?;
    let once = compared(&stage, &names[1], &names[2]).await?;
    only(&once, &written).context("some was written")?;
    for (earlier, later) in [(0, 2), (2, 3), (0, 3), (3, 0), (2, 1)] {
        compared(&stage, &names[earlier], &names[later]).await?;
    }
    for snapshot in &names {
        stage.delete_now(snapshot).await?;
    }
    stage.finish().await
}

pub(super) async fn outlives(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 1).await?;
    if !compares(fixture, &mut stage).await? {
        return Ok(());
    }
    let (targets, target) = (stage.targets(1), stage.first());
    let names = ["kept", "between", "later", "last"].map(name);
    for (snapshot, seed) in names.iter().zip(1..) {
        paint::picture(&stage, &target, seed).await?;
        stage.create(snapshot, &targets).await?;
    }
    paint::scribble(&stage, &target, 0xe9).await?;
    stage.delete_now(&names[1]).await?;
    compared(&stage, &names[0], &names[2]).await?;
    let size = stage.setting.size(&target);
    stage.zero(&target, 0, size).await?;
    compared(&stage, &names[0], &names[3]).await?;
    for snapshot in [&names[0], &names[2], &names[3]] {
        stage.delete_now(snapshot).await?;
    }
    stage.finish().await
}

/// Has the first disk of two snapshots compared, and looks whether they are equal in all that is not told.
async fn compared(stage: &Stage, earlier: &SnapshotName, later: &SnapshotName) -> Step<Told> {
    let target = stage.first();
    let told = told(stage, earlier, later, &target).await;
    let told = told.context(format!("comparing {earlier} with {later}"))?;
    let mut patched = stage.frozen(earlier, &target).await?;
    let wanted = stage.frozen(later, &target).await?;
    for range in &told.ranges {
        let place = place(range)?;
        let fits = place.end <= wanted.len();
        ensure!(fits, "{range:?} is told of a disk of {} bytes", wanted.len());
        patched[place.clone()].copy_from_slice(&wanted[place]);
    }
    same(&wanted, &patched).context(format!(
        "{earlier} with the ranges that are told of {later}, {:?}",
        told.ranges
    ))?;
    Ok(told)
}

fn place(range: &Range<u64>) -> Step<Range<usize>> {
    let place = |at: u64| usize::try_from(at).map_err(|_| Failure(format!("{range:?} is out of all bounds")));
    Ok(place(range.start)?..place(range.end)?)
}

async fn told(stage: &Stage, earlier: &SnapshotName, later: &SnapshotName, target: &str) -> Step<Told> {
    let (earlier, later) = (stage.show(earlier).await?, stage.show(later).await?);
    let (earlier, later) = (peer(&earlier.snapshot), peer(&later.snapshot));
    let compare = stage.provider().compare(&later.unit);
    let compare = compare.ok_or_else(|| Failure("nothing is offered that compares".to_owned()))?;
    let control = stage.control().await?;
    let changed = compare.changed(&*control, &earlier, &later, target).await?;
    let size = stage.setting.size(target);
    ensure!(
        changed.size == size,
        "the disk is said to have {} of {size} bytes",
        changed.size
    );
    let precision = changed.precision;
    let ranges: Vec<Range<u64>> = changed.ranges.try_collect().await?;
    ensure!(
        ranges.iter().all(|range| range.start < range.end),
        "an empty range: {ranges:?}"
    );
    let ascending = ranges.windows(2).all(|pair| pair[0].end < pair[1].start);
    ensure!(ascending, "the ranges touch or do not ascend: {ranges:?}");
    Ok(Told { ranges, precision })
}

fn peer(snapshot: &Snapshot) -> Peer {
    Peer {
        snapshot: snapshot.id,
        unit: snapshot.units[0].unit.clone(),
    }
}

/// Fails where what is told exactly has blocks in which nothing was written.
fn only(told: &Told, written: &[(u64, u64)]) -> Verdict {
    let Precision::Exact(block) = told.precision else {
        return Ok(());
    };
    for range in &told.ranges {
        let mut at = range.start / block * block;
        while at < range.end {
            let touched = written
                .iter()
                .any(|(offset, len)| *offset < at + block && offset + len > at);
            ensure!(
                touched,
                "the block at {at} is told as changed exactly, in blocks of {block} bytes, and nothing was written there: {:?}",
                told.ranges
            );
            at += block;
        }
    }
    Ok(())
}
