//! How checkpoints look in a list, and what a redefine did.

use std::collections::{BTreeMap, HashMap};
use std::time::SystemTime;

use disksnap::checkpoint_set::json;
use disksnap::xml::Element;
use disksnap::{Checkpoint, CheckpointDisk, CheckpointName, Mark, Redefined, Result};
use serde::{Serialize, Serializer};

use crate::output::{Text, table};

/// All checkpoints of a domain. As JSON it is the form that `redefine` reads.
#[derive(Debug)]
pub(crate) struct List<'a> {
    checkpoints: &'a [Checkpoint],
    set: json::Set<'a>,
    tree: bool,
}

impl<'a> List<'a> {
    /// In this order; as a tree parents come before their children.
    pub(crate) fn new(checkpoints: &'a [Checkpoint], tree: bool) -> Result<Self> {
        Ok(Self {
            checkpoints,
            set: json::Set::new(checkpoints)?,
            tree,
        })
    }
}

impl Serialize for List<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        self.set.serialize(to)
    }
}

impl Text for List<'_> {
    fn text(&self) -> String {
        if self.checkpoints.is_empty() {
            return "The domain has no checkpoints.\n".to_owned();
        }
        let header = ["NAME", "PARENT", "TAKEN", "DISKS"];
        let mut rows = vec![header.map(str::to_owned).to_vec()];
        if self.tree {
            let lines = branches(self.checkpoints);
            rows.extend(
                lines
                    .into_iter()
                    .map(|(indent, checkpoint)| row(&indent, checkpoint)),
            );
        } else {
            rows.extend(self.checkpoints.iter().map(|checkpoint| row("", checkpoint)));
        }
        table(&rows)
    }
}

fn row(indent: &str, checkpoint: &Checkpoint) -> Vec<String> {
    let parent = checkpoint.parent.as_ref().map_or("-", CheckpointName::as_str);
    let told = |disk: &CheckpointDisk| match disk.mark {
        Mark::Bitmap(_) => disk.target.clone(),
        Mark::Pinned(_) => format!("{} (kept snapshot)", disk.target),
    };
    let targets: Vec<String> = checkpoint.disks.iter().map(told).collect();
    vec![
        format!("{indent}{}", checkpoint.name),
        parent.to_owned(),
        time(checkpoint.created),
        targets.join(", "),
    ]
}

/// UTC, as RFC 3339 has it.
fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

/// The checkpoints as the lines of a tree, with what stands before each. A line of descent goes straight on below its parent;
/// only side lines are indented, the longest being the main one: a line of ten thousand stays narrow.
fn branches(checkpoints: &[Checkpoint]) -> Vec<(String, &Checkpoint)> {
    let places: HashMap<&CheckpointName, usize> = checkpoints
        .iter()
        .enumerate()
        .map(|(n, c)| (&c.name, n))
        .collect();
    let parent = |n: usize| {
        checkpoints[n]
            .parent
            .as_ref()
            .and_then(|p| places.get(p))
            .copied()
    };
    let mut children: Vec<Vec<usize>> = vec![Vec::new(); checkpoints.len()];
    // How many come from each, itself among them: children come after their parents.
    let mut weight = vec![1_usize; checkpoints.len()];
    for n in (0..checkpoints.len()).rev() {
        if let Some(parent) = parent(n) {
            weight[parent] += weight[n];
            children[parent].push(n);
        }
    }
    let roots = (0..checkpoints.len()).rev().filter(|&n| parent(n).is_none());
    // The last that is put here comes next.
    let mut todo: Vec<(usize, String, &str)> = roots.map(|n| (n, String::new(), "")).collect();
    let mut lines = Vec::with_capacity(checkpoints.len());
    while let Some((n, indent, branch)) = todo.pop() {
        lines.push((format!("{indent}{branch}"), &checkpoints[n]));
        let own = if branch.is_empty() {
            indent
        } else {
            indent + "│  "
        };
        // The first of several with the same weight is the oldest.
        let main = children[n].iter().copied().max_by_key(|&child| weight[child]);
        let side = children[n].iter().copied().filter(|&child| Some(child) != main);
        let side: Vec<_> = side.map(|child| (child, own.clone(), "├─ ")).collect();
        todo.extend(main.map(|main| (main, own, "")));
        todo.extend(side);
    }
    lines
}

/// What a redefine did.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RedefinedView<'a> {
    added: &'a [CheckpointName],
    replaced: &'a [CheckpointName],
    kept: &'a [CheckpointName],
    forgotten: &'a [CheckpointName],
    /// Disks that the domain does not have, by target or id, with the number of checkpoints that covered them.
    pub(crate) left_out: BTreeMap<String, usize>,
}

impl<'a> RedefinedView<'a> {
    pub(crate) fn new(done: &'a Redefined, mut left_out: BTreeMap<String, usize>) -> Self {
        left_out.extend(done.left_out.clone());
        Self {
            added: &done.added,
            replaced: &done.replaced,
            kept: &done.kept,
            forgotten: &done.forgotten,
            left_out,
        }
    }

    fn groups(&self) -> [(&'static str, &'a [CheckpointName]); 4] {
        [
            ("added", self.added),
            ("replaced", self.replaced),
            ("kept", self.kept),
            ("forgotten", self.forgotten),
        ]
    }

    pub(crate) fn document(&self) -> Result<String> {
        let each = self.groups().into_iter().flat_map(|(what, names)| {
            let element = move |name| Element::new("checkpoint").attr("name", name).attr("state", what);
            names.iter().map(element)
        });
        let left_out = self.left_out.iter();
        let left_out =
            left_out.map(|(disk, n)| Element::new("leftOut").attr("disk", disk).attr("checkpoints", n));
        Element::new("redefined")
            .children(each)
            .children(left_out)
            .to_document()
    }
}

impl Text for RedefinedView<'_> {
    fn text(&self) -> String {
        let counts = self
            .groups()
            .map(|(what, names)| format!("{what} {}", names.len()));
        format!("{}\n", counts.join(", "))
    }
}
