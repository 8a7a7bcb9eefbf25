//! The method on real LVM. There is none on many a machine, so these tests run in a guest that has it: those on
//! the host start one and run this very program in it, those marked `ignore` are what it runs there.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

mod bad_input;
mod comparing;
mod conformance;
mod file_systems;
mod finding;
mod kills;
mod machine;
mod metadata;
mod reverting;
mod running;
mod sound;
mod storage_faults;
mod support;
mod taking;

use disksnap_test_support::{GIB, LvmGuest, need};

/// Runs the tests of some modules in a guest of their own.
fn in_guest(modules: &[&str]) {
    run_in(LvmGuest::start(&[GIB, GIB]), modules);
}

fn run_in(mut guest: LvmGuest, modules: &[&str]) {
    let me = guest.put(&std::env::current_exe().unwrap());
    let mut command = vec![me.as_str(), "--ignored", "--show-output", "--test-threads=1"];
    command.extend(modules);
    // What is in the guest is all there is.
    let output = guest.run_with(&[("DISKSNAP_TOOLS", "system")], &command);
    let serial = guest.serial();
    let told = format!("{}\n{}\n{serial}", output.stdout, output.stderr);
    assert_eq!(output.status, 0, "{told}");
    assert!(!serial.contains("GUEST FAILED"), "{told}");
    for module in modules {
        assert!(
            output.stdout.contains(&format!("test {module}")),
            "no test of {module} ran: {told}"
        );
    }
    // Where it is wanted, what the tests measured.
    std::io::Write::write_all(&mut std::io::stderr(), told.as_bytes()).unwrap();
}

#[test]
fn becomes_the_guardian_when_asked() {
    disksnap_hypervisor::guardian::run_if_asked();
}

#[test]
fn snapshots_conform() {
    need!("lvm");
    in_guest(&["conformance::"]);
}

#[test]
fn it_does_what_it_says() {
    need!("lvm");
    in_guest(&["bad_input::", "finding::", "reverting::", "taking::"]);
}

#[test]
fn what_changed_is_told() {
    need!("lvm");
    in_guest(&["comparing::"]);
}

#[test]
fn metadata_is_never_left_reserved() {
    need!("lvm");
    in_guest(&["metadata::"]);
}

#[test]
fn reverts_can_be_killed_at_any_command() {
    need!("lvm");
    in_guest(&["kills::"]);
}

#[test]
fn what_is_in_a_snapshot_is_sound() {
    need!("lvm");
    in_guest(&["file_systems::", "running::", "sound::"]);
}

#[test]
fn snapshots_of_a_running_machine_are_sound() {
    need!("lvm");
    run_in(LvmGuest::start_with_qemu(&[GIB, GIB]), &["machine::"]);
}

#[test]
fn storage_that_fails_under_a_running_machine_is_told() {
    need!("lvm");
    run_in(LvmGuest::start_with_qemu(&[GIB]), &["storage_faults::"]);
}
