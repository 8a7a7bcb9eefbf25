//! Monitors and agents that lie, flood, drip or never answer: whoever asks hears an error by its deadline, and memory stays bounded.
//!
//! Each case runs in a process of its own, whose peak of memory (`VmHWM`, proc(5)) is what it says at its end. The peers send for as
//! long as somebody reads, so that there is no end but the one that the client makes.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs::Permissions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program, Stdio};
use std::thread;
use std::time::Duration;

use common::{Place, domain};
use disksnap_core::{Command, Control, Error, ErrorKind};
use disksnap_hypervisor::{Heard, Session, Timeouts};
use disksnap_test_support::skip;
use serde_json::{Value, json};

/// What a process may need for all that it is told, in KiB: a debug build's own needs, and one line of a monitor with its copies.
const MEMORY: u64 = 64 << 10;

/// A client that hangs is ended after this, and the case fails.
const HANGS: Duration = Duration::from_mins(2);

/// For those who never come to an end by themselves.
fn impatient() -> Timeouts {
    Timeouts {
        greeting: Duration::from_secs(2),
        command: Duration::from_secs(2),
        agent: Duration::from_secs(1),
        thaw: Duration::from_secs(2),
        guardian: Duration::from_secs(2),
    }
}

/// For those who are cut off: on a busy machine even that takes a while.
fn patient() -> Timeouts {
    Timeouts {
        greeting: Duration::from_mins(1),
        command: Duration::from_mins(1),
        agent: Duration::from_mins(1),
        ..impatient()
    }
}

/// Somebody who says `first`, and then `say` until nobody listens; each time anew where somebody connects again.
fn endless(dir: &Path, first: &'static str, say: Vec<u8>, pause: Duration) -> PathBuf {
    let path = dir.join("peer.sock");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, say) = (stream.unwrap(), say.clone());
            thread::spawn(move || {
                let _ = stream.write_all(first.as_bytes());
                while stream.write_all(&say).is_ok() {
                    thread::sleep(pause);
                }
            });
        }
    });
    path
}

/// A monitor that is ready, and answers as it is told to from the second command on.
fn monitor(dir: &Path, answer: impl Fn(&Value, &mut UnixStream) + Send + Sync + 'static) -> PathBuf {
    let path = dir.join("peer.sock");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.write_all(b"{\"QMP\": {}}\n");
            for line in BufReader::new(stream.try_clone().unwrap())
                .lines()
                .map_while(Result::ok)
            {
                let command: Value = serde_json::from_str(&line).unwrap();
                if command["execute"] == "qmp_capabilities" {
                    let _ = writeln!(stream, "{}", json!({"return": {}, "id": command["id"]}));
                } else {
                    answer(&command, &mut stream);
                }
            }
        }
    });
    path
}

/// What a monitor is asked, and what comes of it.
async fn asked(path: &Path, timeouts: Timeouts) -> Error {
    let session = Session::new(path, timeouts);
    session.execute(Command::bare("query-x")).await.unwrap_err()
}

/// What comes of freezing, and of thawing, where this is the agent.
async fn frozen(place: &Place, path: &Path, timeouts: Timeouts) -> (Error, Error) {
    let connector = place.connector.clone().timeouts(timeouts);
    let control = connector
        .control(&domain(Path::new("/no/monitor"), Some(path)))
        .unwrap();
    let freeze = control.freeze(&[], timeouts.agent).await.unwrap_err();
    (freeze, control.thaw().await.unwrap_err())
}

fn chunk(with: &[u8]) -> Vec<u8> {
    with.repeat((1 << 20) / with.len())
}

/// The cases by name. What runs them is `each_in_a_process_of_its_own`.
async fn case(name: &str) {
    let place = Place::new();
    let dir = place.dir.path();
    let greeting = "{\"QMP\": {}}\n";
    let (soon, late) = (impatient(), patient());
    match name {
        "a greeting without end" => {
            let path = endless(dir, "{\"QMP\": \"", chunk(b"x"), Duration::ZERO);
            assert_eq!(asked(&path, late).await.kind(), ErrorKind::Protocol);
        }
        "a greeting that nests without end" => {
            let path = endless(dir, "", chunk(b"["), Duration::ZERO);
            assert_eq!(asked(&path, late).await.kind(), ErrorKind::Protocol);
        }
        "messages instead of a greeting" => {
            let path = endless(dir, "", chunk(b"{\"return\": {}, \"id\": 0}\n"), Duration::ZERO);
            assert_eq!(asked(&path, late).await.kind(), ErrorKind::Protocol);
        }
        "a greeting that drips" => {
            // As one that says nothing: it serves somebody else, as far as can be told.
            let path = endless(dir, "{", b" ".to_vec(), Duration::from_millis(50));
            assert_eq!(asked(&path, soon).await.kind(), ErrorKind::Busy);
        }
        "answers to nobody" => {
            let path = endless(
                dir,
                greeting,
                chunk(b"{\"return\": {}, \"id\": 7}\n"),
                Duration::ZERO,
            );
            let error = asked(&path, soon).await;
            // Busy where the machine is: then even the greeting came late.
            assert!(
                matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Busy),
                "{error}"
            );
        }
        "an answer without end" => {
            let path = monitor(dir, |command, stream| {
                let _ = write!(stream, "{{\"id\": {}, \"return\": \"", command["id"]);
                let more = chunk(b"x");
                while stream.write_all(&more).is_ok() {}
            });
            assert_eq!(asked(&path, late).await.kind(), ErrorKind::Protocol);
        }
        "events that nobody takes" => {
            let event = json!({"event": "FLOOD", "data": "x".repeat(1 << 20)}).to_string();
            let path = monitor(dir, move |command, stream| {
                for _ in 0..128 {
                    let _ = writeln!(stream, "{event}");
                }
                let _ = writeln!(stream, "{}", json!({"return": 1, "id": command["id"]}));
            });
            let session = Session::new(path, late);
            let mut events = session.subscribe();
            assert_eq!(session.execute(Command::bare("query-x")).await.unwrap(), 1);
            assert_eq!(
                events.next().await,
                Heard::Missed,
                "whoever waits looks for itself"
            );
        }
        "an agent's line without end" => {
            let path = endless(dir, "", chunk(b"x"), Duration::ZERO);
            let (freeze, thaw) = frozen(&place, &path, late).await;
            assert_eq!(freeze.kind(), ErrorKind::Protocol, "{freeze}");
            // It is tried again and again, and the last time is cut short.
            assert!(
                matches!(thaw.kind(), ErrorKind::Protocol | ErrorKind::Timeout),
                "{thaw}"
            );
        }
        "an agent that is never in step" => {
            let say = chunk(b"\xff{\"return\": 1}\nnonsense\n\n");
            let (freeze, thaw) = frozen(&place, &endless(dir, "", say, Duration::ZERO), soon).await;
            assert_eq!(freeze.kind(), ErrorKind::Timeout, "{freeze}");
            assert_eq!(thaw.kind(), ErrorKind::Timeout, "{thaw}");
        }
        "an agent that drips" => {
            let path = endless(dir, "", b"{".to_vec(), Duration::from_millis(50));
            let (freeze, thaw) = frozen(&place, &path, soon).await;
            assert_eq!(freeze.kind(), ErrorKind::Timeout, "{freeze}");
            assert_eq!(thaw.kind(), ErrorKind::Timeout, "{thaw}");
        }
        other => panic!("no such case: {other}"),
    }
}

const CASES: [&str; 10] = [
    "a greeting without end",
    "a greeting that nests without end",
    "messages instead of a greeting",
    "a greeting that drips",
    "answers to nobody",
    "an answer without end",
    "events that nobody takes",
    "an agent's line without end",
    "an agent that is never in step",
    "an agent that drips",
];

/// Not a test: what the test below starts for each case.
#[tokio::test]
#[ignore = "the test below runs it as processes of their own"]
#[expect(clippy::print_stdout, reason = "this is how the test knows")]
async fn one() {
    let Ok(name) = std::env::var("HOSTILE_CASE") else {
        return;
    };
    tokio::time::timeout(HANGS, case(&name)).await.expect("it hangs");
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    println!("\nPEAK {}", peak.trim().trim_end_matches(" kB"));
}

#[test]
fn each_in_a_process_of_its_own() {
    for name in CASES {
        let output = Program::new(std::env::current_exe().unwrap())
            .args(["--exact", "one", "--ignored", "--nocapture"])
            .env("HOSTILE_CASE", name)
            .output()
            .unwrap();
        let (out, err) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        assert!(output.status.success(), "{name}: {out}\n{err}");
        let peak: u64 = out
            .lines()
            .find_map(|line| line.strip_prefix("PEAK "))
            .unwrap()
            .parse()
            .unwrap();
        assert!(peak < MEMORY, "{name}: {} MiB at its peak", peak >> 10);
    }
}

/// Not a test: who listens as another user for the test below.
#[test]
#[ignore = "the test below runs it as a process of its own"]
#[expect(clippy::print_stdout, reason = "this is how the test knows")]
fn listener() {
    let Some(path) = std::env::var_os("HOSTILE_LISTENER") else {
        return;
    };
    let listener = UnixListener::bind(path).unwrap();
    println!("\nLISTENS");
    for stream in listener.incoming() {
        let _ = stream.unwrap().write_all(b"{\"QMP\": {}}\n");
    }
}

/// A process that is ended with the test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A monitor's socket where anybody may make one: whoever came first would be believed what it says.
#[tokio::test]
async fn a_monitor_that_anybody_could_be_is_refused() {
    const NOBODY: u32 = 65534;
    if !rustix::process::geteuid().is_root() {
        skip!("root", "only root can become another user");
    }
    let place = Place::new();
    let mode = |path: &Path, mode| std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    let program = place.dir.path().join("listener");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    mode(place.dir.path(), 0o755);
    mode(&program, 0o755);
    for (directory, its_mode, denied) in [
        ("open", 0o777, true),
        ("like-tmp", 0o1777, true),
        ("its-own", 0o755, false),
    ] {
        let directory = place.dir.path().join(directory);
        std::fs::create_dir(&directory).unwrap();
        mode(&directory, its_mode);
        if !denied {
            std::os::unix::fs::chown(&directory, Some(NOBODY), None).unwrap();
        }
        let path = directory.join("qmp.sock");
        let mut command = Program::new(&program);
        command
            .args(["--exact", "listener", "--ignored", "--nocapture"])
            .env("HOSTILE_LISTENER", &path);
        command
            .uid(NOBODY)
            .gid(NOBODY)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut child = Ended(command.spawn().unwrap());
        let mut said = BufReader::new(child.0.stdout.take().unwrap())
            .lines()
            .map_while(Result::ok);
        assert!(said.any(|line| line == "LISTENS"));
        let error = asked(&path, impatient()).await;
        if denied {
            assert_eq!(error.kind(), ErrorKind::Denied, "{its_mode:o}: {error}");
            assert!(error.to_string().contains("user 65534 listens"), "{error}");
        } else {
            // It is talked to, and has no more to say than its greeting.
            assert_ne!(error.kind(), ErrorKind::Denied, "{error}");
        }
    }
}
