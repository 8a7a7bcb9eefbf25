//! The walk over the points: an act is run once to learn which points it passes, and then once for each point, at which it is
//! killed; what is there afterwards is looked at, and the same act is done again.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use disksnap_test_support::pattern::Random;
use disksnap_test_support::require;

use crate::acts::{ACTS, Act, Settles, ok};
use crate::invariants;
use crate::scene::{Kind, Scene};
use crate::site::Ended;
use crate::table::{Row, Table, note};
use crate::world::World;

/// The signal that ends a process at its point.
const KILLED: i32 = 9;

/// Which points are tried.
#[derive(Debug, Clone)]
struct Plan {
    /// Part of a scene's name; all where it is empty.
    methods: Vec<String>,
    /// Part of an act's name.
    act: Option<String>,
    /// One point alone.
    point: Option<String>,
    seed: u64,
    /// How many points of each act; all of them where there is none.
    sample: Option<usize>,
}

/// A point, and the how many-th passing of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Point {
    pub(crate) name: String,
    pub(crate) k: usize,
}

impl std::fmt::Display for Point {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.name, self.k)
    }
}

/// What an act left when nobody killed it.
struct Known {
    /// Before everything, and after the undoing.
    bare: World,
    before: World,
    after: World,
}

/// What came of a kill.
enum Killed {
    There,
    NotPassed,
    /// How it ended instead.
    Not(String),
}

/// The exit code of what is busy.
const BUSY: i32 = 6;

/// How often a point is tried that an act does not pass each time.
const TRIES: usize = 3;

/// One act in one scene, and what becomes of it.
struct Walk {
    kind: Kind,
    act: Act,
    /// The one point that is tried, if not all.
    only: Option<String>,
    scene: Option<Scene>,
    known: Option<Known>,
    rounds: usize,
}

impl Walk {
    fn new(kind: Kind, act: Act, only: Option<String>) -> Self {
        Self {
            kind,
            act,
            only,
            scene: None,
            known: None,
            rounds: 0,
        }
    }

    /// Kills it at all points or at some, and tells how each went.
    fn run(&mut self, random: &mut Random, sample: Option<usize>) -> Vec<Row> {
        let mut points = match guarded(|| self.learn()) {
            Ok(points) => points,
            Err(why) => {
                self.scene = None;
                let point = Point {
                    name: "without a kill".to_owned(),
                    k: 1,
                };
                return vec![self.row(point, vec![why])];
            }
        };
        points.retain(|point| self.only.as_ref().is_none_or(|only| point.to_string() == *only));
        let chosen = match sample {
            Some(count) => some(points, count, random),
            None => points,
        };
        let mut rows = Vec::new();
        for point in chosen {
            let rounds = || (0..TRIES).find_map(|_| self.round(&point));
            let mut wrong = match guarded(rounds) {
                Ok(Some(wrong)) => wrong,
                Ok(None) => {
                    note(&format!(
                        "{}: {}: {point}: passed no more",
                        self.kind.name(),
                        self.act.name
                    ));
                    continue;
                }
                Err(why) => vec![why],
            };
            if !wrong.is_empty() {
                wrong.extend(self.last_words());
                note(&format!(
                    "{}: {}: {point}: {wrong:#?}",
                    self.kind.name(),
                    self.act.name
                ));
                // Whatever is there now is not what the next round expects.
                self.scene = None;
            }
            rows.push(self.row(point, wrong));
        }
        rows
    }

    /// What the hypervisor said where it has ended by itself.
    fn last_words(&self) -> Option<String> {
        let qemu = self.scene.as_ref()?.qemu.as_ref()?;
        (!qemu.is_running()).then(|| format!("the hypervisor has ended: {}", qemu.log()))
    }

    fn row(&self, point: Point, wrong: Vec<String>) -> Row {
        Row {
            scene: self.kind.name(),
            act: self.act.name,
            point,
            wrong,
        }
    }

    /// Runs it through, and learns what it passes and what it leaves.
    fn learn(&mut self) -> Vec<Point> {
        let scene = Scene::alone(self.kind);
        // The first act of all makes what stays, such as the state directory.
        (self.act.prepare)(&scene);
        ok(&scene, &(self.act.words)(&scene));
        (self.act.undo)(&scene);
        let bare = World::of(&scene);
        let complaints = invariants::check(&scene);
        assert!(complaints.is_empty(), "before any kill: {complaints:#?}");
        (self.act.prepare)(&scene);
        let before = World::of(&scene);
        let log = scene.site.path("points");
        let mut command = self.command(&scene);
        let output = command.env("DISKSNAP_FAULT_LOG", &log).output().unwrap();
        let ended = crate::site::ended(output);
        assert_eq!(ended.code, Some(0), "without a kill: {}", ended.stderr);
        let points = points(&std::fs::read_to_string(log).unwrap_or_default());
        assert!(
            !points.is_empty(),
            "it passes no point: was it built without debug assertions?"
        );
        let after = World::of(&scene);
        (self.act.undo)(&scene);
        let left = invariants::eventually(|| bare.compared(&World::of(&scene)));
        assert!(left.is_empty(), "undone without a kill, it leaves: {left:#?}");
        self.known = Some(Known { bare, before, after });
        self.scene = Some(scene);
        points
    }

    fn command(&self, scene: &Scene) -> std::process::Command {
        let words = (self.act.words)(scene);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        scene.command(&words)
    }

    /// One kill, and everything that must hold afterwards; what does not. None where the act did not pass the point so often
    /// this time: in how many pieces a disk is read, for one, is the guest's doing.
    fn round(&mut self, point: &Point) -> Option<Vec<String>> {
        self.rounds += 1;
        if self.scene.is_none() {
            self.learn();
        }
        let (Some(scene), Some(known)) = (&self.scene, &self.known) else {
            return Some(vec!["there is no scene".to_owned()]);
        };
        (self.act.prepare)(scene);
        match self.kill(scene, point) {
            Killed::There => {}
            Killed::NotPassed => {
                (self.act.undo)(scene);
                return None;
            }
            Killed::Not(why) => return Some(vec![why]),
        }
        let mut wrong = invariants::writes_go_on(scene);
        // Every second time whatever comes next has to settle it.
        if self.rounds.is_multiple_of(2) {
            wrong.extend(self.recovered(scene, known));
        }
        wrong.extend(self.again(scene, known));
        (self.act.undo)(scene);
        wrong.extend(invariants::check_and(scene, |world| known.bare.compared(world)));
        wrong.extend(invariants::writes_are_whole(scene));
        Some(wrong)
    }

    /// Runs it up to the point.
    fn kill(&self, scene: &Scene, point: &Point) -> Killed {
        let log = scene.site.path("points");
        // That of the round before, if there was one.
        let _ = std::fs::remove_file(&log);
        let mut command = self.command(scene);
        command.env("DISKSNAP_FAULT", point.to_string());
        command.env("DISKSNAP_FAULT_LOG", &log);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let output = command.output().unwrap();
        if output.status.signal() == Some(KILLED) {
            return Killed::There;
        }
        let passed = points(&std::fs::read_to_string(&log).unwrap_or_default());
        if output.status.success() && !passed.contains(point) {
            return Killed::NotPassed;
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let (how, said) = (output.status, scene.site.short(&said));
        Killed::Not(format!("it was not killed: {how}: {said}"))
    }

    /// `recover` settles it: all is as if the act had been done, or as if it had not.
    fn recovered(&self, scene: &Scene, known: &Known) -> Vec<String> {
        let recovered = patiently(|| scene.site.run(&["recover"]));
        let mut wrong = Vec::new();
        if recovered.code != Some(0) {
            wrong.push(format!("recover: {}", told(scene, &recovered)));
        }
        if self.act.settles == Settles::Whole {
            wrong.extend(invariants::check_and(scene, |world| {
                let (before, after) = (known.before.compared(world), known.after.compared(world));
                match (before.is_empty() || after.is_empty(), before.len() <= after.len()) {
                    (true, _) => Vec::new(),
                    (false, true) => prefixed("recovered, it is not as before", before),
                    (false, false) => prefixed("recovered, it is not as after", after),
                }
            }));
        }
        wrong
    }

    /// The same request again does the act, or finds it done.
    fn again(&self, scene: &Scene, known: &Known) -> Vec<String> {
        let request = || crate::site::ended(self.command(scene).output().unwrap());
        let mut ended = patiently(request);
        if self.act.settles == Settles::Anew && ended.code == Some(self.act.done) {
            // Nothing is overwritten: what there is of it is taken away first.
            std::fs::remove_dir_all(scene.restored()).unwrap();
            ended = request();
        }
        let mut wrong = Vec::new();
        if ended.code != Some(0) && ended.code != Some(self.act.done) {
            wrong.push(format!("the same again: {}", told(scene, &ended)));
        }
        let adds = self.act.settles == Settles::Adds;
        let looked_at = |world: World| if adds { world.without_repository() } else { world };
        let after = looked_at(known.after.clone());
        wrong.extend(invariants::eventually(|| {
            let now = looked_at(World::of(scene));
            prefixed("done again, it is not as after", after.compared(&now))
        }));
        if Path::new(&scene.repo()).exists() {
            wrong.extend(invariants::repository(scene, &scene.repo()));
        }
        wrong.extend((self.act.holds)(scene));
        wrong
    }
}

/// Runs it again while something is busy: a program outlives who started it, and keeps its image until it has done its work.
fn patiently(mut run: impl FnMut() -> Ended) -> Ended {
    let mut ended = run();
    invariants::eventually(|| {
        if ended.code == Some(BUSY) {
            ended = run();
        }
        if ended.code == Some(BUSY) {
            vec![ended.stderr.clone()]
        } else {
            Vec::new()
        }
    });
    ended
}

fn told(scene: &Scene, ended: &Ended) -> String {
    let printed = String::from_utf8_lossy(&ended.stdout);
    format!(
        "exit code {:?}: {printed}{}",
        ended.code,
        scene.site.short(&ended.stderr)
    )
}

fn prefixed(what: &str, lines: Vec<String>) -> Vec<String> {
    lines.into_iter().map(|line| format!("{what}: {line}")).collect()
}

/// A panic is one more thing that went wrong, and not the end of the walk.
fn guarded<T>(act: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(act)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        text.unwrap_or("a panic without words").to_owned()
    })
}

/// Each passing of each point, in the order of the log.
pub(crate) fn points(log: &str) -> Vec<Point> {
    let mut passed: BTreeMap<&str, usize> = BTreeMap::new();
    let mut all = Vec::new();
    for name in log.lines() {
        let k = passed.entry(name).or_default();
        *k += 1;
        all.push(Point {
            name: name.to_owned(),
            k: *k,
        });
    }
    all
}

/// So many of them, each as likely as any other.
pub(crate) fn some(mut points: Vec<Point>, count: usize, random: &mut Random) -> Vec<Point> {
    let mut chosen = Vec::new();
    while chosen.len() < count && !points.is_empty() {
        let at = usize::try_from(random.below(points.len() as u64)).unwrap();
        chosen.push(points.swap_remove(at));
    }
    chosen
}

impl Plan {
    /// What the environment says, as `./x faults` sets it.
    fn told() -> Self {
        let var = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
        let methods = var("DISKSNAP_TRIALS_METHODS").unwrap_or_default();
        Self {
            methods: methods
                .split(';')
                .filter(|m| !m.is_empty())
                .map(str::to_owned)
                .collect(),
            act: var("DISKSNAP_TRIALS_ACT"),
            point: var("DISKSNAP_TRIALS_POINT"),
            seed: var("DISKSNAP_TRIALS_SEED").map_or_else(seed, |text| text.parse().unwrap()),
            sample: var("DISKSNAP_TRIALS_SAMPLE").map(|text| text.parse().unwrap()),
        }
    }

    fn names(&self, scene: &str) -> bool {
        self.methods.is_empty()
            || self
                .methods
                .iter()
                .any(|method| scene.starts_with(method.as_str()))
    }

    /// The acts in their scenes, those that this machine can set.
    fn walks(&self) -> Vec<Walk> {
        let mut walks: Vec<Walk> = Vec::new();
        for kind in Kind::ALL.into_iter().filter(|kind| self.names(kind.name())) {
            if let Some(why) = kind.needs().and_then(require::lacking) {
                require::report_skip(kind.name(), &why);
                continue;
            }
            let named = |act: &&Act| self.act.as_ref().is_none_or(|name| act.name == name);
            let acts = ACTS.iter().filter(|act| act.on.contains(&kind)).filter(named);
            walks.extend(acts.map(|act| Walk::new(kind, *act, self.point.clone())));
        }
        walks
    }
}

/// Where the choices begin when nobody says it. The same each time, as long as not every act of every method has been walked
/// whole: what fails now and then would be told of the wrong change.
pub(crate) fn seed() -> u64 {
    1
}

/// Walks all that are planned, two at a time, and gives the table of them.
fn walk(plan: &Plan) -> Table {
    let walks = plan.walks();
    let table = Arc::new(std::sync::Mutex::new(Table::default()));
    let waiting = std::sync::Mutex::new(walks.into_iter());
    std::thread::scope(|scope| {
        for n in 0..2 {
            let (table, waiting, mut random) = (&table, &waiting, Random::new(plan.seed + n));
            scope.spawn(move || {
                loop {
                    let Some(mut walk) = waiting.lock().unwrap().next() else {
                        break;
                    };
                    let begun = Instant::now();
                    let rows = walk.run(&mut random, plan.sample);
                    let failed = rows.iter().filter(|row| !row.wrong.is_empty()).count();
                    note(&format!(
                        "{}: {}: {} points, {failed} failed, {:.0?}",
                        walk.kind.name(),
                        walk.act.name,
                        rows.len(),
                        begun.elapsed()
                    ));
                    table.lock().unwrap().add(rows);
                }
            });
        }
    });
    Arc::into_inner(table).unwrap().into_inner().unwrap()
}

/// All of them: `./x faults`.
#[test]
#[ignore = "minutes: run by ./x faults"]
fn every_point() {
    let plan = Plan::told();
    note(&format!("seed {}", plan.seed));
    let mut table = walk(&plan);
    if plan.names("lvm") && require::lacking("lvm").is_none() {
        let wanted = |act: &str| plan.act.as_deref().is_none_or(|name| act == name);
        table.add(crate::lvm::walk(wanted, plan.seed, plan.sample));
    }
    table.conclude(plan.act.is_none() && plan.point.is_none() && plan.sample.is_none());
}

/// How long [`some_points`] begins new acts.
const A_WHILE: Duration = Duration::from_secs(50);

/// A few points of a few acts; others with another seed in `DISKSNAP_TRIALS_SEED`.
#[test]
fn some_points() {
    let plan = Plan::told();
    note(&format!("seed {}", plan.seed));
    let (mut random, mut table) = (Random::new(plan.seed), Table::default());
    let mut walks = plan.walks();
    let begun = Instant::now();
    while begun.elapsed() < A_WHILE && !walks.is_empty() {
        let at = usize::try_from(random.below(walks.len() as u64)).unwrap();
        table.add(walks.swap_remove(at).run(&mut random, Some(4)));
    }
    table.conclude(false);
}
