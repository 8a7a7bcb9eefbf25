//! Block devices: loop devices, which need root.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicU64;

use disksnap::Effect;
use disksnap_backup::{ErrorKind, Silent, Target, restore_disk};
use disksnap_test_support::{pattern, skip};

use crate::rig::{QemuNbd, Saved, StopAfter, run, text};

/// A loop device over a file of random bytes. Detached with the value.
struct Loop {
    device: PathBuf,
    file: PathBuf,
}

impl Loop {
    /// `None` where this machine has no loop devices, and why.
    fn new(saved: &Saved, name: &str, length: usize) -> Result<Self, String> {
        let file = saved.path(name);
        std::fs::write(&file, pattern::bytes(99, length)).unwrap();
        Self::over(file)
    }

    fn over(file: PathBuf) -> Result<Self, String> {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&file)
            .stdin(Stdio::null())
            .output();
        let output = output.map_err(|e| format!("losetup: {e}"))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        let device = String::from_utf8(output.stdout).unwrap().trim().into();
        Ok(Self { device, file })
    }

    fn target(&self) -> Target {
        Target::Device {
            path: self.device.clone(),
        }
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(&self.device).unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).output();
    }
}

macro_rules! loop_device {
    ($made:expr) => {
        match $made {
            Ok(device) => device,
            Err(why) => skip!("loop", "no loop device: {why}"),
        }
    };
}

#[tokio::test]
async fn a_device_of_the_disks_size() {
    let saved = Saved::new().await;
    for n in 0..saved.points.len() {
        let device = loop_device!(Loop::new(&saved, &format!("device-{n}"), saved.contents[n].len()));
        let (chain, disk) = saved.chain(n).await;
        let restored = restore_disk(chain, disk, &device.target(), true, &Silent)
            .await
            .unwrap();
        assert!(device.content() == saved.contents[n], "point {n}");
        assert_eq!(restored.digest, disk.content);
        assert_eq!(restored.notes, [""; 0]);
    }
}

#[tokio::test]
async fn a_larger_device_keeps_its_rest() {
    let saved = Saved::new().await;
    let length = saved.contents[2].len();
    let device = loop_device!(Loop::new(&saved, "device", length + 8192));
    let before = device.content();
    let (chain, disk) = saved.chain(2).await;
    let restored = restore_disk(chain, disk, &device.target(), true, &Silent)
        .await
        .unwrap();
    let after = device.content();
    assert!(after[..length] == saved.contents[2]);
    assert!(after[length..] == before[length..]);
    assert!(
        restored.notes[0].contains("last 8192 bytes"),
        "{:?}",
        restored.notes
    );
}

#[tokio::test]
async fn zeroes_become_holes_below_the_device() {
    let saved = Saved::new().await;
    let device = loop_device!(Loop::new(&saved, "device", saved.contents[2].len()));
    let (chain, disk) = saved.chain(2).await;
    let restored = restore_disk(chain, disk, &device.target(), true, &Silent)
        .await
        .unwrap();
    let room = std::os::unix::fs::MetadataExt::blocks(&device.file.metadata().unwrap()) * 512;
    assert!(restored.zero > 1 << 20);
    assert!(room <= disk.size - restored.zero + (64 << 10), "{room}");
}

#[tokio::test]
async fn what_must_not_be_overwritten_is_not() {
    let saved = Saved::new().await;
    let device = loop_device!(Loop::new(&saved, "device", saved.contents[0].len()));
    let before = device.content();
    let unasked = attempt(&saved, &device.target(), false).await;
    assert_eq!(unasked, ErrorKind::AlreadyExists);
    let small = loop_device!(Loop::new(&saved, "small", saved.contents[0].len() - 512));
    let small_before = small.content();
    assert_eq!(attempt(&saved, &small.target(), true).await, ErrorKind::NoSpace);
    assert!(small.content() == small_before);
    // QEMU has it open.
    let server = QemuNbd::start(&["--format=raw"], &device.device);
    assert_eq!(attempt(&saved, &device.target(), true).await, ErrorKind::Busy);
    server.quit();
    assert!(device.content() == before);
    let file = Target::Device {
        path: device.file.clone(),
    };
    assert_eq!(attempt(&saved, &file, true).await, ErrorKind::Invalid);
    let absent = Target::Device {
        path: saved.path("absent"),
    };
    assert_eq!(attempt(&saved, &absent, true).await, ErrorKind::NotFound);
}

/// The locks of whoever has it open are on another inode.
#[tokio::test]
async fn a_device_that_is_open_under_another_name_is_refused() {
    let saved = Saved::new().await;
    let device = loop_device!(Loop::new(&saved, "device", saved.contents[0].len()));
    let before = device.content();
    let number = std::os::unix::fs::MetadataExt::rdev(&device.device.metadata().unwrap());
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let other = saved.path("another-node");
    run(
        "mknod",
        &[text(&other), "b", &major.to_string(), &minor.to_string()],
    );
    if let Err(why) = std::fs::File::open(&other) {
        skip!("loop", "no device nodes in temporary directories: {why}");
    }
    let server = QemuNbd::start(&["--format=raw"], &other);
    assert_eq!(attempt(&saved, &device.target(), true).await, ErrorKind::Busy);
    server.quit();
    assert!(device.content() == before);
    let by_the_other = Target::Device { path: other };
    let server = QemuNbd::start(&["--format=raw"], &device.device);
    assert_eq!(attempt(&saved, &by_the_other, true).await, ErrorKind::Busy);
    server.quit();
    assert_eq!(attempt(&saved, &by_the_other, true).await, ErrorKind::Internal);
    assert!(device.content() == saved.contents[0]);
}

#[tokio::test]
async fn a_mounted_device_is_refused() {
    let saved = Saved::new().await;
    let file = saved.path("file-system");
    std::fs::File::create(&file).unwrap().set_len(320 << 20).unwrap();
    run("mkfs.xfs", &["-q", file.to_str().unwrap()]);
    let device = loop_device!(Loop::over(file));
    let point = saved.path("mounted");
    std::fs::create_dir(&point).unwrap();
    let mounted = Command::new("mount")
        .arg(&device.device)
        .arg(&point)
        .output()
        .unwrap();
    if !mounted.status.success() {
        skip!(
            "xfs",
            "cannot mount: {}",
            String::from_utf8_lossy(&mounted.stderr)
        );
    }
    let refused = attempt(&saved, &device.target(), true).await;
    unmount(&point);
    assert_eq!(refused, ErrorKind::Busy);
    assert_eq!(attempt(&saved, &device.target(), true).await, ErrorKind::Internal);
}

fn unmount(point: &Path) {
    let done = Command::new("umount").arg(point).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// Tries, and says how it was refused: `Internal` where it was not.
async fn attempt(saved: &Saved, target: &Target, overwrite: bool) -> ErrorKind {
    let (chain, disk) = saved.chain(0).await;
    match restore_disk(chain, disk, target, overwrite, &Silent).await {
        Ok(_) => ErrorKind::Internal,
        Err(error) => {
            assert_eq!(error.effect(), Effect::None, "{error:?}");
            error.kind()
        }
    }
}

#[tokio::test]
async fn what_is_cut_short_is_said_to_be_unfinished() {
    let saved = Saved::new().await;
    let device = loop_device!(Loop::new(&saved, "device", saved.contents[0].len()));
    let (chain, disk) = saved.chain(0).await;
    let watcher = StopAfter(1 << 20, AtomicU64::new(0));
    let error = restore_disk(chain, disk, &device.target(), true, &watcher)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("unfinished"), "{error}");
    assert_eq!(error.effect(), Effect::Unknown);
    saved.damage();
    let (chain, disk) = saved.chain(0).await;
    let error = restore_disk(chain, disk, &device.target(), true, &Silent)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
}
