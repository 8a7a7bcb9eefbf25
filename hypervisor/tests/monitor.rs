//! The session against real hypervisors, and against peers that lie.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::cell::Cell;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use common::{Place, daemon_domain, domain, qemu_domain};
use disksnap_core::{Command, Control, Effect, ErrorKind, Host, RunState};
use disksnap_hypervisor::{Heard, Session, Timeouts};
use disksnap_test_support::{DiskSpec, MIB, Qemu, QemuVersion, StorageDaemon};
use serde_json::{Value, json};

/// Time-outs for peers that will never answer.
fn impatient() -> Timeouts {
    Timeouts {
        greeting: Duration::from_millis(300),
        command: Duration::from_millis(300),
        ..Timeouts::default()
    }
}

/// A peer that does `what` with each connection, one at a time.
fn peer(dir: &Path, what: impl Fn(UnixStream) + Send + 'static) -> PathBuf {
    let path = dir.join("peer.sock");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            what(stream.unwrap());
        }
    });
    path
}

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 99, "major": 99}}, "capabilities": ["oob", "future"]}}"#;

/// A peer that greets and then answers each command with what `answer` makes of it.
fn talker(dir: &Path, answer: impl Fn(&Value, &mut UnixStream) + Send + 'static) -> PathBuf {
    peer(dir, move |mut stream| {
        let reader = BufReader::new(stream.try_clone().unwrap());
        writeln!(stream, "{GREETING}").unwrap();
        for line in reader.lines().map_while(Result::ok) {
            let command: Value = serde_json::from_str(&line).unwrap();
            if command["execute"] == "qmp_capabilities" {
                writeln!(stream, "{}", json!({"return": {}, "id": command["id"]})).unwrap();
            } else {
                answer(&command, &mut stream);
            }
        }
    })
}

#[tokio::test]
async fn nobody_there_is_off_and_unavailable() {
    let place = Place::new();
    let path = place.dir.path().join("none.sock");
    let control = place.control(&domain(&path, None));
    assert_eq!(control.state().await.unwrap(), RunState::Off);
    assert_eq!(control.instance().await.unwrap(), None);
    assert_eq!(control.image_owner().await.unwrap(), None);
    let error = control.monitor(Command::bare("query-version")).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Unavailable, Effect::None)
    );
    assert!(error.next_step().is_some());
    // A socket that its listener left behind.
    drop(UnixListener::bind(&path).unwrap());
    assert_eq!(control.state().await.unwrap(), RunState::Off);
    // A domain that says nothing of a monitor.
    let mut nowhere = domain(&path, None);
    nowhere.sockets.monitor = None;
    let control = place.control(&nowhere);
    assert_eq!(control.state().await.unwrap(), RunState::Off);
    let error = control.monitor(Command::bare("query-version")).await.unwrap_err();
    assert!(error.next_step().unwrap().contains("--monitor"));
}

#[tokio::test]
async fn another_client_holds_the_monitor() {
    let daemon = StorageDaemon::builder().without_guest_side().start();
    let other = Session::new(daemon.qmp_path(), Timeouts::default());
    other.execute(Command::bare("query-version")).await.unwrap();
    let session = Session::new(daemon.qmp_path(), impatient());
    let error = session.execute(Command::bare("query-version")).await.unwrap_err();
    assert_eq!((error.kind(), error.effect()), (ErrorKind::Busy, Effect::None));
    assert!(error.to_string().contains("another client"), "{error}");
    // More wait than the kernel lets queue: still the same answer.
    let waiting: Vec<_> = (0..4)
        .map(|_| Session::new(daemon.qmp_path(), impatient()))
        .collect();
    for session in &waiting {
        let error = session.execute(Command::bare("query-version")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
    }
    drop(other);
    let session = Session::new(daemon.qmp_path(), Timeouts::default());
    session.execute(Command::bare("query-version")).await.unwrap();
}

/// As root, everything may be opened: then this test runs itself as nobody.
#[tokio::test]
async fn a_socket_that_may_not_be_opened_is_denied() {
    if let Some(path) = std::env::var_os("DENIED") {
        let session = Session::new(path, impatient());
        let error = session.execute(Command::bare("query-version")).await.unwrap_err();
        assert_eq!((error.kind(), error.effect()), (ErrorKind::Denied, Effect::None));
        return;
    }
    let place = Place::new();
    let path = peer(place.dir.path(), drop);
    fs::set_permissions(place.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    // Where nobody may read the test itself, its name leads there all the same.
    let file = fs::File::open("/proc/self/exe").unwrap();
    let mut command = std::process::Command::new(format!("/proc/self/fd/{}", file.as_raw_fd()));
    command
        .args(["--exact", "a_socket_that_may_not_be_opened_is_denied"])
        .env("DENIED", &path)
        .current_dir("/");
    if rustix::process::geteuid().is_root() {
        command.uid(65534).gid(65534);
    }
    assert!(command.status().unwrap().success());
}

#[tokio::test]
async fn a_killed_hypervisor_leaves_the_effect_unknown() {
    let qemu = Qemu::builder().disk(DiskSpec::new("vda", MIB)).start();
    let place = Place::new();
    let control = place.control(&qemu_domain(&qemu));
    assert_eq!(control.state().await.unwrap(), RunState::Running);
    let instance = control.instance().await.unwrap().unwrap();
    // Stopped, it reads the command no more; killed, it never answers.
    qemu.hang();
    let (error, ()) = tokio::join!(control.monitor(Command::bare("system_reset")), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        qemu.kill9();
    });
    let error = error.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Unavailable, Effect::Unknown)
    );
    assert_eq!(control.state().await.unwrap(), RunState::Off);
    // The next command connects anew by itself.
    qemu.restart();
    assert_eq!(control.state().await.unwrap(), RunState::Running);
    assert_ne!(control.instance().await.unwrap().unwrap(), instance);
}

#[tokio::test]
async fn a_hung_hypervisor_times_out_and_recovers() {
    let qemu = Qemu::builder().start();
    let session = Session::new(qemu.qmp_path(), impatient());
    while session.execute(Command::bare("query-version")).await.is_err() {}
    qemu.hang();
    let error = session.execute(Command::bare("query-name")).await.unwrap_err();
    assert_eq!((error.kind(), error.effect()), (ErrorKind::Timeout, Effect::None));
    // A command that changes nothing here: it may still be carried out once QEMU goes on.
    let error = session.execute(Command::bare("cont")).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Timeout, Effect::Unknown)
    );
    session.disconnect().await;
    let error = session.execute(Command::bare("query-name")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    assert!(
        error.next_step().unwrap().contains("kill -CONT"),
        "{:?}",
        error.next_step()
    );
    qemu.unhang();
    let patient = Session::new(qemu.qmp_path(), Timeouts::default());
    patient.execute(Command::bare("query-name")).await.unwrap();
}

#[tokio::test]
async fn late_answers_go_to_nobody_else() {
    let qemu = Qemu::builder().start();
    let timeouts = Timeouts {
        command: Duration::from_millis(200),
        ..Timeouts::default()
    };
    let session = Session::new(qemu.qmp_path(), timeouts);
    while session.execute(Command::bare("query-version")).await.is_err() {}
    qemu.hang();
    session.execute(Command::bare("query-name")).await.unwrap_err();
    qemu.unhang();
    loop {
        match session.execute(Command::bare("query-status")).await {
            Ok(status) => break assert_eq!(status["status"], "running"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Timeout),
        }
    }
}

#[tokio::test]
async fn refusals_keep_their_kind_and_words() {
    let qemu = Qemu::builder().start();
    let place = Place::new();
    let control = place.control(&qemu_domain(&qemu));
    let error = control
        .monitor(Command::bare("no-such-command"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let error = control
        .monitor(Command::new("blockdev-del", json!({"node-name": "none"})))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.message().contains("none"), "{error}");
    assert!(error.context().any(|c| c == ("command", "blockdev-del")));
    let error = control
        .monitor(Command::new("block-job-cancel", json!({"device": "none"})))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);

    let each = vec![
        Command::bare("query-name"),
        Command::bare("no-such-command"),
        Command::bare("query-status"),
    ];
    let answers = control.monitor_each(each).await.unwrap();
    assert!(answers[0].is_ok() && answers[2].as_ref().unwrap()["status"] == "running");
    assert_eq!(answers[1].as_ref().unwrap_err().kind(), ErrorKind::Unsupported);
    let many = (0..500).map(|_| Command::bare("query-name")).collect();
    assert!(
        control
            .monitor_each(many)
            .await
            .unwrap()
            .iter()
            .all(Result::is_ok)
    );
}

#[tokio::test]
async fn states_are_told_apart() {
    for version in [QemuVersion::V7_2, QemuVersion::V10_0] {
        let place = Place::new();
        let daemon = StorageDaemon::builder()
            .version(version)
            .without_guest_side()
            .start();
        assert_eq!(
            place.control(&daemon_domain(&daemon)).state().await.unwrap(),
            RunState::Storage
        );
        let qemu = Qemu::builder()
            .version(version)
            .disk(DiskSpec::new("vda", MIB))
            .start();
        let control = place.control(&qemu_domain(&qemu));
        assert_eq!(control.state().await.unwrap(), RunState::Running);
        control.pause().await.unwrap();
        control.pause().await.unwrap();
        assert_eq!(control.state().await.unwrap(), RunState::Stopped("paused".into()));
        control.resume().await.unwrap();
        // It runs as we do.
        assert_eq!(control.image_owner().await.unwrap(), None);
        // A destination that is full: the migration stays under way.
        let sink = place.dir.path().join(format!("{version:?}.sock"));
        let listener = UnixListener::bind(&sink).unwrap();
        qemu.qmp("migrate", json!({"uri": format!("unix:{}", sink.display())}));
        let (connection, _) = listener.accept().unwrap();
        let state = control.state().await.unwrap();
        assert!(matches!(&state, RunState::Migrating(_)), "{state}");
        drop(connection);
        let arriving = Qemu::builder()
            .version(version)
            .args(["-incoming", "defer"])
            .start();
        let control = place.control(&qemu_domain(&arriving));
        assert_eq!(
            control.state().await.unwrap(),
            RunState::Migrating("inmigrate".into())
        );
    }
}

#[tokio::test]
async fn controls_of_one_connector_share_the_connection() {
    let daemon = StorageDaemon::builder().without_guest_side().start();
    let place = Place::new();
    let (a, b) = (
        place.control(&daemon_domain(&daemon)),
        place.control(&daemon_domain(&daemon)),
    );
    a.monitor(Command::bare("query-version")).await.unwrap();
    b.monitor(Command::bare("query-version")).await.unwrap();
    // And so do tasks.
    let (x, y) = tokio::join!(
        a.monitor(Command::bare("query-jobs")),
        b.monitor(Command::bare("query-jobs"))
    );
    assert!(x.is_ok() && y.is_ok());
}

#[tokio::test]
async fn what_is_unknown_does_not_end_the_session() {
    let place = Place::new();
    let path = talker(place.dir.path(), |command, stream| {
        let event =
            json!({"event": "EVENT_OF_THE_FUTURE", "data": {"new": ["things"]}, "timestamp": {"eons": 1}});
        for noise in [
            event,
            json!({"id": 4_711, "return": "not yours"}),
            json!({"error": {"class": "X"}}),
            json!([1]),
            json!(null),
        ] {
            writeln!(stream, "{noise}").unwrap();
        }
        let id = &command["id"];
        let answer = match command["execute"].as_str().unwrap() {
            "odd" => json!({"id": id, "error": {"class": "ClassOfTheFuture", "desc": "no"}}),
            "neither" => json!({"id": id}),
            _ => json!({"id": id, "return": {"state": "state-of-the-future"}}),
        };
        write!(stream, "\r\n{answer}\r\n").unwrap();
    });
    let session = Session::new(path, Timeouts::default());
    let mut events = session.subscribe();
    let answer = session.execute(Command::bare("a")).await.unwrap();
    assert_eq!(answer["state"], "state-of-the-future");
    assert!(matches!(events.next().await, Heard::Event(e) if e.name == "EVENT_OF_THE_FUTURE"));
    assert_eq!(
        session.execute(Command::bare("odd")).await.unwrap_err().kind(),
        ErrorKind::Refused
    );
    assert_eq!(
        session
            .execute(Command::bare("neither"))
            .await
            .unwrap_err()
            .kind(),
        ErrorKind::Protocol
    );
    session.execute(Command::bare("b")).await.unwrap();
}

#[tokio::test]
async fn a_flood_of_events_drops_the_oldest_and_tells() {
    let place = Place::new();
    let path = talker(place.dir.path(), |command, stream| {
        for n in 0..5000 {
            writeln!(stream, "{}", json!({"event": "FLOOD", "data": n})).unwrap();
        }
        writeln!(stream, "{}", json!({"id": command["id"], "return": {}})).unwrap();
    });
    let session = Session::new(path, Timeouts::default());
    let mut events = session.subscribe();
    session.execute(Command::bare("a")).await.unwrap();
    assert_eq!(events.next().await, Heard::Missed);
    let mut last = Value::Null;
    while last != 4999 {
        match events.next().await {
            Heard::Event(event) => last = event.data,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn nonsense_is_a_breach_of_protocol() {
    for text in [
        "SSH-2.0-OpenSSH_9.2\r\n",
        "{\"hello\": 1}\n",
        "[\n",
        "\u{0}\u{1}\n",
    ] {
        let place = Place::new();
        let path = peer(place.dir.path(), move |mut stream| {
            let _ = stream.write_all(text.as_bytes());
            thread::sleep(Duration::from_secs(1));
        });
        let error = Session::new(path, Timeouts::default())
            .execute(Command::bare("a"))
            .await
            .unwrap_err();
        assert_eq!(
            (error.kind(), error.effect()),
            (ErrorKind::Protocol, Effect::None),
            "{text:?}"
        );
    }
    // In the middle of the conversation; and half a message, and then the end.
    for (text, kind) in [
        ("garbage\n", ErrorKind::Protocol),
        ("{\"return\": {", ErrorKind::Unavailable),
    ] {
        let place = Place::new();
        let path = talker(place.dir.path(), move |_, stream| {
            stream.write_all(text.as_bytes()).unwrap();
            stream.shutdown(std::net::Shutdown::Both).unwrap();
        });
        let session = Session::new(path, Timeouts::default());
        let mut events = session.subscribe();
        let error = session.execute(Command::bare("stop")).await.unwrap_err();
        assert_eq!((error.kind(), error.effect()), (kind, Effect::Unknown));
        assert_eq!(events.next().await, Heard::Lost);
        // It connects anew and is told the same again.
        assert_eq!(
            session
                .execute(Command::bare("query-x"))
                .await
                .unwrap_err()
                .kind(),
            kind
        );
    }
}

#[tokio::test]
async fn a_line_without_end_is_cut_off() {
    let place = Place::new();
    let path = peer(place.dir.path(), |mut stream| {
        let chunk = vec![b'x'; 1 << 20];
        while stream.write_all(&chunk).is_ok() {}
    });
    let error = Session::new(path, Timeouts::default())
        .execute(Command::bare("a"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol);
    assert!(error.to_string().contains("longer than"), "{error}");
}

#[tokio::test]
async fn a_peer_that_closes_at_once_is_unavailable_and_not_off() {
    let place = Place::new();
    let path = peer(place.dir.path(), drop);
    let control = place.control(&domain(&path, None));
    assert_eq!(
        control.monitor(Command::bare("a")).await.unwrap_err().kind(),
        ErrorKind::Unavailable
    );
    assert_eq!(control.state().await.unwrap_err().kind(), ErrorKind::Unavailable);
}

/// QEMU does so when it finds out late that the client before is gone.
#[tokio::test]
async fn a_monitor_that_closes_a_new_connection_is_connected_to_again() {
    let place = Place::new();
    let connections = Cell::new(0);
    let path = peer(place.dir.path(), move |mut stream| {
        connections.set(connections.get() + 1);
        // Closed before the greeting, then after it, then while it waits for an answer.
        if connections.get() == 1 {
            return;
        }
        writeln!(stream, "{GREETING}").unwrap();
        if connections.get() == 2 {
            return;
        }
        for line in BufReader::new(stream.try_clone().unwrap()).lines() {
            let command: Value = serde_json::from_str(&line.unwrap()).unwrap();
            if connections.get() == 3 {
                return;
            }
            let answer = json!({"return": {"connection": connections.get()}, "id": command["id"]});
            writeln!(stream, "{answer}").unwrap();
        }
    });
    let session = Session::new(path, Timeouts::default());
    let answer = session.execute(Command::bare("a")).await.unwrap();
    assert_eq!(answer["connection"], 4);
}

/// What QEMU was doing for a client that was killed: the real one answers the next one so now and then only.
#[tokio::test]
async fn answers_to_somebody_gone_may_come_before_the_greeting() {
    let place = Place::new();
    let path = peer(place.dir.path(), |mut stream| {
        writeln!(
            stream,
            "{}",
            json!({"return": [], "id": 2_151_882_957_172_506_u64})
        )
        .unwrap();
        writeln!(
            stream,
            "{}",
            json!({"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 2}})
        )
        .unwrap();
        writeln!(stream, "{GREETING}").unwrap();
        for line in BufReader::new(stream.try_clone().unwrap()).lines() {
            let command: Value = serde_json::from_str(&line.unwrap()).unwrap();
            writeln!(stream, "{}", json!({"return": "mine", "id": command["id"]})).unwrap();
        }
    });
    let session = Session::new(path, Timeouts::default());
    assert_eq!(session.execute(Command::bare("a")).await.unwrap(), "mine");
}

#[tokio::test]
async fn a_pause_that_is_not_confirmed_is_taken_back() {
    let qemu = Qemu::builder().start();
    let place = Place::new();
    let connector = place.connector.clone().timeouts(impatient());
    let control = connector.control(&qemu_domain(&qemu)).unwrap();
    while control.state().await.is_err() {}
    qemu.hang();
    let error = control.pause().await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Timeout, Effect::Unknown)
    );
    assert_eq!(error.rollback_failures().len(), 1);
    qemu.unhang();
    // Both have been carried out by the time the next one is.
    while control.state().await.is_err() {}
    common::eventually("the guest runs", || qemu.status() == "running");
}

#[test]
fn a_connection_outlives_no_runtime() {
    let daemon = StorageDaemon::builder().without_guest_side().start();
    let session = Session::new(daemon.qmp_path(), Timeouts::default());
    for _ in 0..2 {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime
            .block_on(session.execute(Command::bare("query-version")))
            .unwrap();
    }
}

#[tokio::test]
async fn a_command_given_up_does_not_garble_the_next() {
    let daemon = StorageDaemon::builder().without_guest_side().start();
    let session = Session::new(daemon.qmp_path(), Timeouts::default());
    session.execute(Command::bare("query-version")).await.unwrap();
    for n in 0..50 {
        let name = "x".repeat(n * 100);
        let ask = session.execute(Command::new(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": name}),
        ));
        let _ = tokio::time::timeout(Duration::from_micros(n as u64 * 10), ask).await;
        session.execute(Command::bare("query-version")).await.unwrap();
    }
}
