//! What makes a machine of its disks is saved and read back, and is what it was.

use std::os::unix::fs::{PermissionsExt, symlink};

use disksnap::DomainDocument;
use disksnap_backup::{
    ErrorKind, LocalStore, MachineEntry, MachineOptions, Result, load_machine, save_machine, verify_machine,
};
use tempfile::TempDir;

use crate::rig::names_in;

struct Machine {
    dir: TempDir,
    store: LocalStore,
}

impl Machine {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("store")).unwrap();
        std::fs::create_dir(dir.path().join("swtpm")).unwrap();
        let store = LocalStore::at(dir.path().join("store"));
        Self { dir, store }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    /// A domain with EFI variables and a TPM in this directory.
    fn document(&self) -> DomainDocument {
        let (nvram, tpm) = (self.path("vars.fd"), self.path("swtpm"));
        Self::with(
            &format!("<nvram>{}</nvram>", nvram.display()),
            &format!("<source type='dir' path='{}'/>", tpm.display()),
        )
    }

    fn with(os: &str, tpm: &str) -> DomainDocument {
        DomainDocument::parse(format!(
            "<domain><name>a</name><uuid>5768a388-c1c4-414c-ac4e-eab216ba7c0c</uuid><os><type>hvm</type>{os}</os><devices>\
             <tpm><backend type='emulator' version='2.0'>{tpm}</backend></tpm></devices></domain>"
        ))
        .unwrap()
    }

    async fn save(
        &self,
        document: &DomainDocument,
        allow_missing: bool,
    ) -> (Result<MachineEntry>, Vec<String>) {
        let mut warnings = Vec::new();
        let options = MachineOptions { allow_missing };
        let entry = save_machine(&self.store, "d/p", document, &options, &mut warnings).await;
        (entry, warnings)
    }
}

#[tokio::test]
async fn what_was_saved_is_what_it_was() {
    let machine = Machine::new();
    machine.put("vars.fd", &vec![1; 540_672]);
    machine.put("swtpm/tpm2-00.permall", b"secret");
    machine.put("swtpm/tpm2-00.volatilestate", b"");
    machine.put("swtpm/.lock", b"");
    let document = machine.document();
    let (entry, warnings) = machine.save(&document, false).await;
    let entry = entry.unwrap();
    assert_eq!(warnings, [""; 0]);
    let files: Vec<&str> = entry.files().map(|file| file.file.as_str()).collect();
    assert_eq!(
        files,
        [
            "domain.xml",
            "nvram.fd",
            "tpm/tpm2-00.permall",
            "tpm/tpm2-00.volatilestate"
        ]
    );
    assert_eq!(
        entry.nvram.as_ref().unwrap().path,
        machine.path("vars.fd").to_str().map(str::to_owned)
    );
    let at = machine.path("store/d/p");
    for file in entry.files() {
        let about = at.join(&file.file).metadata().unwrap();
        assert_eq!(about.permissions().mode() & 0o777, 0o600, "{}", file.file);
        assert_eq!(about.len(), file.bytes);
    }
    let loaded = load_machine(&machine.store, "d/p", &entry).await.unwrap();
    assert_eq!(loaded.document, document);
    assert_eq!(loaded.nvram.unwrap(), vec![1; 540_672]);
    assert_eq!(loaded.tpm[0], ("tpm2-00.permall".to_owned(), b"secret".to_vec()));
    // Again, in the place of the first.
    machine.put("vars.fd", b"other");
    let (again, _) = machine.save(&document, false).await;
    verify_machine(&machine.store, "d/p", &again.unwrap())
        .await
        .unwrap();
    let error = verify_machine(&machine.store, "d/p", &entry).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Broken);
    assert!(error.to_string().contains("nvram.fd"), "{error}");
}

#[tokio::test]
async fn a_damaged_or_missing_file_is_named() {
    let machine = Machine::new();
    machine.put("vars.fd", b"vars");
    machine.put("swtpm/tpm2-00.permall", b"secret");
    let (entry, _) = machine.save(&machine.document(), false).await;
    let entry = entry.unwrap();
    for file in entry.files() {
        let path = machine.path("store/d/p").join(&file.file);
        let good = std::fs::read(&path).unwrap();
        let mut flipped = good.clone();
        flipped[1] ^= 1;
        let longer = [good.as_slice(), b"x"].concat();
        for bad in [Some(flipped), Some(good[1..].to_vec()), Some(longer), None] {
            match bad {
                Some(bad) => std::fs::write(&path, bad).unwrap(),
                None => std::fs::remove_file(&path).unwrap(),
            }
            let error = verify_machine(&machine.store, "d/p", &entry).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Broken, "{error}");
            assert!(error.to_string().contains(&file.file), "{error}");
        }
        std::fs::write(&path, good).unwrap();
    }
    verify_machine(&machine.store, "d/p", &entry).await.unwrap();
}

#[tokio::test]
async fn a_hostile_manifest_leads_nowhere() {
    let machine = Machine::new();
    machine.put("vars.fd", b"vars");
    machine.put("swtpm/tpm2-00.permall", b"secret");
    machine.put("outside", b"secret");
    let (entry, _) = machine.save(&machine.document(), false).await;
    let entry = entry.unwrap();
    for name in [
        "tpm/../../../../outside",
        "../outside",
        "tpm/",
        "tpm/.hidden",
        "nvram.fd",
        "/etc/passwd",
    ] {
        let mut bad = entry.clone();
        bad.tpm[0].file = name.to_owned();
        load_machine(&machine.store, "d/p", &bad).await.unwrap_err();
    }
}

#[tokio::test]
async fn what_cannot_be_read_is_an_error_or_a_warning() {
    let machine = Machine::new();
    machine.put("vars.fd", b"vars");
    machine.put("swtpm/tpm2-00.permall", b"secret");
    let good_os = format!("<nvram>{}</nvram>", machine.path("vars.fd").display());
    let good_tpm = format!("<source type='dir' path='{}'/>", machine.path("swtpm").display());
    symlink(machine.path("vars.fd"), machine.path("link.fd")).unwrap();
    std::fs::create_dir(machine.path("empty")).unwrap();
    std::fs::create_dir(machine.path("linked")).unwrap();
    symlink("/etc/passwd", machine.path("linked/tpm2-00.permall")).unwrap();
    std::fs::create_dir(machine.path("odd")).unwrap();
    machine.put("odd/a b", b"");
    let fifo = std::process::Command::new("mkfifo")
        .arg(machine.path("fifo"))
        .status();
    assert!(fifo.unwrap().success());
    let nvram = |name: &str| format!("<nvram>{}</nvram>", machine.path(name).display());
    let tpm =
        |kind: &str, name: &str| format!("<source type='{kind}' path='{}'/>", machine.path(name).display());
    let cases = [
        (nvram("absent.fd"), good_tpm.clone(), "absent.fd"),
        (nvram("link.fd"), good_tpm.clone(), "link.fd"),
        (nvram("fifo"), good_tpm.clone(), "fifo"),
        (nvram("swtpm"), good_tpm.clone(), "swtpm"),
        (
            "<nvram template='/t.fd'/>".to_owned(),
            good_tpm.clone(),
            "does not say where",
        ),
        (
            "<nvram type='network'><source protocol='nbd' name='x'><host name='h'/></source></nvram>"
                .to_owned(),
            good_tpm,
            "nbd:h/x",
        ),
        (good_os.clone(), tpm("dir", "absent"), "absent"),
        (good_os.clone(), tpm("dir", "empty"), "empty"),
        (good_os.clone(), tpm("dir", "linked"), "linked"),
        (good_os.clone(), tpm("dir", "odd"), "odd"),
        (good_os.clone(), tpm("dir", "vars.fd"), "vars.fd"),
        (good_os.clone(), tpm("file", "linked/tpm2-00.permall"), "linked"),
        (good_os, String::new(), "/var/lib/libvirt/swtpm/5768a388"),
    ];
    for (os, tpm, named) in cases {
        let document = Machine::with(&os, &tpm);
        let (refused, _) = machine.save(&document, false).await;
        let error = refused.unwrap_err();
        assert!(error.to_string().contains(named), "{os}{tpm}: {error}");
        assert_ne!(error.kind(), ErrorKind::Internal);
        let (allowed, warnings) = machine.save(&document, true).await;
        let allowed = allowed.unwrap();
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].contains(named), "{warnings:?}");
        assert_eq!(
            allowed.files().count(),
            2,
            "what can be read is saved all the same"
        );
    }
}

/// The TPM's state as one file, and one of another kind.
#[tokio::test]
async fn other_forms_of_a_tpm() {
    let machine = Machine::new();
    machine.put("state-file", b"secret");
    let document = Machine::with(
        "",
        &format!(
            "<source type='file' path='{}'/>",
            machine.path("state-file").display()
        ),
    );
    let (entry, warnings) = machine.save(&document, false).await;
    let entry = entry.unwrap();
    assert_eq!((entry.tpm[0].file.as_str(), warnings.len()), ("tpm/state", 0));
    let external = "<domain><name>a</name><devices><tpm><backend type='external'/></tpm></devices></domain>";
    let (entry, warnings) = machine
        .save(&DomainDocument::parse(external).unwrap(), false)
        .await;
    assert_eq!((entry.unwrap().files().count(), warnings.len()), (1, 1));
}

/// A file that never comes to rest is saved, and it is said.
#[tokio::test]
async fn a_file_that_changes_all_the_time_is_told() {
    let machine = Machine::new();
    // Each read gives another.
    let restless = "/proc/sys/kernel/random/uuid";
    machine.put("swtpm/tpm2-00.permall", b"secret");
    let tpm = format!("<source type='dir' path='{}'/>", machine.path("swtpm").display());
    let document = Machine::with(&format!("<nvram>{restless}</nvram>"), &tpm);
    let (entry, warnings) = machine.save(&document, false).await;
    verify_machine(&machine.store, "d/p", &entry.unwrap())
        .await
        .unwrap();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains(restless), "{warnings:?}");
    assert!(
        warnings[0].contains("changed each of the 5 times"),
        "{warnings:?}"
    );
    assert_eq!(
        names_in(&machine.path("store/d/p")),
        ["domain.xml", "nvram.fd", "tpm"]
    );
}
