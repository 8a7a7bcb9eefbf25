//! The table of points and verdicts: printed, and kept in `docs/fault-points.md`.

use std::collections::BTreeMap;
use std::fmt::Write;

use disksnap_test_support::tools::workspace_root;

use crate::acts::ACTS;
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

/// The tables of scenes, by these.
type Sections = BTreeMap<String, String>;

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

    /// Prints it, keeps it where all points of its scenes were tried, and fails the test where something has gone wrong.
    pub(crate) fn conclude(&self, keeps: bool) {
        let sections = self.sections();
        note(&text(&sections));
        if keeps {
            let path = workspace_root().join("docs/fault-points.md");
            let mut kept = read(&std::fs::read_to_string(&path).unwrap_or_default());
            kept.extend(sections);
            std::fs::write(path, format!("{INTRODUCTION}\n{}", text(&kept))).unwrap();
        }
        let failed: Vec<&Row> = self.0.iter().filter(|row| !row.wrong.is_empty()).collect();
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

    /// One table for each scene: the points down, the acts across.
    fn sections(&self) -> Sections {
        let scenes = self.0.iter().map(|row| row.scene);
        scenes.map(|scene| (scene.to_owned(), self.of(scene))).collect()
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
        // Several are walked at once.
        acts.sort_by_key(|act| ACTS.iter().position(|known| known.name == *act));
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

/// The tables, by their scenes.
fn text(sections: &Sections) -> String {
    let cells = || {
        sections
            .values()
            .flat_map(|table| table.lines().skip(2))
            .flat_map(cells)
    };
    let (kills, failed) = (cells().map(|cell| cell.kills), cells().map(|cell| cell.failed));
    let (kills, failed): (usize, usize) = (kills.sum(), failed.sum());
    let mut text = format!("{kills} kills, {failed} of them left something wrong.\n");
    for (scene, table) in sections {
        writeln!(text, "\n## {scene}\n\n{table}").unwrap();
    }
    text
}

/// What a document holds of earlier walks.
fn read(document: &str) -> Sections {
    let sections = document.split("\n## ").skip(1);
    let parts = sections.filter_map(|section| section.split_once("\n\n"));
    parts
        .map(|(scene, table)| (scene.to_owned(), table.trim_end().to_owned()))
        .collect()
}

/// What a line of a table counts.
fn cells(line: &str) -> impl Iterator<Item = Cell> {
    line.split('|').skip(2).filter_map(|cell| {
        let mut words = cell.split([' ', '(']).filter(|word| !word.is_empty());
        let kills = words.next()?.parse().ok()?;
        let failed = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
        Some(Cell { kills, failed })
    })
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

#[test]
fn a_table_is_read_as_it_was_written() {
    let row = |scene, act, k, wrong: &[&str]| Row {
        scene,
        act,
        point: Point {
            name: "after monitor cont".to_owned(),
            k,
        },
        wrong: wrong.iter().map(|&wrong| wrong.to_owned()).collect(),
    };
    let mut table = Table::default();
    table.add(vec![
        row("lvm", "create", 1, &[]),
        row("lvm", "create", 2, &["lost"]),
        row("lvm", "delete", 1, &[]),
        row("btrfs", "create", 1, &[]),
    ]);
    let sections = table.sections();
    let text = text(&sections);
    assert!(
        text.starts_with("4 kills, 1 of them left something wrong.\n"),
        "{text}"
    );
    assert!(
        text.contains("| after monitor cont | 2 (1 FAILED) | 1 |"),
        "{text}"
    );
    assert_eq!(read(&format!("{INTRODUCTION}\n{text}")), sections);
}

#[expect(
    clippy::print_stderr,
    reason = "the numbers and words are for whoever runs it"
)]
pub(crate) fn note(text: &str) {
    eprintln!("{text}");
}
