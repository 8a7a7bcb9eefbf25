//! The guest that has LVM does what it is told.

use disksnap_test_support::{LvmGuest, MIB, need};

#[test]
fn programs_run_in_it_and_volumes_can_be_made() {
    need!("lvm");
    let mut guest = LvmGuest::start(&[64 * MIB]);
    let me = guest.put(&std::env::current_exe().expect("a test knows its program"));
    let listed = guest.run(&[me.as_str(), "--list"]);
    assert_eq!(listed.status, 0, "{listed:?}");
    assert!(listed.stdout.contains("programs_run_in_it"), "{listed:?}");

    let told = guest.run_with(
        &[("WORD", "a b")],
        &["sh", "-c", "echo $WORD; echo bad >&2; exit 3"],
    );
    assert_eq!(
        (told.status, told.stdout.as_str(), told.stderr.as_str()),
        (3, "a b\n", "bad\n")
    );
    assert_eq!(guest.run(&["/no/such/program"]).status, 127);

    let made = guest.run(&[
        "sh",
        "-ec",
        "vgcreate vg /dev/vda; lvcreate -L 4M -n lv vg; lvs --noheadings -o lv_size --units b vg",
    ]);
    assert_eq!(made.status, 0, "{made:?}");
    assert!(made.stdout.ends_with("4194304B\n"), "{made:?}");
    assert!(!guest.serial().contains("GUEST FAILED"), "{}", guest.serial());
}

#[test]
fn it_goes_on_from_where_it_was_saved_as_often_as_wanted() {
    need!("lvm");
    let guest = LvmGuest::start(&[64 * MIB, 64 * MIB]);
    let shell = |guest: &mut LvmGuest, script: &str| {
        let ended = guest.run(&["sh", "-ec", script]);
        assert_eq!(ended.status, 0, "{script}: {ended:?}\n{}", guest.serial());
        ended.stdout
    };
    let mut first = guest;
    shell(
        &mut first,
        "vgcreate vg /dev/vda; lvcreate -L 4M -n lv vg; echo here > /tmp/word",
    );
    let saved = first.save();
    for _ in 0..2 {
        let mut guest = saved.restore();
        let found = shell(&mut guest, "cat /tmp/word; lvs --noheadings -o lv_name vg");
        assert_eq!(found.split_whitespace().collect::<Vec<_>>(), ["here", "lv"]);
        shell(
            &mut guest,
            "rm /tmp/word; lvremove -y vg/lv; lvcreate -L 8M -n other vg",
        );
    }
}
