//! A child process with its logs, killed by its handle when dropped.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::qmp::Monitor;

/// How long a process may take to start answering, or to end when asked; far more than it needs.
pub(crate) const PATIENCE: Duration = Duration::from_mins(2);

/// A running program, its arguments kept so that it can be started again.
#[derive(Debug)]
pub(crate) struct Process {
    program: PathBuf,
    args: Vec<OsString>,
    dir: PathBuf,
    name: &'static str,
    child: Mutex<Child>,
}

impl Process {
    /// Starts a program whose standard output and error go to `NAME.out` and `NAME.err` in `dir`.
    pub(crate) fn start(name: &'static str, program: PathBuf, args: Vec<OsString>, dir: &Path) -> Self {
        let child = Mutex::new(spawn(name, &program, &args, dir));
        Self {
            program,
            args,
            dir: dir.to_path_buf(),
            name,
            child,
        }
    }

    /// Starts it again with the same arguments, ending it first if it still runs.
    pub(crate) fn restart(&self) {
        self.restart_with(&self.args);
    }

    /// Starts it again with other arguments, once.
    pub(crate) fn restart_with(&self, args: &[OsString]) {
        self.kill();
        let child = spawn(self.name, &self.program, args, &self.dir);
        *self.lock() = child;
    }

    /// What it was started with at first.
    pub(crate) fn args(&self) -> &[OsString] {
        &self.args
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Child> {
        self.child
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.lock().id()
    }

    pub(crate) fn is_running(&self) -> bool {
        matches!(self.lock().try_wait(), Ok(None))
    }

    /// SIGKILL, and waits until it is gone.
    pub(crate) fn kill(&self) {
        let mut child = self.lock();
        // Both fail only when it has ended already.
        let _ = child.kill();
        let _ = child.wait();
    }

    /// Kills it. Where it had ended by itself before: how it ended, and what it printed.
    ///
    /// One whose monitor has closed the connection is on its way out, and is waited for.
    pub(crate) fn last_words(&self, monitor: &Mutex<Monitor>) -> Option<String> {
        let mut monitor = monitor.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let begun = Instant::now();
        while monitor.is_closed() && self.is_running() && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(monitor);
        self.kill();
        let status = self.lock().wait().ok()?;
        let by_itself = status.signal() != Some(Signal::KILL.as_raw());
        by_itself.then(|| format!("{} ended by itself: {status}\n{}", self.name, self.log()))
    }

    /// Waits for it to end by itself.
    pub(crate) fn wait(&self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Ok(Some(status)) = self.lock().try_wait() {
                return status;
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "{} does not end\n{}",
                self.name,
                self.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw);
        let pid = pid.expect("a child has a positive pid");
        kill_process(pid, signal).unwrap_or_else(|error| panic!("cannot signal {}: {error}", self.name));
    }

    /// Where its standard output goes.
    pub(crate) fn stdout_path(&self) -> PathBuf {
        self.dir.join(format!("{}.out", self.name))
    }

    /// What it printed so far, for the message of a failing test.
    pub(crate) fn log(&self) -> String {
        let read = |suffix: &str| {
            let path = self.dir.join(format!("{}.{suffix}", self.name));
            last_lines(&String::from_utf8_lossy(&fs::read(path).unwrap_or_default()), 60)
        };
        format!(
            "--- command\n{} {}\n--- stdout\n{}--- stderr\n{}",
            self.program.display(),
            self.args
                .iter()
                .map(|x| x.to_string_lossy())
                .collect::<Vec<_>>()
                .join(" "),
            read("out"),
            read("err")
        )
    }
}

impl Drop for Process {
    #[expect(
        clippy::print_stderr,
        reason = "the logs of a failing test are part of its report"
    )]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        self.kill();
    }
}

fn last_lines(text: &str, count: usize) -> String {
    let skipped = text.lines().count().saturating_sub(count);
    let kept = text.lines().skip(skipped);
    kept.fold(String::new(), |all, line| all + line + "\n")
}

fn spawn(name: &str, program: &Path, args: &[OsString], dir: &Path) -> Child {
    let log = |suffix: &str| {
        let path = dir.join(format!("{name}.{suffix}"));
        let file = File::options().create(true).append(true).open(&path);
        file.unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()))
    };
    Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(log("out"))
        .stderr(log("err"))
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {}: {error}", program.display()))
}

/// Runs a program to its end and returns what it printed; panics with its error when it fails.
pub(crate) fn run(program: &Path, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("cannot start {}: {error}", program.display()));
    assert!(
        output.status.success(),
        "{} {}: {}\n{}",
        program.display(),
        args.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
