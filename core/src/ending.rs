//! Ending bitmaps, and writing down what that means: one act, which whoever comes after a kill finishes.

use crate::{Act, Change, Control, Dispatcher, Domain, Ending, Error, ErrorKind, Intent, Result};

impl Dispatcher {
    /// Ends bitmaps, and then changes the records.
    pub(crate) async fn end_marks(
        &self,
        control: &dyn Control,
        domain: &Domain,
        endings: Vec<Ending>,
        changes: Vec<Change>,
    ) -> Result<()> {
        let act = Act::EndMarks {
            endings: endings.clone(),
            changes: changes.clone(),
        };
        let intent = self.intend(domain, act).await?;
        let Err(error) = self.end_bitmaps(control, &endings).await else {
            return self.catalog.settle(intent.id, &domain.id, &changes).await;
        };
        // While the domain runs all is one command, which was refused as a whole; anything else may have been done, or in
        // part, and whoever comes next does it again.
        let refused = matches!(error.kind(), ErrorKind::Refused | ErrorKind::Busy);
        if came_to_nothing(&error) || refused && control.state().await?.is_active() {
            self.catalog.settle(intent.id, &domain.id, &[]).await?;
            return Err(error);
        }
        Err(error.leaving(crate::Effect::Unknown).hint(
            "Do it again once the cause is mended; the next act on the domain finishes it, and so does `disksnap recover`.",
        ))
    }

    /// What was begun and not finished: the bitmaps, and then the records.
    pub(crate) async fn redo_end_marks(&self, control: &dyn Control, intent: &Intent) -> Result<()> {
        let Act::EndMarks { endings, changes } = &intent.act else {
            return Ok(());
        };
        let standing = self.standing(&intent.domain.id).await?;
        let present = endings.iter().map(|ending| Ending {
            disk: standing.present(&ending.disk),
            ..ending.clone()
        });
        let present: Vec<Ending> = present.collect();
        match self.end_bitmaps(control, &present).await {
            Ok(()) => self.catalog.settle(intent.id, &intent.domain.id, changes).await,
            // What was there has been lost since: the records stay, and `validate` tells what cannot be trusted.
            Err(error) if came_to_nothing(&error) => {
                tracing::warn!("checkpoints that were being removed stay: {error}");
                self.catalog.settle(intent.id, &intent.domain.id, &[]).await
            }
            Err(error) => Err(error),
        }
    }

    async fn end_bitmaps(&self, control: &dyn Control, endings: &[Ending]) -> Result<()> {
        match endings {
            [] => Ok(()),
            endings => self.tracker()?.end(control, endings).await,
        }
    }
}

/// Whether nothing has been touched: a tracker looks at all bitmaps before it ends any.
fn came_to_nothing(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Broken | ErrorKind::Unsupported | ErrorKind::NotFound
    )
}
