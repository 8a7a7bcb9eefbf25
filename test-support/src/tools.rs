//! Where the external programs are: the tree `./x tools` makes, or the system's own when the caller says so.

use std::env;
use std::path::{Path, PathBuf};

/// Names the directory of the tools, so that several checkouts share one. The word `system` means:
/// only what is on `PATH`.
pub const TOOLS_ENV: &str = "DISKSNAP_TOOLS";

/// Names a directory with the programs of a QEMU 7.2, where [`TOOLS_ENV`] is `system`.
pub const QEMU_7_2_ENV: &str = "DISKSNAP_QEMU_7_2";

/// Which of the two QEMUs a test wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum QemuVersion {
    /// 10.0, from Debian's backports: every way of fleecing works.
    #[default]
    V10_0,
    /// 7.2, Debian 12's own: only the classic way of fleecing is safe.
    V7_2,
}

impl QemuVersion {
    /// The version as people write it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V10_0 => "10.0",
            Self::V7_2 => "7.2",
        }
    }

    /// The path of a program of this QEMU, such as `qemu-img`.
    ///
    /// Panics with the command that gets it when it is missing.
    #[must_use]
    pub fn program(self, name: &str) -> PathBuf {
        match self {
            Self::V10_0 => program(name),
            Self::V7_2 => {
                let dir =
                    env::var_os(QEMU_7_2_ENV).map_or_else(|| tools_dir().join("qemu-7.2/bin"), PathBuf::from);
                let path = dir.join(name);
                assert!(path.is_file(), "{}", missing(&format!("{name} of QEMU 7.2")));
                path
            }
        }
    }
}

/// The root of the workspace this crate was built in.
#[must_use]
pub fn workspace_root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// The directory of the tools: `DISKSNAP_TOOLS`, else `.tools` of the workspace.
#[must_use]
pub fn tools_dir() -> PathBuf {
    match env::var_os(TOOLS_ENV) {
        // Programs are started in many directories: a relative path is meant from the root.
        Some(dir) if !dir.is_empty() && dir != "system" => workspace_root().join(dir),
        _ => workspace_root().join(".tools"),
    }
}

/// The path of a program, if it is there: of the tools, else on `PATH`.
#[must_use]
pub fn find(name: &str) -> Option<PathBuf> {
    let own = (!are_systems()).then(|| tools_dir().join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    own.into_iter()
        .chain(env::split_paths(&path))
        .chain(system)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

/// The path of a program.
///
/// Panics with the command that gets it when it is missing: a test without its tools must not pass.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    find(name).unwrap_or_else(|| panic!("{}", missing(name)))
}

/// The schema of a libvirt document, such as `domain.rng` or `domaincheckpoint.rng`, for `xmllint --relaxng`.
///
/// Panics with the command that gets it when it is missing.
#[must_use]
pub fn libvirt_schema(name: &str) -> PathBuf {
    let schemas = "usr/share/libvirt/schemas";
    let roots = [tools_dir().join("libvirt/root"), PathBuf::from("/")];
    let found = roots
        .iter()
        .map(|root| root.join(schemas).join(name))
        .find(|x| x.is_file());
    found.unwrap_or_else(|| panic!("{}", missing(&format!("libvirt's schema {name}"))))
}

/// Whether the caller brings the programs: then it is no one's fault when one is missing.
pub(crate) fn are_systems() -> bool {
    env::var_os(TOOLS_ENV).is_some_and(|x| x == "system")
}

fn missing(what: &str) -> String {
    format!(
        "{what} is not in {}: run `./x tools` at the root of the checkout, or set {TOOLS_ENV} to a \
         directory that has it (`system` for the programs on PATH)",
        tools_dir().display()
    )
}
