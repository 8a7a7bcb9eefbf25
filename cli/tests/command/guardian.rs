//! Whatever dies, hangs or is cut off while a real guest stands still because of us: it runs again and is thawed, by
//! itself as long as anything is left alive to see to it, and by the next command or `recover` otherwise.
//!
//! One guest for many cases, since it takes its time to boot. What a case took is printed and bounded by many times what
//! it should take: a machine with other things to do must not fail it, and a guest that nobody lets go never comes. Who let it
//! go is looked at, and that a guardian set about it in time, by a clock that such a machine slows down ([`rests`]).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use disksnap_test_support::{DiskSpec, GuestSetup, MIB, Qemu, need};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::kills::leftovers;
use crate::rests;
use crate::site::{Site, arg, ended, list};
use crate::tap::{Side, Tap, Then, When};

/// What should be, and what is allowed: the guest is to be let go in the deadline and 2 s.
const LATE: Duration = Duration::from_secs(2);
const FACTOR: u32 = 8;
/// For what has no bound of its own.
const PATIENCE: Duration = Duration::from_mins(4);

/// Asked of the guest's agent while nobody else holds its socket: runs something beside it.
fn beside_the_agent(script: &str) -> Value {
    json!({"execute": "guest-exec", "arguments": {"path": "/bin/busybox", "arg": ["sh", "-c", script]}})
}

/// The guest, what stands before its sockets, and the command's site.
struct Scene {
    qemu: Arc<Qemu>,
    site: Site,
    monitor: Tap,
    agent: Tap,
    xml: String,
}

/// The two that could let the guest go.
#[derive(Debug, Clone, Copy)]
struct Pair {
    parent: Pid,
    guardian: Option<Pid>,
    /// How long the guest may stand still, in seconds.
    deadline: u64,
}

impl Pair {
    /// By its parent, of all processes: a list of one process's children may leave some out.
    fn of(parent: Pid, deadline: u64) -> Self {
        let id = parent.as_raw_nonzero().to_string();
        let is_guardian = |pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            // The state and the parent come behind the name, which may hold anything.
            let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
            line.starts_with(b"disksnap-guardian") && fields.nth(1) == Some(&id)
        };
        let all = std::fs::read_dir("/proc").unwrap().flatten();
        let mut pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let guardian = pids.find(is_guardian).and_then(Pid::from_raw);
        Self {
            parent,
            guardian,
            deadline,
        }
    }

    fn signal_parent(self, signal: Signal) {
        kill_process(self.parent, signal).unwrap();
    }

    fn kill_guardian(self) {
        kill_process(self.guardian.expect("a guardian is armed"), Signal::KILL).unwrap();
    }

    fn kill_both(self) {
        // First the one who would act on the other's death.
        self.kill_guardian();
        self.signal_parent(Signal::KILL);
    }
}

/// A command that was struck at.
struct Struck {
    child: Child,
    pid: Pid,
    guardian: Option<Pid>,
    hit: Instant,
    /// When that was over, by the clock of [`rests`].
    over: Duration,
    deadline: Duration,
}

/// Who lets the guest go.
#[derive(Debug, Clone, Copy)]
enum By {
    Parent,
    /// He has begun within so much of the blow.
    Guardian(Duration),
}

impl Struck {
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// How it ended, and what it said.
    fn ended(self) -> (Option<i32>, String) {
        let output = self.child.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }
}

impl Scene {
    fn new() -> Self {
        let qemu = Qemu::builder()
            .disk(DiskSpec::new("vda", 64 * MIB))
            .disk(DiskSpec::new("vdb", 8 * MIB))
            .disk(DiskSpec::new("vdc", 16 * MIB).qcow2())
            .guest(GuestSetup::new().file_system("ext4", "vda").writer(&["vdc"]))
            .start();
        qemu.wait_files(1);
        qemu.wait_writer(1);
        rests::now();
        let site = Site::new();
        let monitor = Tap::before(&qemu.qmp_path(), site.path("qmp.sock"));
        let agent = Tap::before(&qemu.agent_path(), site.path("agent.sock"));
        let mut text = qemu.domain_xml();
        for (real, tap) in [(qemu.qmp_path(), &monitor), (qemu.agent_path(), &agent)] {
            text = text.replace(&arg(&real), &arg(&tap.socket));
        }
        let xml = site.file("domain.xml", &text);
        Self {
            qemu: Arc::new(qemu),
            site,
            monitor,
            agent,
            xml,
        }
    }

    fn run(&self, words: &[&str]) -> Value {
        self.site.json(&[&["-d", &self.xml][..], words].concat())
    }

    /// Runs the command until it is struck at. One that its own deadline ends before that, on a machine with much to do,
    /// is run again with a longer one.
    fn strike<F>(
        &self,
        at: (&Tap, When, &'static str),
        words: &[&str],
        deadlines: [u64; 3],
        prepare: impl Fn(),
        blow: F,
    ) -> Struck
    where
        F: Fn(Pair, &Side<'_>) -> Then + Clone + Send + 'static,
    {
        let (tap, when, command) = at;
        for deadline in deadlines {
            prepare();
            for tap in [&self.monitor, &self.agent] {
                tap.forget();
            }
            let (victim, told) = (Arc::new(Mutex::new(None)), Arc::new(Mutex::new(None)));
            let (known, tell, blow) = (Arc::clone(&victim), Arc::clone(&told), blow.clone());
            tap.arm(
                when,
                command,
                Box::new(move |side| {
                    // It may come this far before it is known by its id.
                    let parent = loop {
                        if let Some(pid) = *known.lock().unwrap() {
                            break pid;
                        }
                        std::thread::sleep(Duration::from_millis(1));
                    };
                    let pair = Pair::of(parent, deadline);
                    let then = blow(pair, side);
                    *tell.lock().unwrap() = Some((pair.guardian, rests::now()));
                    then
                }),
            );
            let seconds = deadline.to_string();
            let all = [&["-d", &self.xml][..], words, &["--deadline", &seconds]].concat();
            let mut starting = self.site.command(&all);
            starting.stdout(Stdio::null()).stderr(Stdio::piped());
            let mut child = starting.spawn().unwrap();
            let pid = Pid::from_child(&child);
            *victim.lock().unwrap() = Some(pid);
            loop {
                if let Some(hit) = tap.hit() {
                    let (guardian, over) = told.lock().unwrap().unwrap();
                    return Struck {
                        child,
                        pid,
                        guardian,
                        hit,
                        over,
                        deadline: Duration::from_secs(deadline),
                    };
                }
                if child.try_wait().unwrap().is_some() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            tap.disarm();
            note(&ended(child.wait_with_output().unwrap()).stderr);
            self.clean();
        }
        panic!("{command} was never reached");
    }

    /// Takes a snapshot of two disks whose methods want the guest to stand still, with its file systems frozen.
    fn create<F>(&self, at: (&Tap, When, &'static str), deadlines: [u64; 3], blow: F) -> Struck
    where
        F: Fn(Pair, &Side<'_>) -> Then + Clone + Send + 'static,
    {
        self.create_prepared(at, deadlines, || {}, blow)
    }

    fn create_prepared<F>(
        &self,
        at: (&Tap, When, &'static str),
        deadlines: [u64; 3],
        prepare: impl Fn(),
        blow: F,
    ) -> Struck
    where
        F: Fn(Pair, &Side<'_>) -> Then + Clone + Send + 'static,
    {
        let disks = [
            "--disk",
            "vda,method=qemu-fleece",
            "--disk",
            "vdb,method=qemu-fleece",
        ];
        let name = ["snapshot", "create", "--name", "struck", "--quiesce", "require"];
        self.strike(at, &[&name[..], &disks].concat(), deadlines, prepare, blow)
    }

    /// Waits until the guest runs and is thawed, and holds that against what it should take.
    fn let_go(&self, case: &str, struck: &Struck) {
        let bound = FACTOR * (struck.deadline + LATE);
        self.eventually(case, bound, || self.qemu.status() == "running");
        self.eventually(case, bound, || {
            self.agent.thawed().is_some_and(|at| at > struck.hit)
        });
        report(case, self.agent.thawed().unwrap() - struck.hit, struck.deadline);
    }

    /// The same, and that it was this one who did it: the first to ask for what the guest at this point needs.
    fn let_go_by(&self, case: &str, struck: &Struck, point: &str, by: By) {
        self.let_go(case, struck);
        let guardian = struck.guardian.expect("a guardian is armed");
        let who = match by {
            By::Parent => struck.pid,
            By::Guardian(_) => guardian,
        };
        assert_eq!(
            self.agent.first_to_ask("guest-fsfreeze-thaw"),
            Some(who),
            "{case}: {by:?}"
        );
        if point == "stop" {
            assert_eq!(self.monitor.first_to_ask("cont"), Some(who), "{case}: {by:?}");
        }
        if let By::Guardian(within) = by {
            let came = [&self.monitor, &self.agent].map(|tap| tap.came(guardian));
            let came = came.into_iter().flatten().min().expect("he came to ask");
            let took = came.saturating_sub(struck.over);
            note(&format!(
                "{case}: the guardian set about it after {took:?} of rests"
            ));
            assert!(took <= within, "{case}: {took:?} of rests");
        }
    }

    fn eventually(&self, case: &str, bound: Duration, so: impl Fn() -> bool) {
        let since = Instant::now();
        while !so() {
            let frozen = "the guest is not let go";
            assert!(
                since.elapsed() < bound,
                "{case}: {frozen}; it is {}",
                self.qemu.status()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The agent's own word, asked past the tap; `None` where it gives none. What it answers to those long gone comes
    /// first, and may be anything.
    fn agent_says(&self) -> Option<String> {
        let mut stream = UnixStream::connect(self.qemu.agent_path()).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
        let id = std::process::id();
        let ask = format!(
            "\n{}\n{}\n",
            json!({"execute": "guest-sync", "arguments": {"id": id}}),
            json!({"execute": "guest-fsfreeze-status"})
        );
        stream.write_all(ask.as_bytes()).ok()?;
        let mut answers = BufReader::new(stream).split(b'\n').map_while(Result::ok);
        let mut answer = || {
            serde_json::from_slice::<Value>(&answers.next()?)
                .ok()
                .or(Some(Value::Null))
        };
        while answer()?["return"] != id {}
        Some(answer()?["return"].as_str()?.to_owned())
    }

    /// Nobody sees to it that the guest is let go.
    fn stands(&self, case: &str, status: &str) {
        std::thread::sleep(Duration::from_secs(1));
        assert_eq!(
            self.qemu.status(),
            status,
            "{case}: something let it go that should be dead"
        );
        if status == "running" {
            let frozen = || self.agent_says().as_deref() == Some("frozen");
            self.eventually(case, PATIENCE, frozen);
        }
    }

    /// A hypervisor that has just woken up may be busy yet: what cannot be settled is told, and stays for the next try.
    fn recover(&self) {
        self.eventually("recover", PATIENCE, || {
            let recovered = self.site.run(&["recover"]);
            let told = String::from_utf8_lossy(&recovered.stdout);
            note(&format!("{told}{}", recovered.stderr));
            recovered.code == Some(0)
        });
    }

    fn clean(&self) {
        self.recover();
        // A merge that came to its end without its command being told has put the disk on another image.
        self.run(&["domain", "update"]);
        let there = self.run(&["snapshot", "list"]);
        for snapshot in there["snapshots"].as_array().unwrap() {
            self.run(&["snapshot", "delete", snapshot["name"].as_str().unwrap()]);
        }
    }

    /// The guest goes on, nothing is left of ours, and the same works again.
    fn is_well(&self, case: &str) {
        assert_eq!(self.qemu.status(), "running", "{case}");
        // Whoever holds the agent's socket may not have come to its turn yet.
        self.eventually(case, PATIENCE, || self.agent_says().as_deref() == Some("thawed"));
        self.clean();
        assert_eq!(leftovers(&self.site, &self.qemu), Vec::<String>::new(), "{case}");
        // The last guardian takes its note with it.
        self.eventually(case, PATIENCE, || list(&self.site.run_dir()).is_empty());
        self.qemu.wait_files(1);
        self.qemu.wait_writer(1);
    }

    fn killed_parent(&self) {
        for (tap, command) in self.points() {
            let case = format!("killed parent at {command}");
            let mut struck = self.create((tap, When::After, command), [60, 120, 300], |pair, _| {
                pair.signal_parent(Signal::KILL);
                Then::Cut
            });
            self.let_go_by(&case, &struck, command, By::Guardian(LATE));
            struck.kill();
            self.is_well(&case);
        }
    }

    /// The two moments: frozen, and paused besides.
    fn points(&self) -> [(&Tap, &'static str); 2] {
        [(&self.agent, "guest-fsfreeze-freeze"), (&self.monitor, "stop")]
    }

    /// Once it goes on, it learns that the guest was let go meanwhile.
    fn stopped_parent(&self) {
        for (tap, command) in self.points() {
            let case = format!("stopped parent at {command}");
            let struck = self.create((tap, When::After, command), [6, 30, 120], |pair, _| {
                pair.signal_parent(Signal::STOP);
                Then::Pass
            });
            let within = struck.deadline + LATE;
            self.let_go_by(&case, &struck, command, By::Guardian(within));
            kill_process(struck.pid, Signal::CONT).unwrap();
            let (code, said) = struck.ended();
            assert_ne!(code, Some(0), "{case}: {said}");
            self.is_well(&case);
        }
    }

    /// The parent lets the guest go by itself, and does not call what it has an instant.
    fn killed_guardian(&self) {
        for (tap, command) in self.points() {
            let case = format!("killed guardian at {command}");
            let struck = self.create((tap, When::After, command), [60, 120, 300], |pair, _| {
                pair.kill_guardian();
                Then::Pass
            });
            self.let_go_by(&case, &struck, command, By::Parent);
            let (code, said) = struck.ended();
            assert_ne!(code, Some(0), "{case}");
            assert!(said.contains("the guardian has died"), "{case}: {said}");
            self.is_well(&case);
        }
    }

    /// Nobody is left: the next who comes lets the guest go.
    fn both_killed(&self) {
        for ((tap, command), status) in self.points().into_iter().zip(["running", "paused"]) {
            for next in [
                &["recover"][..],
                &["-d", &self.xml, "snapshot", "create", "--name", "next"],
            ] {
                let case = format!("both killed at {command}, then {}", next.join(" "));
                let mut struck = self.create((tap, When::After, command), [60, 120, 300], |pair, _| {
                    pair.kill_both();
                    Then::Cut
                });
                struck.kill();
                self.stands(&case, status);
                let since = Instant::now();
                self.site.ok(next);
                report(&case, since.elapsed(), Duration::ZERO);
                self.is_well(&case);
            }
        }
    }

    /// The agent hangs with the order to freeze before it, and freezes when it wakes up: after the deadline.
    fn late_freeze(&self) {
        for dying in [Dying::Nobody, Dying::Parent, Dying::Guardian, Dying::Both] {
            let case = format!("an agent that freezes late, {dying:?} dies");
            let qemu = Arc::clone(&self.qemu);
            let at = (&self.agent, When::Before, "guest-fsfreeze-freeze");
            let struck = self.create(at, [4, 15, 60], move |pair, side| {
                let hangs = |text: &str| text.matches("AGENT HANGS").count();
                let before = hangs(&qemu.serial());
                side.ask(&beside_the_agent(&format!(
                    "usleep 200000; kill -STOP $PPID; echo AGENT HANGS > /dev/console; sleep {}; kill -CONT $PPID",
                    pair.deadline + 8
                )));
                qemu.wait_serial("hanging agent", |text| (hangs(text) > before).then_some(()));
                dying.die(pair);
                Then::Pass
            });
            if matches!(dying, Dying::Both) {
                // It waits for the agent, or else says that it is to be run again.
                self.eventually(&case, PATIENCE, || self.site.run(&["recover"]).code == Some(0));
            }
            let told = || self.agent.thawed().is_some_and(|at| at > struck.hit);
            self.eventually(&case, PATIENCE, told);
            report(&case, self.agent.thawed().unwrap() - struck.hit, struck.deadline);
            let (code, said) = struck.ended();
            assert_ne!(code, Some(0), "{case}: {said}");
            self.is_well(&case);
        }
    }

    /// The agent hangs and dies in the window, and the new one knows nothing of what the old one was asked meanwhile.
    fn restarted_agent(&self) {
        for (case, dying) in [
            ("restarted agent", Dying::Nobody),
            ("restarted agent, killed parent", Dying::Parent),
            ("restarted agent, both killed", Dying::Both),
        ] {
            let gone = |text: &str| text.matches("AGENT GOES").count();
            let before = Arc::new(AtomicUsize::new(0));
            let prepare = || {
                before.store(gone(&self.qemu.serial()), Ordering::SeqCst);
                self.qemu.run_in_guest(
                    "c=$(tr '\\0' ' ' < /proc/$PPID/cmdline); until [ -e /run/qga.state.isfrozen ]; do usleep 20000; \
                     done; sleep 2; kill -STOP $PPID; echo AGENT GOES > /dev/console; sleep 4; kill -9 $PPID; \
                     usleep 300000; exec $c",
                );
            };
            let (qemu, known) = (Arc::clone(&self.qemu), Arc::clone(&before));
            let at = (&self.agent, When::After, "guest-fsfreeze-freeze");
            let struck = self.create_prepared(at, [60, 120, 300], prepare, move |pair, _| {
                let before = known.load(Ordering::SeqCst);
                qemu.wait_serial("agent's end", |text| (gone(text) > before).then_some(()));
                dying.die(pair);
                Then::Pass
            });
            if matches!(dying, Dying::Both) {
                self.recover();
            } else {
                self.let_go(case, &struck);
            }
            drop(struck.ended());
            self.is_well(case);
        }
    }

    /// The monitor's connection ends under the pause; the next one lets the guest run.
    fn monitor_cut(&self) {
        let case = "monitor cut at stop";
        let at = (&self.monitor, When::After, "stop");
        let struck = self.create(at, [60, 120, 300], |_, _| Then::Cut);
        self.let_go(case, &struck);
        let (code, said) = struck.ended();
        assert_ne!(code, Some(0), "{case}: {said}");
        self.is_well(case);
    }

    /// Nothing can be asked of a hypervisor that is stopped; what it was asked it does once it goes on.
    fn hypervisor_hangs(&self) {
        for (case, dying) in [
            ("hypervisor hangs at stop", Dying::Nobody),
            ("hypervisor hangs at stop, killed parent", Dying::Parent),
        ] {
            let qemu = Arc::clone(&self.qemu);
            let struck = self.create(
                (&self.monitor, When::After, "stop"),
                [6, 30, 120],
                move |pair, _| {
                    qemu.hang();
                    dying.die(pair);
                    Then::Pass
                },
            );
            std::thread::sleep(struck.deadline + Duration::from_secs(4));
            self.qemu.unhang();
            let since = Instant::now();
            self.let_go(case, &struck);
            report("  once the hypervisor went on", since.elapsed(), Duration::ZERO);
            drop(struck.ended());
            self.is_well(case);
        }
    }

    /// The second window: from the end of a commit until it is finalized the guest's disk stands still. It does so
    /// because of the checkpoint, whose bitmap is to be kept.
    fn merge(&self) {
        let begin = [
            "snapshot",
            "create",
            "--name",
            "begin",
            "--checkpoint=begin",
            "--disk",
            "vdc,method=qemu",
        ];
        self.run(&begin);
        self.run(&["snapshot", "merge", "begin"]);
        for (command, when) in [("job-complete", When::After), ("job-finalize", When::Before)] {
            for dying in [Dying::Parent, Dying::Stopped, Dying::Guardian, Dying::Both] {
                let case = format!("merge, {dying:?} at {command}");
                let prepare = || {
                    let words = [
                        "snapshot",
                        "create",
                        "--name",
                        "merged",
                        "--disk",
                        "vdc,method=qemu",
                    ];
                    self.run(&words);
                    self.qemu.wait_writer(2);
                };
                let deadlines = match dying {
                    Dying::Stopped => [4, 30, 120],
                    _ => [60, 120, 300],
                };
                let words = ["snapshot", "merge", "merged"];
                let struck = self.strike(
                    (&self.monitor, when, command),
                    &words,
                    deadlines,
                    prepare,
                    move |pair, _| {
                        dying.die(pair);
                        match (dying, when) {
                            (Dying::Stopped, When::After) | (Dying::Guardian, _) => Then::Pass,
                            _ => Then::Cut,
                        }
                    },
                );
                if matches!(dying, Dying::Both) {
                    self.recover();
                }
                // A disk that stood still for ever would end it.
                self.qemu.wait_writer(3);
                report(&case, struck.hit.elapsed(), struck.deadline);
                if matches!(dying, Dying::Stopped) {
                    kill_process(struck.pid, Signal::CONT).unwrap();
                }
                drop(struck.ended());
                self.is_well(&case);
            }
        }
        self.run(&["checkpoint", "remove", "begin"]);
    }

    /// What the user has paused is not ours to let go.
    fn paused_by_the_user(&self) {
        let case = "paused by the user";
        let disks = [
            "--disk",
            "vda,method=qemu-fleece",
            "--disk",
            "vdb,method=qemu-fleece",
        ];
        let create = [&["snapshot", "create", "--name", "struck"][..], &disks].concat();
        for dying in [Dying::Nobody, Dying::Parent, Dying::Both] {
            self.qemu.qmp("stop", json!({}));
            let struck = self.strike(
                (&self.monitor, When::After, "qom-set"),
                &create,
                [60, 120, 300],
                || {},
                move |pair, _| {
                    dying.die_if_there(pair);
                    Then::Pass
                },
            );
            drop(struck.ended());
            assert_eq!(self.qemu.status(), "paused", "{case}, {dying:?}");
            self.recover();
            assert_eq!(self.qemu.status(), "paused", "{case}, {dying:?}, recovered");
            self.qemu.qmp("cont", json!({}));
            self.is_well(case);
        }
    }
}

/// Who dies.
#[derive(Debug, Clone, Copy)]
enum Dying {
    Nobody,
    Parent,
    Guardian,
    Both,
    /// The parent does not die, but stands still.
    Stopped,
}

impl Dying {
    fn die(self, pair: Pair) {
        match self {
            Self::Nobody => {}
            Self::Parent => pair.signal_parent(Signal::KILL),
            Self::Guardian => pair.kill_guardian(),
            Self::Both => pair.kill_both(),
            Self::Stopped => pair.signal_parent(Signal::STOP),
        }
    }

    /// Where nothing stands still because of us there may be no guardian.
    fn die_if_there(self, pair: Pair) {
        match (self, pair.guardian) {
            (Self::Both, None) => pair.signal_parent(Signal::KILL),
            _ => self.die(pair),
        }
    }
}

fn report(case: &str, took: Duration, deadline: Duration) {
    note(&format!(
        "{case}: let go after {took:.1?}, with a deadline of {deadline:?}"
    ));
}

#[expect(
    clippy::print_stderr,
    reason = "the numbers and words are for whoever runs it"
)]
fn note(text: &str) {
    eprintln!("{text}");
}

/// What strikes at the commands of the tests does not strike at the one who lets their guests go.
#[test]
fn the_guardian_knows_nothing_of_fault_points() {
    let (qemu, site) = (
        Qemu::builder().disk(DiskSpec::new("vda", 8 * MIB)).start(),
        Site::new(),
    );
    let monitor = Tap::before(&qemu.qmp_path(), site.path("qmp.sock"));
    let text = qemu
        .domain_xml()
        .replace(&arg(&qemu.qmp_path()), &arg(&monitor.socket));
    let xml = site.file("domain.xml", &text);
    let (victim, told) = (Arc::new(Mutex::new(None)), Arc::new(Mutex::new(None)));
    let (known, tell) = (Arc::clone(&victim), Arc::clone(&told));
    let look = move |_: &Side<'_>| {
        let parent = loop {
            if let Some(pid) = *known.lock().unwrap() {
                break pid;
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        let both = Pair::of(parent, 0)
            .guardian
            .map(|guardian| [parent, guardian].map(environment));
        *tell.lock().unwrap() = both;
        Then::Pass
    };
    monitor.arm(When::After, "stop", Box::new(look));
    let disk = ["--disk", "vda,method=qemu-fleece"];
    let words = [&["-d", &xml, "snapshot", "create"][..], &disk].concat();
    let mut create = site.command(&words);
    create.env("DISKSNAP_FAULT", "before what is never done:1");
    create.env("DISKSNAP_FAULT_LOG", site.path("points"));
    create.stdout(Stdio::null()).stderr(Stdio::piped());
    let child = create.spawn().unwrap();
    *victim.lock().unwrap() = Some(Pid::from_child(&child));
    let ended = child.wait_with_output().unwrap();
    assert!(ended.status.success(), "{ended:?}");
    let points = std::fs::read_to_string(site.path("points")).unwrap();
    assert!(points.contains("guardian start"), "{points}");
    let both = told.lock().unwrap().take();
    let [parents, its] = both.expect("the guest was paused, and guarded");
    assert!(parents.contains("DISKSNAP_FAULT="), "{parents}");
    assert!(its.contains("DISKSNAP_GUARDIAN="), "{its}");
    assert!(!its.contains("DISKSNAP_FAULT"), "{its}");
}

/// What it was started with, if it is there.
fn environment(pid: Pid) -> String {
    let bytes = std::fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero())).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[test]
fn the_guest_is_let_go_whoever_dies() {
    need!("guest");
    let scene = Scene::new();
    scene.killed_parent();
    scene.stopped_parent();
    scene.killed_guardian();
    scene.both_killed();
    scene.monitor_cut();
    scene.hypervisor_hangs();
    scene.paused_by_the_user();
}

#[test]
fn the_guest_is_let_go_whatever_its_agent_does() {
    need!("guest");
    let scene = Scene::new();
    scene.late_freeze();
    scene.restarted_agent();
}

#[test]
fn a_merged_disk_is_let_go_whoever_dies() {
    need!("guest");
    Scene::new().merge();
}
