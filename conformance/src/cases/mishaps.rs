//! Something goes wrong at every single point of a create and of a delete, one after the other.

use std::sync::Arc;

use disksnap_core::{Capability, Deleted, Effect, RecoveredHow, Snapshot, SnapshotName, SnapshotRequest};

use crate::Fixture;
use crate::cases::paint;
use crate::points::{Ended, Mishap};
use crate::stage::{Context, Failure, Stage, Verdict, ensure, name};

pub(super) const ERROR: Mishap = Mishap::Error;
pub(super) const DISCONNECT: Mishap = Mishap::Disconnect;

/// More points than any create has; beyond it the loop is not coming to an end.
const LIMIT: usize = 2000;

/// At every how many points the content is read too: it has cases of its own, and takes longest.
const CONTENT_EVERY: usize = 5;

/// Two, so that one is done and the other is not; one where what follows is the same for all.
fn disks_for(mishap: Mishap) -> usize {
    if mishap == DISCONNECT { 1 } else { 2 }
}

pub(super) async fn create_fails(fixture: &Arc<dyn Fixture>, mishap: Mishap) -> Verdict {
    let disks = disks_for(mishap);
    let mut stage = Stage::new(fixture, disks).await?;
    let targets = stage.targets(disks);
    for n in 0..LIMIT {
        let request = stage.request(&name(&format!("fails-{n}")), &targets);
        let dispatcher = stage.dispatcher()?;
        stage.points.arm(n, mishap);
        let created = dispatcher.create(stage.domain(), &request).await;
        let hit = stage.points.disarm();
        stage.follow(&[]).await?;
        let at = hit.as_deref().unwrap_or("no mishap");
        match created {
            // A provider may get over it (a second try, another way): then the snapshot must be good.
            Ok(snapshot) => stage.good(&snapshot).await.context(at)?,
            Err(error) if hit.is_none() => return Err(error.into()),
            Err(error) => {
                // Nobody can tidy up over a connection that has ended; that is what recover is for.
                if mishap == ERROR || error.effect() != Effect::Unknown {
                    ensure!(
                        error.effect() != Effect::Unknown,
                        "{at}: not rolled back: {}",
                        Failure::from(error).0
                    );
                    stage.nothing_left(at).await?;
                }
                stage.runs_as_before().await.context(at)?;
                stage.recover().await.context(at)?;
                stage.nothing_left(at).await?;
                stage.works_now(&request, n).await.context(at)?;
            }
        }
        if hit.is_none() {
            ensure!(
                n > 0 || mishap == DISCONNECT,
                "there was no point where anything could go wrong"
            );
            return stage.finish().await;
        }
    }
    Err(Failure(format!("a create passes more than {LIMIT} points")))
}

pub(super) async fn create_killed(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 2).await?;
    let targets = stage.targets(2);
    for n in 0..LIMIT {
        let request = stage.request(&name(&format!("killed-{n}")), &targets);
        let dispatcher = stage.dispatcher()?;
        stage.points.arm(n, Mishap::Kill);
        let create = dispatcher.create(stage.domain(), &request);
        let at = match stage.points.killable(create).await {
            Ended::Done(created) => {
                ensure!(n > 0, "there was no point where it could be killed");
                stage.follow(&[]).await?;
                stage.good(&created?).await?;
                return stage.finish().await;
            }
            Ended::Killed(at) => at,
        };
        stage.recover().await.context(&at)?;
        stage.runs_as_before().await.context(&at)?;
        let whole = stage.dispatcher()?.list(stage.domain()).await.context(&at)?;
        if whole.is_empty() {
            stage.nothing_left(&at).await?;
        }
        for inspected in &whole {
            ensure!(
                inspected.overall().is_good(),
                "{at}: recovered into a snapshot that is {:?}",
                inspected.overall()
            );
        }
        stage.works_now(&request, n).await.context(&at)?;
    }
    Err(Failure(format!("a create passes more than {LIMIT} points")))
}

pub(super) async fn delete_fails(fixture: &Arc<dyn Fixture>, mishap: Mishap) -> Verdict {
    let disks = disks_for(mishap);
    let mut stage = Stage::new(fixture, disks).await?;
    let targets = stage.targets(disks);
    for n in 0..LIMIT {
        let snapshot = name(&format!("fails-{n}"));
        stage.create(&snapshot, &targets).await?;
        let dispatcher = stage.dispatcher()?;
        stage.points.arm(n, mishap);
        let deleted = dispatcher.delete(stage.domain(), &snapshot).await;
        let hit = stage.points.disarm();
        stage.follow(&[]).await?;
        let at = hit.as_deref().unwrap_or("no mishap");
        if let Err(error) = deleted {
            if hit.is_none() {
                return Err(error.into());
            }
            stage.delete(&snapshot).await.context(at)?;
        }
        stage.deleted(&snapshot).await.context(at)?;
        if hit.is_none() {
            ensure!(
                n > 0 || mishap == DISCONNECT,
                "there was no point where anything could go wrong"
            );
            return stage.finish().await;
        }
    }
    Err(Failure(format!("a delete passes more than {LIMIT} points")))
}

pub(super) async fn delete_killed(fixture: &Arc<dyn Fixture>) -> Verdict {
    let mut stage = Stage::new(fixture, 2).await?;
    let merges = fixture.expected_capabilities().contains(&Capability::Merge);
    let targets = stage.targets(2);
    for n in 0..LIMIT {
        let snapshot = name(&format!("killed-{n}"));
        stage.create(&snapshot, &targets).await?;
        let dispatcher = stage.dispatcher()?;
        stage.points.arm(n, Mishap::Kill);
        let delete = dispatcher.delete(stage.domain(), &snapshot);
        let at = match stage.points.killable(delete).await {
            Ended::Done(deleted) => {
                ensure!(n > 0, "there was no point where it could be killed");
                deleted?;
                stage.follow(&[]).await?;
                stage.deleted(&snapshot).await?;
                return stage.finish().await;
            }
            Ended::Killed(at) => at,
        };
        let begun = !stage.catalog_is_settled().await?;
        stage.recover().await.context(&at)?;
        // A merge that nobody drives is not carried on unasked: the snapshot stays until it is deleted again.
        let stays = merges
            && !stage
                .dispatcher()?
                .list(stage.domain())
                .await
                .context(&at)?
                .is_empty();
        if begun && !stays {
            stage.nothing_left(&at).await?;
        }
        stage.delete(&snapshot).await.context(&at)?;
        stage.deleted(&snapshot).await.context(&at)?;
    }
    Err(Failure(format!("a delete passes more than {LIMIT} points")))
}

impl Stage {
    /// Settles all that is open; twice, for the second time must find nothing.
    pub(super) async fn recover(&mut self) -> Verdict {
        let domain = self.domain().id.clone();
        for recovered in self
            .dispatcher()?
            .recover(Some(&domain))
            .await
            .context("recovering")?
        {
            ensure!(
                !matches!(recovered.how, RecoveredHow::Left(_)),
                "recover leaves {recovered:?}"
            );
        }
        let again = self
            .dispatcher()?
            .recover(Some(&domain))
            .await
            .context("recovering again")?;
        ensure!(again.is_empty(), "recovered again, it finds {again:?}");
        self.follow(&[]).await
    }

    pub(super) async fn catalog_is_settled(&self) -> Result<bool, Failure> {
        use disksnap_core::Catalog as _;
        Ok(self.catalog.intents(None).await?.is_empty())
    }

    /// The same request again makes a snapshot (or answers with the one it made), which holds what it should.
    async fn works_now(&mut self, request: &SnapshotRequest, n: usize) -> Verdict {
        let created = self.try_create(request).await?;
        let created = created.context("the same request again")?;
        if n.is_multiple_of(CONTENT_EVERY) {
            return self.good(&created).await;
        }
        let shown = self.show(&created.name).await?;
        ensure!(
            shown.overall().is_good(),
            "the same request again makes a snapshot that is {:?}",
            shown.overall()
        );
        self.delete_now(&created.name).await?;
        self.nothing_left("after the delete").await
    }

    /// Fails unless a new snapshot is whole and keeps its content; deletes it.
    async fn good(&mut self, snapshot: &Snapshot) -> Verdict {
        for disk in &snapshot.disks {
            let target = &disk.target;
            let content = self.live(target).await?;
            paint::dab(self, target, content[0].wrapping_add(1)).await?;
            self.must_hold(&snapshot.name, target, &content).await?;
        }
        self.delete_now(&snapshot.name).await?;
        self.nothing_left("after the delete").await
    }

    /// Fails unless this snapshot is gone, and nothing is left of it.
    async fn deleted(&mut self, snapshot: &SnapshotName) -> Verdict {
        ensure!(
            self.delete(snapshot).await? == Deleted::Before,
            "after the delete it is still there"
        );
        self.nothing_left("after the delete").await
    }
}
