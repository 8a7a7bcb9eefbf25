//! One command of a soak: run to its end, or killed on the way.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use disksnap_test_support::pattern::Random;

use super::life::{Life, Told};
use super::tale::Tale;

/// No command takes as long, on a machine that is busy with eight guests.
const LONGEST: Duration = Duration::from_mins(5);

/// What is to become of a command.
#[derive(Debug)]
pub(crate) enum Fate {
    /// It comes to its end; it may be asked which points it passes.
    Lives { learning: bool },
    /// It is killed after that long, if it still runs.
    After(Duration),
    /// It is killed at this point, if it comes to it.
    At(String),
}

/// What became of it.
#[derive(Debug)]
pub(crate) enum Outcome {
    Ended {
        code: i32,
        stdout: String,
        stderr: String,
    },
    Killed,
}

impl Fate {
    pub(crate) fn drawn(kind: &'static str, tale: &Tale, random: &mut Random) -> Self {
        match random.below(100) {
            0..24 => {
                let typical = u64::try_from(tale.typical(kind).as_micros()).unwrap_or(u64::MAX);
                Self::After(Duration::from_micros(random.below(typical.max(1000) * 11 / 10)))
            }
            24..42 => match tale.point(kind, random) {
                Some(point) => Self::At(point),
                None => Self::Lives { learning: true },
            },
            n => Self::Lives { learning: n >= 75 },
        }
    }
}

/// Runs words on a domain.
pub(crate) fn run(
    life: &mut Life,
    kind: &'static str,
    words: &[String],
    fate: &Fate,
    tale: &Tale,
) -> Told<Outcome> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let dir = tempfile::tempdir().unwrap();
    let mut command = life.scene.command(&words);
    match fate {
        Fate::Lives { learning: true } => drop(command.env("DISKSNAP_FAULT_LOG", dir.path().join("points"))),
        Fate::At(point) => drop(command.env("DISKSNAP_FAULT", point)),
        _ => {}
    }
    life.note(&format!("{} … {fate:?}", words.join(" ")));
    let [out, err] = ["out", "err"].map(|name| dir.path().join(name));
    command.stdin(Stdio::null());
    command
        .stdout(File::create(&out).unwrap())
        .stderr(File::create(&err).unwrap());
    let began = Instant::now();
    let status = ended(command, fate)?;
    let text = |path: &Path| String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
    let Some(code) = status.code() else {
        if status.signal() != Some(9) {
            return Err(format!("{}: {status}: {}", words.join(" "), text(&err)));
        }
        let how = match fate {
            Fate::At(_) => "the command, at a point",
            _ => "the command, at some moment",
        };
        tale.killed(kind, how);
        life.note("killed");
        return Ok(Outcome::Killed);
    };
    if let Fate::Lives { learning: true } = fate {
        tale.learn(kind, &text(&dir.path().join("points")));
    }
    if code == 0 {
        tale.done(kind, began.elapsed());
    }
    let stderr = life.scene.site.short(&text(&err));
    life.note(&format!("exit code {code} {}", first_line(&stderr)));
    Ok(Outcome::Ended {
        code,
        stdout: text(&out),
        stderr,
    })
}

fn ended(mut command: Command, fate: &Fate) -> Told<ExitStatus> {
    let mut child: Child = command.spawn().unwrap();
    let (began, mut struck) = (Instant::now(), false);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Ok(status);
        }
        if let Fate::After(delay) = fate
            && !struck
            && began.elapsed() >= *delay
        {
            struck = true;
            child.kill().unwrap();
        }
        if began.elapsed() > LONGEST {
            let stacks = std::fs::read_to_string(format!("/proc/{}/wchan", child.id())).unwrap_or_default();
            child.kill().unwrap();
            child.wait().unwrap();
            return Err(format!("{command:?} does not end ({stacks})"));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What an error says first.
pub(crate) fn first_line(text: &str) -> String {
    let lines = text
        .lines()
        .filter(|line| !line.starts_with('{') || line.contains("\"error\""));
    lines.filter(|line| line.contains("error")).take(1).collect()
}
