//! One domain of a soak, and what its disks and its snapshots must hold.
//!
//! The guest's writer leaves its disks at any instant as they are after a certain round, and after no other. So what a disk held
//! when its guest was started, and a number, say all of a later content; the rounds that the guest has told of before and after
//! an act say which numbers can be right.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use disksnap_test_support::{firmware_writer_round_over, pattern};
use serde_json::{Value, json};

use super::tale::Tale;
use crate::invariants::eventually;
use crate::programs::program;
use crate::scene::{Kind, Scene, TARGETS};
use crate::site::{arg, list};

/// What went wrong is told, and ends the domain's part.
pub(crate) type Told<T = ()> = Result<T, String>;

/// What both disks hold.
pub(crate) type Contents = [Vec<u8>; 2];

/// The instant of a snapshot, as far as it is known.
#[derive(Debug, Clone)]
pub(crate) struct Born {
    /// Which start of the guest it was after; any where it is not known.
    pub(crate) era: Option<usize>,
    /// The guest had told of this round before.
    pub(crate) from: u32,
    /// And of this one after it.
    pub(crate) to: u32,
}

/// A snapshot that is there.
#[derive(Debug, Clone)]
pub(crate) struct Snap {
    pub(crate) born: Born,
    /// The disks that it is of.
    pub(crate) disks: Vec<usize>,
    /// In the hypervisor, and gone with it.
    pub(crate) inside: bool,
    /// Its hypervisor has ended.
    pub(crate) lost: bool,
    /// A merge of it was cut short: it is good for being merged to the end only.
    pub(crate) spoilt: bool,
    digests: [Option<String>; 2],
}

/// A domain, and the model of it.
pub(crate) struct Life {
    pub(crate) number: usize,
    pub(crate) scene: Scene,
    pub(crate) repo: String,
    /// All that was done, for whoever looks for what went wrong.
    pub(crate) log: Vec<String>,
    pub(crate) snaps: BTreeMap<String, Snap>,
    /// The hypervisor has ended since the checkpoints were looked at: some may be lost.
    pub(crate) shaken: bool,
    /// Whether the guest runs, or somebody else has paused it.
    pub(crate) awake: bool,
    pub(crate) named: u32,
    /// What was in the repository, by point and disk.
    points: BTreeMap<(String, usize), String>,
    eras: Vec<Contents>,
    /// Where the writer's words since the last start begin.
    printed: usize,
}

impl Life {
    pub(crate) fn new(number: usize, scene: Scene, repo: String) -> Self {
        let zero = vec![0; usize::try_from(crate::scene::SIZE).unwrap()];
        let mut life = Self {
            number,
            scene,
            repo,
            log: Vec::new(),
            snaps: BTreeMap::new(),
            shaken: false,
            awake: true,
            named: 0,
            points: BTreeMap::new(),
            eras: vec![[zero.clone(), zero]],
            printed: 0,
        };
        if life.is_off() {
            life.eras = vec![life.stored()];
        }
        life
    }

    pub(crate) fn is_off(&self) -> bool {
        self.scene.kind == Kind::ExternalOff
    }

    pub(crate) fn note(&mut self, what: &str) {
        self.log
            .push(format!("{:.3} {what}", super::elapsed().as_secs_f64()));
    }

    /// How far the guest's writer has told that it is, since its last start.
    pub(crate) fn round(&self) -> u32 {
        let Some(qemu) = &self.scene.qemu else { return 0 };
        let serial = qemu.serial();
        let told = serial.get(self.printed..).unwrap_or_default();
        let whole = told.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let number = |line: &str| line.trim().strip_prefix("WRITER ")?.parse().ok();
        whole.lines().rev().find_map(number).unwrap_or(0)
    }

    /// Something that begins now.
    pub(crate) fn now(&self) -> Born {
        Born {
            era: Some(self.eras.len() - 1),
            from: self.round(),
            to: u32::MAX,
        }
    }

    /// It has ended by now.
    pub(crate) fn ended(&self, mut born: Born) -> Born {
        born.to = self.round();
        born
    }

    /// The guest goes on, or stays as somebody has left it.
    pub(crate) fn wake(&mut self, awake: bool) {
        let Some(qemu) = &self.scene.qemu else { return };
        self.awake = awake;
        qemu.qmp(if awake { "cont" } else { "stop" }, json!({}));
    }

    /// The guest stands still while nobody is at work on the domain.
    pub(crate) fn rest(&mut self) {
        self.wake(false);
    }

    /// The guest is as it was before the act: at the latest when the guardian has acted.
    pub(crate) fn stands(&self) -> Told {
        let Some(qemu) = &self.scene.qemu else {
            return Ok(());
        };
        let wanted = if self.awake { "running" } else { "paused" };
        let wrong = eventually(|| {
            let status = qemu.status();
            Vec::from_iter((status != wanted).then(|| format!("the guest is {status}, and was {wanted}")))
        });
        none(wrong)
    }

    /// What the domain's document names for a disk, and its format.
    fn image(&self, target: &str) -> (String, String) {
        let document = self.scene.document();
        let mut disks = document.split("<disk ").skip(1);
        let disk = disks.find(|disk| disk.contains(&format!("dev='{target}'")));
        let disk = disk.unwrap_or_else(|| panic!("no disk {target} in {document}"));
        let value = |after: &str| {
            let rest = disk
                .split_once(after)
                .unwrap_or_else(|| panic!("no {after} in {disk}"))
                .1;
            rest.split_once('\'').unwrap().0.to_owned()
        };
        (value("<source file='"), value(" type='"))
    }

    /// What the disks' images hold. Nobody may write to them.
    fn stored(&self) -> Contents {
        TARGETS.map(|target| {
            let (image, format) = self.image(target);
            let to = tempfile::NamedTempFile::new().unwrap();
            let words = ["convert", "-U", "-f", &format, "-O", "raw", &image];
            program("qemu-img", &[&words[..], &[&arg(to.path())]].concat());
            std::fs::read(to.path()).unwrap()
        })
    }

    /// The guest's disks are as its writer has left them, and the writer goes on.
    pub(crate) fn guest_is_whole(&mut self, tale: &Tale) -> Told {
        tale.checked("the guest's disks");
        let Some(qemu) = &self.scene.qemu else {
            let now = self.stored();
            let whole = now == *self.era();
            return if whole {
                Ok(())
            } else {
                Err("the disks do not hold what they held".to_owned())
            };
        };
        qemu.qmp("stop", json!({}));
        let (from, now) = (self.round(), self.stored());
        let born = Born {
            era: Some(self.eras.len() - 1),
            from,
            to: from,
        };
        let judged = self
            .judge(&born, &now.map(Some))
            .map_err(|why| format!("the guest's own disks: {why}"));
        qemu.qmp("cont", json!({}));
        self.awake = true;
        judged?;
        let before = qemu.serial().len();
        none(eventually(|| {
            let serial = qemu.serial();
            let goes_on = serial.len() > before && !serial.contains("GUEST FAILED");
            Vec::from_iter((!goes_on).then(|| "the guest writes no more".to_owned()))
        }))
    }

    fn era(&self) -> &Contents {
        self.eras.last().unwrap()
    }

    /// Of a domain that is off: somebody else has written to the disks.
    pub(crate) fn write(&mut self, offset: u64, byte: u8) {
        let length = 40 << 10;
        let mut next = self.era().clone();
        for (n, target) in TARGETS.iter().enumerate() {
            let (image, format) = self.image(target);
            let command = format!("write -P {byte} {offset} {length}");
            program("qemu-io", &["-f", &format, "-c", &command, &image]);
            let at = usize::try_from(offset).unwrap();
            next[n][at..at + length].fill(byte);
        }
        self.eras.push(next);
    }

    /// Of a domain that is off: it may have gone back to a snapshot.
    pub(crate) fn settle_contents(&mut self, back: Option<&str>, must: bool) -> Told {
        let now = self.stored();
        let then = back.and_then(|name| self.snaps.get(name)).and_then(|snap| {
            let era = self.eras.get(snap.born.era?)?;
            let mut then = self.era().clone();
            for n in &snap.disks {
                then[*n].clone_from(&era[*n]);
            }
            Some(then)
        });
        match then {
            Some(then) if then == now => {
                self.eras.push(then);
                Ok(())
            }
            _ if !must && now == *self.era() => Ok(()),
            _ => Err("the disks hold neither what they held nor what the snapshot does".to_owned()),
        }
    }

    /// The hypervisor ends, and is started on what the document names.
    pub(crate) fn restart(&mut self, orderly: bool) -> Told {
        let Some(qemu) = &self.scene.qemu else {
            return Ok(());
        };
        let before = self.round();
        if orderly {
            qemu.quit();
        } else {
            qemu.kill9();
        }
        let now = self.stored();
        let born = Born {
            era: Some(self.eras.len() - 1),
            from: before,
            to: self.round(),
        };
        self.judge(&born, &now.clone().map(Some))
            .map_err(|why| format!("after the hypervisor's end: {why}"))?;
        self.eras.push(now);
        self.printed = qemu.serial().len();
        let images = TARGETS.map(|target| (target, PathBuf::from(self.image(target).0)));
        qemu.restart_on(
            &images
                .each_ref()
                .map(|(target, image)| (*target, image.as_path())),
        );
        self.awake = true;
        self.shaken = true;
        for snap in self.snaps.values_mut().filter(|snap| snap.inside) {
            snap.lost = true;
        }
        none(eventually(|| {
            Vec::from_iter((self.round() < 8).then(|| "the guest does not start again".to_owned()))
        }))
    }

    /// Whether contents can be those of an instant.
    pub(crate) fn judge(&self, born: &Born, contents: &[Option<Vec<u8>>; 2]) -> Told {
        let eras: Vec<usize> = match born.era {
            Some(era) => vec![era],
            None => (0..self.eras.len()).rev().collect(),
        };
        let mut why = String::new();
        for era in eras {
            match self.judge_in(era, born, contents) {
                Ok(()) => return Ok(()),
                Err(reason) => why = format!("{why}; start {era}: {reason}"),
            }
        }
        Err(why)
    }

    fn judge_in(&self, era: usize, born: &Born, contents: &[Option<Vec<u8>>; 2]) -> Told {
        let before = &self.eras[era];
        let mut rounds: Vec<Vec<u32>> = Vec::new();
        for (n, content) in contents.iter().enumerate() {
            let Some(content) = content else { continue };
            if self.is_off() {
                if *content != before[n] {
                    return Err(format!("{} is not what it was", TARGETS[n]));
                }
                continue;
            }
            let round = firmware_writer_round_over(&before[n], content);
            rounds.push(round.map_err(|why| format!("{}: {why}", TARGETS[n]))?);
        }
        // A line is told with every eighth round; what comes before the first line is round 0 to 8.
        let within = |round: &u32| *round >= born.from && *round <= born.to.saturating_add(8);
        let one = match &rounds[..] {
            [first, last] => first.iter().any(|first| {
                let together = |last: &u32| first == last || *first == last + 1;
                within(first) && last.iter().any(together)
            }),
            each => each.iter().all(|rounds| rounds.iter().any(within)),
        };
        if one {
            return Ok(());
        }
        let (from, to) = (born.from, born.to);
        Err(format!(
            "the disks are of the rounds {rounds:?}, and the instant was between {from} and {to}"
        ))
    }

    /// A snapshot is there that was not.
    pub(crate) fn begun(&mut self, name: &str, born: Born, disks: &[usize], inside: bool) {
        let snap = Snap {
            born,
            disks: disks.to_vec(),
            inside,
            lost: false,
            spoilt: false,
            digests: [None, None],
        };
        self.snaps.insert(name.to_owned(), snap);
    }

    /// What was read of a snapshot is what it must hold, and what was read before.
    pub(crate) fn read(&mut self, name: &str, contents: [Option<Vec<u8>>; 2], tale: &Tale) -> Told {
        tale.checked("a snapshot's content");
        let Some(snap) = self.snaps.get(name) else {
            return Err(format!("{name} was read, and is not known"));
        };
        self.judge(&snap.born, &contents)
            .map_err(|why| format!("{name} does not hold its instant: {why}"))?;
        let found = contents.map(|content| content.map(|content| pattern::digest(&content)));
        let snap = self.snaps.get_mut(name).unwrap();
        for (known, found) in snap.digests.iter_mut().zip(found) {
            match (&known, &found) {
                (Some(known), Some(found)) if known != found => {
                    return Err(format!("{name} has changed"));
                }
                (None, Some(_)) => *known = found,
                _ => {}
            }
        }
        Ok(())
    }

    /// What was restored of a point is what the disk held at some instant, and what was restored before.
    pub(crate) fn restored(&mut self, point: &str, disk: usize, content: Vec<u8>, tale: &Tale) -> Told {
        tale.checked("a backup's content");
        let found = pattern::digest(&content);
        let known = self.points.insert((point.to_owned(), disk), found.clone());
        if known.is_some_and(|known| known != found) {
            return Err(format!("{} of {point} has changed", TARGETS[disk]));
        }
        let mut contents = [None, None];
        contents[disk] = Some(content);
        let any = Born {
            era: None,
            from: 0,
            to: u32::MAX,
        };
        self.judge(&any, &contents)
            .map_err(|why| format!("the backup {point} holds no instant: {why}"))
    }

    /// The snapshots that are there are those that must be; those in doubt may.
    pub(crate) fn reconcile(&mut self, doubtful: &BTreeSet<String>) -> Told<BTreeSet<String>> {
        let listed = self.scene.json(&["snapshot", "list"]);
        let mut there = BTreeSet::new();
        for one in listed["snapshots"].as_array().into_iter().flatten() {
            let name = one["name"].as_str().unwrap().to_owned();
            let state = one["state"].as_str().unwrap();
            there.insert(name.clone());
            if doubtful.contains(&name)
                && state == "broken"
                && !self.snaps.get(&name).is_none_or(|snap| snap.inside)
            {
                self.snaps.get_mut(&name).unwrap().spoilt = true;
            }
            // What belongs to a backup that was cut short is the backup's.
            let known = self.snaps.get(&name);
            let may = match state {
                "active" => known.is_none_or(|snap| !snap.lost),
                _ => known.is_none_or(|snap| snap.lost || snap.spoilt),
            };
            if !may {
                return Err(format!("{name} is {state}: {}", one["reason"]));
            }
            if known.is_none() && !doubtful.contains(&name) && !name.starts_with("backup-") {
                return Err(format!("{name} is there, and nobody made it"));
            }
        }
        let gone: Vec<String> = self
            .snaps
            .keys()
            .filter(|name| !there.contains(*name))
            .cloned()
            .collect();
        for name in gone {
            if !doubtful.contains(&name) {
                return Err(format!("{name} is not there any more"));
            }
            self.snaps.remove(&name);
        }
        Ok(there)
    }

    /// The processes that serve this domain's images.
    pub(crate) fn daemons(&self) -> Vec<i32> {
        let ours = |pid: &i32| {
            let input = std::fs::read_link(format!("/proc/{pid}/fd/0"));
            input.is_ok_and(|input| input.to_string_lossy().contains(&self.scene.stem))
        };
        crate::daemons::of(&self.scene.site.run_dir())
            .into_iter()
            .filter(ours)
            .collect()
    }

    /// The points of its backups.
    pub(crate) fn backups(&self) -> Vec<String> {
        if !self.repo_is_there() {
            return Vec::new();
        }
        let listed = self.scene.json(&["backup", "list", "--repo", &self.repo]);
        let domains = listed["domains"].as_array().cloned().unwrap_or_default();
        let uuid = |domain: &&Value| {
            let uuid = domain["uuid"].as_str().unwrap_or_default().replace('-', "");
            uuid.starts_with(&self.scene.stem)
        };
        let own = domains.iter().find(uuid);
        let points = own
            .and_then(|own| own["points"].as_array())
            .cloned()
            .unwrap_or_default();
        points
            .iter()
            .filter_map(|point| Some(point["point"].as_str()?.to_owned()))
            .collect()
    }

    fn repo_is_there(&self) -> bool {
        // Its folder is called after the domain's UUID.
        let folders = list(self.repo.as_ref());
        let digits = &self.scene.stem[..8];
        folders
            .iter()
            .any(|folder| arg(folder).ends_with(&format!("-{digits}")))
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "it is what was just asked, and nobody else's"
)]
pub(crate) fn none(wrong: Vec<String>) -> Told {
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(wrong.join("; "))
    }
}
