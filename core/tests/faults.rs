//! Fault points: a build with debug assertions ends at the one that is named, and no other build knows of them.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::process::{Command, ExitStatus};

use disksnap_core::faults;

/// Spelt here in two parts: this program must not hold the name where the library does not.
fn variable(rest: &str) -> String {
    ["DISKSNAP", "_FAULT", rest].concat()
}

/// What the other tests run in a process of its own.
#[test]
#[ignore = "run by the other tests"]
fn passes_points() {
    for _ in 0..2 {
        faults::around("file", "rename", || ());
    }
    faults::amid("program", "lvcreate");
}

/// Runs that in another process; how it ended, and the points that it passed.
fn run(end_at: Option<&str>) -> (ExitStatus, Vec<String>) {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("points");
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "passes_points", "--ignored"]);
    command.env(variable("_LOG"), &log);
    if let Some(point) = end_at {
        command.env(variable(""), point);
    }
    let ended = command.output().unwrap().status;
    let passed = std::fs::read_to_string(log).unwrap_or_default();
    (ended, passed.lines().map(str::to_owned).collect())
}

#[cfg(debug_assertions)]
#[test]
fn a_process_ends_at_the_point_that_is_named() {
    use std::os::unix::process::ExitStatusExt;

    const KILLED: i32 = 9;
    let all = [
        "before file rename",
        "after file rename",
        "before file rename",
        "after file rename",
        "amid program lvcreate",
    ];
    let (ended, passed) = run(None);
    assert!(ended.success(), "{ended}");
    assert_eq!(passed, all);
    for (point, passes) in [
        ("before file rename:1", 1),
        ("before file rename:2", 3),
        ("after file rename:2", 4),
        ("amid program lvcreate:1", 5),
    ] {
        let (ended, passed) = run(Some(point));
        assert_eq!(ended.signal(), Some(KILLED), "{point}: {ended}");
        assert_eq!(passed, all[..passes], "{point}");
    }
    for point in [
        "before file rename:3",
        "file rename:1",
        "before file rename",
        "before file rename:x",
    ] {
        let (ended, passed) = run(Some(point));
        assert!(ended.success(), "{point}: {ended}");
        assert_eq!(passed, all, "{point}");
    }
    assert_eq!(faults::VARIABLES, [variable(""), variable("_LOG")]);
}

/// `./x bench` runs it, which builds for release anyway.
#[cfg(not(debug_assertions))]
#[test]
fn a_release_build_holds_no_trace_of_them() {
    let (ended, passed) = run(Some("before file rename:1"));
    assert!(ended.success(), "{ended}");
    assert_eq!((passed, faults::VARIABLES), (Vec::new(), &[][..]));
    let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    let name = variable("");
    assert!(!program.windows(name.len()).any(|bytes| bytes == name.as_bytes()));
}
