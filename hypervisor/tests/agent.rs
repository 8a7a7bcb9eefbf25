//! Freezing and thawing through a real guest agent, and through agents that are late, silent or gone.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use common::{Place, domain, eventually, guardian_program, qemu_domain};
use disksnap_core::{Control, Effect, ErrorKind, Verdict, Watch};
use disksnap_hypervisor::Timeouts;
use disksnap_test_support::{DiskSpec, GuestSetup, MIB, Qemu, need};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_mins(1);

/// A booted guest whose `vda` carries a mounted file system.
fn guest() -> Qemu {
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", 64 * MIB))
        .guest(GuestSetup::new().file_system("ext4", "vda"))
        .start();
    eventually("the file system is mounted", || {
        let mounted = qemu.agent().execute("guest-get-fsinfo", json!({}));
        mounted.as_array().is_some_and(|list| !list.is_empty())
    });
    qemu
}

/// The real agent's word, asked while nobody else holds its socket.
fn status(qemu: &Qemu) -> Value {
    qemu.agent().execute("guest-fsfreeze-status", json!({}))
}

#[tokio::test]
async fn a_guest_is_frozen_and_thawed() {
    need!("guest");
    let qemu = guest();
    let place = Place::new();
    let connector = place.connector.clone().guardian(guardian_program());
    let control = connector.control(&qemu_domain(&qemu)).unwrap();
    control.thaw().await.unwrap();
    let watch = Watch {
        release: Vec::new(),
        resume: false,
        thaw: true,
        deadline: Duration::from_mins(10),
    };
    let guard = control.guard(watch).await.unwrap();
    assert!(control.freeze(&[], DEADLINE).await.unwrap().filesystems > 0);
    let error = control.freeze(&[], DEADLINE).await.unwrap_err();
    assert_eq!((error.kind(), error.effect()), (ErrorKind::Busy, Effect::None));
    control.thaw().await.unwrap();
    control.thaw().await.unwrap();
    assert_eq!(guard.disarm().await.unwrap(), Verdict::Quiet);
    drop((control, connector));
    assert_eq!(status(&qemu), "thawed");
}

#[tokio::test]
async fn only_the_file_systems_that_are_named_are_frozen() {
    need!("guest");
    let qemu = guest();
    let place = Place::new();
    let control = place.control(&qemu_domain(&qemu));
    let all = control.freeze(&[], DEADLINE).await.unwrap();
    control.thaw().await.unwrap();
    let [point] = &all.mountpoints[..] else {
        panic!("{all:?}");
    };
    let named = control
        .freeze(std::slice::from_ref(point), DEADLINE)
        .await
        .unwrap();
    assert_eq!((named.filesystems, &named.mountpoints), (1, &all.mountpoints));
    control.thaw().await.unwrap();
    let strange = ["/no/such/place".to_owned()];
    let error = control.freeze(&strange, DEADLINE).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::NotFound, Effect::None)
    );
    assert!(error.next_step().unwrap().contains(point), "{error:?}");
    drop((control, place));
    assert_eq!(status(&qemu), "thawed");
}

#[tokio::test]
async fn past_the_deadline_the_guardian_thaws() {
    need!("guest");
    let qemu = guest();
    let place = Place::new();
    let connector = place.connector.clone().guardian(guardian_program());
    let control = connector.control(&qemu_domain(&qemu)).unwrap();
    let watch = Watch {
        release: Vec::new(),
        resume: true,
        thaw: true,
        deadline: Duration::from_secs(8),
    };
    let guard = control.guard(watch).await.unwrap();
    assert!(control.freeze(&[], DEADLINE).await.unwrap().filesystems > 0);
    control.pause().await.unwrap();
    eventually("the guest runs again", || qemu.status() == "running");
    assert_eq!(guard.disarm().await.unwrap(), Verdict::Fired);
    // The connection was taken from us; thawing what is thawed connects anew and is well.
    control.thaw().await.unwrap();
    drop((control, connector));
    assert_eq!(status(&qemu), "thawed");
}

#[tokio::test]
async fn what_a_client_long_gone_has_asked_for_is_thawed() {
    need!("guest");
    let qemu = guest();
    let place = Place::new();
    let control = place.control(&qemu_domain(&qemu));
    // The guest stands still, so its agent hangs; the freeze waits in the port.
    qemu.qmp("stop", json!({}));
    let mut client = UnixStream::connect(qemu.agent_path()).unwrap();
    client
        .write_all(b"{\"execute\": \"guest-fsfreeze-freeze\"}\n")
        .unwrap();
    drop(client);
    let (thawed, ()) = tokio::join!(control.thaw(), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        qemu.qmp("cont", json!({}));
    });
    thawed.unwrap();
    // Answered by the agent after all that was asked before.
    assert!(control.freeze(&[], DEADLINE).await.unwrap().filesystems > 0);
    control.thaw().await.unwrap();
    drop((control, place));
    assert_eq!(status(&qemu), "thawed");
}

#[tokio::test]
async fn a_guest_without_an_agent_is_unavailable_or_silent() {
    let qemu = Qemu::builder().start();
    let place = Place::new();
    let impatient = Timeouts {
        agent: Duration::from_millis(300),
        thaw: Duration::from_millis(300),
        ..Timeouts::default()
    };
    let connector = place
        .connector
        .clone()
        .timeouts(impatient)
        .guardian(guardian_program());
    // The channel is there, and no agent behind it. The guard does not mind.
    let control = connector.control(&qemu_domain(&qemu)).unwrap();
    let watch = Watch {
        release: Vec::new(),
        resume: true,
        thaw: true,
        deadline: DEADLINE,
    };
    let guard = control.guard(watch).await.unwrap();
    let error = control.freeze(&[], DEADLINE).await.unwrap_err();
    assert_eq!((error.kind(), error.effect()), (ErrorKind::Timeout, Effect::None));
    assert_eq!(guard.disarm().await.unwrap(), Verdict::Quiet);
    let error = control.thaw().await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Timeout, Effect::Unknown)
    );

    let nobody = domain(&qemu.qmp_path(), Some(Path::new("/no/such/agent.sock")));
    let error = connector
        .control(&nobody)
        .unwrap()
        .freeze(&[], DEADLINE)
        .await
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Unavailable, Effect::None)
    );
    let unsaid = connector.control(&domain(&qemu.qmp_path(), None)).unwrap();
    let error = unsaid.freeze(&[], DEADLINE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.next_step().unwrap().contains("disksnap:agent"));
    unsaid.thaw().await.unwrap();
}

/// What a made-up agent does when it is told to freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Temper {
    /// Says no.
    Unwilling,
    /// Hangs until another client connects, and freezes then.
    Late,
    /// Hangs until it is woken, and freezes then.
    Hung,
}

/// An agent on a port that is one stream, whatever comes and goes on the host's side: what it is asked while it hangs
/// it does afterwards, in order.
#[derive(Debug)]
struct Agent {
    temper: Temper,
    awake: AtomicBool,
    asked: AtomicBool,
    frozen: AtomicBool,
    freezes: AtomicU32,
    thaws: AtomicU32,
}

impl Agent {
    fn listen(temper: Temper, dir: &Path) -> (PathBuf, Arc<Self>) {
        let path = dir.join("agent.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let agent = Arc::new(Self {
            temper,
            awake: AtomicBool::default(),
            asked: AtomicBool::default(),
            frozen: AtomicBool::default(),
            freezes: AtomicU32::default(),
            thaws: AtomicU32::default(),
        });
        let port = Arc::clone(&agent);
        thread::spawn(move || port.serve(&listener));
        (path, agent)
    }

    fn serve(&self, listener: &UnixListener) {
        let mut next = None;
        loop {
            let mut stream: UnixStream = next.take().unwrap_or_else(|| listener.accept().unwrap().0);
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut line = Vec::new();
            while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                let answer = self.answer(&std::mem::take(&mut line), || {
                    next = Some(listener.accept().unwrap().0);
                });
                // A client that has gone hears no answer, and has still asked.
                let _ = stream.write_all(&answer);
            }
        }
    }

    fn answer(&self, line: &[u8], until_another_client: impl FnOnce()) -> Vec<u8> {
        let delimited = line.contains(&0xff);
        let start = line.iter().rposition(|b| *b == 0xff).map_or(0, |at| at + 1);
        let command: Value = serde_json::from_slice(&line[start..]).unwrap();
        let value = match command["execute"].as_str().unwrap() {
            "guest-sync-delimited" => command["arguments"]["id"].clone(),
            "guest-fsfreeze-freeze" => {
                self.asked.store(true, Ordering::SeqCst);
                match self.temper {
                    Temper::Unwilling => {
                        let error = json!({"class": "GenericError", "desc": "failed to freeze /mnt"});
                        return format!("{}\n", json!({ "error": error })).into_bytes();
                    }
                    Temper::Late => until_another_client(),
                    Temper::Hung => eventually("woken", || self.awake.load(Ordering::SeqCst)),
                }
                self.freezes.fetch_add(1, Ordering::SeqCst);
                self.frozen.store(true, Ordering::SeqCst);
                json!(1)
            }
            "guest-fsfreeze-thaw" => {
                self.thaws.fetch_add(1, Ordering::SeqCst);
                json!(u32::from(self.frozen.swap(false, Ordering::SeqCst)))
            }
            "guest-fsfreeze-status" if self.frozen.load(Ordering::SeqCst) => json!("frozen"),
            _ => json!("thawed"),
        };
        let mut answer = if delimited { vec![0xff] } else { Vec::new() };
        writeln!(answer, "{}", json!({ "return": value })).unwrap();
        answer
    }
}

#[tokio::test]
async fn a_late_freeze_is_thawed() {
    let place = Place::new();
    let (path, agent) = Agent::listen(Temper::Late, place.dir.path());
    let control = place.control(&domain(Path::new("/no/monitor"), Some(&path)));
    let error = control.freeze(&[], Duration::from_secs(5)).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Timeout, Effect::RolledBack),
        "{error}"
    );
    assert_eq!(
        agent.freezes.load(Ordering::SeqCst),
        1,
        "it froze late, and was thawed again"
    );
    assert!(!agent.frozen.load(Ordering::SeqCst));
}

#[tokio::test]
async fn a_thaw_waits_behind_a_freeze_that_never_came() {
    let place = Place::new();
    let (path, agent) = Agent::listen(Temper::Hung, place.dir.path());
    let timeouts = Timeouts {
        thaw: Duration::from_millis(300),
        ..Timeouts::default()
    };
    let connector = place.connector.clone().timeouts(timeouts);
    let control = connector
        .control(&domain(Path::new("/no/monitor"), Some(&path)))
        .unwrap();
    let error = control.freeze(&[], Duration::from_secs(5)).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Timeout, Effect::Unknown),
        "{error}"
    );
    assert!(!error.rollback_failures().is_empty());
    // We are gone when it wakes up.
    drop((control, connector));
    agent.awake.store(true, Ordering::SeqCst);
    eventually("it has frozen", || agent.freezes.load(Ordering::SeqCst) == 1);
    eventually("it has thawed behind that", || {
        agent.thaws.load(Ordering::SeqCst) > 0
    });
    assert!(!agent.frozen.load(Ordering::SeqCst));
}

#[tokio::test]
async fn an_agent_that_refuses_leaves_nothing_frozen() {
    let place = Place::new();
    let (path, _agent) = Agent::listen(Temper::Unwilling, place.dir.path());
    let control = place.control(&domain(Path::new("/no/monitor"), Some(&path)));
    let error = control.freeze(&[], DEADLINE).await.unwrap_err();
    assert_eq!((error.kind(), error.effect()), (ErrorKind::Refused, Effect::None));
    assert_eq!(error.message(), "failed to freeze /mnt");
}

#[tokio::test]
async fn the_guardian_thaws_what_freezes_late() {
    let qemu = Qemu::builder().start();
    let place = Place::new();
    let (path, agent) = Agent::listen(Temper::Hung, place.dir.path());
    let connector = place.connector.clone().guardian(guardian_program());
    let control = connector.control(&domain(&qemu.qmp_path(), Some(&path))).unwrap();
    let watch = Watch {
        release: Vec::new(),
        resume: true,
        thaw: true,
        deadline: Duration::from_mins(10),
    };
    let guard = control.guard(watch).await.unwrap();
    // The one who asked for the freeze is gone before it comes about.
    let asked = async {
        while !agent.asked.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        frozen = control.freeze(&[], DEADLINE) => panic!("{frozen:?}"),
        () = asked => {}
    }
    drop((guard, control, connector));
    agent.awake.store(true, Ordering::SeqCst);
    eventually("it has thawed", || agent.thaws.load(Ordering::SeqCst) > 0);
    assert_eq!(agent.freezes.load(Ordering::SeqCst), 1);
    assert!(!agent.frozen.load(Ordering::SeqCst));
}
