//! The walk over the points of acts on logical volumes. There is no LVM on many a machine, so it takes place in the guest that
//! has it: one is made ready once and kept, and each part of the walk begins from there. The half that runs in the guest is
//! `inside`; this one gives it its tasks, and reads what it tells.

mod inside;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use disksnap_test_support::pattern::Random;
use disksnap_test_support::{GIB, LvmGuest, SavedLvmGuest, need};
use serde::{Deserialize, Serialize};

use crate::faults::{Point, some};
use crate::site::program;
use crate::table::{Row, Table, note};

/// What the table calls it.
pub(crate) const NAME: &str = "lvm, off";
/// Where the task is told to the half in the guest.
const TASK: &str = "DISKSNAP_TRIALS_TASK";
/// Before each line of its answers; the test's own output is between them.
const ANSWER: &str = "ANSWER ";

/// What is to be done in the guest.
#[derive(Debug, Serialize, Deserialize)]
enum Task {
    /// Make the volumes.
    Make,
    /// Tell the points of this act.
    Learn(String),
    /// Kill it at these points, up to the first at which something goes wrong.
    Walk(String, inside::Known, Vec<String>),
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// The points, a line each, and how it is without a kill.
    Learnt(String, inside::Known),
    /// What is wrong after a kill at this point; in the order of the task's points.
    Tried(String, Vec<String>),
}

/// The guest, ready.
struct Ready {
    guest: SavedLvmGuest,
    me: String,
}

impl Ready {
    fn new() -> Self {
        let mut guest = LvmGuest::start(&[GIB]);
        let dir = tempfile::tempdir().unwrap();
        let disksnap = guest.put(&stripped(&program(), dir.path()));
        let me = guest.put(&stripped(&std::env::current_exe().unwrap(), dir.path()));
        // Both halves look for the command where it was built.
        let (place, built) = (program(), disksnap);
        let folder = place.parent().unwrap().display().to_string();
        for words in [
            ["mkdir", "-p", &folder].as_slice(),
            &["ln", "-s", &built, &place.display().to_string()],
        ] {
            assert_eq!(guest.run(words).status, 0, "{words:?}");
        }
        tell(&mut guest, &me, &Task::Make);
        Self {
            guest: guest.save(),
            me,
        }
    }

    fn tell(&self, task: &Task) -> Vec<Answer> {
        tell(&mut self.guest.restore(), &self.me, task)
    }
}

fn tell(guest: &mut LvmGuest, me: &str, task: &Task) -> Vec<Answer> {
    let task = serde_json::to_string(task).unwrap();
    let variables = [
        ("DISKSNAP_TOOLS", "system"),
        ("RUST_BACKTRACE", "0"),
        (TASK, &task),
    ];
    let words = [
        me,
        "--exact",
        "lvm::inside::does_its_task",
        "--ignored",
        "--nocapture",
    ];
    let output = guest.run_with(&variables, &words);
    let told = format!("{task}: {}\n{}\n{}", output.stdout, output.stderr, guest.serial());
    assert_eq!(output.status, 0, "{told}");
    assert!(output.stdout.contains("1 passed"), "{told}");
    let lines = output.stdout.lines().filter_map(|line| line.split_once(ANSWER));
    lines
        .map(|(_, answer)| serde_json::from_str(answer).unwrap())
        .collect()
}

/// Without what only a debugger reads: the guest's memory holds it whole.
fn stripped(program: &Path, dir: &Path) -> PathBuf {
    let to = dir.join(program.file_name().unwrap());
    let stripped = Command::new("strip").arg("-o").arg(&to).arg(program).status();
    if !stripped.is_ok_and(|status| status.success()) {
        std::fs::copy(program, &to).unwrap();
    }
    to
}

/// Walks the acts that `wanted` takes, two at a time; all points of each, or so many.
pub(crate) fn walk(wanted: impl Fn(&str) -> bool, seed: u64, sample: Option<usize>) -> Vec<Row> {
    let acts = inside::ACTS.iter().map(|act| act.name);
    let acts: Vec<&'static str> = acts.filter(|act| wanted(act)).collect();
    if acts.is_empty() {
        return Vec::new();
    }
    let ready = Ready::new();
    let (rows, waiting) = (Mutex::default(), Mutex::new(acts.into_iter()));
    std::thread::scope(|scope| {
        for n in 0..2 {
            let (ready, rows, waiting, mut random) = (&ready, &rows, &waiting, Random::new(seed + n));
            scope.spawn(move || {
                loop {
                    let Some(act) = waiting.lock().unwrap().next() else {
                        break;
                    };
                    let begun = std::time::Instant::now();
                    let found = walk_one(ready, act, &mut random, sample);
                    let failed = found.iter().filter(|row| !row.wrong.is_empty()).count();
                    note(&format!(
                        "{NAME}: {act}: {} points, {failed} failed, {:.0?}",
                        found.len(),
                        begun.elapsed()
                    ));
                    let mut rows: std::sync::MutexGuard<'_, Vec<Row>> = rows.lock().unwrap();
                    rows.extend(found);
                }
            });
        }
    });
    rows.into_inner().unwrap()
}

fn walk_one(ready: &Ready, act: &'static str, random: &mut Random, sample: Option<usize>) -> Vec<Row> {
    let Some(Answer::Learnt(points, known)) = ready.tell(&Task::Learn(act.to_owned())).pop() else {
        panic!("{act}: nothing is told of its points")
    };
    let points = crate::faults::points(&points);
    let points = match sample {
        Some(count) => some(points, count, random),
        None => points,
    };
    let mut rows: Vec<Row> = Vec::new();
    // What is left behind where something went wrong is gone with that guest.
    while rows.len() < points.len() {
        let left = &points[rows.len()..];
        let names = left.iter().map(Point::to_string).collect();
        let answers = ready.tell(&Task::Walk(act.to_owned(), known.clone(), names));
        let tried: Vec<Row> = answers
            .into_iter()
            .zip(left)
            .filter_map(|(answer, point)| match answer {
                Answer::Tried(name, wrong) if name == point.to_string() => Some(Row {
                    scene: NAME,
                    act,
                    point: point.clone(),
                    wrong,
                }),
                _ => None,
            })
            .collect();
        assert!(!tried.is_empty(), "{act}: nothing is told of {}", left[0]);
        for row in tried.iter().filter(|row| !row.wrong.is_empty()) {
            note(&format!("{NAME}: {act}: {}: {:#?}", row.point, row.wrong));
        }
        rows.extend(tried);
    }
    rows
}

/// A few of one act.
#[test]
fn some_points_of_acts_on_volumes() {
    need!("lvm");
    let seed = crate::faults::seed();
    note(&format!("seed {seed}"));
    let mut table = Table::default();
    // What is left of a clock's nanoseconds is not evenly spread.
    let chosen = Random::new(seed).below(inside::ACTS.len() as u64);
    let act = inside::ACTS[usize::try_from(chosen).unwrap()].name;
    table.add(walk(|name| name == act, seed, Some(3)));
    table.conclude(false);
}
