//! What is done to a domain: drawn at random, done, perhaps killed, settled, and compared with what must be.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::time::Duration;

use disksnap_test_support::pattern::Random;
use disksnap_test_support::tools;
use serde_json::{Value, json};

use super::life::{Life, Told, none};
use super::run::{Fate, Outcome, first_line, run};
use super::tale::Tale;
use crate::acts::{names, words};
use crate::invariants::{self, eventually};
use crate::scene::{Kind, SIZE, TARGETS};
use crate::site::arg;

/// No more snapshots of a domain at a time.
const SNAPSHOTS: usize = 3;
/// Nor checkpoints.
const CHECKPOINTS: usize = 4;

/// Something to be done.
struct Deed {
    kind: &'static str,
    words: Vec<String>,
    /// The snapshot that it is about.
    about: Option<String>,
    leaves: Leaves,
    /// Exit codes that are an answer, too.
    refusals: &'static [i32],
    /// Exit codes of the same once more, after a kill.
    again: &'static [i32],
}

/// What becomes of the snapshot that it is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leaves {
    /// It is there.
    There,
    /// It is gone.
    Gone,
    /// It is as before.
    Same,
}

impl Deed {
    fn new(kind: &'static str, line: &str) -> Self {
        Self {
            kind,
            words: words(line),
            about: None,
            leaves: Leaves::Same,
            refusals: &[],
            again: &[],
        }
    }

    fn on(mut self, name: &str, leaves: Leaves) -> Self {
        self.about = Some(name.to_owned());
        self.leaves = leaves;
        self
    }

    fn refused_by(mut self, refusals: &'static [i32]) -> Self {
        self.refusals = refusals;
        self
    }

    fn again(mut self, again: &'static [i32]) -> Self {
        self.again = again;
        self
    }

    fn more(mut self, words: &[String]) -> Self {
        self.words.extend_from_slice(words);
        self
    }
}

/// Everything that a round needs.
pub(crate) struct Doing<'a> {
    pub(crate) life: &'a mut Life,
    pub(crate) random: &'a mut Random,
    pub(crate) tale: &'a Tale,
}

impl Doing<'_> {
    /// A few deeds, and a look at everything.
    pub(crate) fn round(&mut self) -> Told {
        let awake = self.random.below(6) > 0;
        self.life.wake(awake);
        for _ in 0..=self.random.below(3) {
            self.deed()?;
        }
        self.look()?;
        self.life.rest();
        Ok(())
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.random.below(n) == 0
    }

    fn chosen<T: Clone>(&mut self, of: &[T]) -> Option<T> {
        let at = (!of.is_empty()).then(|| self.random.below(of.len() as u64))?;
        of.get(usize::try_from(at).ok()?).cloned()
    }

    fn deed(&mut self) -> Told {
        match self.random.below(100) {
            0..18 => self.create(),
            18..30 => self.read(),
            30..42 => self.delete(),
            42..50 => self.merge_or_revert(),
            50..60 => self.export(),
            60..65 => self.remove_checkpoint(),
            65..68 => self.validate(),
            68..78 => self.back_up(),
            78..86 => self.restore(),
            86..90 => self.prune(),
            90..92 => self.verify(),
            92..95 => self.recover(),
            95..98 => self.end_hypervisor(),
            _ => self.end_server(),
        }
    }

    /// Runs it, perhaps to be killed; settles that, and brings the model up to date. What it printed, where it came to its end.
    fn perform(&mut self, deed: &Deed) -> Told<Option<String>> {
        let fate = Fate::drawn(deed.kind, self.tale, self.random);
        self.perform_as(deed, &fate)
    }

    fn perform_as(&mut self, deed: &Deed, fate: &Fate) -> Told<Option<String>> {
        let companion = self.one_in(12).then(|| self.companion());
        let outcome = run(self.life, deed.kind, &deed.words, fate, self.tale)?;
        if let Some(mut companion) = companion {
            let status = companion.wait().unwrap();
            if !matches!(status.code(), Some(0 | 6)) {
                return Err(format!("a list beside it: {status}"));
            }
        }
        self.life.stands()?;
        let doubt: BTreeSet<String> = deed.about.iter().cloned().collect();
        match outcome {
            Outcome::Ended { code: 0, stdout, .. } => {
                let there = self.life.reconcile(&doubt)?;
                left_by(deed, &there)?;
                Ok(Some(stdout))
            }
            Outcome::Ended { code, stderr, .. } if deed.refusals.contains(&code) => {
                self.tale.refused(deed.kind, &plain(&first_line(&stderr)));
                self.life.reconcile(&doubt)?;
                Ok(None)
            }
            Outcome::Ended { code, stderr, .. } => {
                Err(format!("{}: exit code {code}: {stderr}", deed.words.join(" ")))
            }
            Outcome::Killed => {
                self.settle(deed)?;
                Ok(None)
            }
        }
    }

    /// Somebody looks at the same domain at the same time.
    fn companion(&mut self) -> std::process::Child {
        let line = ["snapshot list", "export list", "checkpoint list", "recover"];
        let line = self.chosen(&line).unwrap();
        self.life.note(&format!("beside it: {line}"));
        let words = words(line);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut command = self.life.scene.command(&words);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.spawn().unwrap()
    }

    /// After a kill: `recover`, or the same once more.
    fn settle(&mut self, deed: &Deed) -> Told {
        let doubt: BTreeSet<String> = deed.about.iter().cloned().collect();
        if self.one_in(2) {
            self.recovered()?;
            self.life.reconcile(&doubt)?;
            return Ok(());
        }
        let lives = Fate::Lives { learning: false };
        let outcome = run(self.life, deed.kind, &deed.words, &lives, self.tale)?;
        let Outcome::Ended { code, stderr, .. } = outcome else {
            return Err("it was killed by somebody else".to_owned());
        };
        if code != 0 && !deed.again.contains(&code) && !deed.refusals.contains(&code) {
            return Err(format!(
                "after a kill, the same again: {}: exit code {code}: {stderr}",
                deed.words.join(" ")
            ));
        }
        self.life.stands()?;
        let there = self.life.reconcile(&doubt)?;
        if code == 0 {
            left_by(deed, &there)?;
        }
        Ok(())
    }

    fn recovered(&mut self) -> Told {
        let life = &mut *self.life;
        let mut said = String::new();
        let mut ask = || {
            let ended = life.scene.run(&["recover", "--output", "json"]);
            said = String::from_utf8_lossy(&ended.stdout).into_owned();
            Vec::from_iter((ended.code != Some(0)).then(|| format!("recover: {said}{}", ended.stderr)))
        };
        none(eventually(&mut ask))?;
        life.note(&format!("recover: {said}"));
        life.stands()
    }

    fn recover(&mut self) -> Told {
        self.perform(&Deed::new("recover", "recover")).map(drop)
    }

    /// The names of the snapshots that can be read.
    fn good(&self) -> Vec<String> {
        let good = self
            .life
            .snaps
            .iter()
            .filter(|(_, snap)| !snap.lost && !snap.spoilt);
        good.map(|(name, _)| name.clone()).collect()
    }

    fn create(&mut self) -> Told {
        if self.life.snaps.len() >= SNAPSHOTS {
            return self.delete();
        }
        if self.life.is_off() {
            let (offset, byte) = (self.random.below(SIZE / 4096 - 16) * 4096, self.random.below(255));
            self.life.write(offset, u8::try_from(byte).unwrap());
        }
        self.life.named += 1;
        let name = format!("s{}", self.life.named);
        let disks = match self.random.below(5) {
            0 => vec![0],
            1 => vec![1],
            _ => vec![0, 1],
        };
        let (mut chosen, mut inside) = (Vec::new(), false);
        for disk in &disks {
            let (kind, other) = (self.life.scene.kind, self.one_in(3));
            let method = match kind {
                Kind::ExternalOff => kind.method(),
                _ if other => "qemu-fleece",
                _ => kind.method(),
            };
            inside |= method == "qemu-fleece";
            chosen.extend(["--disk".to_owned(), format!("{},method={method}", TARGETS[*disk])]);
        }
        let many = names(&self.life.scene, "checkpoint", "checkpoints").len() >= CHECKPOINTS;
        if !many && self.one_in(2) {
            chosen.push("--checkpoint".to_owned());
        }
        let deed = Deed::new("snapshot create", "snapshot create --name")
            .more(std::slice::from_ref(&name))
            .more(&chosen)
            .on(&name, Leaves::There)
            .refused_by(if self.life.scene.kind == Kind::External {
                &[5, 6]
            } else {
                &[]
            })
            .again(&[4]);
        let born = self.life.now();
        // It may come to be in any case but a refusal.
        self.life.begun(&name, born.clone(), &disks, inside);
        self.perform(&deed)?;
        let born = self.life.ended(born);
        if let Some(snap) = self.life.snaps.get_mut(&name) {
            snap.born = born;
            if self.one_in(2) {
                self.read_both(&name)?;
            }
        }
        Ok(())
    }

    fn delete(&mut self) -> Told {
        let all: Vec<String> = self.life.snaps.keys().cloned().collect();
        let Some(name) = self.chosen(&all) else {
            return Ok(());
        };
        let deed = Deed::new("snapshot delete", &format!("snapshot delete {name}"))
            .on(&name, Leaves::Gone)
            .refused_by(self.merging_refusals());
        self.perform(&deed).map(drop)
    }

    /// Why a snapshot that the disk stands on may have to stay for now: another one is read through it.
    fn merging_refusals(&self) -> &'static [i32] {
        match self.life.scene.kind {
            // Reverts have several snapshots stand on one image.
            Kind::External | Kind::ExternalOff => &[5, 6],
            _ => &[],
        }
    }

    fn merge_or_revert(&mut self) -> Told {
        if self.life.is_off() && self.one_in(2) {
            return self.revert();
        }
        if !matches!(self.life.scene.kind, Kind::External | Kind::ExternalOff) {
            return self.read();
        }
        let all = self.life.snaps.iter().filter(|(_, snap)| !snap.inside);
        let all: Vec<String> = all.map(|(name, _)| name.clone()).collect();
        let Some(name) = self.chosen(&all) else {
            return Ok(());
        };
        let spoilt = self.life.snaps[&name].spoilt;
        let deed = if spoilt || self.one_in(2) {
            Deed::new("snapshot merge", &format!("snapshot merge {name}"))
                .on(&name, Leaves::Gone)
                .refused_by(&[5, 6])
                .again(&[3])
        } else {
            Deed::new(
                "merge --into overlay",
                &format!("snapshot merge --into overlay {name}"),
            )
            .on(&name, Leaves::There)
            .refused_by(&[5, 6])
        };
        self.perform(&deed).map(drop)
    }

    fn revert(&mut self) -> Told {
        let good = self.good();
        let Some(name) = self.chosen(&good) else {
            return Ok(());
        };
        let deed = Deed::new("snapshot revert", &format!("snapshot revert {name}"))
            .on(&name, Leaves::There)
            .refused_by(&[5, 6]);
        let done = self.perform(&deed)?.is_some();
        self.life.settle_contents(Some(&name), done)
    }

    fn read(&mut self) -> Told {
        let good = self.good();
        match self.chosen(&good) {
            Some(name) => self.read_both(&name),
            None => Ok(()),
        }
    }

    fn read_both(&mut self, name: &str) -> Told {
        let dir = tempfile::tempdir().unwrap();
        let mut contents = [None, None];
        for disk in self.life.snaps[name].disks.clone() {
            let to = dir.path().join(TARGETS[disk]);
            let line = format!("read {name} {} --to {}", TARGETS[disk], arg(&to));
            let deed = Deed::new("read", &line).on(name, Leaves::There).again(&[4]);
            self.perform(&deed)?;
            contents[disk] = std::fs::read(to).ok();
        }
        self.life.read(name, contents, self.tale)
    }

    fn stop_exports(&mut self) -> Told {
        if self.life.scene.json(&["export", "list"])["exports"] == json!([]) {
            return Ok(());
        }
        let deed = Deed::new("export stop", "export stop --all").again(&[3]);
        self.perform(&deed).map(drop)
    }

    fn export(&mut self) -> Told {
        self.stop_exports()?;
        self.stop_exports()?;
        let good = self.good();
        let Some(name) = self.chosen(&good) else {
            return Ok(());
        };
        let line = format!("export start {name} --output json");
        let deed = Deed::new("export start", &line)
            .on(&name, Leaves::There)
            .again(&[4]);
        let Some(told) = self.perform(&deed)? else {
            return Ok(());
        };
        let told: Value = serde_json::from_str(&told).map_err(|e| format!("{line}: {e}"))?;
        let dir = tempfile::tempdir().unwrap();
        let mut contents = [None, None];
        for export in told["exports"].as_array().into_iter().flatten() {
            let target = export["target"].as_str().unwrap();
            let disk = TARGETS.iter().position(|known| *known == target).unwrap();
            let to = dir.path().join(target);
            if self.pulled(export["uri"].as_str().unwrap(), &arg(&to))? {
                contents[disk] = std::fs::read(to).ok();
            }
        }
        self.life.read(&name, contents, self.tale)?;
        if self.one_in(5) {
            Ok(())
        } else {
            self.stop_exports()
        }
    }

    /// Another program reads an export; it may be killed on the way.
    fn pulled(&mut self, uri: &str, to: &str) -> Told<bool> {
        let mut command = Command::new(tools::program("nbdcopy"));
        command
            .args([uri, to])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        if self.one_in(4) {
            std::thread::sleep(Duration::from_micros(self.random.below(60_000)));
            child.kill().unwrap();
            child.wait().unwrap();
            self.tale.struck("a reader");
            self.life.note("a reader was killed");
            return Ok(false);
        }
        let output = child.wait_with_output().unwrap();
        if output.status.success() {
            self.tale.done("nbdcopy", Duration::ZERO);
            return Ok(true);
        }
        Err(format!(
            "nbdcopy {uri}: {}",
            String::from_utf8_lossy(&output.stderr)
        ))
    }

    fn own_checkpoints(&self) -> Vec<String> {
        let mut all = names(&self.life.scene, "checkpoint", "checkpoints");
        all.retain(|name| !name.starts_with("backup-"));
        all
    }

    fn remove_checkpoint(&mut self) -> Told {
        let own = self.own_checkpoints();
        let Some(name) = self.chosen(&own) else {
            return Ok(());
        };
        let shaken: &[i32] = if self.life.shaken { &[5, 6, 11] } else { &[6] };
        let deed = Deed::new("checkpoint remove", &format!("checkpoint remove {name}"))
            .refused_by(shaken)
            .again(&[3]);
        self.perform(&deed).map(drop)
    }

    fn validate(&mut self) -> Told {
        if self.life.shaken {
            let deed = Deed::new("checkpoint drop-broken", "checkpoint drop-broken");
            if self.perform(&deed)?.is_none() {
                return Ok(());
            }
            self.life.shaken = false;
        }
        let deed = Deed::new("checkpoint validate", "checkpoint validate");
        self.perform(&deed).map(drop)
    }

    fn repo(&self, line: &str) -> Vec<String> {
        [words(line), words(&format!("--repo {}", self.life.repo))].concat()
    }

    fn back_up(&mut self) -> Told {
        let deed = Deed::new("backup create", "")
            .more(&self.repo("backup create -q"))
            .refused_by(self.merging_refusals());
        self.perform(&deed).map(drop)
    }

    fn restore(&mut self) -> Told {
        let points = self.life.backups();
        let Some(point) = self.chosen(&points) else {
            return self.back_up();
        };
        let dir = tempfile::tempdir().unwrap();
        for (disk, target) in TARGETS.iter().enumerate() {
            let to = dir.path().join(format!("{target}.raw"));
            let place = words(&format!("-q --disk {target}={}", arg(&to)));
            let deed = Deed::new("backup restore", "")
                .more(&self.repo(&format!("backup restore {point}")))
                .more(&place)
                .again(&[4]);
            self.perform(&deed)?;
            if let Ok(content) = std::fs::read(&to) {
                self.life.restored(&point, disk, content, self.tale)?;
            }
        }
        Ok(())
    }

    fn prune(&mut self) -> Told {
        if self.life.backups().len() < 3 {
            return self.back_up();
        }
        let deed = Deed::new("backup prune", "").more(&self.repo("backup prune -q --keep-last 2"));
        self.perform(&deed).map(drop)
    }

    fn verify(&mut self) -> Told {
        if self.life.backups().is_empty() {
            return Ok(());
        }
        let deed = Deed::new("backup verify", "").more(&self.repo("backup verify -q"));
        self.perform(&deed).map(drop)
    }

    /// The hypervisor is killed, or ends in an orderly way, and is started again.
    fn end_hypervisor(&mut self) -> Told {
        if self.life.is_off() {
            return Ok(());
        }
        let orderly = self.one_in(3);
        self.life.note(if orderly {
            "the hypervisor ends"
        } else {
            "the hypervisor is killed"
        });
        if !orderly {
            self.tale.struck("the hypervisor");
        }
        self.life.restart(orderly)?;
        self.recovered()?;
        self.stop_exports()?;
        self.life.reconcile(&BTreeSet::new()).map(drop)
    }

    /// What serves images is killed while it does.
    fn end_server(&mut self) -> Told {
        let good = self.good();
        let Some(name) = self.chosen(&good) else {
            return Ok(());
        };
        let started = Deed::new("export start", &format!("export start {name}")).on(&name, Leaves::There);
        self.stop_exports()?;
        self.stop_exports()?;
        self.perform_as(&started, &Fate::Lives { learning: true })?;
        for pid in self.life.daemons() {
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            if rustix::process::kill_process(pid, rustix::process::Signal::KILL).is_ok() {
                self.tale.struck("the server for images");
                self.life.note("the server for images was killed");
            }
        }
        let gone =
            || Vec::from_iter((!self.life.daemons().is_empty()).then(|| "a killed server stays".to_owned()));
        none(eventually(gone))?;
        if self.one_in(2) {
            self.read_both(&name)?;
        }
        self.stop_exports()?;
        self.stop_exports()
    }

    /// Everything about this domain that must hold when nobody is at work on it.
    pub(crate) fn look(&mut self) -> Told {
        self.tale.checked("a domain");
        self.life.stands()?;
        self.life.reconcile(&BTreeSet::new())?;
        self.life.guest_is_whole(self.tale)?;
        let scene = &self.life.scene;
        // Layers below the disk's own are snapshots: what is in them stays in them until they are merged.
        let layered = scene.kind == Kind::External && !self.life.snaps.is_empty();
        none(eventually(|| {
            let mut wrong = invariants::guest(scene);
            wrong.retain(|what| !layered || !what.starts_with("bitmap "));
            wrong
        }))
    }

    /// Gives up what is broken: what is left is to be sound.
    pub(crate) fn tidy(&mut self) -> Told {
        self.stop_exports()?;
        self.stop_exports()?;
        let lost = self
            .life
            .snaps
            .iter()
            .filter(|(_, snap)| snap.lost || snap.spoilt);
        if lost.count() > 0 {
            // What is sound may have to go first.
            self.end_all(self.life.snaps.keys().cloned().collect())?;
        }
        if self.life.shaken {
            self.surely(&Deed::new("checkpoint drop-broken", "checkpoint drop-broken"))?;
            self.life.shaken = false;
        }
        let left = names(&self.life.scene, "snapshot", "snapshots");
        if left.iter().any(|name| name.starts_with("backup-")) {
            self.surely(&Deed::new("backup abandon", "").more(&self.repo("backup abandon")))?;
        }
        Ok(())
    }

    /// Gives up everything.
    pub(crate) fn clear(&mut self) -> Told {
        self.life.wake(true);
        self.tidy()?;
        self.end_all(self.life.snaps.keys().cloned().collect())?;
        self.stop_exports()?;
        for name in names(&self.life.scene, "checkpoint", "checkpoints") {
            let line = format!("checkpoint remove {name}");
            self.surely(&Deed::new("checkpoint remove", &line))?;
        }
        self.look()?;
        self.life.rest();
        Ok(())
    }

    /// Deletes all of these: one may have to wait for another that is read through it.
    fn end_all(&mut self, mut names: Vec<String>) -> Told {
        while !names.is_empty() {
            let before = names.len();
            for name in std::mem::take(&mut names) {
                let deed = Deed::new("snapshot delete", &format!("snapshot delete {name}"))
                    .on(&name, Leaves::Gone)
                    .refused_by(self.merging_refusals());
                if self.perform_as(&deed, &Fate::Lives { learning: true })?.is_none() {
                    names.push(name);
                }
            }
            if names.len() == before {
                return Err(format!("{names:?} cannot be deleted, in no order"));
            }
        }
        Ok(())
    }

    fn surely(&mut self, deed: &Deed) -> Told {
        self.perform_as(deed, &Fate::Lives { learning: true }).map(drop)
    }
}

/// Whether the snapshot that it was about is there or gone, as it is to be.
fn left_by(deed: &Deed, there: &BTreeSet<String>) -> Told {
    let Some(name) = &deed.about else { return Ok(()) };
    match (deed.leaves, there.contains(name)) {
        (Leaves::There, false) => Err(format!("{name} was made, and is not there")),
        (Leaves::Gone, true) => Err(format!("{name} was given up, and is there")),
        _ => Ok(()),
    }
}

/// A refusal without the names that differ.
fn plain(text: &str) -> String {
    let text = text.split(" (").next().unwrap_or_default();
    crate::world::plain(text)
}
