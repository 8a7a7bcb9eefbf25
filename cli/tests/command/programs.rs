//! Programs that are not ours: NBD clients, and QEMU's and the file systems' tools.

use std::process::Command;

use disksnap_test_support::tools;

/// Runs a program, expects it to do what it should, and gives what it printed.
pub(crate) fn program(name: &str, arguments: &[&str]) -> String {
    let output = Command::new(tools::program(name))
        .args(arguments)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{name} {arguments:?}: {errors}");
    // nbdinfo tells the content's kind in whatever bytes it finds.
    String::from_utf8_lossy(&output.stdout).into_owned()
}
