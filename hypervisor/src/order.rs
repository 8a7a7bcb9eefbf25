//! What the parent and its guardian say to each other: one JSON value a packet, with descriptors beside it.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use disksnap_core::Command;
use rustix::io::{Errno, Result};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Tells a program that it was started as the guardian.
pub(crate) const ASKED: &str = "DISKSNAP_GUARDIAN";

/// The longest packet, in bytes: two paths, some numbers, and some commands for each of many disks.
const PACKET: usize = 128 << 10;

/// A connection that the guardian can shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum End {
    Monitor,
    Agent,
}

/// From the parent.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Order {
    /// The first order.
    Arm(Plan),
    /// This connection is new; its descriptor comes along.
    Connected(End),
    /// The guest runs again, thank you.
    Disarm,
}

/// What is to be undone, and how to reach it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// What lets disks go that a merge holds still, and the monitor's socket for it.
    pub(crate) release: Option<(PathBuf, Vec<Command>)>,
    /// To let the guest run: the monitor's socket.
    pub(crate) resume: Option<PathBuf>,
    /// To thaw the guest: the agent's socket.
    pub(crate) thaw: Option<PathBuf>,
    /// From now until it acts by itself.
    pub(crate) deadline_ms: u64,
    /// How long it tries while the parent may wait for it.
    pub(crate) patience_ms: u64,
    /// The hypervisor's process, and the socket of its NBD server there, whose clients it may be waiting for.
    pub(crate) clients: Option<(i32, PathBuf)>,
    /// The note that tells the next process of this plan, if neither the parent nor the guardian carries it out.
    pub(crate) note: Option<PathBuf>,
}

/// From the guardian.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Report {
    Armed,
    /// Let go without having acted.
    Quiet,
    /// Let go after having acted; the guest runs.
    Fired,
    /// Let go after having tried in vain.
    Failed(String),
}

/// The parent's end and the guardian's.
pub(crate) fn pair() -> Result<(OwnedFd, OwnedFd)> {
    rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
}

pub(crate) fn send(
    socket: impl AsFd,
    message: &impl Serialize,
    descriptor: Option<BorrowedFd<'_>>,
) -> Result<()> {
    let text = serde_json::to_vec(message).map_err(|_| Errno::INVAL)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.map(|d| [d]);
    if let Some(descriptors) = &descriptors {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    // A packet is sent whole or not at all.
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(&text)], &mut control, SendFlags::NOSIGNAL)?;
    if sent == text.len() {
        Ok(())
    } else {
        Err(Errno::MSGSIZE)
    }
}

/// The next packet; `None` when the other end is gone.
pub(crate) fn receive<T: DeserializeOwned>(socket: impl AsFd) -> Result<Option<(T, Option<OwnedFd>)>> {
    let mut text = vec![0; PACKET];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut text)];
    let got = rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    if got.bytes == 0 {
        return Ok(None);
    }
    let message = serde_json::from_slice(&text[..got.bytes]).map_err(|_| Errno::PROTO)?;
    Ok(Some((message, descriptor)))
}
