//! All that there is of a scene, as lines of text without what differs from run to run: two worlds that are alike have the
//! same lines.

use std::collections::BTreeSet;
use std::path::Path;

use disksnap_test_support::Qemu;
use serde_json::{Value, json};

use crate::daemons;
use crate::scene::{Scene, TARGETS};

/// What the command tells of a domain.
#[derive(Debug)]
pub(crate) struct Told {
    pub(crate) snapshots: Value,
    pub(crate) checkpoints: Value,
    pub(crate) exports: Value,
}

impl Told {
    pub(crate) fn by(scene: &Scene) -> Self {
        Self {
            snapshots: scene.json(&["snapshot", "list"]),
            checkpoints: scene.json(&["checkpoint", "list"]),
            exports: scene.json(&["export", "list"]),
        }
    }
}

/// What there is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct World(BTreeSet<String>);

impl World {
    /// Looks at everything that an act could have left.
    pub(crate) fn of(scene: &Scene) -> Self {
        Self::told(scene, &Told::by(scene))
    }

    /// The same, where the command was asked already.
    pub(crate) fn told(scene: &Scene, told: &Told) -> Self {
        let mut lines = Vec::new();
        if let Some(qemu) = &scene.qemu {
            in_qemu(qemu, &mut lines);
        }
        for (what, dir) in [
            ("image", scene.site.state().join("images")),
            ("run", scene.site.run_dir()),
            ("beside the disks", scene.folder.clone()),
            ("repository", scene.repo().into()),
            ("restored", scene.restored()),
        ] {
            let mut names = Vec::new();
            files(&dir, &dir, &mut names);
            lines.extend(names.into_iter().map(|name| format!("{what}: {name}")));
        }
        lines.push(format!(
            "storage daemons: {}",
            daemons::of(&scene.site.run_dir()).len()
        ));
        lines.push(format!("document: {}", scene.document()));
        if !scene.kind.writes() {
            let content = |target: &&str| format!("content: {target} {}", digest(&scene.content(target)));
            lines.extend(TARGETS.iter().map(content));
        }
        for (what, list) in [
            ("snapshot", &told.snapshots),
            ("checkpoint", &told.checkpoints),
            ("export", &told.exports),
        ] {
            lines.extend(listed(list).map(|line| format!("{what}: {line}")));
        }
        // Of several that are alike each is told.
        let mut numbered = BTreeSet::new();
        for line in lines {
            let line = plain(&scene.site.short(&line));
            let mut n = 1;
            while !numbered.insert(if n == 1 {
                line.clone()
            } else {
                format!("{line} ({n})")
            }) {
                n += 1;
            }
        }
        Self(numbered)
    }

    /// Without what lies in the repository.
    pub(crate) fn without_repository(&self) -> Self {
        let lines = self.0.iter().filter(|line| !line.starts_with("repository: "));
        Self(lines.cloned().collect())
    }

    /// What the other has more (`+`) and less (`-`).
    pub(crate) fn compared(&self, other: &Self) -> Vec<String> {
        let more = other.0.difference(&self.0).map(|line| format!("+ {line}"));
        more.chain(self.0.difference(&other.0).map(|line| format!("- {line}")))
            .collect()
    }
}

/// What [`World`] tells of a hypervisor: nodes, bitmaps, jobs, exports, objects, and what the disks stand on.
fn in_qemu(qemu: &Qemu, lines: &mut Vec<String>) {
    let ask = |command: &str, arguments: Value| match qemu.qmp(command, arguments) {
        Value::Array(all) => all,
        _ => Vec::new(),
    };
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    for node in ask("query-named-block-nodes", json!({ "flat": true })) {
        let name = match text(&node["node-name"]) {
            own if own.starts_with('#') => "#".to_owned(),
            name => name,
        };
        lines.push(format!("node: {name} {}", text(&node["drv"])));
        for bitmap in node["dirty-bitmaps"].as_array().into_iter().flatten() {
            lines.push(format!(
                "bitmap: {name} {} recording={} persistent={} busy={}",
                text(&bitmap["name"]),
                bitmap["recording"],
                bitmap["persistent"],
                bitmap["busy"]
            ));
        }
    }
    for (what, command, key) in [
        ("job", "query-jobs", "id"),
        ("export", "query-block-exports", "id"),
    ] {
        let names = ask(command, json!({})).into_iter();
        lines.extend(names.map(|one| format!("{what}: {}", text(&one[key]))));
    }
    let objects = ask("qom-list", json!({ "path": "/objects" })).into_iter();
    lines.extend(objects.map(|one| format!("object: {}", text(&one["name"]))));
    for block in ask("query-block", json!({})) {
        let inserted = &block["inserted"];
        let stands_on = (text(&inserted["node-name"]), text(&inserted["file"]));
        lines.push(format!(
            "disk: {} {} {}",
            text(&block["qdev"]),
            stands_on.0,
            stands_on.1
        ));
    }
}

/// The name of a content, in digits that are nobody's number.
fn digest(content: &[u8]) -> String {
    let digest = disksnap_test_support::pattern::digest(content);
    digest[..7].to_owned()
}

/// The names of all files and directories below a directory.
fn files(root: &Path, dir: &Path, names: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = path.strip_prefix(root).unwrap_or(&path).display().to_string();
        names.push(name);
        // One that is gone meanwhile is no directory either.
        if path.is_dir() && !path.is_symlink() {
            files(root, &path, names);
        }
    }
}

/// What a list of the command's tells of each, but for what is never the same.
pub(crate) fn listed(list: &Value) -> impl Iterator<Item = String> {
    let changes = ["created", "id", "uri", "window", "consistency"];
    let lists = list.as_object().into_iter().flatten();
    let lists = lists.filter_map(|(_, list)| list.as_array().cloned());
    lists.flatten().map(move |mut one| {
        if let Some(one) = one.as_object_mut() {
            one.retain(|key, _| !changes.contains(&key.as_str()));
        }
        one.to_string()
    })
}

/// Without the numbers that are made anew each time: eight hexadecimal digits and more, and UUIDs, become `#`.
pub(crate) fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut number = String::new();
    let text = without_hours(text);
    for c in text.chars().chain(['\n']) {
        // A dash belongs to a number where it is in a UUID.
        if c.is_ascii_hexdigit() || (c == '-' && is_uuid_until(&number)) {
            number.push(c);
            continue;
        }
        if number.len() < 8 {
            out.push_str(&number);
        } else {
            out.push('#');
            out.extend(number.strip_suffix('-').map(|_| '-'));
        }
        number.clear();
        out.push(c);
    }
    out.pop();
    out
}

/// Without what follows the day in the name of a backup's point: `T154716Z`.
fn without_hours(text: &str) -> String {
    let mut parts = text.split('T');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let hours = part.get(..7).is_some_and(|hours| {
            let (digits, z) = hours.split_at(6);
            z == "Z" && digits.bytes().all(|digit| digit.is_ascii_digit())
        });
        out.push('T');
        out.push_str(if hours { &part[6..] } else { part });
    }
    out
}

/// Whether a UUID has a dash behind these digits.
fn is_uuid_until(number: &str) -> bool {
    let groups: Vec<usize> = number.split('-').map(str::len).collect();
    [&[8][..], &[8, 4], &[8, 4, 4], &[8, 4, 4, 4]].contains(&&groups[..])
}

#[test]
fn numbers_made_anew_are_left_out() {
    assert_eq!(plain("ds-0123456789ab-vda-cbw"), "ds-#-vda-cbw");
    assert_eq!(plain("a face of 1234567"), "a face of 1234567");
    assert_eq!(
        plain("c8b7e5f1-4738-4f86-aad0-c33ebdb96a29-vda.fleece"),
        "#-vda.fleece"
    );
    assert_eq!(plain("01234567-vda"), "#-vda");
    assert_eq!(plain("backup-20261122T154716Z-2 This"), "backup-#TZ-2 This");
}
