//! A private apt: downloads and unpacks Debian packages for a directory, without root, without touching
//! the system. apt itself checks signatures and hashes with Debian's keyring; that is the pinning.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// The suite the packages are for.
const SUITE: &str = "bookworm";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Whose C library the unpacked programs run with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Libc {
    /// The system's: its loader runs them, and the two must match.
    System,
    /// That of the packages, for a root file system of its own.
    Own,
}

/// Packages nothing of ours runs.
const LEFT_OUT: &[&str] = &[
    "adduser",
    "debconf",
    "gcc-12-base",
    "init-system-helpers",
    "libasound2-data",
    "libaudit-common",
    "libpam-modules",
    "libpam-modules-bin",
    "libpam0g",
    "libsemanage-common",
    "libsemanage2",
    "libsepol2",
    "passwd",
    "perl-base",
    "usr-is-merged",
    "usrmerge",
];

/// One package in the version apt chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    arch: String,
}

impl Package {
    fn file_name(&self) -> String {
        format!(
            "{}_{}_{}.deb",
            self.name,
            self.version.replace(':', "%3a"),
            self.arch
        )
    }
}

/// An apt with its own lists, cache and (empty) package status.
#[derive(Debug)]
pub(crate) struct Apt {
    dir: PathBuf,
}

impl Apt {
    /// Writes the configuration into `dir` and fetches the package lists.
    pub(crate) fn new(dir: &Path) -> Result<Self> {
        let configured = configured_sources(Path::new("/etc/apt"))?;
        let sources = sources(&configured)?;
        for sub in ["lists/partial", "state", "cache/archives/partial", "debs"] {
            fs::create_dir_all(dir.join(sub)).with_context(|| format!("cannot make {sub}"))?;
        }
        fs::write(dir.join("status"), "")?;
        fs::write(dir.join("sources.list"), &sources)?;
        let apt = Self {
            dir: dir.to_path_buf(),
        };
        apt.get("apt-get", &["update"]).with_context(|| {
            format!(
                "the package lists could not be fetched from\n{sources}\
                 Check that these mirrors answer (they are the ones in /etc/apt, plus backports), \
                 then run it again; or install the programs yourself and set DISKSNAP_TOOLS=system"
            )
        })?;
        Ok(apt)
    }

    /// The closure of `packages` on an empty system, in the versions apt chooses; `suite` is preferred
    /// where given (apt's `-t`).
    pub(crate) fn resolve(&self, packages: &[&str], suite: Option<&str>) -> Result<Vec<Package>> {
        let mut args = vec!["install", "--simulate", "--no-install-recommends"];
        args.extend(suite.iter().flat_map(|suite| ["-t", suite]));
        args.extend(packages);
        let printed = self.get("apt-get", &args)?;
        Ok(printed.lines().filter_map(parse_inst).collect())
    }

    /// Downloads what is not there yet and unpacks it all into `root`, without documentation.
    pub(crate) fn unpack(&self, packages: &[Package], libc: Libc, root: &Path) -> Result<()> {
        fs::create_dir_all(root)?;
        let is_wanted = |name: &str| match name {
            "libc6" => libc == Libc::Own,
            name => !LEFT_OUT.contains(&name),
        };
        let wanted: Vec<_> = packages.iter().filter(|x| is_wanted(&x.name)).collect();
        self.download(&wanted)?;
        for package in wanted {
            unpack(&self.dir.join("debs").join(package.file_name()), root)?;
        }
        Ok(())
    }

    fn download(&self, packages: &[&Package]) -> Result<()> {
        let debs = self.dir.join("debs");
        let missing = packages.iter().filter(|x| !debs.join(x.file_name()).is_file());
        let names: Vec<_> = missing.map(|x| format!("{}={}", x.name, x.version)).collect();
        if names.is_empty() {
            return Ok(());
        }
        let mut args = vec!["download"];
        args.extend(names.iter().map(String::as_str));
        self.get("apt-get", &args).context(
            "packages could not be downloaded; what came is kept, so run it again when the mirror \
             answers",
        )?;
        Ok(())
    }

    fn get(&self, program: &str, args: &[&str]) -> Result<String> {
        let path = |sub: &str| self.dir.join(sub).display().to_string();
        let options = [
            format!("Dir::Etc::sourcelist={}", path("sources.list")),
            "Dir::Etc::sourceparts=/dev/null".into(),
            "Dir::Etc::preferences=/dev/null".into(),
            "Dir::Etc::preferencesparts=/dev/null".into(),
            format!("Dir::State={}", path("state")),
            format!("Dir::State::lists={}", path("lists")),
            format!("Dir::State::status={}", path("status")),
            format!("Dir::Cache={}", path("cache")),
            // Without this, root's downloads go through a user who may not enter the directory.
            "APT::Sandbox::User=".into(),
            "APT::Get::Assume-Yes=true".into(),
            // Otherwise a mirror that does not answer is only a warning.
            "APT::Update::Error-Mode=any".into(),
            "Acquire::Languages=none".into(),
            "Acquire::Retries=3".into(),
            "Debug::NoLocking=true".into(),
        ];
        let mut command = Command::new(program);
        command
            .arg("-qq")
            .current_dir(self.dir.join("debs"))
            .env("LC_ALL", "C");
        command.args(options.iter().flat_map(|x| ["-o", x])).args(args);
        let output = command
            .output()
            .with_context(|| format!("cannot start {program}"))?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{program} {}: {}",
            args.join(" "),
            errors.trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// `Inst qemu-utils (1:7.2+dfsg-7 Debian:12.15/oldstable [amd64])`
fn parse_inst(line: &str) -> Option<Package> {
    let (name, rest) = line.strip_prefix("Inst ")?.split_once(" (")?;
    let version = rest.split_once(' ')?.0;
    let arch = rest.split_once('[')?.1.split_once(']')?.0;
    Some(Package {
        name: name.into(),
        version: version.into(),
        arch: arch.into(),
    })
}

fn unpack(deb: &Path, root: &Path) -> Result<()> {
    let mut dpkg = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(deb)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start dpkg-deb")?;
    let archive = dpkg.stdout.take().context("dpkg-deb has no output")?;
    let excluded = ["doc", "man", "locale", "info", "lintian"].map(|x| format!("./usr/share/{x}/*"));
    let tar = Command::new("tar")
        .args(["-x", "--no-same-owner", "--keep-directory-symlink", "-C"])
        .arg(root)
        .args(excluded.iter().map(|x| format!("--exclude={x}")))
        .stdin(archive)
        .status()
        .context("cannot start tar")?;
    let dpkg = dpkg.wait()?;
    ensure!(dpkg.success() && tar.success(), "cannot unpack {}", deb.display());
    Ok(())
}

/// A source of packages as the system's apt has it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Source {
    uri: String,
    suites: Vec<String>,
    signed_by: Option<String>,
}

/// Every binary source below apt's configuration directory, in both of its notations.
fn configured_sources(etc: &Path) -> Result<Vec<Source>> {
    let mut files = vec![etc.join("sources.list")];
    if let Ok(parts) = fs::read_dir(etc.join("sources.list.d")) {
        files.extend(parts.filter_map(|x| Some(x.ok()?.path())));
    }
    files.sort();
    let mut found = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        match file.extension().and_then(|x| x.to_str()) {
            Some("sources") => found.extend(parse_deb822(&text)),
            Some("list") => found.extend(text.lines().filter_map(parse_one_line)),
            _ => {}
        }
    }
    ensure!(
        !found.is_empty(),
        "apt has no sources: {} names no mirror",
        etc.display()
    );
    Ok(found)
}

fn parse_one_line(line: &str) -> Option<Source> {
    let rest = line
        .trim()
        .strip_prefix("deb")?
        .strip_prefix([' ', '\t'])?
        .trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let uri = words.next()?.to_owned();
    let suites = words.next().map(str::to_owned).into_iter().collect();
    let signed_by = options
        .split_whitespace()
        .find_map(|x| x.strip_prefix("signed-by="));
    Some(Source {
        uri,
        suites,
        signed_by: signed_by.map(str::to_owned),
    })
}

fn parse_deb822(text: &str) -> Vec<Source> {
    let field = |stanza: &str, name: &str| {
        let prefix = format!("{name}:").to_ascii_lowercase();
        let line = stanza
            .lines()
            .find(|x| x.to_ascii_lowercase().starts_with(&prefix))?;
        let value = line[prefix.len()..].trim();
        (!value.is_empty()).then(|| value.to_owned())
    };
    let words = |x: String| x.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let mut found = Vec::new();
    for stanza in text.split("\n\n") {
        let binary = field(stanza, "Types").is_some_and(|x| words(x).iter().any(|x| x == "deb"));
        let enabled = field(stanza, "Enabled").is_none_or(|x| !x.eq_ignore_ascii_case("no"));
        let uris = field(stanza, "URIs").map(words).unwrap_or_default();
        if !binary || !enabled {
            continue;
        }
        for uri in uris {
            let suites = field(stanza, "Suites").map(words).unwrap_or_default();
            found.push(Source {
                uri,
                suites,
                signed_by: field(stanza, "Signed-By"),
            });
        }
    }
    found
}

/// The private `sources.list`: the system's mirrors of this Debian, with backports added.
fn sources(configured: &[Source]) -> Result<String> {
    let of = |suite: &str| configured.iter().find(|x| x.suites.iter().any(|y| y == suite));
    let Some(main) = of(SUITE) else {
        bail!(
            "apt on this machine has no mirror of Debian 12 ({SUITE}), and the packages are taken from \
             there. Elsewhere, install QEMU 10.0 (with its utilities and storage daemon), nbdcopy \
             and nbdinfo yourself and set DISKSNAP_TOOLS=system"
        );
    };
    let mut lines = String::new();
    let mut add = |source: &Source, suite: &str| {
        // A key written into the stanza itself shows as an empty field: then the keyring it is.
        let key = source
            .signed_by
            .as_deref()
            .filter(|x| x.starts_with('/'))
            .unwrap_or(KEYRING);
        lines.extend(["deb [signed-by=", key, "] ", &source.uri, " ", suite, " main\n"]);
    };
    for suite in ["", "-updates", "-backports"] {
        let suite = format!("{SUITE}{suite}");
        add(of(&suite).unwrap_or(main), &suite);
    }
    let security = format!("{SUITE}-security");
    if let Some(source) = of(&security) {
        add(source, &security);
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_notations_give_the_same_sources() {
        let one_line = "# deb http://old/debian bookworm main\n\
                        deb-src http://m/debian bookworm main\n\
                        deb [arch=amd64 signed-by=/k.gpg] http://m/debian bookworm main contrib\n\
                        deb http://s/debian-security bookworm-security main\n";
        let deb822 = "Types: deb deb-src\nURIs: http://m/debian\nSuites: bookworm bookworm-updates\n\
                      Components: main\nSigned-By: /k.gpg\n\n# note\nTypes: deb\n\
                      URIs: http://s/debian-security\nSuites: bookworm-security\nSigned-By:\n -----BEGIN\n\n\
                      Types: deb\nEnabled: no\nURIs: http://x\nSuites: bookworm-backports\n";
        let wanted = "deb [signed-by=/k.gpg] http://m/debian bookworm main\n\
                      deb [signed-by=/k.gpg] http://m/debian bookworm-updates main\n\
                      deb [signed-by=/k.gpg] http://m/debian bookworm-backports main\n\
                      deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] \
                      http://s/debian-security bookworm-security main\n";
        let from_lines: Vec<_> = one_line.lines().filter_map(parse_one_line).collect();
        assert_eq!(sources(&from_lines).expect("bookworm is there"), wanted);
        assert_eq!(sources(&parse_deb822(deb822)).expect("bookworm is there"), wanted);
    }

    #[test]
    fn another_debian_is_told() {
        let other = parse_one_line("deb http://m/debian trixie main").expect("a source");
        let error = sources(&[other]).expect_err("not bookworm").to_string();
        assert!(error.contains("DISKSNAP_TOOLS=system"), "{error}");
    }

    #[test]
    fn a_simulated_installation_is_read() {
        let line = "Inst qemu-utils (1:7.2+dfsg-7+deb12u18+b3 Debian:12.15/oldstable [amd64]) []";
        let package = parse_inst(line).expect("a package");
        assert_eq!(
            package.file_name(),
            "qemu-utils_1%3a7.2+dfsg-7+deb12u18+b3_amd64.deb"
        );
        assert_eq!(parse_inst("Conf qemu-utils (1:7.2 x [amd64])"), None);
    }
}
