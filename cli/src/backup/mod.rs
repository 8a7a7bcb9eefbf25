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

use std::path::Path;
use std::sync::Arc;

use disksnap::{DomainId, Error, ErrorKind};
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
    let meant = |id: &DomainId| id.name == given || Some(id.uuid) == given.parse().ok();
    if let Some(n) = all.iter().position(|folder| meant(&folder.id)) {
        return Ok(all.swap_remove(n));
    }
    // A document, or a domain that is known here by another name.
    let id = match context.disksnap().await?.load(given).await {
        Ok(document) => Some(document.domain().id.clone()),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(error.into()),
    };
    let found = all
        .iter()
        .position(|folder| id.as_ref().is_some_and(|id| id.uuid == folder.id.uuid));
    if let Some(n) = found {
        return Ok(all.swap_remove(n));
    }
    Err(Error::new(
        ErrorKind::NotFound,
        format!("the repository has no backup of '{given}'"),
    )
    .with("repository", repository.store().describe())
    .hint(format!("It has: {}.", names(&all)))
    .into())
}

fn names(all: &[DomainFolder]) -> String {
    let names: Vec<&str> = all.iter().map(|folder| folder.id.name.as_str()).collect();
    names.join(", ")
}

/// A directory that exists, for a repository that may have to be made in it.
pub(crate) fn made(path: &Path) -> disksnap::Result<()> {
    std::fs::create_dir_all(path)
        .map_err(|e| Error::io("cannot make the repository", e).with("path", path.display()))
}
