//! What can be killed: each act with what it wants to find, its words, and how to undo it.

use std::path::Path;

use serde_json::{Value, json};

use crate::invariants;
use crate::programs::program;
use crate::scene::{Kind, Scene, TARGETS};
use crate::site::arg;

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
    /// What must hold besides, once it is done; what does not.
    pub(crate) holds: fn(&Scene) -> Vec<String>,
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
    /// What there is of it may have to be taken away before.
    Anew,
    /// It may wait, and each time that it is done there is one more in the repository.
    Adds,
}

use Kind::{Btrfs, BtrfsOff, External, ExternalOff, Fleece, Paused, Quiesced, Reflink, ReflinkOff};

const EVERY: &[Kind] = &[
    Fleece,
    External,
    ExternalOff,
    Reflink,
    ReflinkOff,
    Btrfs,
    BtrfsOff,
];
/// Where a checkpoint can be a snapshot that is kept.
const KEPT: &[Kind] = &[Btrfs, BtrfsOff];

/// What most acts have in common.
const ACT: Act = Act {
    name: "",
    on: EVERY,
    prepare: |_| (),
    words: |_| Vec::new(),
    done: 0,
    settles: Settles::Whole,
    holds: |_| Vec::new(),
    undo: clear,
};

/// All acts.
pub(crate) const ACTS: &[Act] = &[
    Act {
        name: "create",
        words: |scene| scene.create("one", &[]),
        done: 4,
        holds: reads_as_one_instant,
        ..ACT
    },
    Act {
        name: "create --checkpoint",
        on: &[Fleece, External, ExternalOff, Reflink, Btrfs, BtrfsOff],
        prepare: |scene| checkpoints(scene, 1),
        words: |scene| scene.create("one", &["--checkpoint"]),
        done: 4,
        holds: reads_as_one_instant,
        ..ACT
    },
    Act {
        name: "create --quiesce",
        on: &[Quiesced],
        words: |scene| scene.create("one", &["--quiesce", "require", "--deadline", "120"]),
        done: 4,
        ..ACT
    },
    Act {
        name: "delete",
        on: &[Fleece, Reflink, ReflinkOff, Btrfs, BtrfsOff],
        prepare: |scene| create(scene, "one", &[]),
        words: |_| words("snapshot delete one"),
        ..ACT
    },
    Act {
        name: "delete, by merging",
        on: &[External, ExternalOff],
        prepare: |scene| create(scene, "one", &[]),
        words: |_| words("snapshot delete one"),
        // As for a merge; what has been merged into one disk is, whatever becomes of the other.
        settles: Settles::Resumes,
        ..ACT
    },
    Act {
        name: "delete, a checkpoint is it",
        on: KEPT,
        prepare: |scene| create(scene, "one", &["--checkpoint"]),
        words: |_| words("snapshot delete one"),
        ..ACT
    },
    Act {
        name: "merge",
        on: &[External, ExternalOff],
        prepare: |scene| create(scene, "one", &[]),
        words: |_| words("snapshot merge one"),
        done: 3,
        // Given up half way, the snapshot's image holds what was written since, and is good for nothing but to be merged.
        settles: Settles::Resumes,
        ..ACT
    },
    Act {
        name: "merge --into overlay",
        on: &[External, ExternalOff],
        prepare: |scene| create(scene, "one", &[]),
        words: |_| words("snapshot merge one --into overlay"),
        // One disk after the other.
        settles: Settles::Resumes,
        ..ACT
    },
    Act {
        name: "revert",
        on: &[ExternalOff, ReflinkOff, BtrfsOff],
        prepare: |scene| {
            create(scene, "one", &[]);
            scene.fill(0x33);
        },
        words: |_| words("snapshot revert one"),
        ..ACT
    },
    Act {
        name: "export start",
        prepare: |scene| create(scene, "one", &[]),
        words: |_| words("export start one"),
        done: 4,
        ..ACT
    },
    Act {
        name: "export stop",
        prepare: |scene| {
            create(scene, "one", &[]);
            scene.ok(&["export", "start", "one"]);
        },
        words: |_| words("export stop one"),
        ..ACT
    },
    Act {
        name: "read",
        on: &[Fleece, BtrfsOff],
        prepare: |scene| create(scene, "one", &[]),
        words: |scene| [words("read one vda --to"), vec![restored(scene, "read.raw")]].concat(),
        done: 4,
        settles: Settles::Anew,
        undo: clear,
        ..ACT
    },
    Act {
        name: "checkpoint remove",
        on: &[Fleece, ExternalOff, BtrfsOff],
        prepare: |scene| checkpoints(scene, 3),
        words: |_| words("checkpoint remove c2"),
        done: 3,
        ..ACT
    },
    Act {
        name: "checkpoint remove, the last",
        on: &[Fleece, ExternalOff, BtrfsOff],
        prepare: |scene| checkpoints(scene, 3),
        words: |_| words("checkpoint remove c3"),
        done: 3,
        ..ACT
    },
    Act {
        name: "checkpoint redefine",
        on: &[Fleece, ExternalOff],
        prepare: described_otherwise,
        words: |scene| {
            let set = scene.site.path("set.json").display().to_string();
            [words("checkpoint redefine --replace"), vec![set]].concat()
        },
        ..ACT
    },
    Act {
        name: "checkpoint drop-broken",
        on: &[Fleece],
        prepare: |scene| {
            checkpoints(scene, 2);
            let qemu = scene.qemu.as_ref().unwrap();
            let bitmap = json!({ "node": qemu.format_node("vda"), "name": "c2" });
            qemu.qmp("block-dirty-bitmap-disable", bitmap);
        },
        words: |_| words("checkpoint drop-broken"),
        // Until it is done the checkpoints are not sound.
        settles: Settles::Resumes,
        ..ACT
    },
    Act {
        name: "disk track",
        on: &[Fleece],
        words: |scene| {
            let place = scene.folder.join("vdb.marks.qcow2").display().to_string();
            [words("disk track vdb --in"), vec![place]].concat()
        },
        undo: untrack,
        ..ACT
    },
    Act {
        name: "disk untrack",
        on: &[Fleece],
        prepare: |scene| {
            let place = scene.folder.join("vdb.marks.qcow2").display().to_string();
            scene.ok(&["disk", "track", "vdb", "--in", &place]);
        },
        words: |_| words("disk untrack vdb"),
        undo: untrack,
        ..ACT
    },
    Act {
        name: "backup create",
        on: &[Fleece, ExternalOff],
        words: |scene| backup(scene, "create", ""),
        settles: Settles::Adds,
        ..ACT
    },
    Act {
        name: "backup create, an increment",
        on: &[Fleece],
        prepare: |scene| drop(ok(scene, &backup(scene, "create", ""))),
        words: |scene| backup(scene, "create", ""),
        settles: Settles::Adds,
        ..ACT
    },
    Act {
        name: "backup merge",
        on: &[Fleece],
        prepare: |scene| repository(scene, 3),
        words: |scene| backup(scene, "merge", points(scene).last().unwrap()),
        settles: Settles::Resumes,
        ..ACT
    },
    Act {
        name: "backup prune",
        on: &[Fleece],
        prepare: |scene| repository(scene, 3),
        words: |scene| backup(scene, "prune", "--keep-last 1"),
        settles: Settles::Resumes,
        ..ACT
    },
    Act {
        name: "backup restore --to",
        on: &[Fleece],
        prepare: |scene| repository(scene, 2),
        words: |scene| backup(scene, "restore", &format!("--to {}", scene.restored().display())),
        done: 4,
        settles: Settles::Anew,
        ..ACT
    },
    Act {
        name: "backup restore --disk",
        on: &[Fleece],
        prepare: |scene| repository(scene, 2),
        words: |scene| {
            backup(
                scene,
                "restore",
                &format!("--disk vda={}", restored(scene, "vda.qcow2")),
            )
        },
        done: 4,
        settles: Settles::Anew,
        ..ACT
    },
    Act {
        name: "backup restore --into",
        on: &[Paused],
        prepare: |scene| {
            scene.fill(0x5a);
            repository(scene, 1);
            scene.fill(0x33);
        },
        words: |scene| {
            let words = backup(scene, "restore", &format!("--into {}", scene.xml));
            // The domain is named already.
            words.into_iter().collect()
        },
        settles: Settles::Resumes,
        ..ACT
    },
    Act {
        name: "fill start",
        on: &[Paused],
        words: |_| words("fill start"),
        undo: |scene| {
            scene.ok(&["fill", "end"]);
            clear(scene);
        },
        ..ACT
    },
    Act {
        name: "fill end",
        on: &[Paused],
        prepare: |scene| drop(scene.ok(&["fill", "start"])),
        words: |_| words("fill end"),
        undo: |scene| {
            scene.ok(&["fill", "end"]);
            clear(scene);
        },
        ..ACT
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

/// A set in which the same checkpoints are described otherwise.
fn described_otherwise(scene: &Scene) {
    checkpoints(scene, 2);
    let mut set: Value =
        serde_json::from_str(&scene.ok(&["checkpoint", "dump", "--format", "json"])).unwrap();
    for checkpoint in set["checkpoints"].as_array_mut().unwrap() {
        checkpoint["description"] = "once more".into();
    }
    scene.site.file("set.json", &set.to_string());
}

/// The words of a command on the scene's repository; those behind it hold no spaces.
fn backup(scene: &Scene, verb: &str, more: &str) -> Vec<String> {
    let first = ["backup", verb, "--repo", &scene.repo()].map(str::to_owned);
    [first.to_vec(), words(more)].concat()
}

/// A repository of so many points; made once, and copied from there.
fn repository(scene: &Scene, count: usize) {
    let (template, repo) = (scene.site.path(&format!("repo-{count}")), scene.repo());
    if !template.exists() {
        for _ in 0..count {
            ok(scene, &backup(scene, "create", ""));
        }
        std::fs::rename(&repo, &template).unwrap();
        clear(scene);
    }
    program("cp", &["-a", &arg(&template), &repo]);
}

/// The names of the points in the scene's repository, oldest first.
fn points(scene: &Scene) -> Vec<String> {
    let folders = crate::site::list(Path::new(&scene.repo()));
    let folders = folders.iter().filter(|path| path.is_dir());
    let points = folders
        .flat_map(|folder| crate::site::list(folder))
        .filter(|path| path.is_dir());
    let name = |path: std::path::PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    points.map(name).collect()
}

fn restored(scene: &Scene, name: &str) -> String {
    std::fs::create_dir_all(scene.restored()).unwrap();
    arg(&scene.restored().join(name))
}

/// The snapshot is that of one instant, read through the command.
fn reads_as_one_instant(scene: &Scene) -> Vec<String> {
    let read = |target: &&str| {
        let to = tempfile::NamedTempFile::new().unwrap();
        let path = arg(to.path());
        // The file must not be there.
        to.close().unwrap();
        scene.ok(&["read", "one", target, "--to", &path]);
        let content = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        content
    };
    let contents: Vec<Vec<u8>> = TARGETS.iter().map(read).collect();
    if scene.kind.writes() {
        return invariants::one_instant(&contents);
    }
    let now: Vec<Vec<u8>> = TARGETS.iter().map(|target| scene.content(target)).collect();
    let wrong = "the snapshot does not hold what the disks held".to_owned();
    if now == contents { Vec::new() } else { vec![wrong] }
}

fn untrack(scene: &Scene) {
    // One that is not tracked is as good.
    scene.run(&["disk", "untrack", "vdb", "--drop-checkpoints"]);
    clear(scene);
}

/// Takes away all exports, snapshots, checkpoints, backups and what was restored.
pub(crate) fn clear(scene: &Scene) {
    for place in [scene.repo().into(), scene.restored()] {
        if place.exists() {
            std::fs::remove_dir_all(place).unwrap();
        }
    }
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
