//! What can be killed: each act with what it wants to find, its words, and how to undo it.

use serde_json::Value;

use crate::scene::{Kind, Scene};

/// One act.
#[derive(Clone, Copy)]
pub(crate) struct Act {
    /// What people call it.
    pub(crate) name: &'static str,
    /// The scenes in which it can be done.
    pub(crate) on: &'static [Kind],
    /// Brings about what it acts on.
    pub(crate) prepare: fn(&Scene),
    /// The command, without the domain.
    pub(crate) words: fn(&Scene) -> Vec<String>,
    /// The exit code of the same request where the act has been done already; 0 where that is as good as doing it.
    pub(crate) done: i32,
    /// What may be there after a kill, once that is settled.
    pub(crate) settles: Settles,
    /// Takes away what it and its preparation have made.
    pub(crate) undo: fn(&Scene),
}

/// What a killed act comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Settles {
    /// It has been done or it has not.
    Whole,
    /// It may wait to be taken up again by the same request.
    Resumes,
}

use Kind::{Btrfs, External, ExternalOff, Fleece, Quiesced, Reflink};

const LIVE: &[Kind] = &[Fleece, External, Reflink, Btrfs];
const EVERY: &[Kind] = &[Fleece, External, ExternalOff, Reflink, Btrfs];

/// All acts.
pub(crate) const ACTS: &[Act] = &[
    Act {
        name: "create",
        on: EVERY,
        prepare: |_| (),
        words: |scene| scene.create("one", &[]),
        done: 4,
        settles: Settles::Whole,
        undo: clear,
    },
    Act {
        name: "create --checkpoint",
        on: LIVE,
        prepare: |scene| checkpoints(scene, 1),
        words: |scene| scene.create("one", &["--checkpoint"]),
        done: 4,
        settles: Settles::Whole,
        undo: clear,
    },
    Act {
        name: "create --quiesce",
        on: &[Quiesced],
        prepare: |_| (),
        words: |scene| scene.create("one", &["--quiesce", "require"]),
        done: 4,
        settles: Settles::Whole,
        undo: clear,
    },
    Act {
        name: "delete",
        on: EVERY,
        prepare: |scene| create(scene, "one", &[]),
        words: |_| words("snapshot delete one"),
        done: 0,
        settles: Settles::Whole,
        undo: clear,
    },
];

/// Words that hold no spaces.
pub(crate) fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// Runs words that are expected to do what they should.
pub(crate) fn ok(scene: &Scene, words: &[String]) -> String {
    scene.ok(&words.iter().map(String::as_str).collect::<Vec<_>>())
}

pub(crate) fn create(scene: &Scene, name: &str, more: &[&str]) {
    ok(scene, &scene.create(name, more));
}

/// Begins so many checkpoints, one after the other, without their snapshots.
fn checkpoints(scene: &Scene, count: usize) {
    for n in 1..=count {
        let name = format!("c{n}");
        create(scene, &name, &["--checkpoint"]);
        scene.ok(&["snapshot", "delete", &name]);
    }
}

/// The names in a list of the command's.
pub(crate) fn names(scene: &Scene, what: &str, list: &str) -> Vec<String> {
    let listed = scene.json(&[what, "list"]);
    let each = listed[list].as_array().into_iter().flatten();
    each.filter_map(|one| one["name"].as_str().map(str::to_owned))
        .collect()
}

/// Takes away all exports, snapshots and checkpoints.
pub(crate) fn clear(scene: &Scene) {
    if scene.json(&["export", "list"])["exports"] != Value::Array(Vec::new()) {
        scene.ok(&["export", "stop", "--all"]);
    }
    if !names(scene, "snapshot", "snapshots").is_empty() {
        scene.ok(&["snapshot", "delete", "--all"]);
    }
    for name in names(scene, "checkpoint", "checkpoints") {
        scene.ok(&["checkpoint", "remove", &name]);
    }
}
