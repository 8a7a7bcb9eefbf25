//! What is written while a snapshot is taken leaves it whole.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::file_systems::Mounted;
use crate::support::{Group, Rig, block, device, file, inside, run, try_run};

/// How often each is tried.
const ROUNDS: u32 = 6;

/// Does one thing again and again in a thread of its own.
struct Busy {
    end: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Busy {
    fn new(mut act: impl FnMut(u64) + Send + 'static) -> Self {
        let (end, done) = (Arc::default(), Arc::default());
        let (ends, counts): (Arc<AtomicBool>, Arc<AtomicU64>) = (Arc::clone(&end), Arc::clone(&done));
        let thread = std::thread::spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                act(counts.fetch_add(1, Ordering::Relaxed));
                std::thread::yield_now();
            }
        });
        Self {
            end,
            done,
            thread: Some(thread),
        }
    }

    fn wait(&self, more: u64) {
        let (goal, begun) = (self.done.load(Ordering::Relaxed) + more, Instant::now());
        while self.done.load(Ordering::Relaxed) < goal {
            assert!(
                begun.elapsed() < Duration::from_mins(2),
                "the writer stands still"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

/// The kernel holds a mounted file system still for as long as the take lasts: no journal needs to be replayed.
/// The control copies the device as it is written to, which does need it, or more.
#[tokio::test]
#[ignore = "runs in the guest"]
#[expect(clippy::print_stderr, reason = "how the control went is worth seeing")]
async fn a_mounted_ext4_is_clean_in_every_snapshot() {
    let group = Group::new("vg", "");
    group.pool("pool", 128);
    let mut unsound = 0;
    for volume in [group.plain("plain", 24), group.thin("pool", "thin", 24)] {
        run(&format!("mke2fs -q -t ext4 {}", volume.display()));
        let live = Path::new("/mnt/live");
        let mounted = Mounted::new(&volume, live, "");
        std::fs::write(live.join("disk.raw"), vec![0; 1 << 20]).unwrap();
        let rig = Rig::new(vec![file("vda", &live.join("disk.raw"))]);
        let busy = Busy::new(|n| {
            let file = PathBuf::from(format!("/mnt/live/{}", n % 40));
            if n % 3 == 0 {
                let _ = std::fs::remove_file(file);
            } else {
                std::fs::write(file, vec![1; 5000 + usize::try_from(n % 7).unwrap() * 9000]).unwrap();
            }
        });
        for round in 0..ROUNDS {
            busy.wait(5);
            let snapshot = rig.create(&round.to_string()).await;
            let taken = &inside(&snapshot, "vda").device;
            try_run(&["e2fsck", "-fn", taken.to_str().unwrap()])
                .unwrap_or_else(|why| panic!("round {round}: {why}"));
            rig.delete(&round.to_string()).await;
        }
        for _ in 0..ROUNDS {
            busy.wait(5);
            run(&format!("dd if={} of=/tmp/copy bs=1M", volume.display()));
            unsound += u32::from(try_run(&["e2fsck", "-fn", "/tmp/copy"]).is_err());
            std::fs::remove_file("/tmp/copy").unwrap();
        }
        drop(busy);
        drop(mounted);
    }
    eprintln!("copied as it was written to: {unsound} of {} unsound", 2 * ROUNDS);
    assert!(unsound > 0, "the control must fail, or the check proves nothing");
}

/// A volume that a storage daemon holds; the guest's side is a file.
pub(crate) struct Daemon {
    child: Child,
    pub(crate) guest: PathBuf,
    pub(crate) monitor: PathBuf,
    _dir: tempfile::TempDir,
}

impl Daemon {
    pub(crate) fn start(volume: &Path, format: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (guest, monitor) = (dir.path().join("guest"), dir.path().join("qmp"));
        File::create(&guest).unwrap();
        let volume = volume.display();
        let node = format!("driver={format},node-name=disk,file.driver=host_device,file.filename={volume}");
        let socket = format!("socket,id=qmp,path={},server=on,wait=off", monitor.display());
        let export = format!(
            "type=fuse,id=out,node-name=disk,mountpoint={},writable=on",
            guest.display()
        );
        let child = Command::new("qemu-storage-daemon")
            .args(["--chardev", &socket, "--monitor", "chardev=qmp"])
            .args(["--blockdev", &node, "--export", &export])
            .spawn()
            .unwrap();
        let begun = Instant::now();
        while guest.metadata().unwrap().len() == 0 {
            assert!(
                begun.elapsed() < Duration::from_mins(1),
                "the daemon does not start"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        Self {
            child,
            guest,
            monitor,
            _dir: dir,
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = try_run(&["umount", self.guest.to_str().unwrap()]);
    }
}

/// One volume is one instant by itself: what was flushed before is in it, in the order it was written.
#[tokio::test]
#[ignore = "runs in the guest"]
async fn a_raw_volume_is_one_instant() {
    let group = Group::new("vg", "");
    let volume = group.plain("disk", 16);
    let rig = Rig::new(vec![block("vda", &volume)]);
    let file = File::options().write(true).open(&volume).unwrap();
    let busy = Busy::new(move |n| {
        for at in [0, 8 << 20] {
            file.write_all_at(&[n.to_le_bytes(); 64].concat(), at).unwrap();
            file.sync_data().unwrap();
        }
    });
    for round in 0..ROUNDS {
        busy.wait(3);
        let snapshot = rig.create(&round.to_string()).await;
        let taken = File::open(device(&snapshot, "vda")).unwrap();
        let number = |at: u64| {
            let mut bytes = [0; 8];
            taken.read_exact_at(&mut bytes, at).unwrap();
            u64::from_le_bytes(bytes)
        };
        let (first, second) = (number(0), number(8 << 20));
        assert!(
            first == second || first == second + 1,
            "{first} and {second} are no instant"
        );
        drop(taken);
        rig.delete(&round.to_string()).await;
    }
}
