//! The guardian: whatever happens to the parent, the guest runs again; and what the parent did not pause stays paused.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Place, eventually, guardian_program, qemu_domain};
use disksnap_core::{Control, ErrorKind, Host, RunState, Verdict, Watch};
use disksnap_hypervisor::{GuardianProgram, Heard, Paths, QemuConnector, Timeouts};
use disksnap_test_support::{DiskSpec, GuestSetup, MIB, Qemu, need};
use rustix::process::{Pid, Signal, kill_process};

const PAUSE: Watch = Watch {
    release: Vec::new(),
    resume: true,
    thaw: false,
    deadline: Duration::from_mins(10),
};

fn place() -> Place {
    let place = Place::new();
    let connector = place.connector.clone().guardian(guardian_program());
    Place { connector, ..place }
}

#[tokio::test]
async fn let_go_in_time_it_is_quiet() {
    let qemu = Qemu::builder().start();
    let control = place().control(&qemu_domain(&qemu));
    let guard = control.guard(PAUSE).await.unwrap();
    control.pause().await.unwrap();
    assert_eq!(qemu.status(), "paused");
    assert_eq!(control.state().await.unwrap(), RunState::Stopped("paused".into()));
    control.resume().await.unwrap();
    assert_eq!(guard.disarm().await.unwrap(), Verdict::Quiet);
    control.resume().await.unwrap();
    assert_eq!(qemu.status(), "running");
}

#[tokio::test]
async fn dropped_without_a_word_it_acts() {
    let qemu = Qemu::builder().start();
    let control = place().control(&qemu_domain(&qemu));
    let guard = control.guard(PAUSE).await.unwrap();
    control.pause().await.unwrap();
    drop(guard);
    eventually("the guest runs again", || qemu.status() == "running");
}

/// On a busy machine the deadline comes first, and the connection is taken from under the pause.
async fn pause_before_or_behind_the_deadline(control: &impl Control) {
    if let Err(error) = control.pause().await {
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    }
}

#[tokio::test]
async fn past_the_deadline_it_acts_and_says_so() {
    let qemu = Qemu::builder().start();
    let control = place().control(&qemu_domain(&qemu));
    let watch = Watch {
        release: Vec::new(),
        deadline: Duration::from_millis(200),
        ..PAUSE
    };
    let guard = control.guard(watch).await.unwrap();
    pause_before_or_behind_the_deadline(&control).await;
    eventually("the guest runs again", || qemu.status() == "running");
    assert_eq!(guard.disarm().await.unwrap(), Verdict::Fired);
    // The parent's connection was taken from it; the next command makes a new one.
    assert_eq!(control.state().await.unwrap(), RunState::Running);
}

#[tokio::test]
async fn a_connection_made_after_arming_is_taken_too() {
    let qemu = Qemu::builder().start();
    let control = place().control(&qemu_domain(&qemu));
    let watch = Watch {
        release: Vec::new(),
        deadline: Duration::from_millis(1500),
        ..PAUSE
    };
    let guard = control.guard(watch).await.unwrap();
    control.session().unwrap().disconnect().await;
    pause_before_or_behind_the_deadline(&control).await;
    eventually("the guest runs again", || qemu.status() == "running");
    assert_eq!(guard.disarm().await.unwrap(), Verdict::Fired);
}

#[tokio::test]
async fn a_guest_that_somebody_else_paused_stays_paused() {
    let qemu = Qemu::builder().prelaunch().start();
    let control = place().control(&qemu_domain(&qemu));
    assert_eq!(
        control.state().await.unwrap(),
        RunState::Stopped("prelaunch".into())
    );
    // As core arms it for a guest that does not run.
    let watch = Watch {
        release: Vec::new(),
        resume: false,
        ..PAUSE
    };
    let guard = control.guard(watch).await.unwrap();
    drop(guard);
    let watch = Watch {
        release: Vec::new(),
        resume: true,
        deadline: Duration::from_millis(1),
        ..PAUSE
    };
    let mut events = control.session().unwrap().subscribe();
    let guard = control.guard(watch).await.unwrap();
    // In QEMU's words it is not paused: even a guardian told to resume leaves it alone.
    while events.next().await != Heard::Lost {}
    assert_eq!(guard.disarm().await.unwrap(), Verdict::Fired);
    assert_eq!(qemu.status(), "prelaunch");
}

#[tokio::test]
async fn without_a_program_nothing_is_paused() {
    let qemu = Qemu::builder().start();
    let place = Place::new();
    let missing = GuardianProgram::Program {
        path: "/no/such/program".into(),
        arguments: Vec::new(),
    };
    let control = place
        .connector
        .clone()
        .guardian(missing)
        .control(&qemu_domain(&qemu))
        .unwrap();
    assert_eq!(
        control.guard(PAUSE).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    drop(control);
    // A program that is no guardian.
    let wrong = GuardianProgram::Program {
        path: "/bin/true".into(),
        arguments: Vec::new(),
    };
    let control = place
        .connector
        .clone()
        .guardian(wrong)
        .control(&qemu_domain(&qemu))
        .unwrap();
    let error = control.guard(PAUSE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(
        error.next_step().unwrap().contains("run_if_asked"),
        "{:?}",
        error.next_step()
    );
    drop(control);
    let control = place.connector.control(&qemu_domain(&qemu)).unwrap();
    let error = control.guard(PAUSE).await.unwrap_err();
    assert!(
        error.next_step().unwrap().contains("run_if_asked"),
        "{:?}",
        error.next_step()
    );
    assert_eq!(qemu.status(), "running");
}

/// Not a test: what the tests below start as the parent. Arms, pauses (and freezes), says so, and hangs.
#[tokio::test]
#[ignore = "the tests below run it as a process of their own"]
#[expect(clippy::print_stdout, reason = "this is how the test knows")]
async fn parent() {
    let Ok(monitor) = std::env::var("PARENT_MONITOR") else {
        return;
    };
    let agent = std::env::var_os("PARENT_AGENT").map(PathBuf::from);
    let deadline = Duration::from_millis(std::env::var("PARENT_DEADLINE").unwrap().parse().unwrap());
    let domain = common::domain(monitor.as_ref(), agent.as_deref());
    let run = PathBuf::from(std::env::var_os("PARENT_RUN").unwrap());
    let control = connector(&run).control(&domain).unwrap();
    let watch = Watch {
        release: Vec::new(),
        resume: agent.is_none(),
        thaw: agent.is_some(),
        deadline,
    };
    let _guard = control.guard(watch).await.unwrap();
    if agent.is_some() {
        assert!(control.freeze(&[], deadline).await.unwrap().filesystems > 0);
    } else {
        control.pause().await.unwrap();
    }
    println!("\nSTANDS STILL");
    std::future::pending::<()>().await;
}

/// One whose sockets and notes are in this directory.
fn connector(run: &Path) -> QemuConnector {
    let paths = Paths {
        images: run.to_owned(),
        run: run.to_owned(),
    };
    QemuConnector::new(paths).guardian(guardian_program())
}

struct Parent(Child);

impl Parent {
    fn start(qemu: &Qemu, agent: bool, deadline: Duration) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "parent", "--ignored", "--nocapture"]);
        command.env("PARENT_MONITOR", qemu.qmp_path());
        command.env("PARENT_RUN", qemu.dir());
        command.env("PARENT_DEADLINE", deadline.as_millis().to_string());
        if agent {
            command.env("PARENT_AGENT", qemu.agent_path());
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let said = out
            .lines()
            .map_while(Result::ok)
            .any(|line| line == "STANDS STILL");
        assert!(said, "the parent did not come as far as to pause");
        Self(child)
    }

    /// The one process that it has started.
    fn child(&self) -> Pid {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.0.id())).unwrap();
        let children =
            |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("children")).unwrap();
        let all: String = tasks.map(|task| children(task.unwrap())).collect();
        Pid::from_raw(all.trim().parse().unwrap()).unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_killed_parent_s_guest_runs_again() {
    let qemu = Qemu::builder().disk(DiskSpec::new("vda", MIB)).start();
    let parent = Parent::start(&qemu, false, Duration::from_mins(10));
    assert_eq!(qemu.status(), "paused");
    parent.signal(Signal::KILL);
    eventually("the guest runs again", || qemu.status() == "running");
}

/// What Ctrl-C, a closed terminal and a stopped service send to everyone around.
#[test]
fn the_guardian_outlives_the_signals_that_end_its_parent() {
    let qemu = Qemu::builder().start();
    let parent = Parent::start(&qemu, false, Duration::from_mins(10));
    let guardian = parent.child();
    for signal in [Signal::INT, Signal::HUP, Signal::TERM, Signal::QUIT] {
        kill_process(guardian, signal).unwrap();
    }
    let status = std::fs::read_to_string(format!("/proc/{}/stat", guardian.as_raw_pid())).unwrap();
    let session = status
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .nth(3)
        .unwrap();
    assert_eq!(
        session,
        guardian.as_raw_pid().to_string(),
        "it leads a session of its own"
    );
    parent.signal(Signal::KILL);
    eventually("the guest runs again", || qemu.status() == "running");
    eventually("the guardian ends", || {
        kill_process(guardian, Signal::CONT).is_err()
    });
}

#[test]
fn a_hung_parent_s_guest_runs_again() {
    let qemu = Qemu::builder().start();
    let parent = Parent::start(&qemu, false, Duration::from_secs(2));
    parent.signal(Signal::STOP);
    eventually("the guest runs again", || qemu.status() == "running");
}

#[test]
fn a_killed_parent_s_guest_is_thawed() {
    need!("guest");
    let qemu = Qemu::builder()
        .disk(DiskSpec::new("vda", 64 * MIB))
        .guest(GuestSetup::new().file_system("ext4", "vda"))
        .start();
    // The agent is up before the file system is.
    eventually("the file system is mounted", || {
        let mounted = qemu.agent().execute("guest-get-fsinfo", serde_json::json!({}));
        mounted.as_array().is_some_and(|list| !list.is_empty())
    });
    let parent = Parent::start(&qemu, true, Duration::from_mins(10));
    parent.signal(Signal::KILL);
    // Only an agent whose file systems are not frozen answers this with "thawed".
    eventually("the guest is thawed", || {
        let mut agent = qemu.agent();
        agent.execute("guest-fsfreeze-status", serde_json::json!({})) == "thawed"
    });
}

/// What guardians have left in the machine's directory for whoever comes next.
fn notes(qemu: &Qemu) -> usize {
    let files = std::fs::read_dir(qemu.dir()).unwrap().flatten();
    files
        .filter(|file| file.path().extension().is_some_and(|end| end == "still"))
        .count()
}

#[tokio::test]
async fn what_nobody_let_go_is_let_go_by_the_next() {
    let qemu = Qemu::builder().start();
    let control = connector(qemu.dir()).control(&qemu_domain(&qemu)).unwrap();
    let parent = Parent::start(&qemu, false, Duration::from_mins(10));
    kill_process(parent.child(), Signal::KILL).unwrap();
    parent.signal(Signal::KILL);
    drop(parent);
    assert_eq!((qemu.status(), notes(&qemu)), ("paused".to_owned(), 1));
    control.let_go().await.unwrap();
    assert_eq!((qemu.status(), notes(&qemu)), ("running".to_owned(), 0));
    // Nothing is known any more: now it is somebody else who paused it.
    control.pause().await.unwrap();
    control.let_go().await.unwrap();
    assert_eq!(qemu.status(), "paused");
}

#[tokio::test]
async fn a_note_of_an_earlier_run_lets_nobody_go() {
    let qemu = Qemu::builder().start();
    let parent = Parent::start(&qemu, false, Duration::from_mins(10));
    kill_process(parent.child(), Signal::KILL).unwrap();
    drop(parent);
    qemu.restart();
    qemu.qmp("stop", serde_json::json!({}));
    let control = connector(qemu.dir()).control(&qemu_domain(&qemu)).unwrap();
    assert_eq!(notes(&qemu), 1);
    control.let_go().await.unwrap();
    assert_eq!((qemu.status(), notes(&qemu)), ("paused".to_owned(), 0));
    // And one that was cut off tells of nothing.
    let uuid = control.domain().id.uuid.simple().to_string();
    std::fs::write(qemu.dir().join(format!("{}.1.still", &uuid[..12])), "{\"mon").unwrap();
    control.let_go().await.unwrap();
    assert_eq!((qemu.status(), notes(&qemu)), ("paused".to_owned(), 0));
}

#[test]
fn a_guardian_that_has_acted_leaves_nothing_to_do() {
    let qemu = Qemu::builder().start();
    let parent = Parent::start(&qemu, false, Duration::from_mins(10));
    assert_eq!(notes(&qemu), 1);
    parent.signal(Signal::KILL);
    eventually("the note is gone", || notes(&qemu) == 0);
    assert_eq!(qemu.status(), "running");
}

/// A hypervisor that answers nobody for longer than the guardian tries at once, and a parent that asks for nothing.
#[tokio::test]
async fn it_tries_again_until_it_is_let_go() {
    let qemu = Qemu::builder().start();
    let short = Timeouts {
        guardian: Duration::from_secs(4),
        ..Timeouts::default()
    };
    let connector = connector(qemu.dir()).timeouts(short);
    let control = connector.control(&qemu_domain(&qemu)).unwrap();
    let watch = Watch {
        deadline: Duration::from_secs(1),
        ..PAUSE
    };
    let guard = control.guard(watch).await.unwrap();
    pause_before_or_behind_the_deadline(&control).await;
    qemu.hang();
    tokio::time::sleep(Duration::from_secs(8)).await;
    qemu.unhang();
    eventually("the guest runs again", || qemu.status() == "running");
    assert_eq!(guard.disarm().await.unwrap(), Verdict::Fired);
}
