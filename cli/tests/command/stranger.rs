//! An image that a stranger has made: its header names files of this host. With the domain off nothing of that is opened by any act,
//! unless the document names it too, as an operator lets it with `domain update --chain`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use disksnap_test_support::{LoopFsKind, MIB, loop_fs, need, tools};
use serde_json::json;

use crate::every_method::off;
use crate::site::{Site, arg, list};

const SIZE: u64 = 2 * MIB;
const SECRET: u8 = 0x5e;

fn qemu_img(directory: &Path, arguments: &[&str]) {
    let run = Command::new(tools::program("qemu-img"))
        .current_dir(directory)
        .args(arguments)
        .output()
        .unwrap();
    assert!(
        run.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&run.stderr)
    );
}

/// A directory with `secret`, and `vda.qcow2` which names it; the document names the image alone.
struct Stranger<'a> {
    site: &'a Site,
    dir: PathBuf,
    image: PathBuf,
    xml: String,
}

impl<'a> Stranger<'a> {
    fn in_dir(site: &'a Site, dir: &Path, options: &[&str]) -> Self {
        let image = dir.join("vda.qcow2");
        fs::write(dir.join("secret"), vec![SECRET; usize::try_from(SIZE).unwrap()]).unwrap();
        let size = SIZE.to_string();
        let create = ["create", "-q", "-f", "qcow2"];
        qemu_img(dir, &[&create[..], options, &["vda.qcow2", &size]].concat());
        let xml = off(site, &image, "qcow2");
        Self {
            site,
            dir: dir.to_owned(),
            image,
            xml,
        }
    }

    /// Whoever opened it for its data would wait for ever.
    fn trap(&self) {
        let secret = self.dir.join("secret");
        fs::remove_file(&secret).unwrap();
        let made = Command::new("mkfifo").arg(&secret).status().unwrap();
        assert!(made.success());
    }

    fn document(&self) -> String {
        fs::read_to_string(&self.xml).unwrap()
    }

    fn create<'b>(&'b self, disk: &'b str) -> Vec<&'b str> {
        vec![
            "snapshot", "create", "-d", &self.xml, "--name", "n", "--disk", disk,
        ]
    }

    /// A create is refused because of the header, and so is one with a checkpoint; nothing is left, and nothing is known of `n`.
    fn is_refused(&self, disk: &str, code: i32) -> String {
        let before = (list(&self.dir), fs::read(&self.image).unwrap(), self.document());
        let told = self.site.fails(code, &self.create(disk));
        let checkpoint = [self.create(disk), vec!["--checkpoint=c"]].concat();
        let same = self.site.fails(5, &checkpoint);
        assert!(
            same.contains("the header of") || same.contains("the image's header"),
            "{same}"
        );
        let none = json!({ "snapshots": [] });
        assert_eq!(self.site.json(&["snapshot", "list", "-d", &self.xml]), none);
        let after = (list(&self.dir), fs::read(&self.image).unwrap(), self.document());
        assert!(after == before, "{disk}: something was left");
        told.replace(&arg(&self.dir), "DIR")
    }

    /// The disk in the snapshot is full of what the file below holds.
    fn shows_the_secret(&self) {
        let copy = self.site.path("copy.raw");
        let _ = fs::remove_file(&copy);
        self.site
            .ok(&["read", "-d", &self.xml, "n", "vda", "--to", &arg(&copy)]);
        let read = fs::read(&copy).unwrap();
        assert!(read.len() as u64 == SIZE && read.iter().all(|byte| *byte == SECRET));
        self.site.ok(&["snapshot", "delete", "-d", &self.xml, "n"]);
    }
}

#[test]
fn a_header_gets_no_file_of_this_host_into_an_external_snapshot() {
    need!("qemu-img");
    let (site, disk) = (Site::new(), "vda,method=qemu-external-qcow2");
    let dir = site.path("d");
    fs::create_dir(&dir).unwrap();
    let image = Stranger::in_dir(&site, &dir, &["-b", "secret", "-F", "raw"]);
    let told = image.is_refused(disk, 2);
    let all = "By the headers the disk is SITE/d/vda.qcow2 on SITE/d/secret (raw).";
    assert!(
        told.contains(all) && told.contains("`disksnap domain update --chain`"),
        "{told}"
    );
    image.trap();
    image.is_refused(disk, 2);
    qemu_img(
        &dir,
        &["rebase", "-u", "-F", "qcow2", "-b", "secret", "vda.qcow2"],
    );
    let told = image.is_refused(disk, 2);
    assert!(told.contains("neither a file nor a block device"), "{told}");
    qemu_img(&dir, &["rebase", "-u", "-F", "raw", "-b", "secret", "vda.qcow2"]);
    // The acts that look for bitmaps open no more.
    let checkpoints = site.json(&["checkpoint", "list", "-d", &image.xml]);
    assert_eq!(checkpoints["checkpoints"], json!([]));
    site.ok(&["checkpoint", "validate", "-d", &image.xml]);
    fs::remove_file(dir.join("secret")).unwrap();
    fs::write(dir.join("secret"), vec![SECRET; usize::try_from(SIZE).unwrap()]).unwrap();

    // The control: once the document names it, it is a chain as any other.
    let before = image.document();
    let told = site.ok(&["domain", "update", "--chain", "-d", &image.xml]);
    let expected = "vda: the document names these images now:\n  DIR/secret (raw)\n";
    assert_eq!(told.replace(&arg(&dir), "DIR"), expected);
    let after = image.document();
    let added = format!("<source file='{}/secret'/>", dir.display());
    assert!(after.contains(&added) && after.len() > before.len(), "{after}");
    let told = site.ok(&["domain", "update", "--chain", "-d", &image.xml]);
    assert_eq!(
        (told.as_str(), image.document()),
        ("The document is up to date.\n", after)
    );
    site.ok(&[image.create(disk), vec!["--checkpoint=c"]].concat());
    site.ok(&["checkpoint", "validate", "-d", &image.xml]);
    image.shows_the_secret();
    // What the snapshot's own overlay made of the document names the whole chain.
    assert!(image.document().contains(&added));
}

#[test]
fn a_file_for_the_data_is_named_by_the_document_too() {
    need!("qemu-img");
    let (site, disk) = (Site::new(), "vda,method=qemu-external-qcow2");
    let dir = site.path("d");
    fs::create_dir(&dir).unwrap();
    let image = Stranger::in_dir(&site, &dir, &["-o", "data_file=secret,data_file_raw=on"]);
    fs::write(dir.join("secret"), vec![SECRET; usize::try_from(SIZE).unwrap()]).unwrap();
    let told = image.is_refused(disk, 2);
    assert!(told.contains("names the file \"secret\" for its data"), "{told}");
    site.ok(&["domain", "update", "--chain", "-d", &image.xml]);
    assert!(image.document().contains("<dataStore"), "{}", image.document());
    site.ok(&image.create(disk));
    site.ok(&["snapshot", "delete", "-d", &image.xml, "n"]);
    assert!(image.document().contains("<dataStore"), "{}", image.document());
}

#[test]
fn what_the_document_says_and_the_header_does_not_is_not_trusted_either() {
    need!("qemu-img");
    let (site, disk) = (Site::new(), "vda,method=qemu-external-qcow2");
    let dir = site.path("d");
    fs::create_dir(&dir).unwrap();
    let image = Stranger::in_dir(&site, &dir, &["-b", "secret", "-F", "raw"]);
    let text = image.document();
    // It says that nothing is below.
    fs::write(&image.xml, text.replace("<target", "<backingStore/><target")).unwrap();
    image.is_refused(disk, 2);
    let told = site.fails(2, &["domain", "update", "--chain", "-d", &image.xml]);
    assert!(told.contains("says where the chain ends"), "{told}");
    // It names another one.
    fs::write(dir.join("other"), vec![0; 512]).unwrap();
    let other = format!(
        "<backingStore type='file'><format type='raw'/><source file='{}/other'/></backingStore><target",
        dir.display()
    );
    fs::write(&image.xml, text.replace("<target", &other)).unwrap();
    image.is_refused(disk, 2);
    let told = site.fails(2, &["domain", "update", "--chain", "-d", &image.xml]);
    assert!(told.contains("the domain's document names"), "{told}");
    // It names it as what it is not: nobody looks into a raw file for a header.
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "inner", "1M"]);
    qemu_img(&dir, &["rebase", "-u", "-F", "qcow2", "-b", "inner", "vda.qcow2"]);
    let inner = other.replace("/other", "/inner");
    fs::write(&image.xml, text.replace("<target", &inner)).unwrap();
    image.is_refused(disk, 5);
}

#[test]
fn a_format_is_never_guessed() {
    need!("qemu-img");
    let (site, disk) = (Site::new(), "vda,method=qemu-external-qcow2");
    let dir = site.path("d");
    fs::create_dir(&dir).unwrap();
    let image = Stranger::in_dir(&site, &dir, &["-b", "secret", "-F", "raw"]);
    // As older versions of qemu-img wrote it.
    let bytes = fs::read(&image.image).unwrap();
    let at = bytes
        .windows(4)
        .position(|four| four == [0xe2, 0x79, 0x2a, 0xca])
        .unwrap();
    let mut without = bytes;
    without[at..at + 4].copy_from_slice(&0x6803_f857_u32.to_be_bytes());
    fs::write(&image.image, without).unwrap();
    let told = image.is_refused(disk, 2);
    assert!(told.contains("does not say the format"), "{told}");
    let told = site.fails(5, &["domain", "update", "--chain", "-d", &image.xml]);
    assert!(told.contains("qemu-img rebase -u -F FORMAT"), "{told}");
}

#[test]
fn a_header_gets_no_file_of_this_host_into_a_snapshot_of_a_file_system() {
    need!("btrfs");
    let fs = loop_fs(LoopFsKind::Btrfs, 300 * MIB, "");
    let images = fs.path().join("images");
    let made = Command::new("btrfs")
        .args(["-q", "subvolume", "create"])
        .arg(&images)
        .status()
        .unwrap();
    assert!(made.success());
    let site = Site::new();
    let image = Stranger::in_dir(&site, &images, &["-b", "secret", "-F", "raw"]);
    let told = image.is_refused("vda,method=btrfs", 2);
    assert!(told.contains("domain update --chain"), "{told}");
    // A clone of one file never holds another.
    image.is_refused("vda,method=reflink", 5);
    site.ok(&["domain", "update", "--chain", "-d", &image.xml]);
    site.ok(&image.create("vda,method=btrfs"));
    image.shows_the_secret();
}
