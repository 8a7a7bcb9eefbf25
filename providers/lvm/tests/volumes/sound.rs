//! What is written while a snapshot is taken leaves it whole.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use disksnap_core::{DiskSnapshot, SnapshotId, Source};
use disksnap_lvm::LogicalVolume;

use crate::file_systems::Mounted;
use crate::support::{Group, Rig, block, device, file, formatted, inside, run, try_run};

/// How often each is tried.
const ROUNDS: u32 = 6;

/// Does one thing again and again in a thread of its own; holding [`Busy::still`] makes it stand still.
struct Busy {
    end: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    turn: Arc<Mutex<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Busy {
    fn new(mut act: impl FnMut(u64) + Send + 'static) -> Self {
        let (end, done, turn) = (Arc::default(), Arc::default(), Arc::default());
        let (ends, counts, turns): (Arc<AtomicBool>, Arc<AtomicU64>, Arc<Mutex<()>>) =
            (Arc::clone(&end), Arc::clone(&done), Arc::clone(&turn));
        let thread = std::thread::spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                {
                    let _turn = turns.lock().unwrap();
                    act(counts.fetch_add(1, Ordering::Relaxed));
                }
                std::thread::yield_now();
            }
        });
        Self {
            end,
            done,
            turn,
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

    fn still(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap()
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

/// Writes scattered blocks and flushes now and then, so that clusters are allocated all the time.
fn scattered(guest: &Path) -> Busy {
    let file = File::options().read(true).write(true).open(guest).unwrap();
    Busy::new(move |n| {
        let at = (n * 0x9e37_79b9) % (48 << 20) / 4096 * 4096;
        file.write_all_at(&[u8::try_from(n % 255).unwrap() + 1; 4096], at)
            .unwrap();
        if n % 16 == 0 {
            file.sync_all().unwrap();
        }
    })
}

/// With the guest standing still and its writes flushed, as in the window, `qemu-img check` finds nothing.
#[tokio::test]
#[ignore = "runs in the guest"]
#[expect(clippy::print_stderr, reason = "how the control went is worth seeing")]
async fn a_qcow2_image_is_sound_when_its_writer_stands_still() {
    let group = Group::new("vg", "");
    let volume = group.plain("disk", 56);
    run(&format!(
        "qemu-img create -q -f qcow2 -o cluster_size=4096 {} 48M",
        volume.display()
    ));
    let rig = Rig::new(vec![formatted(
        "vda",
        Source::Block { dev: volume.clone() },
        "qcow2",
    )]);
    let daemon = Daemon::start(&volume, "qcow2");
    let flush = File::options().write(true).open(&daemon.guest).unwrap();
    let busy = scattered(&daemon.guest);
    let (control, requests) = (rig.control().await, rig.requests(&[]));
    let mut unsound = 0;
    for round in 0..2 * ROUNDS {
        busy.wait(20);
        let id = SnapshotId::random();
        let prepared = LogicalVolume.prepare(&*control, id, &requests).await.unwrap();
        let still = (round % 2 == 0).then(|| {
            let still = busy.still();
            flush.sync_all().unwrap();
            still
        });
        let taken = LogicalVolume.take(&*control, &prepared[0]).await.unwrap();
        let stood = still.is_some();
        drop(still);
        let unit = LogicalVolume
            .complete(&*control, id, &prepared[0], &taken)
            .await
            .unwrap();
        let device = unit.disks[0].details["snapshot.volume"].clone();
        let checked = try_run(&[
            "qemu-img",
            "check",
            "-q",
            "-f",
            "qcow2",
            &format!("/dev/{device}"),
        ]);
        match checked {
            Err(why) if stood => panic!("round {round}: {why}"),
            checked => unsound += u32::from(checked.is_err()),
        }
        LogicalVolume.delete(&*control, id, &unit).await.unwrap();
    }
    eprintln!("taken while it was written to: {unsound} of {ROUNDS} unsound");
    drop(busy);
    drop(daemon);
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
