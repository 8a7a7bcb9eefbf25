//! `disksnap backup serve`: real clients look at points, and nothing outlives the command, whatever it dies of.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use disksnap_test_support::{DiskSpec, KIB, MIB, Qemu, QemuBuilder, pattern, tools};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::backups::Night;
use crate::kills::kill_after;
use crate::programs::program;
use crate::site::{Ended, Site, arg, ended, list};

/// A domain with two points, and what its disks held at each.
struct Shelf {
    night: Night,
    points: Vec<(String, [Vec<u8>; 2])>,
}

impl Shelf {
    fn new() -> Self {
        let disks = [
            DiskSpec::new("vda", 8 * MIB).qcow2(),
            DiskSpec::new("vdb", 4 * MIB),
        ];
        let night = Night::new(disks.into_iter().fold(Qemu::builder(), QemuBuilder::disk));
        let mut points = Vec::new();
        for round in 1..=2 {
            for (n, target) in ["vda", "vdb"].into_iter().enumerate() {
                let disk = night.machine.disk(target);
                disk.write(MIB, &pattern::bytes(round * 7 + n as u64, 96 << 10));
                disk.fill(round * MIB + 512, 64 * KIB, u8::try_from(round).unwrap());
                disk.zero(3 * MIB, round * 64 * KIB);
            }
            let disks = ["vda", "vdb"].map(|target| night.now(target));
            let point = night.json(&["create"]);
            points.push((point["point"].as_str().unwrap().to_owned(), disks));
        }
        Self { night, points }
    }

    fn command(&self, words: &[&str]) -> Command {
        let words = [&["serve"], words, &["--output", "json"]].concat();
        self.night.site.command(&self.night.words(&words))
    }

    /// Begins to serve, and waits until it says that it does.
    fn serve(&self, words: &[&str]) -> Look {
        Look::new(self.command(words)).unwrap()
    }

    /// The same on a port, which somebody else may take between the look for a free one and the use.
    fn serve_on_port(&self, words: &[&str]) -> Look {
        loop {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let place = listener.local_addr().unwrap().to_string();
            drop(listener);
            match Look::new(self.command(&[&["--listen", &place], words].concat())) {
                Err(ended) if ended.code == Some(6) => {}
                look => return look.unwrap(),
            }
        }
    }

    /// Is refused, and leaves nothing.
    fn refused(&self, code: i32, words: &[&str]) -> String {
        let before = self.sockets();
        let ended = ended(self.command(words).output().unwrap());
        assert_eq!(ended.code, Some(code), "{words:?}: {}", ended.stderr);
        assert!(
            self.sockets().iter().all(|socket| before.contains(socket)),
            "{words:?}"
        );
        ended.stderr
    }

    fn sockets(&self) -> Vec<PathBuf> {
        let mut found = list(&self.night.site.run_dir());
        found.retain(|path| path.extension().is_some_and(|x| x == "sock") && arg(path).contains("serve-"));
        found
    }

    /// Drops all but the latest point.
    fn prune(&self) -> Ended {
        self.night
            .site
            .run(&self.night.words(&["prune", "--keep-last", "1"]))
    }
}

/// The command that serves.
#[derive(Debug)]
struct Look {
    child: Child,
    told: Value,
    _stdout: BufReader<ChildStdout>,
}

impl Drop for Look {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Look {
    /// Or how it ended without serving.
    fn new(mut command: Command) -> Result<Self, Ended> {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut text = String::new();
        while !text.ends_with("\n}\n") {
            if stdout.read_line(&mut text).unwrap() == 0 {
                return Err(ended(child.wait_with_output().unwrap()));
            }
        }
        let told = serde_json::from_str(&text).unwrap();
        Ok(Self {
            child,
            told,
            _stdout: stdout,
        })
    }

    fn uri(&self, n: usize) -> String {
        self.told["disks"][n]["uri"].as_str().unwrap().to_owned()
    }

    /// The processes that it has started.
    fn daemons(&self) -> Vec<u32> {
        let tasks = list(PathBuf::from(format!("/proc/{}/task", self.child.id())).as_path());
        let children = tasks
            .iter()
            .map(|task| std::fs::read_to_string(task.join("children")).unwrap());
        children
            .flat_map(|pids| {
                pids.split_whitespace()
                    .map(|pid| pid.parse().unwrap())
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    fn send(&self, signal: Signal) {
        kill(self.child.id(), signal);
    }

    /// How it ended; what it had started is gone by then, or soon is.
    fn ended(mut self) -> (Option<i32>, String) {
        use std::io::Read;
        let mut stderr = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut stderr)
            .unwrap();
        (self.child.wait().unwrap().code(), stderr)
    }
}

fn kill(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
}

/// Whether a process runs; one that nobody has waited for does not.
fn runs(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = status
        .rsplit(')')
        .next()
        .and_then(|rest| rest.trim().chars().next());
    state.is_some_and(|state| state != 'Z' && state != 'X')
}

fn wait_gone(pids: &[u32]) {
    let since = Instant::now();
    while pids.iter().any(|pid| runs(*pid)) {
        assert!(since.elapsed() < Duration::from_mins(2), "{pids:?} live on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn real_clients_read_each_point_as_the_disks_were() {
    let shelf = Shelf::new();
    let site = &shelf.night.site;
    let (first, latest) = (&shelf.points[0], &shelf.points[1]);
    let look = shelf.serve(&[&first.0]);
    assert_eq!(look.told["point"], first.0.as_str());
    let daemons = look.daemons();
    assert_eq!(daemons.len(), 1);
    for (n, (target, was)) in ["vda", "vdb"].into_iter().zip(&first.1).enumerate() {
        let info: Value = serde_json::from_str(&program("nbdinfo", &["--json", &look.uri(n)])).unwrap();
        let export = &info["exports"][0];
        assert_eq!(
            (
                &export["export-name"],
                &export["export-size"],
                &export["is_read_only"]
            ),
            (&target.into(), &was.len().into(), &true.into())
        );
        let to = site.path(&format!("{target}.copy"));
        program("nbdcopy", &[&look.uri(n), &arg(&to)]);
        assert!(std::fs::read(&to).unwrap() == *was, "{target} at {}", first.0);
        let refused = Command::new(tools::program("qemu-io"))
            .args(["-f", "raw", "-c", "write 0 64k", &look.uri(n)])
            .output()
            .unwrap();
        assert!(!refused.status.success(), "{refused:?}");
    }
    // Another point beside it, and two clients at once.
    let other = shelf.serve(&["latest", "--disk", "vdb"]);
    assert_eq!(other.told["disks"].as_array().unwrap().len(), 1);
    assert_eq!(other.told["disks"][0]["images"], 2);
    let copies = ["one.raw", "two.raw"].map(|name| site.path(name));
    std::thread::scope(|scope| {
        for to in &copies {
            scope.spawn(|| {
                program(
                    "qemu-img",
                    &["convert", "-f", "raw", "-O", "raw", &other.uri(0), &arg(to)],
                )
            });
        }
    });
    for to in &copies {
        assert!(std::fs::read(to).unwrap() == latest.1[1], "{}", to.display());
    }
    assert_eq!(shelf.sockets().len(), 2);
    look.send(Signal::INT);
    let (code, said) = look.ended();
    assert_eq!((code, said.as_str()), (Some(130), ""));
    wait_gone(&daemons);
    assert_eq!(shelf.sockets().len(), 1);
    other.send(Signal::TERM);
    assert_eq!(other.ended().0, Some(143));
    assert_eq!(shelf.sockets(), Vec::<PathBuf>::new());
}

#[test]
fn a_point_that_is_served_is_not_taken_away_and_a_kill_leaves_nothing() {
    let shelf = Shelf::new();
    let look = shelf.serve(&[]);
    let busy = shelf.prune();
    assert_eq!(busy.code, Some(6), "{}", busy.stderr);
    assert!(busy.stderr.contains("holds the lock"), "{}", busy.stderr);
    let to = shelf.night.site.path("copy.raw");
    program("nbdcopy", &[&look.uri(0), &arg(&to)]);
    assert!(std::fs::read(&to).unwrap() == shelf.points[1].1[0]);

    let daemons = look.daemons();
    assert_eq!(daemons.len(), 1);
    look.send(Signal::KILL);
    assert_eq!(look.ended().0, None);
    wait_gone(&daemons);
    let pruned = shelf.prune();
    assert_eq!(pruned.code, Some(0), "{}", pruned.stderr);
    // What is left of the one that was killed goes with the next.
    let stale = shelf.sockets();
    assert_eq!(stale.len(), 1);
    let look = shelf.serve(&[]);
    assert_eq!(shelf.sockets().len(), 1);
    assert_ne!(shelf.sockets(), stale);
    assert_eq!(look.told["disks"][0]["images"], 1);
    program("nbdcopy", &[&look.uri(0), &arg(&to)]);
    assert!(std::fs::read(&to).unwrap() == shelf.points[1].1[0]);
}

/// The processes that have a path of this site on their command line.
fn of_site(site: &Site) -> Vec<u32> {
    let path = site.dir.path().display().to_string();
    let pids = list("/proc".as_ref());
    let pids = pids
        .iter()
        .filter_map(|entry| entry.file_name()?.to_str()?.parse().ok());
    let names_it = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&path) && runs(*pid)
    };
    pids.filter(names_it).collect()
}

#[test]
fn killed_at_any_moment_of_its_start_it_leaves_no_daemon() {
    let shelf = Shelf::new();
    let words = shelf.night.words(&["serve"]);
    let since = Instant::now();
    drop(shelf.serve(&[]));
    let (whole, rounds) = (since.elapsed(), 16);
    let killed = (0..rounds).filter(|round| {
        let at_work = kill_after(&shelf.night.site, whole * *round / rounds, &words);
        let since = Instant::now();
        while !of_site(&shelf.night.site).is_empty() {
            assert!(
                since.elapsed() < Duration::from_mins(2),
                "round {round}: a daemon lives on"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        at_work
    });
    assert!(
        killed.count() > 4,
        "hardly one was killed at work: the test proves little"
    );
    let look = shelf.serve(&[]);
    assert_eq!(shelf.sockets().len(), 1);
    drop(look);
}

#[test]
fn a_daemon_that_dies_is_told() {
    let shelf = Shelf::new();
    let look = shelf.serve(&[]);
    kill(look.daemons()[0], Signal::KILL);
    let (code, said) = look.ended();
    assert_eq!(code, Some(8), "{said}");
    assert!(said.contains("the storage daemon has ended (signal: 9"), "{said}");
    assert_eq!(shelf.sockets(), Vec::<PathBuf>::new());
}

#[test]
fn addresses_follow_the_rules_of_exports() {
    let shelf = Shelf::new();
    let site = &shelf.night.site;
    let said = shelf.refused(7, &["--listen", "0.0.0.0:10809"]);
    assert!(said.contains("could read the disks"), "{said}");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = taken.local_addr().unwrap().to_string();
    let said = shelf.refused(6, &["--listen", &place]);
    assert!(said.contains("is in use"), "{said}");
    drop(taken);
    let file = site.file("file", "precious");
    let said = shelf.refused(4, &["--listen", &format!("unix:{file}")]);
    assert!(said.contains("is not a socket"), "{said}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");

    let socket = arg(&site.path("my.sock"));
    let look = shelf.serve(&["--listen", &format!("unix:{socket}")]);
    assert!(
        look.uri(0).ends_with(&format!("?socket={socket}")),
        "{}",
        look.uri(0)
    );
    let said = shelf.refused(6, &["--listen", &format!("unix:{socket}")]);
    assert!(said.contains("somebody already does"), "{said}");
    look.send(Signal::TERM);
    assert_eq!(look.ended().0, Some(143));
    assert!(!site.path("my.sock").exists());

    let pki = site.path("pki");
    crate::exports::credentials(&pki);
    let pki = arg(&pki);
    let said = shelf.refused(2, &["--tls-credentials", &pki]);
    assert!(said.contains("TLS is for TCP"), "{said}");
    let look = shelf.serve_on_port(&["--tls-credentials", &pki]);
    assert_eq!(
        (&look.told["tls"], &look.told["verifyClient"]),
        (&pki.as_str().into(), &true.into())
    );
    let to = site.path("tls.raw");
    let verified = format!("{}?tls-certificates={pki}", look.uri(0));
    program("nbdcopy", &[&verified, &arg(&to)]);
    assert!(std::fs::read(&to).unwrap() == shelf.points[1].1[0]);
    let another = shelf.serve_on_port(&["--tls-credentials", &pki, "--allow-client", "CN=somebody else"]);
    let named = format!("{}?tls-certificates={pki}", another.uri(0));
    for unverified in [look.uri(0), look.uri(0).replacen("nbds", "nbd", 1), named] {
        let output = Command::new(tools::program("nbdinfo"))
            .arg(&unverified)
            .output()
            .unwrap();
        assert!(!output.status.success(), "{unverified}: {output:?}");
    }
}

#[test]
fn what_cannot_be_served_is_named() {
    let shelf = Shelf::new();
    let night = &shelf.night;
    let said = shelf.refused(3, &["--disk", "vdz"]);
    assert!(
        said.contains("no disk 'vdz'") && said.contains("vda, vdb"),
        "{said}"
    );
    shelf.refused(3, &["2001"]);
    let mut without = shelf.command(&[]);
    let output = without
        .env("DISKSNAP_STORAGE_DAEMON", "/nowhere/daemon")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(8), "{output:?}");
    let mut failing = shelf.command(&[]);
    let output = failing
        .env("DISKSNAP_STORAGE_DAEMON", "/bin/false")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(8), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("has ended (exit status: 1)"),
        "{output:?}"
    );
    assert_eq!(shelf.sockets(), Vec::<PathBuf>::new());

    // A header that has QEMU open another file.
    let point = serde_json::json!({ "point": shelf.points[0].0 });
    let image = night.image(&point, "vda");
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&image)
        .unwrap();
    let mut features = [0; 8];
    file.read_exact_at(&mut features, 72).unwrap();
    let external = (u64::from_be_bytes(features) | 1 << 2).to_be_bytes();
    file.write_all_at(&external, 72).unwrap();
    let said = shelf.refused(11, &[]);
    assert!(
        said.contains("is damaged") && said.contains(&shelf.points[0].0),
        "{said}"
    );
    file.write_all_at(&features, 72).unwrap();
    shelf.serve(&[]);
    std::fs::remove_file(&image).unwrap();
    let said = shelf.refused(11, &[]);
    assert!(said.contains("it is missing"), "{said}");
    shelf.serve(&["--disk", "vdb"]);
}
