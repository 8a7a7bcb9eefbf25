//! The half of the walk that runs in the guest: a domain that is off, with a classic and a thin volume, and the command that
//! is killed. It looks at less than the walks on the host do, since the guest is slow: at LVM, the catalog and the files.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{ANSWER, Answer, TASK, Task};
use crate::site::{Site, list};
use crate::world::plain;

/// The volumes, in MiB; the same for both.
const SIZE: usize = 4;
/// What the disks hold at the snapshot, and what they hold now.
const THEN: u8 = 0x11;
const NOW: u8 = 0x22;
const KILLED: i32 = 9;
/// The domain's disks, by target.
const DISKS: [(&str, &str); 2] = [("vda", "/dev/vg/plain"), ("vdb", "/dev/vg/thin")];
/// Where the state directory is that all parts of the walk find.
const PLACE: &str = "/tmp/site";

/// One act.
pub(super) struct Act {
    pub(super) name: &'static str,
    /// What was done before, a command each.
    prepare: &'static [&'static str],
    words: &'static str,
    /// The exit code of the same request where it has been done.
    done: i32,
    /// What takes away all that it and its preparation have made.
    undo: &'static [&'static str],
}

const CREATE: &str =
    "snapshot create --name one --disk vda,method=lvm,snapshot.size=100%ORIGIN --disk vdb,method=lvm";
const MARKED: &str = "snapshot create --name one --checkpoint --disk vdb,method=lvm";

pub(super) const ACTS: &[Act] = &[
    Act {
        name: "create",
        prepare: &[],
        words: CREATE,
        done: 4,
        undo: &["snapshot delete one"],
    },
    Act {
        name: "create --checkpoint",
        prepare: &[],
        words: MARKED,
        done: 4,
        undo: &["snapshot delete one", "checkpoint remove one"],
    },
    Act {
        name: "delete",
        prepare: &[CREATE],
        words: "snapshot delete one",
        done: 0,
        undo: &[],
    },
    Act {
        name: "delete, pinned by a checkpoint",
        prepare: &[MARKED],
        words: "snapshot delete one",
        done: 0,
        undo: &["checkpoint remove one"],
    },
    Act {
        name: "export start",
        prepare: &[CREATE],
        words: "export start one",
        done: 4,
        undo: &["export stop --all", "snapshot delete one"],
    },
    Act {
        name: "export stop",
        prepare: &[CREATE, "export start one"],
        words: "export stop one",
        done: 0,
        undo: &["snapshot delete one"],
    },
    Act {
        name: "checkpoint remove",
        prepare: &[MARKED, "snapshot delete one"],
        words: "checkpoint remove one",
        done: 3,
        undo: &[],
    },
    Act {
        name: "revert",
        prepare: &[CREATE],
        words: "snapshot revert one",
        // LVM's merge takes the snapshot along.
        done: 3,
        undo: &[],
    },
];

/// What there is, as lines without what differs from run to run.
type World = BTreeSet<String>;

/// The domain and its state directory.
struct Volumes {
    site: Site,
    xml: String,
}

fn run(line: &str) -> String {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

impl Volumes {
    /// In the directory that is there from the first part on.
    fn new() -> Self {
        std::fs::create_dir_all(PLACE).unwrap();
        let site = Site {
            dir: TempDir::new_in(PLACE).unwrap(),
        };
        let disk = |(target, device): (&str, &str)| {
            format!(
                "<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='{device}'/>\
                 <target dev='{target}' bus='virtio'/></disk>"
            )
        };
        let xml = format!(
            "<domain type='qemu'><name>off</name><uuid>6f3c5a4e-0000-4000-8000-00000000000b</uuid><devices>{}\
             </devices></domain>",
            DISKS.map(disk).concat()
        );
        let xml = site.file("off.xml", &xml);
        let volumes = Self { site, xml };
        // The first act of all makes what stays: the state directory, and the domain's lock.
        let nothing = crate::site::ended(volumes.command("snapshot delete none").output().unwrap());
        assert_eq!(nothing.code, Some(3), "{}", nothing.stderr);
        volumes
    }

    fn command(&self, line: &str) -> Command {
        let words: Vec<&str> = line.split_whitespace().collect();
        self.site.command(&[&["-d", &self.xml], &words[..]].concat())
    }

    fn ok(&self, line: &str) -> String {
        let ended = crate::site::ended(self.command(line).output().unwrap());
        assert_eq!(ended.code, Some(0), "{line}: {}", ended.stderr);
        String::from_utf8(ended.stdout).unwrap()
    }

    fn prepare(&self, act: &Act) {
        fill(THEN);
        for line in act.prepare {
            self.ok(line);
        }
        fill(NOW);
    }

    fn undo(&self, act: &Act) {
        for line in act.undo {
            self.ok(line);
        }
    }

    fn world(&self) -> World {
        let fields = "lv_name,lv_size,origin,pool_lv,lv_attr,lv_tags";
        let volumes = run(&format!("lvs -a --noheadings --separator | -o {fields} vg"));
        // How far a copy-on-write device is filled, or open at this moment, is no difference.
        let mut lines: Vec<String> = volumes.lines().map(|line| plain(line.trim())).collect();
        let devices = run("dmsetup ls");
        let names = devices.lines().filter_map(|line| line.split_whitespace().next());
        lines.extend(names.map(|name| format!("device {}", plain(name))));
        for dir in [self.site.state().join("images"), self.site.run_dir()] {
            let left = list(&dir).into_iter();
            lines.extend(left.map(|path| plain(&self.site.short(&path.display().to_string()))));
        }
        lines.extend(servers());
        let lists = [
            ("snapshot", "snapshot list"),
            ("checkpoint", "checkpoint list"),
            ("export", "export list"),
        ];
        for (what, words) in lists {
            let told: Value = serde_json::from_str(&self.ok(&format!("{words} --output json"))).unwrap();
            lines.extend(crate::world::listed(&told).map(|line| format!("{what} {}", plain(&line))));
        }
        lines.extend(DISKS.map(|(target, device)| format!("{target} holds {}", content(Path::new(device)))));
        let mut counted = World::new();
        for line in lines {
            let mut n = 1;
            while !counted.insert(format!("{line} ({n})")) {
                n += 1;
            }
        }
        counted
    }

    /// Runs it through.
    fn learn(&self, act: &Act, log: &Path) -> Known {
        // Whatever the disks hold, which reverts change.
        fill(NOW);
        let bare = self.world();
        self.prepare(act);
        let before = self.world();
        let mut command = self.command(act.words);
        command.env("DISKSNAP_FAULT_LOG", log);
        let ended = crate::site::ended(command.output().unwrap());
        assert_eq!(ended.code, Some(0), "{}: {}", act.words, ended.stderr);
        let after = self.world();
        let again = crate::site::ended(self.command(act.words).output().unwrap());
        assert_eq!(again.code, Some(act.done), "done again: {}", again.stderr);
        self.undo(act);
        fill(NOW);
        let left = compared(&bare, &self.world_like(&[&bare]));
        assert_eq!(left, Vec::<String>::new(), "undone, it leaves");
        Known { bare, before, after }
    }

    /// How it is once it is like one of these; a server that was told to end takes a moment.
    fn world_like(&self, one_of: &[&World]) -> World {
        let since = Instant::now();
        loop {
            let world = self.world();
            if one_of.contains(&&world) || since.elapsed() > Duration::from_secs(10) {
                return world;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// One kill, and what does not hold afterwards.
    fn round(&self, act: &Act, point: &str, known: &Known, recover: bool) -> Vec<String> {
        self.prepare(act);
        let mut command = self.command(act.words);
        command
            .env("DISKSNAP_FAULT", point)
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let killed = command.output().unwrap();
        if killed.status.signal() != Some(KILLED) {
            let said = String::from_utf8_lossy(&killed.stderr);
            return vec![format!("the point was not reached: {}: {said}", killed.status)];
        }
        let mut wrong = Vec::new();
        if recover {
            wrong.extend(self.recover());
            let world = self.world_like(&[&known.before, &known.after]);
            if world != known.before && world != known.after {
                wrong.push(format!(
                    "recovered, it is not as before {:#?}, nor as after {:#?}",
                    compared(&known.before, &world),
                    compared(&known.after, &world)
                ));
            }
        }
        let again = crate::site::ended(self.command(act.words).output().unwrap());
        if again.code != Some(0) && again.code != Some(act.done) {
            wrong.push(format!("the same again: {:?}: {}", again.code, again.stderr));
        }
        let world = self.world_like(&[&known.after]);
        if world != known.after {
            wrong.push(format!(
                "done again, it is not as after: {:#?}",
                compared(&known.after, &world)
            ));
        }
        self.undo(act);
        fill(NOW);
        let world = self.world_like(&[&known.bare]);
        if world != known.bare {
            wrong.push(format!(
                "undone, it is not as before all: {:#?}",
                compared(&known.bare, &world)
            ));
        }
        let nothing = self.site.run(&["recover", "--output", "json"]);
        let told: Value = serde_json::from_slice(&nothing.stdout).unwrap_or_default();
        if told["recovered"] != json!([]) {
            wrong.push(format!("recover has something to do: {told}{}", nothing.stderr));
        }
        wrong
    }

    fn recover(&self) -> Option<String> {
        let recovered = self.site.run(&["recover"]);
        (recovered.code != Some(0)).then(|| format!("recover: {:?}: {}", recovered.code, recovered.stderr))
    }
}

/// How it is without a kill.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Known {
    bare: World,
    before: World,
    after: World,
}

fn compared(was: &World, is: &World) -> Vec<String> {
    let more = is.difference(was).map(|line| format!("+ {line}"));
    more.chain(was.difference(is).map(|line| format!("- {line}")))
        .collect()
}

/// Fills both disks with one byte, on to the disk itself.
fn fill(byte: u8) {
    for (_, device) in DISKS {
        let file = std::fs::OpenOptions::new().write(true).open(device).unwrap();
        file.write_all_at(&vec![byte; SIZE << 20], 0).unwrap();
        file.sync_all().unwrap();
    }
}

/// The servers of images that run.
fn servers() -> Vec<String> {
    // One that has ended and that nobody has waited for has no words any more.
    let named = |dir: &Path| {
        let words = std::fs::read_to_string(dir.join("cmdline")).ok()?;
        let program = words.split('\0').next()?;
        program
            .ends_with("qemu-storage-daemon")
            .then(|| "a server of images".to_owned())
    };
    list(Path::new("/proc"))
        .iter()
        .filter_map(|dir| named(dir))
        .collect()
}

/// The byte that a device is full of, or that it is full of none.
fn content(device: &Path) -> String {
    let bytes = std::fs::read(device).unwrap();
    match bytes.first() {
        Some(first) if bytes.iter().all(|byte| byte == first) => {
            format!("{} bytes of {first:#x}", bytes.len())
        }
        _ => "this and that".to_owned(),
    }
}

fn make() {
    run("vgcreate -y -s 64k vg /dev/vda");
    run(&format!("lvcreate -y -Wn -L {SIZE}m -n plain vg"));
    run("lvcreate -y --type thin-pool -Zn -c 64k -L 32m --poolmetadatasize 2m -n pool vg");
    run(&format!("lvcreate -y -V {SIZE}m --thinpool vg/pool -n thin"));
    fill(THEN);
}

fn act(name: &str) -> &'static Act {
    ACTS.iter().find(|act| act.name == name).unwrap()
}

#[expect(clippy::print_stdout, reason = "the other half reads it")]
fn answer(answer: &Answer) {
    println!("\n{ANSWER}{}", serde_json::to_string(answer).unwrap());
}

#[test]
#[ignore = "runs in the guest"]
fn does_its_task() {
    let Ok(task) = std::env::var(TASK) else { return };
    match serde_json::from_str(&task).unwrap() {
        Task::Make => make(),
        Task::Learn(name) => {
            let (volumes, act) = (Volumes::new(), act(&name));
            let log = volumes.site.path("points");
            let known = volumes.learn(act, &log);
            let points = std::fs::read_to_string(log).unwrap();
            answer(&Answer::Learnt(points, known));
        }
        Task::Walk(name, known, points) => {
            let (volumes, act) = (Volumes::new(), act(&name));
            for (n, point) in points.into_iter().enumerate() {
                let wrong = volumes.round(act, &point, &known, n.is_multiple_of(2));
                let failed = !wrong.is_empty();
                answer(&Answer::Tried(point, wrong));
                if failed {
                    break;
                }
            }
        }
    }
}
