//! Checkpoints in libvirt's form, alone and as a set.

use std::time::{Duration, UNIX_EPOCH};

use disksnap_core::{Checkpoint, CheckpointDisk, ErrorKind, Mark, SnapshotId};
use disksnap_xml::{MAX_SET_BYTES, checkpoints, checkpoints_document};

use crate::schema::Schema;

fn disk(target: &str, bitmap: &str, size: Option<u64>) -> CheckpointDisk {
    CheckpointDisk {
        target: target.to_owned(),
        id: None,
        size,
        mark: Mark::Bitmap(bitmap.to_owned()),
        volatile: false,
        anew: false,
    }
}

fn line() -> Vec<Checkpoint> {
    let named = |name: &str, parent: Option<&str>, second, disks| Checkpoint {
        name: name.parse().unwrap(),
        parent: parent.map(|parent| parent.parse().unwrap()),
        created: UNIX_EPOCH + Duration::from_secs(second),
        description: None,
        disks,
    };
    let mut line = vec![
        named(
            "monday",
            None,
            1_525_889_631,
            vec![disk("vda", "monday", Some(1 << 30))],
        ),
        named(
            "5768a388-c1c4-414c-ac4e-eab216ba7c0c",
            Some("monday"),
            1_525_889_700,
            vec![disk("vda", "x", None), disk("sdb", "-y.", Some(0))],
        ),
        named("empty", Some("monday"), 0, Vec::new()),
    ];
    line[1].description = Some("after <the> upgrade & before".to_owned());
    line
}

#[test]
fn a_set_comes_back_as_it_went() {
    let text = checkpoints_document(&line()).unwrap();
    insta::assert_snapshot!(text, @r"
    <domaincheckpoints>
      <domaincheckpoint>
        <name>monday</name>
        <creationTime>1525889631</creationTime>
        <disks>
          <disk name='vda' checkpoint='bitmap' bitmap='monday' size='1073741824'/>
        </disks>
      </domaincheckpoint>
      <domaincheckpoint>
        <name>5768a388-c1c4-414c-ac4e-eab216ba7c0c</name>
        <description>after &lt;the&gt; upgrade &amp; before</description>
        <parent>
          <name>monday</name>
        </parent>
        <creationTime>1525889700</creationTime>
        <disks>
          <disk name='vda' checkpoint='bitmap' bitmap='x'/>
          <disk name='sdb' checkpoint='bitmap' bitmap='-y.' size='0'/>
        </disks>
      </domaincheckpoint>
      <domaincheckpoint>
        <name>empty</name>
        <parent>
          <name>monday</name>
        </parent>
        <creationTime>0</creationTime>
      </domaincheckpoint>
    </domaincheckpoints>
    ");
    assert_eq!(checkpoints(&text).unwrap(), line());
}

/// What `virsh checkpoint-dumpxml` tells, whole domain and all.
#[test]
fn libvirts_own_words_are_read() {
    let text = "<domaincheckpoint>\n  <name>1525889631</name>\n  <description>Completion of updates</description>\n\
         <parent><name>bare-os-install</name></parent><creationTime>1525889631</creationTime>\n\
         <disks><disk name='vda' checkpoint='bitmap' bitmap='1525889631'/><disk name='vdb' checkpoint='no'/>\
         <disk name='vdc'/></disks>\n\
         <domain type='qemu'><name>fedora</name><devices><disk type='file'/></devices></domain></domaincheckpoint>";
    let read = checkpoints(text).unwrap();
    assert_eq!(read.len(), 1);
    let own = |target| disk(target, "1525889631", None);
    assert_eq!(read[0].disks, [own("vda"), own("vdc")]);
    assert_eq!(read[0].parent.as_ref().unwrap().as_str(), "bare-os-install");
}

#[test]
fn each_is_valid_in_libvirts_eyes() {
    let Some(schema) = Schema::find("domaincheckpoint.rng") else {
        return;
    };
    let mut line = line();
    line[0].disks.push(CheckpointDisk {
        mark: Mark::Pinned(SnapshotId::random()),
        ..disk("vdc", "", Some(1))
    });
    let text = checkpoints_document(&line).unwrap();
    let mut found = 0;
    for one in text.split("<domaincheckpoint>").skip(1) {
        let one = one.replace("</domaincheckpoints>", "");
        schema.check(&format!("<domaincheckpoint>{one}")).unwrap();
        found += 1;
    }
    assert_eq!(found, 3);
    schema
        .check("<domaincheckpoint><disks/></domaincheckpoint>")
        .unwrap_err();
}

#[test]
fn faults_are_placed() {
    let told = |inner: &str| {
        let error = checkpoints(&format!("<domaincheckpoints>\n{inner}\n</domaincheckpoints>")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        error.to_string()
    };
    let around = |inner: &str| {
        format!("<domaincheckpoint><name>a</name><creationTime>1</creationTime>{inner}</domaincheckpoint>")
    };
    let all = [
        told("<domaincheckpoint><name>a/b</name></domaincheckpoint>"),
        told("<domaincheckpoint><name>a\nb</name></domaincheckpoint>"),
        told("<domaincheckpoint><name>a</name></domaincheckpoint>"),
        told("<domaincheckpoint><name>a</name><creationTime>soon</creationTime></domaincheckpoint>"),
        told(&around("<disks><disk name='vda' bitmap=''/></disks>")),
        told(&around("<disks><disk name='vda' bitmap='a' size='-1'/></disks>")),
        told(&around("<parent/>")),
        told("<checkpoint/>"),
    ];
    insta::assert_snapshot!(all.join("\n"), @r#"
    the checkpoint name "a/b" has '/' (line 2, column 19, element name)
    the checkpoint name "a\nb" has '\n' (line 2, column 19, element name)
    <domaincheckpoint> lacks its <creationTime>: expected <creationTime>seconds since 1970</creationTime> (line 2, column 1, element domaincheckpoint)
    <creationTime> is "soon": expected <creationTime>seconds since 1970</creationTime> (line 2, column 33, element creationTime)
    the attribute 'bitmap' is empty: expected the name of the disk's bitmap (line 2, column 87, element disk)
    size='-1': expected bytes, a whole number (line 2, column 98, element disk)
    <parent> lacks its <name>: expected <name>the name of a checkpoint</name> (line 2, column 63, element parent)
    unknown element <checkpoint> in <domaincheckpoints>: expected <domaincheckpoint> (line 2, column 1, element checkpoint)
    "#);
}

#[test]
fn a_set_of_a_hundred_megabytes_is_refused_and_one_of_twenty_is_not() {
    let one = |n: usize| {
        let disk =
            |d| format!("<disk name='vd{d}' checkpoint='bitmap' bitmap='c{n}' size='1099511627776'/>\n");
        let disks: Vec<String> = (0..16).map(disk).collect();
        let disks = disks.concat();
        format!(
            "<domaincheckpoint><name>c{n}</name><creationTime>{n}</creationTime><disks>{disks}</disks></domaincheckpoint>\n"
        )
    };
    let many: String = (0..10_000).map(one).collect();
    let text = format!("<domaincheckpoints>{many}</domaincheckpoints>");
    assert_eq!(checkpoints(&text).unwrap().len(), 10_000);
    let error = checkpoints(&text.replace("<disks>", &" ".repeat(9_000))).unwrap_err();
    assert_eq!(
        error.message(),
        format!("the document has more than {MAX_SET_BYTES} bytes")
    );
}
