//! A second process with the same catalog: the test's binary again, told by [`ROLE`] what to be.
//!
//! A binary that starts one has a test `second_process`, which calls [`role`].

#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use disksnap_catalog::SqliteCatalog;
use disksnap_core::{Act, Catalog, Change};
use uuid::Uuid;

use super::{checkpoint, domain, export, intent, snapshot, state};

const ROLE: &str = "DISKSNAP_CATALOG_TEST_ROLE";
const DIR: &str = "DISKSNAP_CATALOG_TEST_DIR";

/// What this process is to be, in which directory; `None` in the process that the tests are in.
pub(crate) async fn role() -> Option<(String, SqliteCatalog, PathBuf)> {
    let role = std::env::var(ROLE).ok()?;
    let dir = PathBuf::from(std::env::var_os(DIR).unwrap());
    let catalog = SqliteCatalog::open(state(&dir)).await.unwrap();
    Some((role, catalog, dir))
}

pub(crate) fn say(word: &str) {
    // In one write, so that a kill cannot cut the word; past the test harness, which would keep it.
    std::io::stdout()
        .write_all(format!("\n> {word}\n").as_bytes())
        .unwrap();
}

/// Each settle makes two snapshots and an export, and says so once it is durable.
pub(crate) async fn settle_for_ever(catalog: &SqliteCatalog) {
    let vm = domain("vm");
    let first = catalog.snapshots(&vm).await.unwrap().len();
    for n in first.. {
        let begun = intent(&vm, &format!("{n}"));
        catalog.intend(&begun).await.unwrap();
        let changes = [
            Change::AddSnapshot(Box::new(snapshot(&vm, &format!("{n}-a"), 0))),
            Change::AddSnapshot(Box::new(snapshot(&vm, &format!("{n}-b"), 0))),
            Change::AddExport(export(&format!("{n}"), "vda")),
        ];
        catalog.settle(begun.id, &vm, &changes).await.unwrap();
        say(&format!("{n}"));
    }
}

/// Each set takes the place of the one before, and all of its checkpoints carry its number.
pub(crate) async fn set_checkpoints_for_ever(catalog: &SqliteCatalog) {
    let vm = domain("vm");
    for n in 0_u64.. {
        let set = (0..100)
            .map(|k| checkpoint(&format!("c{k}"), None, n, 16))
            .collect();
        let change = [Change::SetCheckpoints(set)];
        catalog.settle(Uuid::nil(), &vm, &change).await.unwrap();
        say(&format!("{n}"));
    }
}

/// What a second process says.
pub(crate) struct Words(BufReader<ChildStdout>);

impl Words {
    /// The next word; `None` once the process has ended.
    pub(crate) fn word(&mut self) -> Option<String> {
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            if let Some(word) = line.strip_prefix("> ") {
                return Some(word.trim_end().to_owned());
            }
        }
    }
}

/// A running second process, killed when dropped.
pub(crate) struct Second {
    pub(crate) child: Child,
    words: Option<Words>,
}

impl Second {
    pub(crate) fn start(role: &str, dir: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "second_process", "--ignored", "--nocapture"])
            .env(ROLE, role)
            .env(DIR, dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let words = child.stdout.take().map(|out| Words(BufReader::new(out)));
        Self { child, words }
    }

    /// The next word it says; `None` once it has ended.
    pub(crate) fn word(&mut self) -> Option<String> {
        self.words.as_mut().unwrap().word()
    }

    /// To be heard by somebody else.
    pub(crate) fn take_words(&mut self) -> Words {
        self.words.take().unwrap()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether all that was said is there, each settle done or not, and what is not done told as under way. Settles what is.
pub(crate) async fn check_settles(catalog: &SqliteCatalog, said: &BTreeSet<String>) {
    let vm = domain("vm");
    catalog.check().await.unwrap();
    let snapshots = catalog.snapshots(&vm).await.unwrap();
    let half = |end: &str| -> BTreeSet<String> {
        let names = snapshots.iter().map(|s| s.name.as_str());
        names
            .filter_map(|name| name.strip_suffix(end))
            .map(str::to_owned)
            .collect()
    };
    let exports = catalog.exports(&vm).await.unwrap();
    let exports: BTreeSet<String> = exports.into_iter().map(|export| export.alias.0).collect();
    let done = half("-a");
    assert_eq!(done, half("-b"));
    assert_eq!(done, exports);
    assert!(done.is_superset(said), "a settle that had answered is lost");
    for intent in catalog.intents(Some(&vm)).await.unwrap() {
        let Act::Create { name, .. } = &intent.act else {
            panic!("{intent:?}")
        };
        assert!(!done.contains(name.as_str()), "settled, and still under way");
        catalog.settle(intent.id, &vm, &[]).await.unwrap();
    }
}
