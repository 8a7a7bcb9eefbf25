//! Sets go out and come in without loss; what is no set is refused with its place.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::time::{Duration, UNIX_EPOCH};

use disksnap_checkpoint_set::ovirt::{DiskIds, Table, Tables};
use disksnap_checkpoint_set::{MAX_BYTES, json};
use disksnap_core::{
    Checkpoint, CheckpointDisk, Disk, Domain, DomainId, Error, ErrorKind, Mark, SnapshotId, Sockets, Source,
};
use insta::assert_snapshot;
use proptest::option;
use proptest::prelude::*;
use uuid::Uuid;

const VM: Uuid = Uuid::from_u128(0x5768_a388_c1c4_414c_ac4e_eab2_16ba_7c0c);

fn domain() -> Domain {
    let path = |path: String| Source::File { file: path.into() };
    let mut disks: Vec<Disk> = (0..4)
        .map(|n| Disk::new(format!("vd{n}"), path(format!("/srv/{n}.qcow2"))))
        .collect();
    disks[0].serial = Some(id(0).to_string());
    disks[1].serial = Some("WEB1-DATA".to_owned());
    disks[1].source = Some(path(format!("/rhev/mnt/{}/images/{}/{}", id(90), id(1), id(91))));
    Domain {
        id: DomainId::new("web1", Some(VM)),
        disks,
        sockets: Sockets::default(),
    }
}

fn id(n: u128) -> Uuid {
    Uuid::from_u128(0xd15c << 112 | n)
}

/// What the domain's document does not tell is told.
fn ids() -> DiskIds {
    DiskIds::new(&domain(), &[("vd2".to_owned(), id(2)), ("vd3".to_owned(), id(3))]).unwrap()
}

fn instant() -> impl Strategy<Value = std::time::SystemTime> {
    // To the end of the year 9999.
    (0..253_402_300_800_u64, 0..1_000_000_000_u32).prop_map(|(s, n)| UNIX_EPOCH + Duration::new(s, n))
}

fn words() -> impl Strategy<Value = Option<String>> {
    option::of("\\PC{0,12}[\",;\r\n]?\\PC{0,3}")
}

prop_compose! {
    fn any_disk(n: u8)(id in option::of(any::<u128>()), size in option::of(any::<u64>()), volatile: bool, anew: bool,
                       mark in prop_oneof![
                           "\\PC{1,20}".prop_map(Mark::Bitmap),
                           any::<u128>().prop_map(|id| Mark::Pinned(SnapshotId(Uuid::from_u128(id)))),
                       ]) -> CheckpointDisk {
        CheckpointDisk { target: format!("vd{n}"), id: id.map(Uuid::from_u128), size, mark, volatile, anew }
    }
}

prop_compose! {
    fn any_checkpoint()(name in "[A-Za-z0-9_-][A-Za-z0-9_.-]{0,30}", parent in option::of("[a-z_-][a-z.]{0,9}"),
                        created in instant(), description in words(),
                        disks in (0_u8..4).prop_flat_map(|n| (0..n).map(any_disk).collect::<Vec<_>>())) -> Checkpoint {
        let parent = parent.map(|parent| parent.parse().unwrap());
        Checkpoint { name: name.parse().unwrap(), parent, created, description, disks }
    }
}

prop_compose! {
    /// As oVirt can know one: the name is a UUID, and the bitmaps are called so.
    fn ovirt_checkpoint()(name: u128, parent in option::of(any::<u128>()), created in instant(),
                          description in words(), covered in 0_u8..16) -> Checkpoint {
        let name = Uuid::from_u128(name).to_string();
        let disk = |n: u128| CheckpointDisk {
            target: format!("vd{n}"),
            id: Some(id(n)),
            size: None,
            mark: Mark::Bitmap(name.clone()),
            volatile: false,
            anew: false,
        };
        Checkpoint {
            name: name.parse().unwrap(),
            parent: parent.map(|parent| Uuid::from_u128(parent).to_string().parse().unwrap()),
            created,
            description: description.filter(|text| !text.is_empty()),
            disks: (0..4).filter(|n| covered & (1 << n) != 0).map(disk).collect(),
        }
    }
}

fn csv_of(tables: &Tables) -> (Vec<u8>, Vec<u8>) {
    let (mut checkpoints, mut disks) = (Vec::new(), Vec::new());
    tables.write_csv(Table::Checkpoints, &mut checkpoints).unwrap();
    tables.write_csv(Table::Disks, &mut disks).unwrap();
    (checkpoints, disks)
}

proptest! {
    #[test]
    fn our_json_keeps_everything(set in prop::collection::vec(any_checkpoint(), 0..6)) {
        let mut text = Vec::new();
        json::Set::new(&set).unwrap().write(&mut text).unwrap();
        prop_assert_eq!(json::read(&text[..]).unwrap(), set);
    }

    #[test]
    fn ovirts_tables_keep_what_they_have_a_place_for(set in prop::collection::vec(ovirt_checkpoint(), 0..6)) {
        let domain = domain();
        let tables = Tables::of(&domain.id, &set, &ids()).unwrap();
        let mut text = Vec::new();
        tables.write_json(&mut text).unwrap();
        prop_assert_eq!(&Tables::read_json(&text[..]).unwrap(), &tables);
        let (checkpoints, disks) = csv_of(&tables);
        prop_assert_eq!(&Tables::read_csv(&checkpoints[..], &disks[..]).unwrap(), &tables);
        let (back, left_out) = tables.checkpoints_of(&domain.id, &ids(), false).unwrap();
        prop_assert!(left_out.is_empty());
        prop_assert_eq!(back, set);
    }
}

fn told(error: &Error) -> String {
    let hint = error.next_step().unwrap_or("-");
    format!("{:?}: {error}\n{hint}", error.kind())
}

fn small() -> Vec<Checkpoint> {
    let name = |n: u128| Uuid::from_u128(n << 100).to_string();
    let disk = |target: &str, n| CheckpointDisk {
        target: target.to_owned(),
        id: None,
        size: Some(1 << 30),
        mark: Mark::Bitmap(name(n)),
        volatile: false,
        anew: false,
    };
    let at = |n: u64| UNIX_EPOCH + Duration::new(1_700_000_000 + n, 250_000_000);
    vec![
        Checkpoint {
            name: name(1).parse().unwrap(),
            parent: None,
            created: at(0),
            description: None,
            disks: vec![disk("vd0", 1), disk("vd1", 1)],
        },
        Checkpoint {
            name: name(2).parse().unwrap(),
            parent: Some(name(1).parse().unwrap()),
            created: at(60),
            description: Some("before, \"the\" upgrade".to_owned()),
            disks: vec![disk("vd0", 2)],
        },
    ]
}

#[test]
fn the_forms_as_they_are_documented() {
    let mut set = small();
    set[1].disks[0].id = Some(id(0));
    set[1].disks[0].volatile = true;
    set[0].disks[1].mark = Mark::Pinned(SnapshotId(id(7)));
    let mut text = Vec::new();
    json::Set::new(&set).unwrap().write(&mut text).unwrap();
    assert_snapshot!("json", String::from_utf8(text).unwrap());
    let tables = Tables::of(&domain().id, &small(), &ids()).unwrap();
    let mut text = Vec::new();
    tables.write_json(&mut text).unwrap();
    assert_snapshot!("ovirt_json", String::from_utf8(text).unwrap());
    let (checkpoints, disks) = csv_of(&tables);
    let both = [checkpoints, disks]
        .map(|text| String::from_utf8(text).unwrap())
        .join("\n");
    assert_snapshot!("ovirt_csv", both);
}

#[test]
fn a_database_s_own_columns_are_read() {
    let checkpoints = "_create_date,checkpoint_id,vm_id,parent_id\n\
        2019-03-12 21:35:23.5+00,00000000-0000-0000-0000-000000000001,5768a388-c1c4-414c-ac4e-eab216ba7c0c,\n";
    let tables = Tables::read_csv(checkpoints.as_bytes(), &b"checkpoint_id,disk_id\n"[..]).unwrap();
    let (set, _) = tables.checkpoints_of(&domain().id, &ids(), false).unwrap();
    assert_eq!(
        set[0].created,
        UNIX_EPOCH + Duration::from_millis(1_552_426_523_500)
    );
    assert_eq!((set[0].parent.as_ref(), set.len()), (None, 1));
}

#[test]
fn json_that_is_no_set_is_told_by_line_and_column() {
    let refused = |text: &str| told(&json::read(text.as_bytes()).unwrap_err());
    let one = |inner: &str| format!("{{\n  \"checkpoints\": [ {{ \"name\": \"a\", {inner} }} ]\n}}");
    assert_snapshot!(refused("{\"checkpoints\": [\n"), @"
    Invalid: the document ends in the middle (line 2, column 0)
    -
    ");
    assert_snapshot!(refused("{\"checkpoints\": [], \"domain\": 1}"), @"
    Invalid: unknown field `domain`, expected `checkpoints` (line 1, column 29)
    -
    ");
    assert_snapshot!(refused("{\"checkpoints\": [ { \"name\": \"a/b\" } ]}"), @r#"
    Invalid: the checkpoint name "a/b" has '/' (line 1, column 35)
    -
    "#);
    assert_snapshot!(refused(&one("\"created\": \"today\", \"disks\": []")), @r#"
    Invalid: "today" is no instant: expected a date and time, such as 2026-11-22T04:30:00.25Z (line 2, column 53)
    -
    "#);
    assert_snapshot!(refused(&one("\"created\": \"1969-01-01T00:00:00Z\", \"disks\": []")), @r#"
    Invalid: "1969-01-01T00:00:00Z" is before 1970: expected a date and time, such as 2026-11-22T04:30:00.25Z (line 2, column 68)
    -
    "#);
    assert_snapshot!(refused(&one("\"disks\": [ { \"target\": \"vda\" } ]")), @r#"
    Invalid: the disk "vda": expected either its 'bitmap', a name, or its 'snapshot', a UUID (line 2, column 66)
    -
    "#);
    assert_snapshot!(refused(&one("\"disks\": [ { \"target\": \"vda\", \"bitmap\": \"b\", \"dirty\": 1 } ]")), @"
    Invalid: unknown field `dirty`, expected one of `target`, `id`, `size`, `bitmap`, `snapshot`, `volatile`, `anew` (line 2, column 87)
    -
    ");
    assert_snapshot!(refused(&one("\"name\": \"b\"")), @"
    Invalid: duplicate field `name` (line 2, column 41)
    -
    ");
    assert_snapshot!(refused("[]"), @"
    Invalid: invalid length 0, expected expected an object with the list `checkpoints` (line 1, column 2)
    -
    ");
}

#[test]
fn a_table_that_is_none_is_told_by_line() {
    let refused = |checkpoints: &str, disks: &str| {
        told(&Tables::read_csv(checkpoints.as_bytes(), disks.as_bytes()).unwrap_err())
    };
    let (head, map) = (
        "checkpoint_id,parent,vm_id,creation_date\n",
        "disk_id,checkpoint_id\n",
    );
    assert_snapshot!(refused("checkpoint_id,parent,vm_id,creation_date,state\n", map), @r#"
    Invalid: the column "state" is not known: expected checkpoint_id, parent, parent_id, vm_id, creation_date, _create_date, description (table vm_checkpoints, line 1)
    Name the columns that are to be copied, or leave the others out.
    "#);
    assert_snapshot!(refused(&format!("{head}{VM},,{VM},2019-03-12 21:35:23\n{VM},,"), map), @"
    Invalid: the record has 3 fields: expected 4, as many as the first line names (table vm_checkpoints, line 3)
    -
    ");
    assert_snapshot!(refused(&format!("{head}{VM},x,{VM},2019-03-12 21:35:23\n"), map), @r#"
    Invalid: "x" is no UUID: expected such as 5768a388-c1c4-414c-ac4e-eab216ba7c0c (table vm_checkpoints, line 2)
    -
    "#);
    assert_snapshot!(refused(&format!("{head}{VM},,{VM},soon\n"), map), @r#"
    Invalid: "soon" is no instant: expected a date and time, such as 2026-11-22T04:30:00.25Z (table vm_checkpoints, line 2)
    -
    "#);
    assert_snapshot!(refused("checkpoint_id,parent,vm_id\n1,2,3\n", map), @r#"
    Invalid: "1" is no UUID: expected such as 5768a388-c1c4-414c-ac4e-eab216ba7c0c (table vm_checkpoints, line 2)
    -
    "#);
    assert_snapshot!(refused(head, "disk_id,checkpoint_id\n\"5768a388\n"), @"
    Invalid: the record has 1 fields: expected 2, as many as the first line names (table vm_checkpoint_disk_map, line 2)
    -
    ");
}

#[test]
fn tables_that_do_not_fit_the_domain_are_told_by_record() {
    let domain = domain();
    let good = Tables::of(&domain.id, &small(), &ids()).unwrap();
    let refused = |change: fn(&mut Tables)| {
        let mut tables = good.clone();
        change(&mut tables);
        told(&tables.checkpoints_of(&domain.id, &ids(), false).unwrap_err())
    };
    assert_snapshot!(refused(|t| t.checkpoints[1].vm_id = Uuid::nil()), @"
    Invalid: the row is of the VM 00000000-0000-0000-0000-000000000000, and the domain is 5768a388-c1c4-414c-ac4e-eab216ba7c0c (table vm_checkpoints, record 2)
    Give the rows of this VM alone.
    ");
    assert_snapshot!(refused(|t| t.checkpoints[1].checkpoint_id = t.checkpoints[0].checkpoint_id), @"
    Invalid: the checkpoint 00000010-0000-0000-0000-000000000000 comes twice (table vm_checkpoints, record 2)
    -
    ");
    assert_snapshot!(refused(|t| t.disks[2].checkpoint_id = Uuid::nil()), @"
    Invalid: the checkpoint 00000000-0000-0000-0000-000000000000 is not in vm_checkpoints (table vm_checkpoint_disk_map, record 3)
    -
    ");
    assert_snapshot!(refused(|t| t.disks[1] = t.disks[0]), @"
    Invalid: the disk d15c0000-0000-0000-0000-000000000000 comes twice in the checkpoint 00000010-0000-0000-0000-000000000000 (table vm_checkpoint_disk_map, record 2)
    -
    ");
    assert_snapshot!(refused(|t| t.disks[1].disk_id = Uuid::nil()), @"
    NotFound: no disk of the domain is known as 00000000-0000-0000-0000-000000000000 (table vm_checkpoint_disk_map, record 2)
    Tell which it is: --disk-id TARGET=UUID; or, if it is gone, say --leave-out-missing-disks.
    ");
    let mut tables = good.clone();
    tables.disks[1].disk_id = Uuid::nil();
    let (set, left_out) = tables.checkpoints_of(&domain.id, &ids(), true).unwrap();
    assert_eq!(set[0].disks.len(), 1);
    assert_eq!(left_out.into_iter().collect::<Vec<_>>(), [(Uuid::nil(), 1)]);
}

#[test]
fn what_ovirt_has_no_word_for_is_not_told_to_it() {
    let refused = |change: fn(&mut Checkpoint)| {
        let mut set = small();
        change(&mut set[1]);
        told(&Tables::of(&domain().id, &set, &DiskIds::new(&domain(), &[]).unwrap()).unwrap_err())
    };
    assert_snapshot!(refused(|c| c.name = "nightly".parse().unwrap()), @"
    Unsupported: the name of the checkpoint 'nightly' is no UUID, and oVirt knows checkpoints by UUID (checkpoint nightly)
    Only sets whose names are UUIDs, in small letters and with dashes, can be told to oVirt; the other formats tell all.
    ");
    assert_snapshot!(refused(|c| c.disks[0].mark = Mark::Bitmap("b0".to_owned())), @"
    Unsupported: the disk vd0 of the checkpoint '00000020-0000-0000-0000-000000000000' has the bitmap 'b0', and oVirt expects it to be called as the checkpoint (checkpoint 00000020-0000-0000-0000-000000000000, disk vd0)
    -
    ");
    assert_snapshot!(refused(|c| c.disks[0].mark = Mark::Pinned(SnapshotId(Uuid::nil()))), @"
    Unsupported: the disk vd0 of the checkpoint '00000020-0000-0000-0000-000000000000' is kept by a snapshot, and oVirt knows bitmaps alone (checkpoint 00000020-0000-0000-0000-000000000000, disk vd0)
    -
    ");
    assert_snapshot!(refused(|c| c.disks[0].target = "vd2".to_owned()), @"
    NotFound: the disk vd2 of the checkpoint '00000020-0000-0000-0000-000000000000' has no id that oVirt could know it by (checkpoint 00000020-0000-0000-0000-000000000000, disk vd2)
    Tell it: --disk-id vd2=UUID.
    ");
    assert_snapshot!(refused(|c| c.created = UNIX_EPOCH + Duration::from_hours(24 * 366 * 9000)), @"
    Unsupported: the checkpoint '00000020-0000-0000-0000-000000000000' is of a time that has no date (checkpoint 00000020-0000-0000-0000-000000000000)
    -
    ");
    // A name that is the same UUID in other letters would come back as another checkpoint.
    let upper = refused(|c| c.name = c.name.as_str().replace('-', "").parse().unwrap());
    assert!(upper.contains("is no UUID"), "{upper}");
}

#[test]
fn ids_are_unique_and_of_disks_that_there_are() {
    let refused = |told: &[(&str, Uuid)]| {
        let told: Vec<_> = told
            .iter()
            .map(|(target, id)| ((*target).to_owned(), *id))
            .collect();
        DiskIds::new(&domain(), &told).unwrap_err()
    };
    assert_eq!(refused(&[("vdx", id(1))]).kind(), ErrorKind::NotFound);
    let same = refused(&[("vd2", id(0))]);
    assert_snapshot!(self::told(&same), @"
    Invalid: the disks vd2 and vd0 have the same id, d15c0000-0000-0000-0000-000000000000 (disk vd0)
    Tell each disk's id: --disk-id TARGET=UUID.
    ");
    let twice = refused(&[("vd2", id(5)), ("vd2", id(6))]);
    assert!(
        twice.message().contains("two ids are told for the disk vd2"),
        "{twice}"
    );
    // What is told wins over what the document lets guess.
    let ids = DiskIds::new(&domain(), &[("vd0".to_owned(), id(9))]).unwrap();
    assert_eq!(
        (ids.id("vd0"), ids.target(id(9)), ids.target(id(0))),
        (Some(id(9)), Some("vd0"), None)
    );
    assert_eq!((ids.id("vd1"), ids.id("vd2")), (Some(id(1)), None));
}

/// Gives spaces for ever, and counts them.
struct Endless<'a>(&'a std::cell::Cell<u64>);

impl std::io::Read for Endless<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        into.fill(b' ');
        self.0.set(self.0.get() + into.len() as u64);
        Ok(into.len())
    }
}

#[test]
fn what_is_too_long_is_refused_before_it_is_all_read() {
    let count = std::cell::Cell::new(0);
    let error = json::read(Endless(&count)).unwrap_err();
    assert_snapshot!(told(&error), @"
    Invalid: the set has more than 67108864 bytes
    -
    ");
    assert!(count.get() < MAX_BYTES + (1 << 20), "{}", count.get());
    count.set(0);
    let error = Tables::read_csv(Endless(&count), &b""[..]).unwrap_err();
    assert_snapshot!(told(&error), @"
    Io: cannot read the set of checkpoints (table vm_checkpoints)
    -
    ");
    assert!(count.get() < MAX_BYTES + (1 << 20), "{}", count.get());
}
