//! A repository in a directory of this host.
use std::path::PathBuf;
/// A directory.
#[derive(Debug, Clone)]
pub struct LocalStore {
    root: PathBuf,
}
impl LocalStore {
    /// A store in this directory, which must exist.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }
    /// Its directory.
    #[must_use]
    pub fn root(&self) -> &std::path::Path {
        &self.root
    }
}
