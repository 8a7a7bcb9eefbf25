//! Names that look like options, paths and commands; a umask that protects nothing; links and directories that others have planted.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use disksnap_test_support::{DiskSpec, MIB, StorageDaemon, need, skip};

use crate::site::{Ended, Site, arg, ended, list};

/// Somebody else.
const NOBODY: u32 = 65534;

fn daemon() -> StorageDaemon {
    StorageDaemon::builder()
        .disk(DiskSpec::new("vda", MIB).qcow2())
        .start()
}

/// Runs the command where a file that a shell would make can be seen.
fn run_in(directory: &Path, site: &Site, arguments: &[&str]) -> Ended {
    ended(site.command(arguments).current_dir(directory).output().unwrap())
}

fn is_plain(text: &str) -> bool {
    !text.chars().any(|c| c.is_control() && !"\n\t".contains(c))
}

#[test]
fn names_that_are_refused_are_told_in_plain_text() {
    let (site, daemon) = (Site::new(), daemon());
    let xml = arg(&daemon.domain_xml_file());
    let long = "x".repeat(129);
    let names = [
        "",
        "-rf",
        "--help",
        ".",
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "a/b",
        "two\nlines",
        "a\ttab",
        "\u{1b}[2J",
        " x",
        "x ",
        &long,
    ];
    for name in names {
        let (named, as_option) = (format!("--name={name}"), ["--name", name]);
        let create = ["snapshot", "create", "-d", &xml];
        for arguments in [
            &[&create[..], &[&named]].concat(),
            &[&create[..], &as_option].concat(),
        ] {
            let ended = run_in(site.dir.path(), &site, arguments);
            assert_eq!(
                (ended.code, &*ended.stdout),
                (Some(2), &b""[..]),
                "{name:?}: {}",
                ended.stderr
            );
            assert!(is_plain(&ended.stderr), "{:?}", ended.stderr);
        }
        for verb in ["show", "delete"] {
            let ended = run_in(
                site.dir.path(),
                &site,
                &["snapshot", verb, "-d", &xml, "--", name],
            );
            assert_eq!(ended.code, Some(2), "{verb} {name:?}: {}", ended.stderr);
            assert!(is_plain(&ended.stderr), "{:?}", ended.stderr);
        }
    }
    assert_eq!(site.images(), Vec::<PathBuf>::new());
}

#[test]
fn names_that_a_shell_would_run_are_names() {
    need!("fuse");
    let (site, daemon) = (Site::new(), daemon());
    let (xml, here) = (arg(&daemon.domain_xml_file()), site.path("here"));
    fs::create_dir(&here).unwrap();
    for name in [
        "$(touch pwned)",
        "`touch pwned`",
        "x; touch pwned",
        "it's \"quoted\"",
        "%s%n{}",
        "a,b=c,,d",
        "é…😀",
        "a\\b",
    ] {
        let named = format!("--name={name}");
        let created = run_in(
            &here,
            &site,
            &["snapshot", "create", "-d", &xml, &named, "--output", "json"],
        );
        assert_eq!(created.code, Some(0), "{name}: {}", created.stderr);
        let created: serde_json::Value = serde_json::from_slice(&created.stdout).unwrap();
        assert_eq!(created["name"], name);
        site.ok(&["export", "start", "-d", &xml, name]);
        let documents = site.ok(&["snapshot", "show", "-d", &xml, name, "--output", "xml"]);
        assert!(documents.contains("<name>"), "{documents}");
        site.ok(&["export", "stop", "-d", &xml, "--all"]);
        let deleted = run_in(&here, &site, &["snapshot", "delete", "-d", &xml, name]);
        assert_eq!(deleted.code, Some(0), "{name}: {}", deleted.stderr);
    }
    assert_eq!(list(&here), Vec::<PathBuf>::new());
    assert_eq!(site.images(), Vec::<PathBuf>::new());
}

/// A document may name a domain and its disks as it likes; no file of ours gets such a name.
#[test]
fn names_in_a_document_lead_nowhere() {
    need!("fuse");
    let (site, daemon) = (Site::new(), daemon());
    let text = fs::read_to_string(daemon.domain_xml_file()).unwrap();
    for (name, target) in [
        ("../../pwned", "vda"),
        ("-rf $(touch pwned)", "vda"),
        ("plain", "../../../pwned"),
        ("plain", "-rf"),
        ("plain", "a/b"),
    ] {
        let named = text
            .replace(
                &format!("<name>{}</name>", daemon.name()),
                &format!("<name>{name}</name>"),
            )
            .replace("dev='vda'", &format!("dev='{target}'"))
            .replace("dev=\"vda\"", &format!("dev='{target}'"));
        assert_ne!(named, text);
        let xml = site.file("domain.xml", &named);
        let created = run_in(
            site.dir.path(),
            &site,
            &["snapshot", "create", "-d", &xml, "--name", "n"],
        );
        assert!(
            matches!(created.code, Some(0 | 2 | 8)),
            "{name} {target}: {}",
            created.stderr
        );
        assert!(is_plain(&created.stderr), "{:?}", created.stderr);
        if created.code == Some(0) {
            site.ok(&["snapshot", "delete", "-d", &xml, "n"]);
        }
        let found: Vec<PathBuf> = below(site.dir.path())
            .into_iter()
            .chain(below(daemon.dir()))
            .collect();
        assert!(found.iter().all(|path| !arg(path).contains("pwned")), "{found:?}");
        assert!(!Path::new("/tmp/pwned").exists() && !Path::new("/pwned").exists());
        assert_eq!(site.images(), Vec::<PathBuf>::new(), "{name} {target}");
    }
}

/// Everything below a directory.
fn below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for path in list(directory) {
        if path.symlink_metadata().unwrap().is_dir() {
            found.extend(below(&path));
        }
        found.push(path);
    }
    found
}

#[test]
fn under_a_umask_that_protects_nothing_all_is_private() {
    need!("fuse");
    let (site, daemon) = (Site::new(), daemon());
    let xml = arg(&daemon.domain_xml_file());
    let careless = |arguments: &[&str]| {
        let plain = site.command(arguments);
        // The umask is the shell's to set, which then becomes the command.
        let mut shell = Command::new("/bin/sh");
        shell
            .args(["-c", "umask 000; exec \"$@\"", "sh"])
            .arg(plain.get_program())
            .args(plain.get_args());
        for (key, value) in plain.get_envs() {
            match value {
                Some(value) => shell.env(key, value),
                None => shell.env_remove(key),
            };
        }
        let ended = ended(shell.output().unwrap());
        assert_eq!(ended.code, Some(0), "{arguments:?}: {}", ended.stderr);
    };
    careless(&["snapshot", "create", "-d", &xml, "--name", "fleece"]);
    careless(&["export", "start", "-d", &xml, "fleece"]);
    careless(&["export", "server", "start", "-d", &xml, "--images"]);
    let all = below(&site.state());
    assert!(all.iter().any(|path| arg(path).ends_with(".nbd.sock")), "{all:?}");
    assert!(all.iter().any(|path| arg(path).ends_with(".img.sock")), "{all:?}");
    for path in all.iter().chain([&site.state()]) {
        let mode = path.symlink_metadata().unwrap().mode() & 0o7777;
        assert_eq!(mode & 0o077, 0, "{} has the mode {mode:o}", path.display());
    }
    let to = site.path("read.raw");
    careless(&["read", "-d", &xml, "fleece", "vda", "--to", &arg(&to)]);
    assert_eq!(
        to.metadata().unwrap().mode() & 0o077,
        0,
        "what was read is the disk"
    );
    site.ok(&["export", "stop", "-d", &xml, "--all"]);
    site.ok(&["export", "server", "stop", "-d", &xml, "--images"]);
    site.ok(&["snapshot", "delete", "-d", &xml, "fleece"]);
}

/// Root is shown a state directory that somebody else has made, with links in it to what only root may change.
#[test]
fn a_directory_that_somebody_else_has_laid_out_is_not_used() {
    if !rustix::process::geteuid().is_root() {
        skip!("root", "only root gains what others lack");
    }
    let (site, daemon) = (Site::new(), daemon());
    let xml = arg(&daemon.domain_xml_file());
    let (victim, victims) = (site.path("victim"), site.path("victims"));
    fs::write(&victim, "precious").unwrap();
    fs::create_dir(&victims).unwrap();
    let state = site.state();
    fs::create_dir(&state).unwrap();
    for part in ["images", "run", "locks"] {
        symlink(&victims, state.join(part)).unwrap();
    }
    for file in ["catalog.sqlite", "catalog.sqlite-wal", "reserve"] {
        symlink(&victim, state.join(file)).unwrap();
    }
    let create = ["snapshot", "create", "-d", &xml];
    let untouched = || {
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
        assert_eq!(list(&victims), Vec::<PathBuf>::new());
    };
    // It is theirs.
    chown(&state, Some(NOBODY), Some(NOBODY)).unwrap();
    let text = site.fails(7, &create);
    assert!(text.contains("belongs to user 65534"), "{text}");
    untouched();
    // It has been given to us, with what they have put in it.
    chown(&state, Some(0), Some(0)).unwrap();
    fs::set_permissions(&state, fs::Permissions::from_mode(0o700)).unwrap();
    let text = site.fails(7, &create);
    assert!(text.contains("symbolic link"), "{text}");
    untouched();
    for part in ["images", "run", "locks"] {
        fs::remove_file(state.join(part)).unwrap();
    }
    let ended = site.run(&create);
    assert_ne!(ended.code, Some(0), "the catalog is a link to another file");
    untouched();
    for file in ["catalog.sqlite", "catalog.sqlite-wal"] {
        fs::remove_file(state.join(file)).unwrap();
    }
    site.ok(&["snapshot", "list", "-d", &xml]);
    untouched();
    // It is ours, and in a directory of theirs.
    chown(site.dir.path(), Some(NOBODY), None).unwrap();
    let text = site.fails(7, &create);
    assert!(text.contains("put another one in its place"), "{text}");
    chown(site.dir.path(), Some(0), None).unwrap();
    site.ok(&["snapshot", "list", "-d", &xml]);
}
