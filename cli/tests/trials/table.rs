//! The table of points and verdicts: printed, and kept in `docs/fault-points.md`.

use std::collections::BTreeMap;
use std::fmt::Write;

use disksnap_test_support::tools::workspace_root;

use crate::faults::Point;

/// How one kill went.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) scene: &'static str,
    pub(crate) act: &'static str,
    pub(crate) point: Point,
    /// What did not hold; nothing where all did.
    pub(crate) wrong: Vec<String>,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Table(Vec<Row>);

/// What stands before the tables.
const INTRODUCTION: &str = "\
# Fault points

Written by `./x faults`: each act is run once to learn which points it passes, and then once for each point and each time that
it passes it, where it is killed by `SIGKILL`. A point is before, amid or after an effect: a command to QEMU's monitor or a
guest's agent, a program, a file that is made, renamed or removed, a system call, a commit to the catalog. Why there are such
points, and how to add one: [rfcs/0006-fault-points.md](rfcs/0006-fault-points.md).

After a kill the guest must run, be thawed and write on, with nobody's help. Every second time `recover` then settles it, and all
must be as if the act had been done or as if it had not: nodes, bitmaps, jobs, exports and objects in QEMU, images, sockets, notes,
subvolumes, child processes, the catalog, the domain's document, the disks' contents. The other times whatever comes next has to
settle it. Then the same request must do it; what it made must be whole; and once that is undone, nothing may be otherwise than
before, and what the guest has written must be on its disks.

Down are the points, across the acts; a number is how many kills there were at a point, one for each time that the act passed it.
";

/// How many kills there were at a point, and how many of them went wrong.
#[derive(Debug, Default, Clone, Copy)]
struct Cell {
    kills: usize,
    failed: usize,
}

impl Table {
    pub(crate) fn add(&mut self, rows: Vec<Row>) {
        self.0.extend(rows);
    }

    /// Prints it, keeps it where it is whole and nothing has failed, and fails the test where something has.
    pub(crate) fn conclude(&self, whole: bool) {
        note(&self.text());
        let failed: Vec<&Row> = self.0.iter().filter(|row| !row.wrong.is_empty()).collect();
        if whole {
            let path = workspace_root().join("docs/fault-points.md");
            std::fs::write(path, self.document()).unwrap();
        }
        for row in &failed {
            note(&format!(
                "FAILED {}: {}: {}: {:#?}",
                row.scene, row.act, row.point, row.wrong
            ));
        }
        assert!(
            failed.is_empty(),
            "{} of {} kills left something wrong",
            failed.len(),
            self.0.len()
        );
        assert!(!self.0.is_empty(), "nothing was tried");
    }

    fn scenes(&self) -> Vec<&'static str> {
        let mut scenes = Vec::new();
        for row in &self.0 {
            if !scenes.contains(&row.scene) {
                scenes.push(row.scene);
            }
        }
        scenes.sort_unstable();
        scenes
    }

    fn document(&self) -> String {
        format!("{INTRODUCTION}\n{}", self.text())
    }

    /// One table for each scene: the points down, the acts across.
    fn text(&self) -> String {
        let mut text = String::new();
        let failed = self.0.iter().filter(|row| !row.wrong.is_empty()).count();
        writeln!(
            text,
            "{} kills, {failed} of them left something wrong.",
            self.0.len()
        )
        .unwrap();
        for scene in self.scenes() {
            writeln!(text, "\n## {scene}\n\n{}", self.of(scene)).unwrap();
        }
        text
    }

    fn of(&self, scene: &str) -> String {
        let mut acts: Vec<&str> = Vec::new();
        let mut cells: BTreeMap<&str, BTreeMap<&str, Cell>> = BTreeMap::new();
        for row in self.0.iter().filter(|row| row.scene == scene) {
            if !acts.contains(&row.act) {
                acts.push(row.act);
            }
            let cell = cells
                .entry(&row.point.name)
                .or_default()
                .entry(row.act)
                .or_default();
            cell.kills += 1;
            cell.failed += usize::from(!row.wrong.is_empty());
        }
        let mut text = format!(
            "| point | {} |\n| --- |{}",
            acts.join(" | "),
            " ---: |".repeat(acts.len())
        );
        let mut cells: Vec<_> = cells.into_iter().collect();
        cells.sort_by_key(|(point, _)| place(point));
        for (point, cells) in cells {
            let shown = acts
                .iter()
                .map(|act| cells.get(act).map_or_else(String::new, Cell::shown));
            write!(text, "\n| {point} | {} |", shown.collect::<Vec<_>>().join(" | ")).unwrap();
        }
        text
    }
}

/// Where a point stands in the table: by its effect, and then by its side of it.
fn place(point: &str) -> (&str, usize) {
    let (side, effect) = point.split_once(' ').unwrap_or(("", point));
    let sides = ["before", "amid", "after"];
    (
        effect,
        sides.iter().position(|one| *one == side).unwrap_or(sides.len()),
    )
}

impl Cell {
    fn shown(&self) -> String {
        match self.failed {
            0 => self.kills.to_string(),
            failed => format!("{} ({failed} FAILED)", self.kills),
        }
    }
}

#[expect(
    clippy::print_stderr,
    reason = "the numbers and words are for whoever runs it"
)]
pub(crate) fn note(text: &str) {
    eprintln!("{text}");
}
