//! The test guest boots under emulation, writes, and its agent freezes a real file system.

use disksnap_test_support::{DiskSpec, GuestSetup, MIB, Qemu, QemuVersion, need, pattern};
use serde_json::json;

fn header(vm: &Qemu, target: &str) -> u64 {
    let bytes = vm.disk(target).read(0, 8);
    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}

#[test]
fn the_guests_writer_goes_on_and_pausing_is_one_instant() {
    need!("guest");
    let vm = Qemu::builder()
        .disk(DiskSpec::new("vda", 16 * MIB).qcow2())
        .disk(DiskSpec::new("sda", 16 * MIB).iothread())
        .guest(GuestSetup::new().writer(&["vda", "sda"]))
        .start();
    vm.wait_writer(150);
    vm.qmp("stop", json!({}));
    let (first, second) = (header(&vm, "vda"), header(&vm, "sda"));
    assert!(first >= 150, "the writer's number is on the disk: {first}");
    assert!(first == second || first == second + 1, "{first} and {second}");
    assert_eq!(header(&vm, "vda"), first, "a paused guest does not write");
    vm.qmp("cont", json!({}));
    vm.wait_writer(100);
    assert!(header(&vm, "vda") > first);
    let written = vm.disk("vda").digest();
    assert_ne!(written, pattern::digest(&vec![0; 16 << 20]));
}

#[test]
fn the_agent_freezes_a_real_file_system() {
    need!("guest");
    let vm = Qemu::builder()
        .disk(DiskSpec::new("vda", 64 * MIB))
        .guest(GuestSetup::new().file_system("ext4", "vda"))
        .start();
    vm.wait_files(20);
    let mut agent = vm.agent();
    assert_eq!(agent.execute("guest-fsfreeze-status", json!({})), "thawed");
    assert_eq!(agent.execute("guest-fsfreeze-freeze", json!({})), 1);
    let before = vm.disk("vda").digest();
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert_eq!(
        vm.disk("vda").digest(),
        before,
        "a frozen file system is not written to"
    );
    assert_eq!(agent.execute("guest-fsfreeze-thaw", json!({})), 1);
    vm.wait_files(20);
    assert_ne!(vm.disk("vda").digest(), before);
}

#[test]
fn the_guest_boots_on_7_2() {
    need!("guest");
    let vm = Qemu::builder()
        .version(QemuVersion::V7_2)
        .disk(DiskSpec::new("vda", 16 * MIB).qcow2())
        .guest(GuestSetup::new().writer(&["vda"]))
        .start();
    vm.wait_writer(10);
    let mut agent = vm.agent();
    agent.execute("guest-ping", json!({}));
}

#[test]
fn a_hung_agent_answers_late() {
    need!("guest");
    let vm = Qemu::builder().guest(GuestSetup::new()).start();
    vm.hang_agent(2);
    let begun = std::time::Instant::now();
    let mut agent = vm.agent();
    assert!(
        begun.elapsed().as_millis() > 500,
        "it answered at once: it does not hang"
    );
    agent.execute("guest-ping", json!({}));
}
