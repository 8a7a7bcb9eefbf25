//! The guest agent: freezing and thawing the guest's file systems, also when the agent is late, silent or wakes up later.
//!
//! The protocol is QEMU's `docs/interop/qemu-ga-ref` (JSON lines over the channel of a serial port). The port is
//! one stream that outlives connections: an answer may belong to a question of a client long gone, which is why
//! each connection begins with `guest-sync-delimited`.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use disksnap_core::{Command, Effect, Error, ErrorKind, Freeze, Result, faults};
use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout_at};

use crate::errors;
use crate::lines::{self, Line};
use crate::qmp::{self, OnConnect, Timeouts};

/// Between two attempts to thaw.
const RETRY: Duration = Duration::from_millis(100);

/// One guest's agent. Connects when it is needed, and keeps the connection while it is in step.
pub(crate) struct Agent {
    path: PathBuf,
    timeouts: Timeouts,
    slot: Mutex<Option<Channel>>,
    on_connect: OnConnect,
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

/// A connection. Dropping it closes it, whoever else holds duplicates.
#[derive(Debug)]
struct Channel {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    descriptor: OwnedFd,
}

impl Drop for Channel {
    fn drop(&mut self) {
        // Closing would not do: the guardian may hold a duplicate. It fails only when it is over already.
        let _ = rustix::net::shutdown(&self.descriptor, rustix::net::Shutdown::Both);
    }
}

impl Agent {
    pub(crate) fn new(path: PathBuf, timeouts: Timeouts, on_connect: OnConnect) -> Self {
        Self {
            path,
            timeouts,
            slot: Mutex::default(),
            on_connect,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A duplicate of the descriptor of the connection, if there is one now.
    pub(crate) async fn descriptor(&self) -> Option<OwnedFd> {
        let slot = self.slot.lock().await;
        slot.as_ref()
            .and_then(|channel| channel.descriptor.try_clone().ok())
    }

    /// Freezes these file systems (`guest-fsfreeze-freeze-list`), or all (`guest-fsfreeze-freeze`), in at most `deadline`.
    pub(crate) async fn freeze(&self, mountpoints: &[String], deadline: Duration) -> Result<Freeze> {
        let until = Instant::now() + deadline;
        let mut slot = self.slot.lock().await;
        let first = until.min(Instant::now() + self.timeouts.agent);
        let mut channel = self.in_step(&mut slot, first).await?;
        if self.is_frozen(&mut channel, until).await? {
            *slot = Some(channel);
            return Err(Error::new(
                ErrorKind::Busy,
                "the guest's file systems are frozen already, by somebody else",
            )
            .with("socket", self.path.display())
            .hint("Thaw them first, with whatever froze them (virsh domfsthaw, guest-fsfreeze-thaw)."));
        }
        let (command, wanted) = match self.to_freeze(&mut channel, mountpoints, until).await {
            Ok(plan) => plan,
            Err(error) => {
                *slot = Some(channel);
                return Err(error);
            }
        };
        let frozen = self.ask(&mut channel, &command, until).await;
        match frozen.and_then(|count| reached(&count, wanted, !mountpoints.is_empty())) {
            Ok(freeze) => {
                *slot = Some(channel);
                Ok(freeze)
            }
            Err(error) => {
                // What the agent refuses it takes back itself; see whether it has.
                let answered = matches!(error.kind(), ErrorKind::Refused | ErrorKind::Unsupported);
                if answered
                    && self
                        .is_frozen(&mut channel, until)
                        .await
                        .is_ok_and(|frozen| !frozen)
                {
                    *slot = Some(channel);
                    return Err(error);
                }
                drop(channel);
                match self.thaw_anew().await {
                    Ok(channel) => {
                        *slot = Some(channel);
                        Err(error.leaving(Effect::RolledBack))
                    }
                    Err(failure) => Err(error.rollback_failed(vec![failure.during("thaw")])),
                }
            }
        }
    }

    /// Thaws (`guest-fsfreeze-thaw`) until the agent says that all is thawed.
    pub(crate) async fn thaw(&self) -> Result<()> {
        let mut slot = self.slot.lock().await;
        if let Some(mut channel) = slot.take() {
            let until = Instant::now() + self.timeouts.thaw.min(self.timeouts.agent);
            match self.thaw_on(&mut channel, until).await {
                Ok(true) => {
                    *slot = Some(channel);
                    return Ok(());
                }
                outcome => tracing::debug!(?outcome, "not thawed at the first attempt"),
            }
        }
        *slot = Some(self.thaw_anew().await?);
        Ok(())
    }

    /// Thaws over new connections until it is done or the patience for thawing is over.
    async fn thaw_anew(&self) -> Result<Channel> {
        let until = Instant::now() + self.timeouts.thaw;
        loop {
            // An agent that is started anew has lost what it was asked, and one that hangs does it twice.
            let outcome = self
                .attempt_to_thaw(until.min(Instant::now() + self.timeouts.agent))
                .await;
            if let Ok(Some(channel)) = outcome {
                return Ok(channel);
            }
            if Instant::now() + RETRY >= until {
                let error = outcome.err().unwrap_or_else(|| {
                    Error::new(
                        ErrorKind::Timeout,
                        "the guest agent says that file systems are still frozen",
                    )
                    .with("socket", self.path.display())
                });
                return Err(error.leaving(Effect::Unknown).hint(
                    "The guest may be frozen now, or freeze when its agent wakes up; a thaw waits behind the freeze. \
                     Run disksnap recover, or guest-fsfreeze-thaw in the guest.",
                ));
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// One attempt; `None` when file systems are still frozen after it.
    async fn attempt_to_thaw(&self, until: Instant) -> Result<Option<Channel>> {
        let (mut channel, id) = self.open(until).await?;
        // Behind the question and before its answer: a hung agent that freezes late finds the thaw right there.
        self.send(&mut channel, "guest-fsfreeze-thaw").await?;
        self.synchronized(&mut channel, id, until).await?;
        if let Err(error) = self.answer(&mut channel, "guest-fsfreeze-thaw", until).await {
            tracing::debug!(%error, "thaw");
        }
        let thawed = self.thaw_on(&mut channel, until).await?;
        Ok(thawed.then_some(channel))
    }

    /// Thaws over a connection that is in step; whether all is thawed now.
    async fn thaw_on(&self, channel: &mut Channel, until: Instant) -> Result<bool> {
        self.send(channel, "guest-fsfreeze-thaw").await?;
        self.send(channel, "guest-fsfreeze-status").await?;
        let thaw = self.answer(channel, "guest-fsfreeze-thaw", until).await;
        let status = self.answer(channel, "guest-fsfreeze-status", until).await?;
        if let Err(error) = &thaw {
            tracing::debug!(%error, "thaw");
        }
        Ok(status == "thawed")
    }

    /// What is to be asked for, and the mount points that it is about as far as the agent tells them.
    async fn to_freeze(
        &self,
        channel: &mut Channel,
        mountpoints: &[String],
        until: Instant,
    ) -> Result<(Command, Vec<String>)> {
        let all = Command::bare("guest-fsfreeze-freeze");
        let known = match self.call(channel, "guest-get-fsinfo", until).await {
            Ok(info) => mounted(&info),
            // An agent may be told not to tell.
            Err(error) if matches!(error.kind(), ErrorKind::Refused | ErrorKind::Unsupported) => Vec::new(),
            Err(error) => return Err(error),
        };
        if mountpoints.is_empty() {
            return Ok((all, known));
        }
        if let Some(strange) = mountpoints.iter().find(|m| !known.contains(m)) {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("the guest has nothing mounted at '{strange}', so nothing was frozen"),
            )
            .with("socket", self.path.display())
            .hint(format!("The guest's mount points are: {}.", known.join(", "))));
        }
        let list = Command::new(
            "guest-fsfreeze-freeze-list",
            json!({ "mountpoints": mountpoints }),
        );
        Ok((list, mountpoints.to_vec()))
    }

    async fn is_frozen(&self, channel: &mut Channel, until: Instant) -> Result<bool> {
        Ok(self.call(channel, "guest-fsfreeze-status", until).await? == "frozen")
    }

    /// The connection there is, taken out of its place, or a new one.
    async fn in_step(&self, slot: &mut Option<Channel>, until: Instant) -> Result<Channel> {
        if let Some(mut channel) = slot.take() {
            // The guest may have rebooted since, or the guardian have closed it.
            let id = self.ask_to_sync(&mut channel).await;
            if let Ok(id) = id
                && self.synchronized(&mut channel, id, until).await.is_ok()
            {
                return Ok(channel);
            }
        }
        let (mut channel, id) = self.open(until).await?;
        self.synchronized(&mut channel, id, until).await?;
        Ok(channel)
    }

    /// Connects and asks the agent to synchronize.
    async fn open(&self, until: Instant) -> Result<(Channel, u64)> {
        let stream = qmp::connect("guest agent", &self.path, until)
            .await
            .map_err(|f| f.error)?;
        let descriptor =
            qmp::duplicate(&stream).map_err(|e| Error::io("cannot keep the agent's descriptor", e))?;
        (self.on_connect)(&descriptor);
        let (reader, writer) = stream.into_split();
        let mut channel = Channel {
            reader: BufReader::new(reader),
            writer,
            descriptor,
        };
        let id = self.ask_to_sync(&mut channel).await?;
        Ok((channel, id))
    }

    async fn ask_to_sync(&self, channel: &mut Channel) -> Result<u64> {
        let id = sync_id();
        let mut question = vec![0xff];
        let command = json!({"execute": "guest-sync-delimited", "arguments": {"id": id}});
        question.extend_from_slice(command.to_string().as_bytes());
        question.push(b'\n');
        self.write(channel, &question).await?;
        Ok(id)
    }

    /// Reads past everything that older questions have left, up to the answer of this one.
    async fn synchronized(&self, channel: &mut Channel, id: u64, until: Instant) -> Result<()> {
        let asked = Instant::now();
        loop {
            let line = self.line(channel, "guest-sync-delimited", until, asked).await?;
            let Some(mark) = line.iter().rposition(|byte| *byte == 0xff) else {
                continue;
            };
            let answer: Option<Value> = serde_json::from_slice(&line[mark + 1..]).ok();
            if answer.is_some_and(|answer| answer["return"] == id) {
                return Ok(());
            }
        }
    }

    async fn call(&self, channel: &mut Channel, command: &str, until: Instant) -> Result<Value> {
        self.ask(channel, &Command::bare(command), until).await
    }

    async fn ask(&self, channel: &mut Channel, command: &Command, until: Instant) -> Result<Value> {
        let mut question = json!({ "execute": command.execute });
        if !command.arguments.is_null() {
            question["arguments"] = command.arguments.clone();
        }
        about_to(&command.execute);
        self.write(channel, format!("{question}\n").as_bytes()).await?;
        self.answer(channel, &command.execute, until).await
    }

    async fn send(&self, channel: &mut Channel, command: &str) -> Result<()> {
        about_to(command);
        let text = format!("{}\n", json!({ "execute": command }));
        self.write(channel, text.as_bytes()).await
    }

    async fn write(&self, channel: &mut Channel, bytes: &[u8]) -> Result<()> {
        // The kernel's buffer takes these few bytes, however hung the guest.
        let written = tokio::time::timeout(self.timeouts.agent, channel.writer.write_all(bytes)).await;
        match written {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Error::io("the connection to the guest agent broke", error)
                .with("socket", self.path.display())),
            Err(_) => Err(errors::silent(
                "guest agent",
                "write",
                &self.path,
                self.timeouts.agent,
            )),
        }
    }

    async fn answer(&self, channel: &mut Channel, command: &str, until: Instant) -> Result<Value> {
        let asked = Instant::now();
        let line = self.line(channel, command, until, asked).await;
        if errors::has_effect(command) {
            faults::after("agent", command);
        }
        let line = line?;
        let mut answer: Value = serde_json::from_slice(&line).map_err(|error| {
            Error::new(
                ErrorKind::Protocol,
                format!("the guest agent speaks nonsense: {}", qmp::excerpt(&line)),
            )
            .with("command", command)
            .with("socket", self.path.display())
            .leaving(errors::effect_unanswered(command))
            .because(error)
        })?;
        if let Some(error) = answer.get("error") {
            return Err(errors::refusal(command, error));
        }
        Ok(answer.get_mut("return").map(Value::take).unwrap_or_default())
    }

    async fn line(
        &self,
        channel: &mut Channel,
        command: &str,
        until: Instant,
        asked: Instant,
    ) -> Result<Vec<u8>> {
        let mut line = Vec::new();
        let over = |why: &str, kind| {
            Error::new(kind, format!("the guest agent's channel {why}"))
                .with("command", command)
                .with("socket", self.path.display())
                .leaving(errors::effect_unanswered(command))
        };
        match timeout_at(until, lines::read(lines::OF_AGENT, &mut channel.reader, &mut line)).await {
            Ok(Ok(Line::Whole)) => Ok(line),
            Ok(Ok(Line::End)) => Err(over("was closed", ErrorKind::Unavailable)),
            Ok(Ok(Line::Endless)) => Err(over("carries an endless line", ErrorKind::Protocol)),
            Ok(Err(error)) => Err(over("broke", ErrorKind::of_io(&error)).because(error)),
            Err(_) => Err(errors::silent("guest agent", command, &self.path, asked.elapsed()).hint(
                "Is the agent running in the guest? Another client on its socket would also keep it silent.",
            )),
        }
    }
}

fn about_to(command: &str) {
    if errors::has_effect(command) {
        faults::before("agent", command);
    }
}

/// The mount points of `guest-get-fsinfo`, each once.
fn mounted(info: &Value) -> Vec<String> {
    let each = info.as_array().into_iter().flatten();
    let mut points: Vec<String> = each
        .filter_map(|fs| fs["mountpoint"].as_str().map(str::to_owned))
        .collect();
    points.sort();
    points.dedup();
    points
}

/// What a freeze reached; an error when it is less than what was named.
fn reached(count: &Value, mountpoints: Vec<String>, named: bool) -> Result<Freeze> {
    let filesystems = count.as_u64().unwrap_or_default();
    if named && filesystems < mountpoints.len() as u64 {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "the guest agent froze {filesystems} of the {} file systems that were named",
                mountpoints.len()
            ),
        )
        .leaving(Effect::Unknown));
    }
    Ok(Freeze {
        filesystems,
        mountpoints,
    })
}

/// A number that no earlier client is likely to have used; agents take up to 63 bits.
fn sync_id() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanos = now.map_or(0, |now| now.as_nanos());
    u64::try_from(nanos & 0x7fff_ffff_ffff_ffff).unwrap_or(1)
}
