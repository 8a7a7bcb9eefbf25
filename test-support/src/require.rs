//! Tests that not every machine can run: they say why, and fail where the caller requires them.
//!
//! `REQUIRE` in the environment lists the capabilities that must be there, comma-separated, or `all`.

use std::env;
use std::fs::OpenOptions;
use std::io::Write;

/// Names a file that gets a line for every skipped test, since test runners hide what a passing test
/// prints.
pub const SKIPPED_ENV: &str = "DISKSNAP_SKIPPED";

/// Why this machine lacks a capability, or `None` when it has it.
///
/// Known are `fuse` (a storage daemon's disks are written through a FUSE export), `small-fs`
/// ([`crate::small_fs`]), `btrfs` and `xfs` ([`crate::loop_fs`]); `guest` and `lvm` (kernels and initrds to boot,
/// the latter for [`crate::LvmGuest`]), `qemu-7.2` and the names of programs, which only `DISKSNAP_TOOLS=system` can lack: otherwise they
/// panic, since `./x tools` gets them.
#[must_use]
pub fn lacking(capability: &str) -> Option<String> {
    match capability {
        "fuse" => lacking_fuse(),
        "small-fs" => crate::small_fs::lacking(),
        "btrfs" => crate::loop_fs::lacking(crate::LoopFsKind::Btrfs),
        "xfs" => crate::loop_fs::lacking(crate::LoopFsKind::Xfs),
        "guest" | "lvm" => {
            crate::tools::are_systems().then(|| "DISKSNAP_TOOLS=system brings no test guest".to_owned())
        }
        "qemu-7.2" => (crate::tools::are_systems() && env::var_os(crate::tools::QEMU_7_2_ENV).is_none())
            .then(|| format!("{} names no QEMU 7.2", crate::tools::QEMU_7_2_ENV)),
        program if crate::tools::are_systems() => crate::tools::find(program)
            .is_none()
            .then(|| format!("the program {program} is not installed")),
        program => {
            // Panics when it is missing.
            let _ = crate::tools::program(program);
            None
        }
    }
}

fn lacking_fuse() -> Option<String> {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        return Some(format!("/dev/fuse cannot be opened: {error}"));
    }
    let root = rustix::process::geteuid().is_root();
    (!root && crate::tools::find("fusermount3").is_none()).then(|| "not root, and no fusermount3".to_owned())
}

/// Whether the caller wants a missing capability to fail the test.
#[must_use]
pub fn is_required(capability: &str) -> bool {
    env::var("REQUIRE").is_ok_and(|list| {
        list.split(',')
            .map(str::trim)
            .any(|x| x == "all" || x == capability)
    })
}

/// What [`skip!`](crate::skip) does before it returns: says why, or panics when `REQUIRE` lists it.
#[expect(clippy::print_stderr, reason = "this is the report of a skipped test")]
pub fn report_skip(capability: &str, why: &str) {
    assert!(
        !is_required(capability),
        "REQUIRE lists {capability}, but this test cannot run here: {why}"
    );
    let thread = std::thread::current();
    let line = format!(
        "SKIPPED: {}: {capability}: {why}",
        thread.name().unwrap_or("a test")
    );
    eprintln!("{line}");
    if let Some(path) = env::var_os(SKIPPED_ENV) {
        let log = OpenOptions::new().create(true).append(true).open(path);
        // The line is on standard error in any case.
        let _ = log.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
    }
}

/// Leaves the test: prints `SKIPPED: capability: why`, or fails it where `REQUIRE` lists the capability.
#[macro_export]
macro_rules! skip {
    ($capability:expr, $($why:tt)+) => {{
        $crate::require::report_skip($capability, &format!($($why)+));
        return;
    }};
}

/// Leaves the test with [`skip!`](crate::skip) unless the machine has each of the capabilities that
/// [`lacking`](crate::require::lacking) knows.
#[macro_export]
macro_rules! need {
    ($($capability:expr),+ $(,)?) => {
        $(if let Some(why) = $crate::require::lacking($capability) {
            $crate::skip!($capability, "{why}");
        })+
    };
}
