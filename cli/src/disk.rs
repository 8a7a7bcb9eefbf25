//! `disksnap disk`: what a domain's document says of how its disks are snapshotted (D7), and raw disks whose bitmaps are kept.

use disksnap::{DiskChoice, Disks, MethodChoice, SnapshotRequest};
use serde::Serialize;

use crate::args::DiskCommand;
use crate::context::Context;
use crate::disk_track;
use crate::failure::Outcome;
use crate::output::Text;

pub(crate) async fn run(context: &Context, command: DiskCommand) -> Outcome {
    match command {
        DiskCommand::SetMethod {
            target,
            method,
            options,
            none: _,
        } => set_method(context, target, method, options).await,
        DiskCommand::Track {
            target,
            metadata,
            document,
        } => disk_track::track(context, &target, &metadata, document).await,
        DiskCommand::Untrack {
            target,
            drop_checkpoints,
            document,
        } => disk_track::untrack(context, &target, drop_checkpoints, document).await,
    }
}

async fn set_method(
    context: &Context,
    disk: String,
    method: Option<String>,
    options: Vec<(String, String)>,
) -> Outcome {
    let target = context.target().await?;
    let choice = method.map(|method| MethodChoice {
        method,
        options: options.into_iter().collect(),
    });
    if let Some(choice) = &choice {
        // What cannot be asked for is not written down: an unknown method, disk or option. Whether it suits the disk now
        // is another matter, and told by `plan`.
        let mut named = DiskChoice::new(&disk);
        named.method = Some(choice.clone());
        let request = SnapshotRequest {
            disks: Disks::Named(vec![named]),
            ..SnapshotRequest::default()
        };
        target
            .disksnap
            .dispatcher()
            .plan(&target.domain, &request)
            .await?;
    }
    let document = target
        .disksnap
        .rewrite(&target.given, |document| {
            document.with_method(&disk, choice.as_ref())
        })
        .await?;
    let view = Set {
        target: disk,
        method: choice.map(|c| c.method),
    };
    context.out.show(&view, || Ok(document.text().to_owned()))
}

#[derive(Debug, Serialize)]
struct Set {
    target: String,
    method: Option<String>,
}

impl Text for Set {
    fn text(&self) -> String {
        match &self.method {
            Some(method) => format!("{}: the method is {method}\n", self.target),
            None => format!("{}: no method of its own\n", self.target),
        }
    }
}
