//! Another host: a snapshot exported with a checkpoint over TCP and TLS, pulled from across a network of its own.
//!
//! The hosts are two network namespaces with a cable between them. They have no names: they, the cable and the addresses
//! are gone with the processes in them, whatever ends those. The test runs itself anew in each of them.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use disksnap::{Error, ErrorKind, RemoteDisk};
use disksnap_test_support::{DiskSpec, MIB, Qemu, pattern, skip, tools};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use crate::site::{Site, arg};

const SIZE: u64 = 48 * MIB;
/// The addresses of the host that exports and of the one that pulls.
const HERE: &str = "10.77.0.1";
const THERE: &str = "10.77.0.2";

#[test]
fn another_host_pulls_what_changed_over_tls() {
    if let Some(why) = lacking() {
        skip!("netns", "{why}");
    }
    let exporting = me("remote::the_host_that_exports");
    let output = Command::new("unshare")
        .arg("--net")
        .args(&exporting)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{}", text.join("\n"));
    assert!(text[0].contains("1 passed"), "{}", text[0]);
}

/// Why this machine cannot have two hosts.
fn lacking() -> Option<String> {
    let cable = "ip link add name host-a type veth peer name host-b";
    let tried = Command::new("unshare")
        .args(["--net", "sh", "-c", cable])
        .output();
    match tried {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Some(format!("unshare: {error}")),
    }
}

/// This program, to run one of its ignored tests.
fn me(test: &str) -> Vec<String> {
    let program = arg(&std::env::current_exe().unwrap());
    [&program, "--exact", test, "--ignored", "--nocapture"]
        .map(str::to_owned)
        .to_vec()
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {errors}");
}

/// The host that pulls: a process that keeps its namespace, until its standard input ends.
struct Other(Child);

impl Other {
    /// Makes it, and the cable to it.
    fn connect() -> Self {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", "echo there; exec cat"]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line, "there\n");
        let other = Self(child);
        ip(&format!(
            "link add name host-a type veth peer name host-b netns {}",
            other.0.id()
        ));
        ip(&format!("address add {HERE}/24 dev host-a"));
        for link in ["host-a", "lo"] {
            ip(&format!("link set {link} up"));
        }
        let address = format!("address add {THERE}/24 dev host-b");
        for arguments in [address.as_str(), "link set host-b up", "link set lo up"] {
            let ip = [&["ip"][..], &arguments.split(' ').collect::<Vec<_>>()].concat();
            other.runs(&ip, &[]);
        }
        other
    }

    /// Runs a program there.
    fn try_run(&self, command: &[&str], environment: &[(&str, &str)]) -> Result<String, String> {
        let mut there = Command::new("nsenter");
        there
            .arg(format!("--net=/proc/{}/ns/net", self.0.id()))
            .args(command);
        let output = there.envs(environment.iter().copied()).output().unwrap();
        let text = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        if output.status.success() {
            return Ok(text[0].clone());
        }
        Err(text.join("\n"))
    }

    fn runs(&self, command: &[&str], environment: &[(&str, &str)]) -> String {
        let ended = self.try_run(command, environment);
        ended.unwrap_or_else(|text| panic!("{command:?}: {text}"))
    }

    /// What [`the_host_that_pulls`] does, and how it ends.
    fn pulls(&self, uri: &str, credentials: &Path, copy: &Path, ends: &str) {
        let (test, credentials, copy) = (me("remote::the_host_that_pulls"), arg(credentials), arg(copy));
        let test: Vec<&str> = test.iter().map(String::as_str).collect();
        let told = [
            ("URI", uri),
            ("CREDENTIALS", &credentials),
            ("COPY", &copy),
            ("ENDS", ends),
        ];
        let text = self.runs(&test, &told.map(|(name, value)| (name, value)));
        assert!(text.contains("1 passed"), "{text}");
    }
}

/// Backups on the other host, in a state directory and a repository of its own.
struct Backup<'a> {
    other: &'a Other,
    xml: &'a str,
    dir: PathBuf,
    credentials: &'a Path,
}

impl Backup<'_> {
    fn disksnap(&self, words: &[&str]) -> serde_json::Value {
        let (program, state) = (arg(&crate::site::program()), arg(&self.dir.join("state")));
        let command = [&program, "--state-dir", &state, "--output", "json", "-q"];
        let text = self.other.runs(&[&command[..], words].concat(), &[]);
        serde_json::from_str(&text).unwrap()
    }

    fn pull(&self, uri: &str, more: &[&str]) -> serde_json::Value {
        let (repo, tls) = (arg(&self.dir.join("repo")), arg(self.credentials));
        let disk = format!("vda={uri}");
        let words = [
            "backup",
            "pull",
            "--repo",
            &repo,
            "-d",
            self.xml,
            "--disk",
            &disk,
            "--tls-credentials",
            &tls,
        ];
        self.disksnap(&[&words[..], more].concat())
    }

    /// The digest of the last point's disk, as QEMU reads its images.
    fn restored(&self) -> String {
        let folders = crate::site::list(&self.dir.join("repo"));
        let points = crate::site::list(folders.iter().find(|path| path.is_dir()).unwrap());
        let last = points.iter().rfind(|path| path.is_dir()).unwrap();
        let raw = self.dir.join("raw");
        let (image, to) = (arg(&last.join("vda.qcow2")), arg(&raw));
        crate::programs::program("qemu-img", &["convert", "-O", "raw", &image, &to]);
        pattern::digest_file(&raw)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A CA, and directories of credentials: the server's own, a client's of the same CA, one without a certificate, and one
/// with a certificate of another CA.
struct Credentials {
    server: PathBuf,
    client: PathBuf,
    nobody: PathBuf,
    stranger: PathBuf,
}

impl Credentials {
    fn new(dir: &Path) -> Self {
        let (ca, other) = (authority(), authority());
        let make = |name: &str, issued: Option<(&str, &CertifiedIssuer<'_, KeyPair>)>| {
            let dir = dir.join(name);
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join("ca-cert.pem"), ca.pem()).unwrap();
            if let Some((role, issuer)) = issued {
                let key = KeyPair::generate().unwrap();
                let params = CertificateParams::new(vec![HERE.to_owned()]).unwrap();
                let certificate = params.signed_by(&key, issuer).unwrap();
                std::fs::write(dir.join(format!("{role}-cert.pem")), certificate.pem()).unwrap();
                std::fs::write(dir.join(format!("{role}-key.pem")), key.serialize_pem()).unwrap();
            }
            dir
        };
        Self {
            server: make("server", Some(("server", &ca))),
            client: make("client", Some(("client", &ca))),
            nobody: make("nobody", None),
            stranger: make("stranger", Some(("client", &other))),
        }
    }
}

fn authority() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

#[test]
#[ignore = "run by another_host_pulls_what_changed_over_tls, in a network of its own"]
fn the_host_that_exports() {
    let other = Other::connect();
    let site = Site::new();
    let credentials = Credentials::new(&site.path("pki"));
    let machine = Qemu::builder().disk(DiskSpec::new("vda", SIZE).qcow2()).start();
    let xml = arg(&machine.domain_xml_file());
    let create = ["snapshot", "create", "-q", "-d", &xml, "--checkpoint", "--name"];
    machine.disk("vda").write(0, &pattern::bytes(1, 40 << 20));
    site.ok(&[&create[..], &["monday"]].concat());
    let copy = site.path("copy");
    site.ok(&["read", "-d", &xml, "monday", "vda", "--to", &arg(&copy)]);
    let listen = format!("{HERE}:10809");
    let tls = arg(&credentials.server);
    let served = site.json(&[
        "export",
        "start",
        "-d",
        &xml,
        "monday",
        "--listen",
        &listen,
        "--tls-credentials",
        &tls,
    ]);
    let backup = Backup {
        other: &other,
        xml: &xml,
        dir: site.path("other"),
        credentials: &credentials.client,
    };
    let uri = served["exports"][0]["uri"].as_str().unwrap();
    let first = backup.pull(uri, &["--snapshot", "monday", "--checkpoint", "monday"]);
    assert_eq!(first["disks"][0]["level"], "full", "{first:#}");
    site.ok(&["export", "stop", "-d", &xml, "--all"]);
    machine
        .disk("vda")
        .write(7 * MIB + 512, &pattern::bytes(2, 3_000_320));
    machine.disk("vda").zero(20 * MIB, 5 * MIB);
    machine.disk("vda").discard(30 * MIB, MIB);
    site.ok(&[&create[..], &["tuesday"]].concat());
    let expected = site.path("expected");
    site.ok(&["read", "-d", &xml, "tuesday", "vda", "--to", &arg(&expected)]);
    let expected = pattern::digest_file(&expected);
    let start = [
        "export",
        "start",
        "-d",
        &xml,
        "tuesday",
        "--checkpoint",
        "monday",
        "--listen",
        &listen,
    ];
    let served = site.json(&[&start[..], &["--tls-credentials", &tls]].concat());
    let uri = served["exports"][0]["uri"].as_str().unwrap();
    assert!(uri.starts_with(&format!("nbds://{listen}/")), "{uri}");
    machine.disk("vda").fill(0, MIB, 9);

    // The control: a client that is not ours.
    let nbdcopy = arg(&tools::program("nbdcopy"));
    let (full, certificates) = (arg(&site.path("full")), arg(&credentials.client));
    let source = format!("{uri}?tls-certificates={certificates}");
    other.runs(&[&nbdcopy, &source, &full], &[]);
    assert_eq!(pattern::digest_file(Path::new(&full)), expected);
    let refused = [&credentials.nobody, &credentials.stranger];
    for directory in refused {
        let source = format!("{uri}?tls-certificates={}", arg(directory));
        other
            .try_run(&[&nbdcopy, &source, &arg(&site.path("none"))], &[])
            .unwrap_err();
        other.pulls(uri, directory, &copy, "denied");
    }
    // It is another host: nothing of this one is reached by the way of a loopback.
    let loopback = uri.replace(HERE, "127.0.0.1");
    other.pulls(&loopback, &credentials.client, &copy, "unavailable");
    assert_ne!(pattern::digest_file(&copy), expected);
    other.pulls(uri, &credentials.client, &copy, "well");
    assert_eq!(pattern::digest_file(&copy), expected);

    let since = [
        "--snapshot",
        "tuesday",
        "--checkpoint",
        "tuesday",
        "--since",
        "monday",
    ];
    let increment = backup.pull(uri, &since);
    assert_eq!(increment["disks"][0]["level"], "incremental", "{increment:#}");
    assert_eq!(increment["disks"][0]["parent"], first["point"]);
    let data = increment["disks"][0]["data"].as_u64().unwrap();
    assert!((3_000_320..4 * MIB).contains(&data), "{increment:#}");
    assert_eq!(backup.restored(), expected);
    // What the exports tell is not since the last point any more.
    let again = backup.pull(uri, &since);
    let why = again["disks"][0]["whyFull"].as_str().unwrap();
    assert!(why.contains("'tuesday'") && why.contains("'monday'"), "{why}");
    site.ok(&["export", "stop", "-d", &xml, "--all"]);
    other.pulls(uri, &credentials.client, &copy, "unavailable");
}

#[test]
#[ignore = "run by another_host_pulls_what_changed_over_tls, in a network of its own"]
fn the_host_that_pulls() {
    let told = |name: &str| std::env::var(name).unwrap();
    let (uri, ends) = (told("URI"), told("ENDS"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let pulled = runtime.unwrap().block_on(async {
        let disk = RemoteDisk::connect(&uri, Some(told("CREDENTIALS").as_ref()), Some("monday")).await?;
        let mut changed = 0;
        disk.bring_up_to_date(told("COPY").as_ref(), 0..disk.size(), None, |extent| {
            changed += extent.length;
        })
        .await?;
        disk.close().await;
        Ok::<_, Error>(changed)
    });
    match (ends.as_str(), pulled) {
        ("well", Ok(changed)) => assert!((8 * MIB..10 * MIB).contains(&changed), "{changed}"),
        ("denied", Err(error)) => assert_eq!(error.kind(), ErrorKind::Denied, "{error:?}"),
        ("unavailable", Err(error)) => assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}"),
        (ends, other) => panic!("should end {ends}: {other:?}"),
    }
}
