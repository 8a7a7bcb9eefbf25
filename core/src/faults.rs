//! Points at which a trial ends this process: before and after every effect. A release build has none of it.
//!
//! In a build with debug assertions two variables are looked at, once: with `DISKSNAP_FAULT_LOG=FILE` each point that is
//! passed appends its name to the file, a line each; with `DISKSNAP_FAULT=NAME:K` the process is ended by `SIGKILL` when it
//! passes the point NAME for the K-th time, counted from 1. A name is `before SEAM WHAT` or `after SEAM WHAT`, such as
//! `before monitor blockdev-add`, and for a program `amid` too: words of the seam and not of the source, so that a list of them stays readable.
//!
//! An effect is whatever outlives this process or is seen outside of it: a command to a monitor or an agent, a program that
//! is run, a file that is made, renamed or removed, a system call that makes or ends something, a commit to the catalog.
//! One without points is a bug, since nobody would try what a kill there leaves. Looking at something is no effect.
//!
//! What this process starts must not have the variables: see [`VARIABLES`].

/// What another process must not inherit; empty in a release build.
#[cfg(debug_assertions)]
pub const VARIABLES: &[&str] = &["DISKSNAP_FAULT", "DISKSNAP_FAULT_LOG"];
/// What another process must not inherit; empty in a release build.
#[cfg(not(debug_assertions))]
pub const VARIABLES: &[&str] = &[];

/// Does something that has an effect, between its two points: the one that is meant to be used where the effect is one call.
///
/// `seam` is what it goes through (`monitor`, `catalog`, `program`, `file`), `what` names it in a word or three.
#[inline]
pub fn around<T>(seam: &str, what: &str, act: impl FnOnce() -> T) -> T {
    before(seam, what);
    let done = act();
    after(seam, what);
    done
}

/// A program has been started and goes on: it may outlive this process.
#[inline]
pub fn amid(seam: &str, what: &str) {
    #[cfg(debug_assertions)]
    armed::pass("amid", seam, what);
    #[cfg(not(debug_assertions))]
    let _ = (seam, what);
}

/// An effect is about to be.
#[inline]
pub fn before(seam: &str, what: &str) {
    #[cfg(debug_assertions)]
    armed::pass("before", seam, what);
    #[cfg(not(debug_assertions))]
    let _ = (seam, what);
}

/// An effect has been, or has failed.
#[inline]
pub fn after(seam: &str, what: &str) {
    #[cfg(debug_assertions)]
    armed::pass("after", seam, what);
    #[cfg(not(debug_assertions))]
    let _ = (seam, what);
}

#[cfg(debug_assertions)]
mod armed {
    use std::fs::OpenOptions;
    use std::io::Write;
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    use rustix::process::{Signal, getpid, kill_process};

    static LOG: LazyLock<Option<std::ffi::OsString>> =
        LazyLock::new(|| std::env::var_os("DISKSNAP_FAULT_LOG"));
    static END: LazyLock<Option<End>> = LazyLock::new(End::told);

    /// Where the process is to end.
    struct End {
        name: String,
        /// How many more times the point is passed, the last one being the end.
        left: AtomicU32,
    }

    impl End {
        fn told() -> Option<Self> {
            let told = std::env::var("DISKSNAP_FAULT").ok()?;
            let (name, count) = told.rsplit_once(':')?;
            Some(Self {
                name: name.to_owned(),
                left: AtomicU32::new(count.parse().ok()?),
            })
        }
    }

    pub(super) fn pass(when: &str, seam: &str, what: &str) {
        if LOG.is_none() && END.is_none() {
            return;
        }
        let name = format!("{when} {seam} {what}");
        if let Some(log) = &*LOG {
            // One write, so that two processes' names do not mix.
            let file = OpenOptions::new().append(true).create(true).open(log);
            let _ = file.and_then(|mut file| file.write_all(format!("{name}\n").as_bytes()));
        }
        if let Some(end) = &*END
            && end.name == name
            && end.left.fetch_sub(1, Ordering::SeqCst) == 1
        {
            let _ = kill_process(getpid(), Signal::KILL);
            // Nothing more is done until the signal is there.
            loop {
                std::thread::park();
            }
        }
    }
}
