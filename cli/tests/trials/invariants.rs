//! What holds whatever was killed, once nobody is at work: told as a list of what does not.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use disksnap_test_support::{Qemu, firmware_writer_round};
use serde_json::{Value, json};

use crate::daemons;
use crate::scene::{Kind, Scene, TARGETS};
use crate::site::{Site, arg, list};
use crate::world::{Told, World};

/// A guardian that ends, a guest that gets its turn: no hurry, since what never comes fails in any case.
const PATIENCE: Duration = Duration::from_secs(20);

/// Everything, of a scene whose state directory is its own. What is under way by itself, such as the end of a guardian, is
/// waited for.
pub(crate) fn check(scene: &Scene) -> Vec<String> {
    eventually(|| check_told(scene, &Told::by(scene)))
}

/// The same, and what else `compared` finds in the world; all of it asked for once.
pub(crate) fn check_and(scene: &Scene, compared: impl Fn(&World) -> Vec<String>) -> Vec<String> {
    eventually(|| {
        let told = Told::by(scene);
        let mut wrong = compared(&World::told(scene, &told));
        wrong.extend(check_told(scene, &told));
        wrong
    })
}

fn check_told(scene: &Scene, told: &Told) -> Vec<String> {
    let owned = Owned::told(scene, told);
    let owner = std::slice::from_ref(&owned);
    [in_guest(scene, &owned), in_state(&scene.site, &[scene], owner)].concat()
}

/// Asks until nothing is wrong, or patience ends.
pub(crate) fn eventually(mut ask: impl FnMut() -> Vec<String>) -> Vec<String> {
    let since = Instant::now();
    loop {
        let wrong = ask();
        if wrong.is_empty() || since.elapsed() > PATIENCE {
            return wrong;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The guest runs, is thawed and writes; nothing is in its hypervisor that no snapshot, export or checkpoint owns.
pub(crate) fn guest(scene: &Scene) -> Vec<String> {
    in_guest(scene, &Owned::of(scene))
}

fn in_guest(scene: &Scene, owned: &Owned) -> Vec<String> {
    let Some(qemu) = &scene.qemu else {
        return Vec::new();
    };
    let mut wrong = Vec::new();
    if Some(qemu.status().as_str()) != scene.kind.status() {
        wrong.push(format!("the guest is {}", qemu.status()));
        return wrong;
    }
    if scene.has_agent() {
        match agent_says(qemu).as_deref() {
            Some("thawed") => {}
            other => wrong.push(format!("the guest's agent says {other:?} and not thawed")),
        }
    }
    let failures = qemu
        .monitor()
        .events()
        .iter()
        .filter(|e| **e == "BLOCK_IO_ERROR")
        .count();
    if failures > 0 {
        wrong.push(format!("{failures} of the guest's requests failed"));
    }
    wrong.extend(
        in_qemu(qemu)
            .into_iter()
            .filter(|name| !owned.is_owner_of(name))
            .map(|name| format!("{name} is in QEMU, and nobody owns it")),
    );
    wrong
}

/// The guest goes on writing. Apart from [`guest`], since it has to be waited for.
pub(crate) fn writes_go_on(scene: &Scene) -> Vec<String> {
    let Some(qemu) = scene.qemu.as_ref().filter(|_| scene.kind.writes()) else {
        return Vec::new();
    };
    let before = qemu.writer_rounds();
    eventually(|| {
        let goes_on = qemu.writer_rounds() > before && !qemu.serial().contains("GUEST FAILED");
        if goes_on {
            Vec::new()
        } else {
            vec!["the guest writes no more".to_owned()]
        }
    })
}

/// What the guest has written is whole: both disks are as its writer left them at one instant. The guest is paused for it.
///
/// Holds only for disks that were never put back to an earlier content.
pub(crate) fn writes_are_whole(scene: &Scene) -> Vec<String> {
    let Some(qemu) = scene
        .qemu
        .as_ref()
        .filter(|_| scene.kind.writes() && !scene.has_agent())
    else {
        return Vec::new();
    };
    qemu.qmp("stop", json!({}));
    let contents = TARGETS.map(|target| scene.content(target));
    qemu.qmp("cont", json!({}));
    one_instant(&contents)
}

/// Whether these are the guest's disks at one instant of its writer's.
pub(crate) fn one_instant(disks: &[Vec<u8>]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut rounds = Vec::new();
    for (disk, target) in disks.iter().zip(TARGETS) {
        match firmware_writer_round(disk) {
            Ok(round) => rounds.push(round),
            Err(why) => wrong.push(format!("{target}: {why}")),
        }
    }
    if let [first, last] = rounds[..]
        && first != last
        && first != last + 1
    {
        wrong.push(format!(
            "no instant: the first disk is of round {first}, the last of {last}"
        ));
    }
    wrong
}

/// What lies in a state directory that these scenes share: intents, files, processes, records.
pub(crate) fn state(site: &Site, scenes: &[&Scene]) -> Vec<String> {
    let owned: Vec<Owned> = scenes.iter().map(|scene| Owned::of(scene)).collect();
    in_state(site, scenes, &owned)
}

fn in_state(site: &Site, scenes: &[&Scene], owned: &[Owned]) -> Vec<String> {
    let mut wrong = Vec::new();
    let recovered = site.run(&["recover", "--output", "json"]);
    let told = String::from_utf8_lossy(&recovered.stdout);
    let nothing = serde_json::from_str::<Value>(&told).is_ok_and(|told| told["recovered"] == json!([]));
    if recovered.code != Some(0) || !nothing {
        wrong.push(format!("recover has something to do: {told}{}", recovered.stderr));
    }
    for owned in owned {
        wrong.extend(owned.unsound.iter().cloned());
    }
    let owner = |path: &Path| owned.iter().any(|owned| owned.is_owner_of(&arg(path)));
    for path in site.images().into_iter().chain(beside(scenes)) {
        if !owner(&path) {
            wrong.push(format!("{} is left, and nobody owns it", path.display()));
        }
    }
    for path in list(&site.run_dir()) {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let serves = owned
            .iter()
            .any(|owned| owned.serves && name.starts_with(&owned.stem));
        let still = Path::new(&name).extension().is_some_and(|end| end == "still");
        if !serves || still {
            wrong.push(format!("run/{name} is left"));
        }
    }
    let daemons = daemons::of(&site.run_dir()).len();
    let serving = owned.iter().filter(|owned| owned.has_image_server).count();
    if daemons != serving {
        wrong.push(format!(
            "{daemons} storage daemons run, and {serving} domains need one"
        ));
    }
    wrong
}

/// A repository is whole, and nothing in it is half done.
pub(crate) fn repository(scene: &Scene, repo: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    let verified = scene.run(&["backup", "verify", "--repo", repo]);
    if verified.code != Some(0) {
        wrong.push(format!("the repository is not whole: {}", verified.stderr));
    }
    let listed = scene.json(&["backup", "list", "--repo", repo]);
    for domain in listed["domains"].as_array().into_iter().flatten() {
        if domain["unfinished"] != json!([]) {
            wrong.push(format!("unfinished points: {}", domain["unfinished"]));
        }
    }
    wrong
}

/// What the catalog says there is of a domain.
struct Owned {
    stem: String,
    /// The first 12 digits of the ids of its snapshots, those that checkpoints are among them.
    ids: BTreeSet<String>,
    /// The bitmaps of its checkpoints.
    bitmaps: BTreeSet<String>,
    exports: BTreeSet<String>,
    /// Its disks are being filled: what is made for that has names of its own.
    is_filled: bool,
    serves: bool,
    has_image_server: bool,
    /// Its images, as its document and its snapshots name them.
    documents: String,
    unsound: Vec<String>,
}

impl Owned {
    fn of(scene: &Scene) -> Self {
        Self::told(scene, &Told::by(scene))
    }

    fn told(scene: &Scene, told: &Told) -> Self {
        let texts = |list: &Value, key: &str| -> BTreeSet<String> {
            let all = list.as_array().into_iter().flatten();
            all.filter_map(|one| one[key].as_str().map(str::to_owned))
                .collect()
        };
        let (snapshots, checkpoints) = (&told.snapshots["snapshots"], &told.checkpoints["checkpoints"]);
        let short = |id: &String| id.replace('-', "")[..12].to_owned();
        let mut ids: BTreeSet<String> = texts(snapshots, "id").iter().map(short).collect();
        let mut unsound = Vec::new();
        for one in snapshots.as_array().into_iter().flatten() {
            if one["state"] != "active" {
                unsound.push(format!(
                    "snapshot {} is {}: {}",
                    one["name"], one["state"], one["reason"]
                ));
            }
        }
        // A snapshot may lie in an image that had another name before it.
        let mut documents = scene.document();
        for name in texts(snapshots, "name") {
            documents += &scene.ok(&["snapshot", "show", &name, "--output", "json"]);
        }
        let mut bitmaps = BTreeSet::new();
        for checkpoint in checkpoints.as_array().into_iter().flatten() {
            bitmaps.extend(texts(&checkpoint["disks"], "bitmap"));
            ids.extend(texts(&checkpoint["disks"], "snapshot").iter().map(short));
        }
        if *checkpoints != json!([]) {
            let validated = scene.run(&["checkpoint", "validate", "--output", "json"]);
            let told = String::from_utf8_lossy(&validated.stdout).into_owned();
            if validated.code != Some(0) {
                unsound.push(format!(
                    "the checkpoints are not sound: {told}{}",
                    validated.stderr
                ));
            }
        }
        let serving = &told.exports;
        let is_filled = scene.kind == Kind::Paused && !scene.json(&["fill", "list"])["filling"].is_null();
        Self {
            stem: scene.stem.clone(),
            ids,
            bitmaps,
            exports: texts(&serving["exports"], "alias"),
            is_filled,
            serves: is_filled || serving["exports"] != json!([]) || serving["server"] != Value::Null,
            has_image_server: !serving["imageServer"].is_null(),
            documents,
            unsound,
        }
    }

    /// Whether the name of a node, job, bitmap or export, or the path of a file, is one of this domain's.
    fn is_owner_of(&self, name: &str) -> bool {
        let plain = name.replace('-', "");
        let is_fills = name.trim_start_matches("export ").starts_with("ds-");
        (self.is_filled && is_fills)
            || self.ids.iter().any(|id| plain.contains(id.as_str()))
            || self.documents.contains(name)
            || name
                .strip_prefix("bitmap ")
                .is_some_and(|name| self.bitmaps.contains(name))
            || name
                .strip_prefix("export ")
                .is_some_and(|name| self.exports.contains(name))
    }
}

/// Ours, in a hypervisor: nodes by their names (the file's name behind it, since a disk may go on standing on an overlay
/// whose snapshot is gone), jobs, bitmaps and exports.
fn in_qemu(qemu: &Qemu) -> Vec<String> {
    let mut ours = Vec::new();
    let is_ours = |name: &str| name.starts_with("ds-") || name.starts_with("dsx-");
    let all = |command: &str, arguments: Value| match qemu.qmp(command, arguments) {
        Value::Array(all) => all,
        _ => Vec::new(),
    };
    for node in all("query-named-block-nodes", json!({ "flat": true })) {
        let name = node["node-name"].as_str().unwrap_or_default();
        if is_ours(name) {
            let file = node["file"].as_str().unwrap_or_default();
            // A disk's own overlay is known by its file.
            ours.push(if name.starts_with("dsx-") {
                file_of(file)
            } else {
                name.to_owned()
            });
        }
        let bitmaps = node["dirty-bitmaps"].as_array().into_iter().flatten();
        let names = bitmaps.filter_map(|bitmap| bitmap["name"].as_str());
        ours.extend(
            names
                .filter(|_| !is_ours(name))
                .map(|name| format!("bitmap {name}")),
        );
    }
    for (command, key) in [("query-jobs", "id"), ("qom-list", "name")] {
        let arguments = if command == "qom-list" {
            json!({"path": "/objects"})
        } else {
            json!({})
        };
        let names = all(command, arguments);
        let names = names.iter().filter_map(|one| one[key].as_str());
        ours.extend(names.filter(|name| is_ours(name)).map(str::to_owned));
    }
    let exports = all("query-block-exports", json!({}));
    let exports = exports.iter().filter_map(|one| one["id"].as_str());
    ours.extend(exports.map(|id| format!("export {id}")));
    ours
}

/// The file's path: after a merge into the overlay QEMU calls the image by all that is below it, in JSON.
fn file_of(name: &str) -> String {
    let options: Option<Value> = name
        .strip_prefix("json:")
        .and_then(|text| serde_json::from_str(text).ok());
    let mut at = options.as_ref();
    while let Some(options) = at {
        if let Some(path) = options["filename"].as_str() {
            return path.to_owned();
        }
        at = options.get("file");
    }
    name.to_owned()
}

/// What lies beside the disks, where the method puts something there.
fn beside(scenes: &[&Scene]) -> Vec<PathBuf> {
    scenes.iter().flat_map(|scene| list(&scene.folder)).collect()
}

/// The agent's own word, asked past the command; `None` where it gives none. What it answers to those long gone comes
/// first, and may be anything.
pub(crate) fn agent_says(qemu: &Qemu) -> Option<String> {
    let mut stream = UnixStream::connect(qemu.agent_path()).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
    let id = std::process::id();
    let ask = format!(
        "\n{}\n{}\n",
        json!({"execute": "guest-sync", "arguments": {"id": id}}),
        json!({"execute": "guest-fsfreeze-status"})
    );
    stream.write_all(ask.as_bytes()).ok()?;
    let mut answers = BufReader::new(stream).split(b'\n').map_while(Result::ok);
    let mut answer = || {
        serde_json::from_slice::<Value>(&answers.next()?)
            .ok()
            .or(Some(Value::Null))
    };
    while answer()?["return"] != id {}
    Some(answer()?["return"].as_str()?.to_owned())
}
