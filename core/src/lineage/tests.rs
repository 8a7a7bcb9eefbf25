#![allow(clippy::unwrap_used, reason = "a test may fail in any way")]

use std::time::Duration;

use super::*;

/// `name<parent@second:disk,disk`.
fn checkpoint(text: &str) -> Checkpoint {
    let (head, disks) = text.split_once(':').unwrap();
    let (head, second) = head.split_once('@').unwrap();
    let (name, parent) = head
        .split_once('<')
        .map_or((head, None), |(name, parent)| (name, Some(parent)));
    let disk = |target: &str| CheckpointDisk {
        target: target.to_owned(),
        id: None,
        size: None,
        mark: Mark::Bitmap(name.to_owned()),
        volatile: false,
        anew: false,
    };
    Checkpoint {
        name: name.parse().unwrap(),
        parent: parent.map(|parent| parent.parse().unwrap()),
        created: SystemTime::UNIX_EPOCH + Duration::from_secs(second.parse().unwrap()),
        description: None,
        disks: disks.split(',').filter(|d| !d.is_empty()).map(disk).collect(),
    }
}

fn set(texts: &[&str]) -> Result<Lineage> {
    Lineage::new(texts.iter().map(|text| checkpoint(text)).collect())
}

fn names<'a>(checkpoints: impl IntoIterator<Item = &'a Checkpoint>) -> Vec<&'a str> {
    checkpoints.into_iter().map(|c| c.name.as_str()).collect()
}

fn name(text: &str) -> CheckpointName {
    text.parse().unwrap()
}

#[test]
fn parents_come_first_and_else_the_older() {
    let lineage = set(&["c<b@1:vda", "x<a@9:vda", "a@5:vda", "b<a@2:vda"]).unwrap();
    assert_eq!(names(lineage.checkpoints()), ["a", "b", "c", "x"]);
    // Of two lines the one that was made last goes on, also where the clock was set back within one.
    assert_eq!(lineage.newest().unwrap().name.as_str(), "x");
}

#[test]
fn what_is_not_sound_is_named() {
    let refused = |texts: &[&str]| {
        let error = set(texts).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        error.message().to_owned()
    };
    let told = [
        refused(&["a@1:vda", "a@2:vdb"]),
        refused(&["b<a@1:vda"]),
        refused(&["a@0:vda", "b<d@1:vda", "c<b@1:vda", "d<c@1:vda", "e<d@1:vda"]),
        refused(&["a<a@1:vda"]),
        refused(&["a@1:vda,vda"]),
        refused(&["a@1:vda", "b@2:vdb", "c<b@3:vda"]),
        refused(&["a@1:vda", "b<a@2:vdb", "c<a@3:vdb"]),
    ];
    let begin = "the set of checkpoints is not sound: ";
    let told: Vec<&str> = told.iter().map(|t| t.strip_prefix(begin).unwrap()).collect();
    assert_eq!(
        told,
        [
            "'a': it comes twice",
            "'b': its parent 'a' is not in the set",
            "'b': it comes from itself, by way of d, c",
            "'a': it is its own parent",
            "'a': the disk vda comes twice",
            "'c': the disk vda begins at 'a' too, and neither comes from the other",
            "'c': the disk vdb begins at 'b' too, and neither comes from the other",
        ]
    );
    // Disks that share nothing may have sets that share nothing, and a disk may come later and be left out.
    set(&["a@1:vda", "b@2:vdb"]).unwrap();
    set(&["a@1:vda", "b<a@2:vdb", "c<b@3:vda,vdb", "d<c@4:"]).unwrap();
}

#[test]
fn each_disk_has_a_chain_of_its_own() {
    let lineage = set(&["a@1:vda", "b<a@2:vdb", "c<b@3:vda,vdb", "d<c@4:vdb"]).unwrap();
    let span = |target, from, last| {
        let marks = lineage.since(target, &name(from), &name(last));
        marks.map(|disks| disks.iter().map(|d| d.mark.clone()).collect::<Vec<_>>())
    };
    let bitmaps = |names: &[&str]| names.iter().map(|n| Mark::Bitmap((*n).to_owned())).collect();
    assert_eq!(span("vda", "a", "d").ok(), Some(bitmaps(&["a", "c"])));
    assert_eq!(span("vdb", "b", "c").ok(), Some(bitmaps(&["b", "c"])));
    assert_eq!(span("vdb", "d", "d").ok(), Some(bitmaps(&["d"])));
    assert_eq!(span("vdb", "a", "d").unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(span("vda", "c", "a").unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(span("vda", "nix", "a").unwrap_err().kind(), ErrorKind::NotFound);
    let last = |target| lineage.newest_of(target).map(|c| c.name.as_str());
    assert_eq!(
        (last("vda"), last("vdb"), last("vdc")),
        (Some("c"), Some("d"), None)
    );
}

#[test]
fn a_removal_hands_over_to_the_one_before_on_each_disk() {
    let lineage = set(&["a@1:vda", "b<a@2:vdb", "c<b@3:vda,vdb", "d<c@4:vdb"]).unwrap();
    let told = |text| {
        let removal = lineage.removal(&name(text)).unwrap();
        let mark = |m: &Unmark| {
            let into = m.into.as_ref().map(|into| match into {
                Mark::Bitmap(name) => name.clone(),
                Mark::Pinned(id) => id.to_string(),
            });
            (m.target.clone(), into, m.last)
        };
        let children = removal.children.iter();
        let children: Vec<_> = children
            .map(|c| (c.name.to_string(), c.parent.clone().map(String::from)))
            .collect();
        (removal.marks.iter().map(mark).collect::<Vec<_>>(), children)
    };
    let own = |text: &str| Some(text.to_owned());
    assert_eq!(
        told("c"),
        (
            vec![
                ("vda".to_owned(), own("a"), true),
                ("vdb".to_owned(), own("b"), false)
            ],
            vec![("d".to_owned(), own("b"))]
        )
    );
    assert_eq!(
        told("a"),
        (
            vec![("vda".to_owned(), None, false)],
            vec![("b".to_owned(), None)]
        )
    );
    assert_eq!(told("d"), (vec![("vdb".to_owned(), own("c"), true)], Vec::new()));
}

#[test]
fn where_gaps_cannot_be_told_what_is_before_them_is_left_out() {
    let mut all: Vec<Checkpoint> = ["a@1:vda,vdb", "b<a@2:vda,vdb", "c<b@3:vda,vdb"]
        .map(checkpoint)
        .into();
    all[2].disks[0].anew = true;
    let lineage = Lineage::new(all).unwrap();
    let covered = |checkpoint: &Checkpoint| {
        let targets: Vec<&str> = checkpoint.disks.iter().map(|d| d.target.as_str()).collect();
        targets.join(",")
    };
    let left = lineage.without_gaps();
    assert_eq!(
        left.iter().map(covered).collect::<Vec<_>>(),
        ["vdb", "vdb", "vda,vdb"]
    );
    assert!(left.iter().flat_map(|c| &c.disks).all(|disk| !disk.anew));
}

/// Long lines neither overflow the stack nor take more than a pass or two.
#[test]
fn ten_thousand_in_one_line() {
    let disks: Vec<String> = (0..16).map(|n| format!("vd{n}")).collect();
    let line = |n: usize| {
        let parent = n.checked_sub(1).map_or(String::new(), |p| format!("<c{p}"));
        checkpoint(&format!("c{n}{parent}@{n}:{}", disks.join(",")))
    };
    let mut all: Vec<Checkpoint> = (0..10_000).map(line).collect();
    all.reverse();
    let lineage = Lineage::new(all.clone()).unwrap();
    assert_eq!(lineage.newest().unwrap().name.as_str(), "c9999");
    let span = lineage.since("vd7", &name("c0"), &name("c9999")).unwrap();
    assert_eq!(span.len(), 10_000);
    all.reverse();
    assert_eq!(lineage.into_checkpoints(), all);
}
