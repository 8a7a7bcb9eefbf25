//! `disksnap backup verify`: what is in the repository against the digests that were taken of the snapshots.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use disksnap::{Error, ErrorKind};
use disksnap_backup::{Fault, PointSpec, Verification, VerifyOptions};
use serde::Serialize;

use crate::backup::args::Verify;
use crate::backup::create::{no_xml, stopped};
use crate::backup::progress::Teller;
use crate::backup::{folder, repository};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::output::{Text, size, table};
use crate::signals::Stop;

pub(crate) async fn run(context: &Context, verify: Verify) -> Outcome {
    let repository = repository(&verify.repo).await?;
    let folder = folder(context, &repository).await?;
    let mut points = BTreeSet::new();
    let listed = repository.points(&folder).await?;
    for spec in &verify.points {
        points.insert(match spec {
            // One whose manifest is damaged is told, not refused.
            PointSpec::Named(name) if listed.iter().any(|point| point.name == *name) => name.clone(),
            spec => repository.point(&folder, spec).await?.point,
        });
    }
    let options = VerifyOptions {
        points,
        targets: verify.disks.into_iter().collect(),
        quick: verify.quick,
    };
    let stop = Stop::listen(false)?;
    let teller = Teller::new(context.out, &stop);
    let found = disksnap_backup::verify(&repository, &folder, &options, &teller).await;
    teller.end();
    let found = found.map_err(|error| stopped(error, &stop))?;
    let whole = found.is_whole();
    let view = VerifiedView {
        whole,
        quick: options.quick,
        found,
    };
    context.out.show(&view, no_xml)?;
    if whole {
        return Ok(());
    }
    let damaged = view.found.points.iter().filter(|point| !point.is_whole());
    let names: Vec<&str> = damaged.map(|point| point.point.as_str()).collect();
    Err(Failure::Error(
        Error::new(
            ErrorKind::Broken,
            format!("not every point can be restored as it was: {}", names.join(", ")),
        )
        .during("backup verify")
        .with("domain", &folder.id)
        .hint(
            "The points that are not named are whole. Take a full backup (`disksnap backup create --level full`), so that the next \
             increments stand on whole images.",
        ),
    ))
}

#[derive(Debug, Serialize)]
struct VerifiedView {
    whole: bool,
    quick: bool,
    #[serde(flatten)]
    found: Verification,
}

impl Text for VerifiedView {
    fn text(&self) -> String {
        let mut rows = Vec::new();
        for point in &self.found.points {
            rows.extend(
                point
                    .faults
                    .iter()
                    .map(|fault| fault_row(&point.point, "-", fault)),
            );
            for disk in &point.disks {
                match disk.faults.as_slice() {
                    [] => rows.push(vec![point.point.clone(), disk.target.clone(), "ok".to_owned()]),
                    faults => rows.extend(
                        faults
                            .iter()
                            .map(|fault| fault_row(&point.point, &disk.target, fault)),
                    ),
                }
            }
        }
        let mut out = table(&rows);
        for stray in &self.found.strays {
            let _ = writeln!(out, "belongs to no point: {} ({})", stray.object, stray.what);
        }
        for point in &self.found.unfinished {
            let _ = writeln!(out, "unfinished: {point}");
        }
        if self.found.merging {
            out.push_str("a merge was cut short: the next one finishes it; no point is the worse for it\n");
        }
        if self.quick {
            return out + "no data was read: a flipped bit would not be seen\n";
        }
        let _ = writeln!(out, "read and compared {}", size(self.found.read));
        out
    }
}

fn fault_row(point: &str, disk: &str, fault: &Fault) -> Vec<String> {
    let mut what = fault.what.clone();
    if let Some(object) = &fault.object {
        let _ = write!(what, ", in {object}");
    }
    if let Some(offset) = fault.offset {
        let _ = write!(what, " at {offset}");
    }
    vec![point.to_owned(), disk.to_owned(), format!("broken: {what}")]
}
