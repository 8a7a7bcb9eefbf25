//! `disksnap backup`: which room does what, and what they share.

pub(crate) mod args;
mod create;
mod list;
mod merge;
mod progress;
mod restore;
mod serve;
mod show;
mod verify;

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use disksnap::{Error, ErrorKind, UnfinishedFolder, faults};
use disksnap_backup::{DomainFolder, LocalStore, Repository};

use crate::backup::args::{BackupCommand, Repo};
use crate::context::Context;
use crate::failure::Outcome;

pub(crate) async fn run(context: &Context, command: BackupCommand) -> Outcome {
    match command {
        BackupCommand::Create(create) => create::create(context, create).await,
        BackupCommand::Pull(pull) => create::pull(context, pull).await,
        BackupCommand::Abandon { repo } => create::abandon(context, &repo).await,
        BackupCommand::List { repo } => list::run(context, &repo).await,
        BackupCommand::Show { repo, point } => show::run(context, &repo, &point.point).await,
        BackupCommand::Merge(merge) => merge::merge(context, merge).await,
        BackupCommand::Prune(prune) => merge::prune(context, prune).await,
        BackupCommand::Restore(restore) => restore::run(context, restore).await,
        BackupCommand::Serve(serve) => serve::run(context, serve).await,
        BackupCommand::Verify(verify) => verify::run(context, verify).await,
    }
}

/// The repository, which must be there.
pub(crate) async fn repository(repo: &Repo) -> Outcome<Repository> {
    let store = Arc::new(LocalStore::at(&repo.repo));
    Ok(Repository::open(store).await?)
}

/// The domain's folder that is meant: that of `-d`, which is a path, a name or a UUID as elsewhere, or a name that only the repository
/// knows; without it the only one there is.
pub(crate) async fn folder(context: &Context, repository: &Repository) -> Outcome<DomainFolder> {
    let mut all = repository.domains().await?;
    let Some(given) = context.global.domain.as_deref() else {
        return match all.len() {
            1 => Ok(all.swap_remove(0)),
            0 => Err(Error::new(ErrorKind::NotFound, "the repository has no domain yet").into()),
            _ => Err(
                Error::new(ErrorKind::Invalid, "the repository has several domains")
                    .hint(format!("Say -d with one of: {}.", names(&all)))
                    .into(),
            ),
        };
    };
    // A UUID or a path means one machine. A name means the one that bears it here now, before any that did once.
    let uuid = match given.parse() {
        Ok(uuid) => Some(uuid),
        Err(_) => match context.disksnap().await?.load(given).await {
            Ok(document) => Some(document.domain().id.uuid),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error.into()),
        },
    };
    if let Some(uuid) = uuid {
        let found = all.iter().position(|folder| folder.id.uuid == uuid);
        return found
            .map(|n| all.swap_remove(n))
            .ok_or_else(|| not_there(repository, given, &all).into());
    }
    let named: Vec<usize> = (0..all.len()).filter(|n| all[*n].id.name == given).collect();
    match named.as_slice() {
        [n] => Ok(all.swap_remove(*n)),
        [] => Err(not_there(repository, given, &all).into()),
        several => {
            let uuids: Vec<String> = several.iter().map(|n| all[*n].id.uuid.to_string()).collect();
            let message = format!("the repository has several machines called '{given}'");
            Err(Error::new(ErrorKind::Invalid, message)
                .hint(format!("Say -d with the UUID of one: {}.", uuids.join(", ")))
                .into())
        }
    }
}

fn not_there(repository: &Repository, given: &str, all: &[DomainFolder]) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("the repository has no backup of '{given}'"),
    )
    .with("repository", repository.store().describe())
    .hint(format!("It has: {}.", names(all)))
}

fn names(all: &[DomainFolder]) -> String {
    let names: Vec<&str> = all.iter().map(|folder| folder.id.name.as_str()).collect();
    names.join(", ")
}

/// A directory for a repository, which is made where there is nothing. One that is empty may be a place where nothing is mounted.
pub(crate) async fn made(path: &Path, init: bool) -> disksnap::Result<()> {
    let mut entries = match std::fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return put_whole(path).await,
        entries => entries.map_err(|e| cannot_make(path, e))?,
    };
    if entries.next().is_none() && !init {
        let error = Error::new(
            ErrorKind::NotFound,
            "the directory is empty: there is no repository in it",
        );
        return Err(error
            .with("path", path.display())
            .hint("Is the file system mounted? --init makes a new repository there."));
    }
    Ok(())
}

/// Makes a repository beside its place and puts it there: a kill must not leave an empty directory, which is refused the next
/// time.
async fn put_whole(path: &Path) -> disksnap::Result<()> {
    let told = |e| cannot_make(path, e);
    let path = std::path::absolute(path).map_err(told)?;
    if let Some(parent) = path.parent() {
        faults::around("file", "make folders", || std::fs::create_dir_all(parent)).map_err(told)?;
    }
    let folder = UnfinishedFolder::beside(&path).map_err(told)?;
    let whole = folder.path().join("repository");
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(&whole)
        .map_err(told)?;
    Repository::open_or_init(Arc::new(LocalStore::at(&whole))).await?;
    match faults::around("file", "rename repository", || std::fs::rename(&whole, &path)) {
        // Another one was quicker.
        Err(_) if path.is_dir() => Ok(()),
        renamed => renamed.map_err(told),
    }
}

fn cannot_make(path: &Path, error: io::Error) -> Error {
    Error::io("cannot make the repository", error).with("path", path.display())
}
