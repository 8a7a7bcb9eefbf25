//! Tests that not every machine can run: they say why, and fail where the caller requires them.
//!
//! `REQUIRE` in the environment lists the capabilities that must be there, comma-separated, or `all`.

use std::env;
use std::fs::OpenOptions;

/// Why this machine lacks a capability, or `None` when it has it.
///
/// Known are `fuse` (a storage daemon's disks are written through a FUSE export), `small-fs`
/// ([`crate::small_fs`]), `guest` (a kernel and initrd to boot), `nbdcopy` and `nbdinfo`, `xmllint`.
#[must_use]
pub fn lacking(capability: &str) -> Option<String> {
    match capability {
        "fuse" => lacking_fuse(),
        "small-fs" => crate::small_fs::lacking(),
        "guest" => crate::guest::lacking(),
        program => crate::tools::find(program)
            .is_none()
            .then(|| format!("the program {program} is not installed; run `./x tools`")),
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
    eprintln!("SKIPPED: {capability}: {why}");
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
