//! The state directory: where it is, that it is ours alone, and what lies in it.

use std::fs::{DirBuilder, File, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use disksnap_core::{Error, ErrorKind, Result, faults};

/// The directory that keeps the catalog, the locks, the images and the sockets.
///
/// Its mode is 0700 when disksnap makes it. It is refused when someone else could change it: the
/// catalog says which files and nodes get deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// Where the state is when nobody says otherwise: `/var/lib/disksnap` for root, else
    /// `$XDG_STATE_HOME/disksnap`, else `~/.local/state/disksnap` (XDG Base Directory Specification).
    ///
    /// # Errors
    /// `Invalid` when neither `XDG_STATE_HOME` nor `HOME` holds an absolute path.
    pub fn default_path() -> Result<PathBuf> {
        if rustix::process::geteuid().is_root() {
            return Ok(PathBuf::from("/var/lib/disksnap"));
        }
        user_path(|name| std::env::var_os(name).map(PathBuf::from))
    }

    /// Opens the given directory, or that of [`StateDir::default_path`], and makes what is missing of
    /// it and of `images/`, `run/` and `locks/`, with mode 0700. Idempotent.
    ///
    /// # Errors
    /// `Denied` when it is a symbolic link, belongs to another user, can be written by a group or by
    /// others, lies below a directory in which somebody else could put another one in its place, or may not be made; `Invalid` when it is not a directory or the path is empty;
    /// `NoSpace`, `Io` as the operating system says. Nothing that exists is changed.
    pub fn open(given: Option<&Path>) -> Result<Self> {
        let wanted = match given {
            Some(path) => path.to_path_buf(),
            None => Self::default_path()?,
        };
        let wanted = absolute(&wanted).map_err(|error| failed("find", &wanted, error))?;
        private_directory(&wanted)?;
        let path = std::fs::canonicalize(&wanted).map_err(|error| failed("find", &wanted, error))?;
        for above in path.ancestors().skip(1) {
            let found = above
                .metadata()
                .map_err(|error| failed("look at", above, error))?;
            check_above(&path, above, &found)?;
        }
        let dir = Self { path };
        for part in [dir.images(), dir.run(), dir.locks()] {
            private_directory(&part)?;
        }
        Ok(dir)
    }

    /// The directory itself, absolute, without symbolic links.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where images go that the caller named no place for.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.path.join("images")
    }

    /// Where sockets go.
    #[must_use]
    pub fn run(&self) -> PathBuf {
        self.path.join("run")
    }

    /// Where the lock files of domains and leases are.
    #[must_use]
    pub fn locks(&self) -> PathBuf {
        self.path.join("locks")
    }

    /// The database.
    pub(crate) fn database(&self) -> PathBuf {
        self.path.join("catalog.sqlite")
    }

    /// The space kept back for a full file system.
    pub(crate) fn reserve(&self) -> PathBuf {
        self.path.join("reserve")
    }
}

fn user_path(variable: impl Fn(&str) -> Option<PathBuf>) -> Result<PathBuf> {
    // The specification has relative paths ignored.
    let absolute = |name: &str| variable(name).filter(|path| path.is_absolute());
    let state = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")));
    state.map(|state| state.join("disksnap")).ok_or_else(|| {
        Error::new(
            ErrorKind::Invalid,
            "there is no state directory: neither XDG_STATE_HOME nor HOME is an absolute path",
        )
        .hint("Name one with --state-dir DIRECTORY.")
    })
}

/// The path without `.` and without a slash at its end, which would make a symbolic link look like
/// the directory that it leads to.
fn absolute(path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    Ok(path
        .components()
        .filter(|part| *part != Component::CurDir)
        .collect())
}

/// Makes the directory when it is missing; refuses it when it is not safe.
fn private_directory(path: &Path) -> Result<()> {
    let found = match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            faults::around("file", "make state directory", || make(path))
                .map_err(|error| failed("make", path, error))?;
            path.symlink_metadata()
        }
        found => found,
    };
    check(path, &found.map_err(|error| failed("look at", path, error))?)
}

fn make(path: &Path) -> io::Result<()> {
    // Another process may make it at the same time: `recursive` takes that for success.
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    // The catalog's commits are durable only if the way to it is.
    path.parent()
        .map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}

fn check(path: &Path, found: &Metadata) -> Result<()> {
    let refuse = |kind, why: String, hint: String| {
        Err(
            Error::new(kind, format!("the state directory cannot be used: {why}"))
                .with("path", path.display())
                .hint(hint),
        )
    };
    let (ours, mode) = (rustix::process::geteuid().as_raw(), found.mode() & 0o7777);
    if found.is_symlink() {
        return refuse(
            ErrorKind::Denied,
            "it is a symbolic link".to_owned(),
            "Name the directory that the link leads to.".to_owned(),
        );
    }
    if !found.is_dir() {
        return refuse(
            ErrorKind::Invalid,
            "it is not a directory".to_owned(),
            "Name a directory, or one that does not exist yet.".to_owned(),
        );
    }
    if found.uid() != ours {
        return refuse(
            ErrorKind::Denied,
            format!("it belongs to user {}, and this is user {ours}", found.uid()),
            "Run as its owner, or name a directory of your own.".to_owned(),
        );
    }
    if mode & 0o022 != 0 {
        return refuse(
            ErrorKind::Denied,
            format!("others can write it (mode {mode:04o})"),
            format!(
                "Look who has changed what is in it; then run: chmod 0700 '{}'",
                path.display()
            ),
        );
    }
    Ok(())
}

/// Refuses a way to the directory that another user can bend: who may rename what is in a directory can put another one in
/// its place between two looks. A group is trusted by whoever let it write there.
fn check_above(path: &Path, above: &Path, found: &Metadata) -> Result<()> {
    let ours = rustix::process::geteuid().as_raw();
    // In a sticky directory each may rename only what is theirs.
    let sticky = found.mode() & 0o1000 != 0;
    let why = if found.uid() != 0 && found.uid() != ours {
        format!("{} belongs to user {}", above.display(), found.uid())
    } else if found.mode() & 0o002 != 0 && !sticky {
        format!("everyone can write {}", above.display())
    } else {
        return Ok(());
    };
    let what = format!("the state directory cannot be used: {why}, who could put another one in its place");
    Err(Error::new(ErrorKind::Denied, what)
        .with("path", path.display())
        .hint("Name a directory that lies in those of root and your own only."))
}

fn failed(verb: &str, path: &Path, error: io::Error) -> Error {
    let invalid = error.kind() == io::ErrorKind::InvalidInput;
    let error = if invalid {
        Error::new(ErrorKind::Invalid, "the path of the state directory is not valid").because(error)
    } else {
        Error::io(format!("cannot {verb} the state directory"), error)
    };
    error
        .with("path", path.display())
        .hint("Name a directory that you may write with --state-dir DIRECTORY.")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn set_mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn everything_is_made_private() {
        let temp = tempfile::tempdir().unwrap();
        let wanted = temp.path().join("a/b");
        let dir = StateDir::open(Some(&wanted)).unwrap();
        assert_eq!(dir.path(), wanted.canonicalize().unwrap());
        for path in [&wanted, &dir.images(), &dir.run(), &dir.locks()] {
            assert_eq!(
                path.metadata().unwrap().mode() & 0o7777,
                0o700,
                "{}",
                path.display()
            );
        }
        assert_eq!(StateDir::open(Some(&wanted)).unwrap(), dir);
    }

    #[test]
    fn a_symbolic_link_is_refused_with_or_without_a_slash() {
        let temp = tempfile::tempdir().unwrap();
        let (real, link) = (temp.path().join("real"), temp.path().join("link"));
        std::fs::create_dir(&real).unwrap();
        symlink(&real, &link).unwrap();
        for path in [
            link.clone(),
            temp.path().join("link/"),
            temp.path().join("link/."),
        ] {
            let error = StateDir::open(Some(&path)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Denied);
            assert!(error.message().contains("symbolic link"), "{error}");
        }
        assert_eq!(
            std::fs::read_dir(&real).unwrap().count(),
            0,
            "nothing was made behind the link"
        );
        std::fs::remove_file(&link).unwrap();
        symlink(temp.path().join("nowhere"), &link).unwrap();
        assert_eq!(StateDir::open(Some(&link)).unwrap_err().kind(), ErrorKind::Denied);
    }

    #[test]
    fn a_linked_part_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let wanted = temp.path().join("state");
        DirBuilder::new().mode(0o700).create(&wanted).unwrap();
        symlink("/etc", wanted.join("images")).unwrap();
        let error = StateDir::open(Some(&wanted)).unwrap_err();
        assert!(
            error.to_string().contains("state/images") && error.kind() == ErrorKind::Denied,
            "{error}"
        );
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        for mode in [0o720, 0o702, 0o1777] {
            set_mode(temp.path(), mode);
            let error = StateDir::open(Some(temp.path())).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Denied, "{mode:o}");
            assert!(
                error.next_step().is_some_and(|hint| hint.contains("chmod 0700")),
                "{error}"
            );
        }
        set_mode(temp.path(), 0o755);
        StateDir::open(Some(temp.path())).unwrap();
    }

    #[test]
    fn another_users_directory_is_refused() {
        // The root user owns /usr; everyone else's directory is made where root runs the test.
        let temp = tempfile::tempdir().unwrap();
        let path = if rustix::process::geteuid().is_root() {
            let theirs = temp.path().join("theirs");
            std::fs::create_dir(&theirs).unwrap();
            std::os::unix::fs::chown(&theirs, Some(65534), None).unwrap();
            theirs
        } else {
            PathBuf::from("/usr")
        };
        let error = StateDir::open(Some(&path)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert!(error.message().contains("belongs to user"), "{error}");
    }

    #[test]
    fn a_directory_that_others_can_swap_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let (open, wanted) = (temp.path().join("open"), temp.path().join("open/deep/state"));
        std::fs::create_dir(&open).unwrap();
        set_mode(&open, 0o777);
        let error = StateDir::open(Some(&wanted)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert!(error.message().contains("everyone can write"), "{error}");
        // As /tmp is.
        set_mode(&open, 0o1777);
        StateDir::open(Some(&wanted)).unwrap();
        if rustix::process::geteuid().is_root() {
            set_mode(&open, 0o755);
            std::os::unix::fs::chown(&open, Some(65534), None).unwrap();
            let error = StateDir::open(Some(&wanted)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Denied);
            assert!(error.message().contains("belongs to user 65534"), "{error}");
        }
    }

    #[test]
    fn what_is_not_a_directory_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("file");
        std::fs::write(&file, "kept").unwrap();
        assert_eq!(
            StateDir::open(Some(&file)).unwrap_err().kind(),
            ErrorKind::Invalid
        );
        assert_eq!(std::fs::read(&file).unwrap(), b"kept");
        assert_eq!(
            StateDir::open(Some(Path::new(""))).unwrap_err().kind(),
            ErrorKind::Invalid
        );
        assert!(StateDir::open(Some(&file.join("below"))).is_err());
    }

    #[test]
    fn users_have_it_in_their_state_home() {
        let of = |state: &'static str, home: &'static str| {
            user_path(move |name| {
                let value = if name == "HOME" { home } else { state };
                (!value.is_empty()).then(|| PathBuf::from(value))
            })
        };
        assert_eq!(of("/s", "/h").unwrap(), Path::new("/s/disksnap"));
        assert_eq!(of("", "/h").unwrap(), Path::new("/h/.local/state/disksnap"));
        assert_eq!(
            of("relative", "/h").unwrap(),
            Path::new("/h/.local/state/disksnap")
        );
        assert_eq!(of("", "").unwrap_err().kind(), ErrorKind::Invalid);
    }
}
