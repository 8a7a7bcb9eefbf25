//! Whole points into a directory, with the machine.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use disksnap::DomainDocument;
use disksnap_backup::{
    Compression, ErrorKind, Form, PointRequest, Silent, Target, merge, restore_disks, restore_point,
};
use uuid::Uuid;

use crate::rig::{POINTS, Saved, document, names_in, reads_as, text};

fn request(directory: &Path, form: Form) -> PointRequest {
    PointRequest {
        directory: directory.to_owned(),
        form,
        disks: Vec::new(),
        machine: true,
        name: None,
        uuid: None,
    }
}

/// A machine with EFI variables and a TPM, whose files are in `dir`.
fn whole(dir: &Path) -> DomainDocument {
    std::fs::create_dir(dir.join("swtpm")).unwrap();
    std::fs::write(dir.join("swtpm/tpm2-00.permall"), "secret").unwrap();
    std::fs::write(dir.join("vars.fd"), "variables").unwrap();
    let at = dir.display();
    document(&format!(
        "  <os>\n    <type>hvm</type>\n    <nvram template='/t.fd'>{at}/vars.fd</nvram>\n  </os>\n  <devices>\n    <tpm>\n      \
         <backend type='emulator'>\n        <source type='dir' path='{at}/swtpm'/>\n      </backend>\n    </tpm>\n    \
         <disk type='file'>\n      <source file='/elsewhere'/>\n      <target dev='vdb'/>\n    </disk>\n  </devices>\n"
    ))
}

#[tokio::test]
async fn the_whole_machine() {
    let dir = tempfile::tempdir().unwrap();
    let document = whole(dir.path());
    let saved = Saved::of(&document).await;
    for (n, form) in [
        (1, Form::Qcow2(Compression::None)),
        (2, Form::Raw { sparse: true }),
    ] {
        let out = saved.path(&format!("restored/{n}"));
        let point = &saved.points[n];
        let done = restore_point(
            &saved.repository,
            &saved.folder,
            point,
            &request(&out, form),
            &Silent,
        )
        .await;
        let done = done.unwrap();
        let image = format!("vda.{}", form.name());
        assert_eq!(names_in(&out), ["domain.xml", "nvram.fd", "tpm", &image]);
        assert_eq!(names_in(&out.join("tpm")), ["tpm2-00.permall"]);
        assert_eq!(
            std::fs::read_to_string(out.join("nvram.fd")).unwrap(),
            "variables"
        );
        for name in names_in(&out) {
            let mode = out.join(&name).metadata().unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, if name == "tpm" { 0o700 } else { 0o600 }, "{name}");
        }
        reads_as(&out.join(&image), form.name(), &saved.contents[n]);
        let restored = std::fs::read_to_string(out.join("domain.xml")).unwrap();
        let at = out.canonicalize().unwrap();
        let at = text(&at);
        let expected = document
            .text()
            .replace("type='block' device", "type='file' device")
            .replace("dev='/dev/vg0/web'", &format!("file='{at}/{image}'"))
            .replace("type='raw'", &format!("type='{}'", form.name()))
            .replace(text(&dir.path().join("vars.fd")), &format!("{at}/nvram.fd"))
            .replace(text(&dir.path().join("swtpm")), &format!("{at}/tpm"));
        assert_eq!(restored, expected);
        assert_eq!(done.warnings.len(), 1, "{:?}", done.warnings);
        assert!(
            done.warnings[0].contains("'vdb' was not restored"),
            "{:?}",
            done.warnings
        );
        assert_eq!(done.disks[0].restored.digest, point.disks[0].content);
    }
}

#[tokio::test]
async fn a_second_machine_of_another_name() {
    let saved = Saved::new().await;
    let out = saved.path("clone");
    let mut wanted = request(&out, Form::Qcow2(Compression::Zstd(1)));
    wanted.name = Some("web 2".to_owned());
    wanted.uuid = Some(Uuid::from_u128(7));
    restore_point(
        &saved.repository,
        &saved.folder,
        &saved.points[0],
        &wanted,
        &Silent,
    )
    .await
    .unwrap();
    let text = std::fs::read_to_string(out.join("domain.xml")).unwrap();
    let clone = DomainDocument::parse(text).unwrap();
    assert_eq!(clone.domain().id.name, "web 2");
    assert_eq!(clone.domain().id.uuid, Uuid::from_u128(7));
}

#[tokio::test]
async fn any_name_that_is_taken_stops_it_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let saved = Saved::of(&whole(dir.path())).await;
    let form = Form::Raw { sparse: true };
    for taken in ["vda.raw", "domain.xml", "nvram.fd", "tpm"] {
        let out = saved.path(&format!("to-{taken}"));
        std::fs::create_dir(&out).unwrap();
        std::fs::write(out.join(taken), "mine").unwrap();
        let done = restore_point(
            &saved.repository,
            &saved.folder,
            &saved.points[0],
            &request(&out, form),
            &Silent,
        )
        .await;
        let error = done.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
        assert_eq!(names_in(&out), [taken]);
        assert_eq!(std::fs::read_to_string(out.join(taken)).unwrap(), "mine");
    }
}

#[tokio::test]
async fn disks_alone_and_disks_that_are_not_there() {
    let saved = Saved::new().await;
    let form = Form::Raw { sparse: true };
    let mut wanted = request(&saved.path("out"), form);
    wanted.machine = false;
    wanted.disks = vec!["vdz".to_owned()];
    let point = &saved.points[0];
    let error = restore_point(&saved.repository, &saved.folder, point, &wanted, &Silent)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.next_step().unwrap().contains("vda"), "{error:?}");
    wanted.disks = vec!["vda".to_owned()];
    // The machine's files are damaged; the disks are good all the same.
    std::fs::write(saved.file(0, "domain.xml"), "<domain/>").unwrap();
    let whole = request(&saved.path("out"), form);
    let error = restore_point(&saved.repository, &saved.folder, point, &whole, &Silent)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    assert!(!saved.path("out").exists());
    restore_point(&saved.repository, &saved.folder, point, &wanted, &Silent)
        .await
        .unwrap();
    assert_eq!(names_in(&saved.path("out")), ["vda.raw"]);
}

#[tokio::test]
async fn a_damaged_disk_leaves_neither_image_nor_document() {
    let saved = Saved::new().await;
    saved.damage();
    let out = saved.path("out");
    let wanted = request(&out, Form::Qcow2(Compression::None));
    let error = restore_point(
        &saved.repository,
        &saved.folder,
        &saved.points[0],
        &wanted,
        &Silent,
    )
    .await
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
    assert_eq!(names_in(&out), [""; 0]);
}

#[tokio::test]
async fn a_chain_that_is_being_changed_is_left_alone() {
    let saved = Saved::new().await;
    let lock = saved.repository.lock(&saved.folder, false).await.unwrap();
    let wanted = request(&saved.path("out"), Form::Raw { sparse: true });
    let error = restore_point(
        &saved.repository,
        &saved.folder,
        &saved.points[0],
        &wanted,
        &Silent,
    )
    .await
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    drop(lock);
}

/// A prune ends between the look at a manifest and the lock.
#[tokio::test]
async fn what_was_merged_since_it_was_looked_up_is_restored_and_what_was_dropped_is_told() {
    let saved = Saved::new().await;
    let drop = POINTS[..2].iter().map(|name| (*name).to_owned()).collect();
    merge(&saved.repository, &saved.folder, &drop, &Silent)
        .await
        .unwrap();
    let to = |name: &str| {
        let path = saved.path(name);
        vec![("vda".to_owned(), Target::Raw { path, sparse: true })]
    };
    for (n, kind) in [
        (0, Some(ErrorKind::NotFound)),
        (1, Some(ErrorKind::NotFound)),
        (2, None),
    ] {
        let (point, out) = (&saved.points[n], format!("out-{n}"));
        let disks = restore_disks(
            &saved.repository,
            &saved.folder,
            point,
            &to(&format!("{out}.raw")),
            false,
            &Silent,
        )
        .await;
        assert_eq!(disks.err().map(|e| e.kind()), kind);
        let form = Form::Qcow2(Compression::None);
        let whole = restore_point(
            &saved.repository,
            &saved.folder,
            point,
            &request(&saved.path(&out), form),
            &Silent,
        )
        .await;
        assert_eq!(whole.err().map(|e| e.kind()), kind);
    }
    reads_as(&saved.path("out-2.raw"), "raw", &saved.contents[2]);
    reads_as(&saved.path("out-2/vda.qcow2"), "qcow2", &saved.contents[2]);
    assert_eq!(names_in(saved.dir.path()), ["out-2", "out-2.raw", "repository"]);
}
