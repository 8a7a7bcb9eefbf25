//! The test guest: Debian's kernel, a small initrd with a real guest agent, and what it is told to do.

use std::fmt::Write;

/// What the guest does once booted. It always starts the guest agent.
#[derive(Clone, Debug, Default)]
pub struct GuestSetup {
    command_line: String,
}

impl GuestSetup {
    /// Only the agent.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An endless writer on these raw disks, such as `vda`. Each round writes to each disk in turn a block
    /// with the round's number at a scattered offset (now and then it zeroes or discards instead), then
    /// the number, little endian in 8 bytes, at offset 0. Its writes are direct and synchronous: at any
    /// one instant the number on the first disk is that on the last one, or one more.
    #[must_use]
    pub fn writer(mut self, targets: &[&str]) -> Self {
        let list: Vec<_> = targets.iter().map(|x| format!("/dev/{x}")).collect();
        self.add("writer", &list.join(","));
        self
    }

    /// Makes a file system (`ext4`, or `xfs`, which wants 300 MiB) on a disk, mounts it and writes files to it, so that freezing it
    /// means something.
    #[must_use]
    pub fn file_system(mut self, kind: &str, target: &str) -> Self {
        self.add("fs", &format!("{kind}:/dev/{target}"));
        self
    }

    fn add(&mut self, key: &str, value: &str) {
        write!(self.command_line, " {key}={value}").expect("a String takes any text");
    }

    pub(crate) fn arguments(&self) -> Vec<String> {
        let [kernel, initrd] = ["vmlinux", "initrd.img"].map(file);
        let line = format!("{KERNEL_ARGUMENTS}{}", self.command_line);
        let args = ["-kernel", &kernel, "-initrd", &initrd, "-append", &line];
        args.map(str::to_owned).to_vec()
    }
}

/// What makes booting under TCG quick: no self tests, no mitigations, no waiting for entropy.
pub(crate) const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet panic=-1 reboot=t mitigations=off nokaslr \
     random.trust_cpu=on tsc=reliable no_timer_check cryptomgr.notests";

pub(crate) fn file(name: &str) -> String {
    let path = crate::tools::tools_dir().join("guest").join(name);
    assert!(path.is_file(), "{} is missing: run `./x tools`", path.display());
    path.to_string_lossy().into_owned()
}

/// The number in the last complete line of a writer: `WRITER n` or `FILES n`.
pub(crate) fn rounds(name: &str, serial: &str) -> u64 {
    let complete = serial.rsplit_once('\n').map_or("", |(x, _)| x);
    let number = |x: &str| x.trim().strip_prefix(name)?.strip_prefix(' ')?.parse().ok();
    complete.lines().rev().find_map(number).unwrap_or(0)
}
