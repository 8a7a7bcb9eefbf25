//! `disksnap checkpoint`: list, dump, redefine and forget the records.

use std::io::{BufWriter, Write};

use disksnap::checkpoint_set::json;
use disksnap::checkpoint_set::ovirt::{DiskIds, Table, Tables};
use disksnap::xml::{Element, checkpoints_document};
use disksnap::{Checkpoint, CheckpointName, Lineage, Result};
use serde::Serialize;

use crate::args::Form;
use crate::checkpoint_args::{CheckpointCommand, Dump, Order, Redefine, SetFormat, WhichTable};
use crate::checkpoint_files::read;
use crate::checkpoint_marks;
use crate::checkpoint_view::{List, RedefinedView};
use crate::context::{Context, Target};
use crate::failure::{Failure, Outcome};
use crate::output::{Text, print};

pub(crate) async fn run(context: &Context, command: CheckpointCommand) -> Outcome {
    match command {
        CheckpointCommand::List { order } => list(context, order).await,
        CheckpointCommand::Dump(dump) => self::dump(context, dump).await,
        CheckpointCommand::Redefine(redefine) => self::redefine(context, redefine).await,
        CheckpointCommand::Validate => checkpoint_marks::validate(context).await,
        CheckpointCommand::DropBroken { unknown } => checkpoint_marks::drop_broken(context, unknown).await,
        CheckpointCommand::Remove { names } => checkpoint_marks::remove(context, names).await,
        CheckpointCommand::Forget { all: _ } => forget(context).await,
    }
}

async fn lineage(target: &Target) -> Result<Lineage> {
    target.disksnap.dispatcher().checkpoints(&target.domain).await
}

async fn list(context: &Context, order: Order) -> Outcome {
    let target = context.target().await?;
    let mut checkpoints = lineage(&target).await?.into_checkpoints();
    if !order.tree && !order.topological {
        // Stable: of the same instant the parent comes first.
        checkpoints.sort_by_key(|checkpoint| checkpoint.created);
    }
    let view = List::new(&checkpoints, order.tree)?;
    context.out.show(&view, || checkpoints_document(&checkpoints))
}

async fn dump(context: &Context, dump: Dump) -> Outcome {
    let target = context.target().await?;
    let lineage = lineage(&target).await?;
    let format = dump.format.unwrap_or(match context.out.form {
        Form::Json => SetFormat::Json,
        Form::Text | Form::Xml => SetFormat::Xml,
    });
    // Only the JSON has a place for gaps: elsewhere what is before one would be taken for whole.
    let checkpoints = match format {
        SetFormat::Json => lineage.into_checkpoints(),
        _ => lineage.without_gaps(),
    };
    let tables = |checkpoints: &[Checkpoint]| {
        let ids = DiskIds::new(&target.domain, &dump.disks.told)?;
        Tables::of(&target.domain.id, checkpoints, &ids)
    };
    let mut out = BufWriter::with_capacity(1 << 16, std::io::stdout().lock());
    let written = match format {
        SetFormat::Xml => return print(checkpoints_document(&checkpoints)?.as_bytes()),
        SetFormat::Json => json::Set::new(&checkpoints)?.write(&mut out),
        SetFormat::OvirtJson => tables(&checkpoints)?.write_json(&mut out),
        SetFormat::OvirtCsv => {
            let table = dump.table.map_or(Table::Checkpoints, WhichTable::into);
            tables(&checkpoints)?.write_csv(table, &mut out)
        }
    };
    written.and_then(|()| out.flush()).map_err(Failure::output)
}

async fn redefine(context: &Context, redefine: Redefine) -> Outcome {
    let target = context.target().await?;
    let how = disksnap::Redefine {
        replace: redefine.replace,
        validate: redefine.validate,
        leave_out: redefine.leave_out_missing_disks,
    };
    let set = read(&target.domain, &redefine)?;
    // What could not be listed afterwards is not taken in.
    json::Set::new(&set.checkpoints)?;
    let dispatcher = target.disksnap.dispatcher();
    let done = dispatcher.redefine(&target.domain, set.checkpoints, how).await?;
    let view = RedefinedView::new(&done, set.left_out);
    for (disk, times) in &view.left_out {
        context.out.warn(&format!(
            "the domain does not have the disk {disk}: it was left out of {times} checkpoints"
        ));
    }
    context.out.show(&view, || view.document())
}

async fn forget(context: &Context) -> Outcome {
    let target = context.target().await?;
    let dispatcher = target.disksnap.dispatcher();
    let view = Forgotten {
        forgotten: dispatcher.forget_checkpoints(&target.domain).await?,
    };
    context.out.show(&view, || {
        let each = view.forgotten.iter();
        let each = each.map(|name| Element::new("checkpoint").attr("name", name));
        Element::new("forgotten").children(each).to_document()
    })
}

#[derive(Debug, Serialize)]
struct Forgotten {
    forgotten: Vec<CheckpointName>,
}

impl Text for Forgotten {
    fn text(&self) -> String {
        match self.forgotten.len() {
            0 => "The domain has no checkpoints.\n".to_owned(),
            n => format!("forgot {n} checkpoints; the disks keep their bitmaps\n"),
        }
    }
}
