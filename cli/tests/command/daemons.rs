//! The storage daemons that the command has started for a state directory: found, and ended with the test.

use std::path::{Path, PathBuf};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// The processes whose standard input is a file in this directory: that is how the command knows its own.
pub(crate) fn of(run: &Path) -> Vec<i32> {
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| lives_in(*pid, run)).collect()
}

fn lives_in(pid: i32, run: &Path) -> bool {
    let input: Result<PathBuf, _> = std::fs::read_link(format!("/proc/{pid}/fd/0"));
    // A file that was removed has " (deleted)" behind its name.
    input.is_ok_and(|input| input.starts_with(run) && input.to_string_lossy().contains(".images.lock"))
}

/// SIGKILL for all of them, as if they crashed.
pub(crate) fn kill(run: &Path) {
    for pid in of(run) {
        let Ok(handle) = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()) else {
            continue;
        };
        if lives_in(pid, run) {
            let _ = pidfd_send_signal(&handle, Signal::KILL);
        }
    }
    while !of(run).is_empty() {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}
