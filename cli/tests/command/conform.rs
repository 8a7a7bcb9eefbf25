//! The conformance suite by the command, as an operator or a vendor runs it: on real LVM, in a guest that has it.

use disksnap_conformance::cases;
use disksnap_test_support::{GIB, GuestOutput, LvmGuest, need};

use crate::site::{Site, program};

/// A volume group `vg` with a thin pool `pool` in it, and the command, in a guest of their own.
struct Lvm {
    guest: LvmGuest,
    disksnap: String,
}

impl Lvm {
    fn new() -> Self {
        let mut guest = LvmGuest::start(&[GIB]);
        let disksnap = guest.put(&program());
        let mut lvm = Self { guest, disksnap };
        // 33 extents of 64 KiB make a disk: no multiple of a MiB, nor of two chunks of the pool.
        lvm.ok("vgcreate -y -s 64k vg /dev/vda");
        lvm.ok("lvcreate -y --type thin-pool -Zn -c 64k -L 256m --poolmetadatasize 2m -n pool vg");
        lvm.ok("lvcreate -y -Wn -L 1m -n mine vg");
        lvm
    }

    fn run(&mut self, line: &str) -> GuestOutput {
        let words: Vec<&str> = line.split_whitespace().collect();
        self.guest.run(&words)
    }

    fn ok(&mut self, line: &str) -> String {
        let output = self.run(line);
        assert_eq!(output.status, 0, "{line}: {}", output.stderr);
        output.stdout
    }

    fn conform(&mut self, arguments: &str) -> GuestOutput {
        let line = format!("{} conform lvm {arguments}", self.disksnap);
        self.run(&line)
    }

    /// Every case passes, and the group is as it was.
    fn conforms(&mut self, arguments: &str) {
        let output = self.conform(arguments);
        let told = format!("{}\n{}", output.stdout, output.stderr);
        assert_eq!(output.status, 0, "{told}");
        assert!(told.contains(" passed, 0 failed"), "{told}");
        for (case, _) in cases() {
            let passed = |line: &str| line.split_whitespace().eq([case, "ok"]);
            assert!(output.stdout.lines().any(passed), "no {case}: {told}");
        }
        self.is_clean();
    }

    fn is_clean(&mut self) {
        let left = self.ok("lvs --noheadings -o lv_name vg");
        let left: Vec<&str> = left.split_whitespace().collect();
        assert_eq!(left, ["mine", "pool"]);
    }
}

#[test]
fn lvm_with_classic_snapshots() {
    need!("lvm");
    Lvm::new().conforms("--volume-group vg --place classic");
}

#[test]
fn lvm_with_thin_snapshots() {
    need!("lvm");
    Lvm::new().conforms("--volume-group vg --thin-pool pool --place thin");
}

#[test]
fn lvm_where_it_cannot_be_tried() {
    need!("lvm");
    let mut lvm = Lvm::new();
    let both = lvm.conform("--volume-group vg --thin-pool pool --case describes");
    assert_eq!(both.status, 0, "{}", both.stderr);
    assert_eq!(
        both.stdout.matches("describes-itself").count(),
        2,
        "{}",
        both.stdout
    );
    for (arguments, status, why) in [
        ("--volume-group nope", 3, "nope"),
        ("--volume-group vg --thin-pool nope", 3, "nope"),
        (
            "--volume-group vg --thin-pool mine",
            2,
            "vg/mine is not a thin pool",
        ),
        ("--volume-group vg --place nowhere", 3, "thin"),
        ("--volume-group=-a", 2, "no name of a volume group"),
    ] {
        let refused = lvm.conform(arguments);
        assert_eq!(refused.status, status, "{arguments}: {}", refused.stderr);
        let told = if why == "thin" { "There are: classic" } else { why };
        assert!(refused.stderr.contains(told), "{arguments}: {}", refused.stderr);
    }
    // A group without room for what is to be made fails the control, and keeps what it has.
    lvm.ok("lvcreate -y -Wn -l 100%FREE -n filler vg");
    let full = lvm.conform("--volume-group vg --case control");
    assert_eq!(full.status, 1, "{}", full.stdout);
    assert!(full.stdout.contains("insufficient free space"), "{}", full.stdout);
    lvm.ok("lvremove -y vg/filler");
    lvm.is_clean();
}

#[test]
fn what_lvm_needs_is_said() {
    let site = Site::new();
    let refused = site.run(&["conform", "lvm"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("--volume-group VG"), "{refused:?}");
    let refused = site.run(&["conform", "lvm", "--thin-pool", "pool"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    let refused = site.run(&["conform", "memory", "--volume-group", "vg"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(
        refused.stderr.contains("'memory' makes no volumes"),
        "{refused:?}"
    );
}
