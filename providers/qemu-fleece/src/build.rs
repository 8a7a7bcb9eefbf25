//! Making what a fleece needs: the image, its nodes, the filter that waits for the guest's writes.

use disksnap_core::{Batch, Command, Error, Host, Owner, Result, SnapshotId, Step, TakePlan};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::choice::{Choice, Seat};
use crate::encrypted;
use crate::image::{self, CALLED, Content};
use crate::names::Names;
use crate::offers::Sparing;
use crate::settings::Way;

/// One disk being fleeced: what `prepare` returns and everything later gets back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fleece {
    pub(crate) id: SnapshotId,
    pub(crate) target: String,
    #[serde(flatten)]
    pub(crate) choice: Choice,
}

impl Fleece {
    pub(crate) fn names(&self) -> Names {
        Names::new(self.id, &self.target)
    }
}

/// Makes the image files of all disks, then everything in QEMU that can be there before the instant.
pub(crate) async fn build(host: &dyn Host, fleeces: &[Fleece]) -> Result<()> {
    let owner = host.image_owner().await?;
    for fleece in fleeces {
        make_file(fleece, owner).map_err(|e| e.with("disk", &fleece.target))?;
    }
    let unreachable = |error: Error| explain_owner(error, owner);
    encrypt(host, fleeces).await.map_err(unreachable)?;
    for fleece in fleeces.iter().filter(|f| f.choice.sparing == Sparing::Nothing) {
        reserve(&fleece.choice).map_err(|e| e.with("disk", &fleece.target))?;
    }
    let mut commands = Vec::new();
    for fleece in fleeces {
        let names = fleece.names();
        let add = match fleece.choice.way {
            Way::Filter => filter(&names, &fleece.choice),
            Way::Job | Way::Classic => fleece_node(&names, &fleece.choice),
        };
        commands.push((fleece, Command::new("blockdev-add", add)));
    }
    each(host, commands).await.map_err(unreachable)
}

/// A QEMU that runs as somebody else opens the image, which is its own, but not every directory on the way.
fn explain_owner(error: Error, owner: Option<Owner>) -> Error {
    match owner {
        Some(Owner { uid, .. }) if error.message().contains("Permission denied") => error.hint(format!(
            "QEMU runs as the user {uid} and cannot reach the directory: name a place that it can (fleece.file=PATH)."
        )),
        _ => error,
    }
}

fn make_file(fleece: &Fleece, owner: Option<Owner>) -> Result<()> {
    let Choice {
        image,
        size,
        way,
        encrypted,
        ..
    } = &fleece.choice;
    let content = match (way, encrypted) {
        // `qemu-img` writes the format, and grows the file.
        (_, true) => Content::Nothing,
        (Way::Classic, false) => Content::Qcow2(*size),
        (Way::Filter | Way::Job, false) => Content::Raw(*size),
    };
    image.create(CALLED, owner, |file| content.write(file))
}

/// Where a full image would fail the guest's writes, there is room for all of it, or there is no snapshot.
fn reserve(choice: &Choice) -> Result<()> {
    let path = choice.image.path.display();
    let reserved = image::reserve(&choice.image.path, choice.size).map_err(|error| {
        let what = format!("cannot reserve {} bytes for the fleece image {path}", image::at_most(choice.size));
        Error::io(what, error).hint(
            "This QEMU would fail the guest's writes when the image is full. Free some space, or name a place with more of it (fleece.file=PATH).",
        )
    })?;
    if !reserved {
        tracing::warn!("the file system of {path} reserves no room: the guest's writes fail when it is full");
    }
    Ok(())
}

/// Writes the formats of the encrypted images, and gives QEMU their keys.
async fn encrypt(host: &dyn Host, fleeces: &[Fleece]) -> Result<()> {
    for fleece in fleeces.iter().filter(|f| f.choice.encrypted) {
        let key = encrypted::random_key()?;
        encrypted::make(&fleece.choice, &key)
            .await
            .map_err(|e| e.with("disk", &fleece.target))?;
        let secret = json!({ "qom-type": "secret", "id": fleece.names().secret(), "data": key });
        each(host, vec![(fleece, Command::new("object-add", secret))]).await?;
    }
    Ok(())
}

fn file_options(choice: &Choice) -> Value {
    json!({ "driver": "file", "filename": choice.image.path, "discard": "unmap" })
}

/// The node that old data is copied to.
fn fleece_node(names: &Names, choice: &Choice) -> Value {
    let mut node = json!({ "node-name": names.fleece(), "discard": "unmap" });
    node["file"] = file_options(choice);
    match (choice.way, choice.encrypted) {
        (Way::Classic, encrypted) => {
            node["driver"] = json!("qcow2");
            node["backing"] = json!(choice.source);
            if encrypted {
                node["encrypt"] = json!({ "format": "luks", "key-secret": names.secret() });
            }
        }
        (_, true) => {
            node["driver"] = json!("luks");
            node["key-secret"] = json!(names.secret());
        }
        (_, false) => {
            node["driver"] = json!("raw");
            node["size"] = json!(choice.size);
        }
    }
    node
}

/// The filter, on top of what the guest writes to and not yet below the guest.
fn filter(names: &Names, choice: &Choice) -> Value {
    let below = choice.seat.as_ref().map_or(choice.source.as_str(), Seat::below);
    json!({
        "driver": "copy-before-write",
        "node-name": names.filter(),
        "read-only": choice.read_only,
        "discard": "unmap",
        "on-cbw-error": "break-snapshot",
        "cbw-timeout": choice.timeout,
        "file": {
            "driver": "raw",
            "node-name": names.wrapper(),
            "read-only": choice.read_only,
            "discard": "unmap",
            "file": below,
        },
        "target": fleece_node(names, choice),
    })
}

/// What fixes the instant of one disk.
pub(crate) fn take(fleece: &Fleece) -> TakePlan {
    let (names, choice) = (fleece.names(), &fleece.choice);
    match &choice.seat {
        Some(Seat::Device { path, root }) => {
            let attach = |node: &str| {
                Command::new(
                    "qom-set",
                    json!({ "path": path, "property": "drive", "value": node }),
                )
            };
            TakePlan::Paused(vec![Step {
                command: attach(&names.filter()),
                undo: Some(attach(root)),
            }])
        }
        Some(Seat::Wrapper { options, below }) => {
            let onto = |node: &str| {
                let mut options = options.clone();
                options["file"] = json!(node);
                options
            };
            let undo = Command::new("blockdev-reopen", json!({ "options": [onto(below)] }));
            TakePlan::Atomic(Batch {
                execute: "blockdev-reopen".to_owned(),
                list: "options".to_owned(),
                items: vec![onto(&names.filter())],
                undo: vec![undo],
            })
        }
        None => {
            let job = backup(&names, choice);
            TakePlan::Atomic(Batch {
                execute: "transaction".to_owned(),
                list: "actions".to_owned(),
                items: vec![json!({ "type": "blockdev-backup", "data": job })],
                undo: Vec::new(),
            })
        }
    }
}

fn backup(names: &Names, choice: &Choice) -> Value {
    let mut job = json!({
        "job-id": names.job(),
        "device": choice.source,
        "target": names.fleece(),
        "sync": "none",
        "filter-node-name": names.filter(),
        "auto-dismiss": false,
    });
    if choice.sparing == Sparing::Job {
        job["on-cbw-error"] = json!("break-snapshot");
        job["cbw-timeout"] = json!(choice.timeout);
    }
    job
}

/// Makes the nodes that the snapshots are read through.
pub(crate) async fn open_access(host: &dyn Host, fleece: &Fleece) -> Result<()> {
    if fleece.choice.way != Way::Classic {
        let names = fleece.names();
        let node =
            json!({ "driver": "snapshot-access", "node-name": names.access(), "file": names.filter() });
        each(host, vec![(fleece, Command::new("blockdev-add", node))]).await?;
    }
    fleece.choice.image.unmark()
}

/// The node that the snapshot is read through.
pub(crate) fn access_node(fleece: &Fleece) -> String {
    let names = fleece.names();
    if fleece.choice.way == Way::Classic {
        names.fleece()
    } else {
        names.access()
    }
}

/// Sends the commands back to back; the first that was refused is the error, with its disk.
async fn each(host: &dyn Host, commands: Vec<(&Fleece, Command)>) -> Result<()> {
    if commands.is_empty() {
        return Ok(());
    }
    let (fleeces, commands): (Vec<&Fleece>, Vec<Command>) = commands.into_iter().unzip();
    let answers = host.monitor_each(commands).await?;
    for (fleece, answer) in fleeces.into_iter().zip(answers) {
        answer.map_err(|e| e.with("disk", &fleece.target))?;
    }
    Ok(())
}
