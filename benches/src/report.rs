//! What is printed: a markdown table per part, and what machine it was.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use disksnap_test_support::QemuVersion;

use crate::race::{Rounds, Spread};

/// A table of one part.
#[derive(Debug)]
pub(crate) struct Table {
    text: String,
}

impl Table {
    /// A table with a heading, a line that explains it, and these columns.
    pub(crate) fn new(heading: &str, explained: &str, columns: &[&str]) -> Self {
        let mut text = format!("\n## {heading}\n\n{explained}\n\n");
        line(&mut text, columns);
        line(&mut text, &vec!["---"; columns.len()]);
        Self { text }
    }

    pub(crate) fn row(&mut self, cells: &[&str]) {
        line(&mut self.text, cells);
    }

    pub(crate) fn print(&self) {
        println!("{}", self.text.trim_end());
    }
}

fn line(text: &mut String, cells: &[&str]) {
    // A String takes any text.
    let _ = writeln!(text, "| {} |", cells.join(" | "));
}

/// `1.23 (1.10–1.40)`: the median, and the quartiles around it.
pub(crate) fn ratio(spread: Spread) -> String {
    let (from, to) = spread.quartiles;
    format!("{} ({}–{})", number(spread.median), number(from), number(to))
}

/// `12 %`
pub(crate) fn percent(spread: Spread) -> String {
    format!("{:.0} %", spread.median * 100.0)
}

/// Two cells: the ratio of one measure to another as [`ratio`] writes it, and that of the best of each.
pub(crate) fn compared(rounds: &Rounds, of: (&str, &str), to: (&str, &str)) -> [String; 2] {
    [ratio(rounds.ratio(of, to)), number(rounds.best(of, to))]
}

fn number(value: f64) -> String {
    if value >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// The machine and the programs, in a few lines.
pub(crate) fn print_machine(scratch: &Path) {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let model = field(&read("/proc/cpuinfo"), "model name");
    let memory: u64 = field(&read("/proc/meminfo"), "MemTotal")
        .split_whitespace()
        .next()
        .and_then(|kib| kib.parse().ok())
        .unwrap_or(0);
    let kvm = if Path::new("/dev/kvm").exists() {
        "KVM is there and not used: all machines run under TCG"
    } else {
        "no KVM: machines run under TCG"
    };
    println!(
        "- machine: {cores} cores ({model}), {} MiB of memory, {kvm}",
        memory >> 10
    );
    println!("- kernel: Linux {}", read("/proc/sys/kernel/osrelease").trim());
    println!("- images, fleece images and catalog on {}", file_system(scratch));
    let program = QemuVersion::V10_0.program("qemu-system-x86_64");
    println!("- {}", first_line(&program, &["--version"]));
    if let Some(nbdcopy) = disksnap_test_support::tools::find("nbdcopy") {
        println!("- {}", first_line(&nbdcopy, &["--version"]));
    }
}

fn field(text: &str, key: &str) -> String {
    let line = text.lines().find(|line| line.starts_with(key));
    let value = line.and_then(|line| line.split_once(':'));
    value.map_or("unknown", |(_, value)| value.trim()).to_owned()
}

/// The type of the file system that a directory is on.
fn file_system(dir: &Path) -> String {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mounts = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        Some((words.next()?.to_owned(), words.next()?.to_owned()))
    });
    let over = mounts.filter(|(point, _)| dir.starts_with(point));
    over.max_by_key(|(point, _)| point.len())
        .map_or_else(|| "an unknown file system".to_owned(), |(_, kind)| kind)
}

fn first_line(program: &Path, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    let text = text.unwrap_or_else(|error| format!("{}: {error}", program.display()));
    text.lines().next().unwrap_or_default().to_owned()
}
