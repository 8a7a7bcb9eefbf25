//! Putting a snapshot back, for the methods that can. The domain must be off for most; where it runs, nothing may
//! change then.

use std::sync::Arc;

use disksnap_core::{Altered, Capability, Disk, ErrorKind, SnapshotName};

use crate::Fixture;
use crate::cases::paint;
use crate::points::{Ended, Mishap};
use crate::stage::{Context, Failure, Stage, Step, Verdict, ensure, name, same};

/// More points than any revert has; beyond it the loop is not coming to an end.
const LIMIT: usize = 500;

pub(super) async fn content(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 2).await?;
    let (targets, snapshot) = (stage.targets(2), name("back"));
    let then = painted(&stage, &targets, 1).await?;
    stage.create(&snapshot, &targets).await?;
    scribbled(&stage, &targets, 0xd1).await?;
    let scribble = contents(&stage, &targets).await?;
    let mut ended = false;
    // Twice, and the second time it is no matter what was written since the first.
    for byte in [0xd2, 0xd3] {
        match put_back(&mut stage, fixture, &snapshot).await? {
            None => {
                all_same(&stage, &targets, &scribble)
                    .await
                    .context("refused, it changed the disk")?;
                break;
            }
            Some(altered) => {
                all_same(&stage, &targets, &then)
                    .await
                    .context("after the revert")?;
                scribbled(&stage, &targets, byte)
                    .await
                    .context("after the revert")?;
                ended = altered.gone;
            }
        }
        if ended {
            break;
        }
        for (target, content) in targets.iter().zip(&then) {
            let held = stage.must_hold(&snapshot, target, content).await;
            held.context("after the revert, and writes")?;
        }
    }
    if !ended {
        stage.delete_now(&snapshot).await?;
    }
    stage.finish().await
}

pub(super) async fn spares_others(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 1).await?;
    let (targets, target) = (stage.targets(1), stage.first());
    let mut snapshots = Vec::new();
    for (seed, text) in (1..).zip(["older", "middle", "newer"]) {
        let then = painted(&stage, &targets, seed).await?.remove(0);
        let snapshot = name(text);
        stage.create(&snapshot, &targets).await?;
        snapshots.push((snapshot, then));
    }
    paint::scribble(&stage, &target, 0xd4).await?;
    for n in [1, 0] {
        let (snapshot, then) = snapshots[n].clone();
        let before = stage.live(&target).await?;
        let altered = match stage.try_revert(&snapshot).await? {
            // Some can put back only the last, or the only one.
            Err(error) if error.kind() == ErrorKind::Busy => None,
            Err(error) if !offered(fixture) && error.kind() == ErrorKind::Unsupported => None,
            other => Some(other.context(format!("reverting to {snapshot} beside others"))?),
        };
        let (content, what) = match altered {
            None => (&before, "refused, it changed the disk"),
            Some(_) => (&then, "after the revert"),
        };
        same(content, &stage.live(&target).await?).context(what)?;
        if altered.is_some_and(|altered| altered.gone) {
            snapshots.remove(n);
        }
        for (other, content) in &snapshots {
            let held = stage.must_hold(other, &target, content).await;
            held.context(format!("after the revert to {snapshot}"))?;
        }
    }
    // The newest first: where a revert has made a tree of them, the older are what the newer stand on.
    for (snapshot, _) in snapshots.iter().rev() {
        stage.delete_now(snapshot).await?;
    }
    stage.finish().await
}

pub(super) async fn fails(fixture: &Arc<dyn Fixture>, mishap: Mishap) -> Verdict {
    let mut stage = Stage::new(fixture, 2).await?;
    let targets = stage.targets(2);
    if !works(&mut stage, fixture, &targets).await? {
        return stage.finish().await;
    }
    for n in 0..LIMIT {
        let (snapshot, then) = (name(&format!("fails-{n}")), contents(&stage, &targets).await?);
        stage.create(&snapshot, &targets).await?;
        dabbed(&stage, &targets, n).await?;
        stage.points.arm(n, mishap);
        let reverted = stage.dispatcher()?.revert(stage.domain(), &snapshot, &[]).await;
        let hit = stage.points.disarm();
        stage.follow(told(&reverted)).await?;
        let at = hit.clone().unwrap_or_else(|| "no mishap".to_owned());
        if let Err(error) = reverted {
            if hit.is_none() {
                return Err(error.into());
            }
            finished(&mut stage, &snapshot).await.context(&at)?;
        }
        all_same(&stage, &targets, &then).await.context(&at)?;
        stage.runs_as_before().await.context(&at)?;
        stage.delete(&snapshot).await?;
        stage.nothing_left(&at).await?;
        if hit.is_none() {
            return stage.finish().await;
        }
    }
    Err(Failure(format!("a revert passes more than {LIMIT} points")))
}

pub(super) async fn killed(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 2).await?;
    let targets = stage.targets(2);
    if !works(&mut stage, fixture, &targets).await? {
        return stage.finish().await;
    }
    for n in 0..LIMIT {
        let (snapshot, then) = (name(&format!("killed-{n}")), contents(&stage, &targets).await?);
        stage.create(&snapshot, &targets).await?;
        dabbed(&stage, &targets, n).await?;
        let dispatcher = stage.dispatcher()?;
        stage.points.arm(n, Mishap::Kill);
        let reverting = dispatcher.revert(stage.domain(), &snapshot, &[]);
        let at = match stage.points.killable(reverting).await {
            Ended::Done(reverted) => {
                ensure!(n > 0, "there was no point where it could be killed");
                stage.follow(told(&reverted)).await?;
                reverted?;
                all_same(&stage, &targets, &then).await?;
                stage.delete(&snapshot).await?;
                return stage.finish().await;
            }
            Ended::Killed(at) => at,
        };
        let begun = !stage.catalog_is_settled().await?;
        stage.recover().await.context(&at)?;
        if begun {
            all_same(&stage, &targets, &then)
                .await
                .context(format!("{at}, recovered"))?;
        }
        finished(&mut stage, &snapshot).await.context(&at)?;
        all_same(&stage, &targets, &then).await.context(&at)?;
        stage.delete(&snapshot).await?;
        stage.nothing_left(&at).await?;
    }
    Err(Failure(format!("a revert passes more than {LIMIT} points")))
}

fn offered(fixture: &Arc<dyn Fixture>) -> bool {
    fixture.expected_capabilities().contains(&Capability::Revert)
}

/// The disks that a revert says the domain uses from now on.
fn told(reverted: &disksnap_core::Result<Altered>) -> &[Disk] {
    reverted.as_ref().map_or(&[], |altered| &altered.disks)
}

/// Puts a snapshot back; `None` where that cannot be and is told so: the method does not offer it, or wants the
/// domain off.
async fn put_back(
    stage: &mut Stage,
    fixture: &Arc<dyn Fixture>,
    snapshot: &SnapshotName,
) -> Step<Option<Altered>> {
    let offered = offered(fixture);
    match stage.try_revert(snapshot).await? {
        Ok(altered) => {
            ensure!(
                offered,
                "the disk does not offer to be reverted, and a revert gave {altered:?}"
            );
            ensure!(
                altered.deferred.is_empty(),
                "nothing stands against the revert, and it is put off: {:?}",
                altered.deferred
            );
            Ok(Some(altered))
        }
        Err(error) if !offered && error.kind() == ErrorKind::Unsupported => Ok(None),
        Err(error) if offered && error.kind() == ErrorKind::Busy && stage.is_active() => {
            stage.runs_as_before().await?;
            Ok(None)
        }
        Err(error) => Err(error).context(format!("reverting to {snapshot}")),
    }
}

/// Whether a snapshot can be put back here where nothing goes wrong: if so, its content is the disks' again.
async fn works(stage: &mut Stage, fixture: &Arc<dyn Fixture>, targets: &[String]) -> Step<bool> {
    let (snapshot, then) = (name("unharmed"), painted(stage, targets, 1).await?);
    stage.create(&snapshot, targets).await?;
    dabbed(stage, targets, 0).await?;
    let works = put_back(stage, fixture, &snapshot).await?.is_some();
    if works {
        all_same(stage, targets, &then).await.context("unharmed")?;
    }
    stage.delete(&snapshot).await?;
    Ok(works)
}

/// After a mishap, another revert finishes it; where a revert uses the snapshot up, it may have been done already.
/// Where the mishap's was finished before this one, the document that this one was asked with is overtaken.
async fn finished(stage: &mut Stage, snapshot: &SnapshotName) -> Verdict {
    let before = stage.domain().clone();
    let mut reverted = stage.try_revert(snapshot).await?;
    if reverted
        .as_ref()
        .is_err_and(|error| stage.is_overtaken(&before, error))
    {
        reverted = stage.try_revert(snapshot).await?;
    }
    match reverted {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other.map(drop).context("the same revert again"),
    }
}

async fn painted(stage: &Stage, targets: &[String], seed: u8) -> Step<Vec<Vec<u8>>> {
    for (target, n) in targets.iter().zip(seed..) {
        paint::picture(stage, target, n).await?;
    }
    contents(stage, targets).await
}

async fn scribbled(stage: &Stage, targets: &[String], byte: u8) -> Verdict {
    for target in targets {
        paint::scribble(stage, target, byte).await?;
    }
    Ok(())
}

/// Writes a little that is not there yet.
async fn dabbed(stage: &Stage, targets: &[String], n: usize) -> Verdict {
    for target in targets {
        let there = stage.live(target).await?[0];
        paint::dab(
            stage,
            target,
            there.wrapping_add(u8::try_from(n % 64).unwrap_or(0) + 1),
        )
        .await?;
    }
    Ok(())
}

async fn contents(stage: &Stage, targets: &[String]) -> Step<Vec<Vec<u8>>> {
    let mut contents = Vec::new();
    for target in targets {
        contents.push(stage.live(target).await?);
    }
    Ok(contents)
}

async fn all_same(stage: &Stage, targets: &[String], contents: &[Vec<u8>]) -> Verdict {
    for (target, content) in targets.iter().zip(contents) {
        same(content, &stage.live(target).await?).context(format!("the disk {target}"))?;
    }
    Ok(())
}
