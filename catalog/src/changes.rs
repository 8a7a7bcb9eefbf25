//! The changes that settle an intent, each as it is done inside the one transaction.

use std::time::SystemTime;

use disksnap_core::{
    Alias, Change, Checkpoint, CheckpointName, DomainId, Error, ErrorKind, Export, Moved, NbdServer,
    Snapshot, SnapshotId,
};
use rusqlite::{OptionalExtension, Transaction, params};

use crate::fault::Outcome;
use crate::record;

/// How many deleted snapshots a domain's catalog remembers by name.
pub(crate) const TOMBSTONES: i64 = 1000;

/// How many former places of a domain's disks its catalog remembers.
const MOVES: i64 = 1000;

/// Applies one change.
pub(crate) fn apply(to: &Transaction<'_>, domain: &DomainId, change: &Change) -> Outcome<()> {
    match change {
        Change::AddSnapshot(snapshot) => add_snapshot(to, domain, snapshot),
        Change::RemoveSnapshot(id) => remove_snapshot(to, domain, *id),
        Change::SetCheckpoints(set) => set_checkpoints(to, domain, set),
        Change::AddCheckpoint(checkpoint) => add_checkpoint(to, domain, checkpoint),
        Change::RemoveCheckpoint(name) => remove_checkpoint(to, domain, name),
        Change::Move(moved) => add_move(to, domain, moved),
        Change::SetServer(server) => set_server(to, domain, server),
        Change::ClearServer => clear_server(to, domain),
        Change::AddExport(export) => add_export(to, domain, export),
        Change::RemoveExport(alias) => remove_export(to, domain, alias),
    }
}

fn add_snapshot(to: &Transaction<'_>, domain: &DomainId, snapshot: &Snapshot) -> Outcome<()> {
    if snapshot.domain.uuid != domain.uuid {
        let message = "a snapshot of another domain cannot settle this domain's intent";
        return Err(Error::new(ErrorKind::Internal, message)
            .with("domain", domain)
            .into());
    }
    if snapshot.pinned {
        return pin_snapshot(to, domain, snapshot);
    }
    let (uuid, id) = (domain.uuid.to_string(), snapshot.id.to_string());
    let mut holder = to.prepare_cached("SELECT id FROM snapshots WHERE domain = ?1 AND name = ?2")?;
    let holder: Option<String> = holder
        .query_row(params![uuid, snapshot.name.as_str()], |row| row.get(0))
        .optional()?;
    if holder.is_some_and(|holder| holder != id) {
        return Err(Error::new(
            ErrorKind::AlreadyExists,
            "the domain has a snapshot of this name; it was left as it is",
        )
        .with("domain", domain)
        .with("snapshot", &snapshot.name)
        .hint("Choose another name, or delete that snapshot first.")
        .into());
    }
    // The same snapshot again is the same settle again, after a crash.
    to.prepare_cached(
        "INSERT INTO snapshots (domain, id, name, created, version, record) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
         ON CONFLICT (domain, id) DO UPDATE SET
         name = excluded.name, created = excluded.created, version = excluded.version, record = excluded.record",
    )?
    .execute(params![
        uuid,
        id,
        snapshot.name.as_str(),
        nanoseconds(snapshot.created),
        record::VERSION,
        record::write("snapshot", snapshot)?
    ])?;
    Ok(())
}

/// A snapshot that is deleted for its users, and kept.
fn pin_snapshot(to: &Transaction<'_>, domain: &DomainId, snapshot: &Snapshot) -> Outcome<()> {
    bury(to, domain, snapshot.id)?;
    to.prepare_cached(
        "INSERT INTO pinned (domain, id, created, version, record) VALUES (?1, ?2, ?3, ?4, ?5)
         ON CONFLICT (domain, id) DO UPDATE SET
         created = excluded.created, version = excluded.version, record = excluded.record",
    )?
    .execute(params![
        domain.uuid.to_string(),
        snapshot.id.to_string(),
        nanoseconds(snapshot.created),
        record::VERSION,
        record::write("snapshot", snapshot)?
    ])?;
    Ok(())
}

/// Since 1970, clipped to what the column holds (the years 1677 to 2262).
fn nanoseconds(at: SystemTime) -> i64 {
    match at.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |n| -n),
    }
}

fn remove_snapshot(from: &Transaction<'_>, domain: &DomainId, id: SnapshotId) -> Outcome<()> {
    bury(from, domain, id)?;
    from.prepare_cached("DELETE FROM pinned WHERE domain = ?1 AND id = ?2")?
        .execute(params![domain.uuid.to_string(), id.to_string()])?;
    Ok(())
}

/// Takes a snapshot out of those that have a name, and remembers the name.
fn bury(from: &Transaction<'_>, domain: &DomainId, id: SnapshotId) -> Outcome<()> {
    let (uuid, id) = (domain.uuid.to_string(), id.to_string());
    let buried = from
        .prepare_cached(
            "INSERT INTO tombstones (domain, name, id)
             SELECT domain, name, id FROM snapshots WHERE domain = ?1 AND id = ?2",
        )?
        .execute(params![uuid, id])?;
    if buried == 0 {
        return Ok(());
    }
    from.prepare_cached("DELETE FROM snapshots WHERE domain = ?1 AND id = ?2")?
        .execute(params![uuid, id])?;
    from.prepare_cached(
        "DELETE FROM tombstones WHERE domain = ?1 AND seq <=
         (SELECT seq FROM tombstones WHERE domain = ?1 ORDER BY seq DESC LIMIT 1 OFFSET ?2)",
    )?
    .execute(params![uuid, TOMBSTONES])?;
    Ok(())
}

fn set_checkpoints(of: &Transaction<'_>, domain: &DomainId, set: &[Checkpoint]) -> Outcome<()> {
    of.prepare_cached("DELETE FROM checkpoints WHERE domain = ?1")?
        .execute([domain.uuid.to_string()])?;
    set.iter()
        .try_for_each(|checkpoint| add_checkpoint(of, domain, checkpoint))
}

fn add_checkpoint(to: &Transaction<'_>, domain: &DomainId, checkpoint: &Checkpoint) -> Outcome<()> {
    to.prepare_cached(
        "INSERT INTO checkpoints (domain, name, created, version, record) VALUES (?1, ?2, ?3, ?4, ?5)
         ON CONFLICT (domain, name) DO UPDATE SET
         created = excluded.created, version = excluded.version, record = excluded.record",
    )?
    .execute(params![
        domain.uuid.to_string(),
        checkpoint.name.as_str(),
        nanoseconds(checkpoint.created),
        record::VERSION,
        record::write("checkpoint", checkpoint)?
    ])?;
    Ok(())
}

fn remove_checkpoint(from: &Transaction<'_>, domain: &DomainId, name: &CheckpointName) -> Outcome<()> {
    from.prepare_cached("DELETE FROM checkpoints WHERE domain = ?1 AND name = ?2")?
        .execute(params![domain.uuid.to_string(), name.as_str()])?;
    Ok(())
}

fn add_move(to: &Transaction<'_>, domain: &DomainId, moved: &Moved) -> Outcome<()> {
    let (uuid, target) = (domain.uuid.to_string(), &moved.disk.target);
    // What is the disk now is not old any more.
    if let Some(now) = &moved.disk.source {
        to.prepare_cached("DELETE FROM moves WHERE domain = ?1 AND target = ?2 AND source = ?3")?
            .execute(params![uuid, target, record::write("source", now)?])?;
    }
    to.prepare_cached(
        "INSERT OR REPLACE INTO moves (domain, target, source, version, record) VALUES (?1, ?2, ?3, ?4, ?5)",
    )?
    .execute(params![
        uuid,
        target,
        record::write("source", &moved.from)?,
        record::VERSION,
        record::write("move", moved)?
    ])?;
    to.prepare_cached(
        "DELETE FROM moves WHERE domain = ?1 AND seq <=
         (SELECT seq FROM moves WHERE domain = ?1 ORDER BY seq DESC LIMIT 1 OFFSET ?2)",
    )?
    .execute(params![uuid, MOVES])?;
    Ok(())
}

fn set_server(to: &Transaction<'_>, domain: &DomainId, server: &NbdServer) -> Outcome<()> {
    to.prepare_cached("INSERT OR REPLACE INTO servers (domain, version, record) VALUES (?1, ?2, ?3)")?
        .execute(params![
            domain.uuid.to_string(),
            record::VERSION,
            record::write("server", server)?
        ])?;
    Ok(())
}

fn clear_server(of: &Transaction<'_>, domain: &DomainId) -> Outcome<()> {
    of.prepare_cached("DELETE FROM servers WHERE domain = ?1")?
        .execute([domain.uuid.to_string()])?;
    Ok(())
}

fn add_export(to: &Transaction<'_>, domain: &DomainId, export: &Export) -> Outcome<()> {
    to.prepare_cached(
        "INSERT INTO exports (domain, alias, version, record) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (domain, alias) DO UPDATE SET version = excluded.version, record = excluded.record",
    )?
    .execute(params![
        domain.uuid.to_string(),
        export.alias.0,
        record::VERSION,
        record::write("export", export)?
    ])?;
    Ok(())
}

fn remove_export(from: &Transaction<'_>, domain: &DomainId, alias: &Alias) -> Outcome<()> {
    from.prepare_cached("DELETE FROM exports WHERE domain = ?1 AND alias = ?2")?
        .execute(params![domain.uuid.to_string(), alias.0])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn every_time_has_a_place_in_the_order() {
        let epoch = SystemTime::UNIX_EPOCH;
        assert_eq!(nanoseconds(epoch), 0);
        assert_eq!(nanoseconds(epoch + Duration::from_nanos(7)), 7);
        assert_eq!(nanoseconds(epoch - Duration::from_nanos(7)), -7);
        assert_eq!(nanoseconds(epoch + Duration::from_secs(1 << 40)), i64::MAX);
    }
}
