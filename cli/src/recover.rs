//! `disksnap recover`: what killed runs left is finished or undone.

use disksnap::xml::Element;
use disksnap::{DomainId, Error, ErrorKind, Recovered, RecoveredHow, Result};
use serde::Serialize;

use crate::context::Context;
use crate::failure::Outcome;
use crate::output::Text;
use crate::signals::Stop;

pub(crate) async fn run(context: &Context) -> Outcome {
    let (disksnap, domain) = if context.global.domain.is_some() {
        let target = context.target().await?;
        // What a killed act left of the document was made good with that.
        (target.disksnap, Some(target.domain.id))
    } else {
        (context.disksnap().await?, None)
    };
    let stop = Stop::listen(true)?;
    let recovered = disksnap.dispatcher().recover(domain.as_ref()).await?;
    let mut recovered: Vec<RecoveredView> = recovered.iter().map(RecoveredView::new).collect();
    let caught_up = disksnap.catch_up(domain.as_ref()).await?;
    recovered.extend(caught_up.iter().map(RecoveredView::document));
    context.out.show(
        &RecoveredList {
            recovered: &recovered,
        },
        || document(&recovered),
    )?;
    let left = recovered.iter().filter(|r| r.reason.is_some()).count();
    if left > 0 {
        let what = format!("{left} of what was left behind could not be settled");
        return Err(Error::new(ErrorKind::Busy, what)
            .during("recover")
            .leaving(disksnap::Effect::Unknown)
            .hint("Mend what is told above, then run `disksnap recover` again.")
            .into());
    }
    stop.check()
}

fn document(recovered: &[RecoveredView]) -> Result<String> {
    let each = recovered.iter().map(|r| {
        let element = Element::new("act")
            .attr("domain", &r.domain)
            .attr("what", &r.what)
            .attr("how", r.how);
        match &r.reason {
            Some(reason) => element.text(reason),
            None => element,
        }
    });
    Element::new("recovered").children(each).to_document()
}

#[derive(Debug, Serialize)]
struct RecoveredList<'a> {
    recovered: &'a [RecoveredView],
}

#[derive(Debug, Serialize)]
struct RecoveredView {
    domain: String,
    what: String,
    how: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl RecoveredView {
    fn new(recovered: &Recovered) -> Self {
        let (how, reason) = match &recovered.how {
            RecoveredHow::Finished => ("finished", None),
            RecoveredHow::Undone => ("undone", None),
            RecoveredHow::Left(why) => ("left", Some(why.clone())),
        };
        Self {
            domain: recovered.domain.name.clone(),
            what: recovered.what.clone(),
            how,
            reason,
        }
    }
}

impl RecoveredView {
    /// A document that had been left behind.
    fn document(domain: &DomainId) -> Self {
        Self {
            domain: domain.name.clone(),
            what: "the domain's document".to_owned(),
            how: "finished",
            reason: None,
        }
    }
}

impl Text for RecoveredList<'_> {
    fn text(&self) -> String {
        if self.recovered.is_empty() {
            return "Nothing was left behind.\n".to_owned();
        }
        let line = |r: &RecoveredView| match &r.reason {
            Some(reason) => format!("{}: {}: left: {reason}\n", r.domain, r.what),
            None => format!("{}: {}: {}\n", r.domain, r.what, r.how),
        };
        self.recovered.iter().map(line).collect()
    }
}
