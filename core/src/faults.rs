//! Points at which a trial ends this process: before and after every effect. A release build has none of it.
//!
//! In a build with debug assertions two variables are looked at, once: with `DISKSNAP_FAULT_LOG=FILE` each point that is
//! passed appends its name to the file, a line each; with `DISKSNAP_FAULT=NAME:K` the process is ended by `SIGKILL` when it
//! passes the point NAME for the K-th time, counted from 1. A name is `before SEAM WHAT` or `after SEAM WHAT`, such as
//! `before monitor blockdev-add`: words of the seam and not of the source, so that a list of them stays readable.
//!
//! What this process starts must not have the variables: see [`VARIABLES`].

/// What another process must not inherit.
pub const VARIABLES: [&str; 2] = ["DISKSNAP_FAULT", "DISKSNAP_FAULT_LOG"];

/// An effect is about to be: `seam` is what it goes through (`monitor`, `catalog`, `program`, `file`), `what` names it.
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
        LazyLock::new(|| std::env::var_os(super::VARIABLES[1]));
    static END: LazyLock<Option<End>> = LazyLock::new(End::told);

    /// Where the process is to end.
    struct End {
        name: String,
        /// How many more times the point is passed, the last one being the end.
        left: AtomicU32,
    }

    impl End {
        fn told() -> Option<Self> {
            let told = std::env::var(super::VARIABLES[0]).ok()?;
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
