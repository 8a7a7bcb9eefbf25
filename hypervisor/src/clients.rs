//! Clients of QEMU's NBD server that take nothing of what they are sent.
//!
//! QEMU waits for a reply that a client does not take whenever it drains the exported disk; its main loop, its monitor and its
//! guest stand still meanwhile (nbd/server.c; seen with 7.2 and 10.0). So that a client that was stopped stops no guest: on TCP the
//! kernel ends such a connection after a while, and on our own unix socket we do, but only while QEMU does not answer.
//!
//! QEMU has no command for either. `pidfd_getfd` gives a duplicate of its sockets to root, and to its own user where Yama does
//! not forbid it; where it gives none, all is as it was.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{Shutdown, SocketAddrAny, SocketAddrUnix, getsockname, sockopt};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// How long QEMU may be silent before its clients are looked at.
const SILENCE: Duration = Duration::from_secs(2);

/// How often they are looked at, and how long it is from one look to the next. One that takes something in between does not stall.
const LOOKS: u32 = 15;
const BETWEEN: Duration = Duration::from_millis(200);

/// Room for whatever waits in a unix socket, and so much more that it counts as writable (a quarter of it at most is full).
const ROOM: usize = 4 << 20;

/// How long a client on TCP may take nothing.
const TCP_PATIENCE: Duration = Duration::from_secs(10);

/// Waits for something of the QEMU with this process id. As long as it is silent, connections to its NBD server at `socket` are ended
/// whose clients take nothing.
pub(crate) async fn ending_stalled<T>(
    pid: Option<i32>,
    socket: Option<&Path>,
    waiting: impl Future<Output = T>,
) -> T {
    let (Some(pid), Some(socket)) = (pid, socket) else {
        return waiting.await;
    };
    let mut waiting = pin!(waiting);
    let end_stalled = async {
        loop {
            tokio::time::sleep(SILENCE).await;
            let mut suspects = connections(pid, socket);
            for _ in 0..LOOKS {
                suspects.retain(is_full);
                if suspects.is_empty() {
                    break;
                }
                tokio::time::sleep(BETWEEN).await;
            }
            end(&suspects);
        }
    };
    tokio::select! {
        biased;
        done = &mut waiting => done,
        () = end_stalled => unreachable!("it has no end"),
    }
}

/// As [`ending_stalled`], once and without a runtime, for a QEMU that has been silent for a while already.
pub(crate) fn end_stalled(pid: i32, socket: &Path) {
    let mut suspects = connections(pid, socket);
    for _ in 0..LOOKS {
        suspects.retain(is_full);
        if suspects.is_empty() {
            return;
        }
        std::thread::sleep(BETWEEN);
    }
    end(&suspects);
}

/// Has the kernel end connections that are accepted from now on at this address, when their clients take nothing for a while (tcp(7),
/// `TCP_USER_TIMEOUT`: it passes from a listening socket to those that it accepts).
pub(crate) fn bound_on_tcp(pid: i32, address: IpAddr, port: u16) {
    let at = SocketAddrAny::from(SocketAddr::new(address, port));
    let patience = u32::try_from(TCP_PATIENCE.as_millis()).unwrap_or(u32::MAX);
    let mut bound = false;
    for socket in sockets(pid).filter(|socket| getsockname(socket).is_ok_and(|name| name == at)) {
        bound |= sockopt::set_tcp_user_timeout(&socket, patience).is_ok();
    }
    if !bound {
        tracing::debug!(pid, %address, port, "clients that stall cannot be bounded");
    }
}

/// The connections that a process has accepted at a unix socket.
fn connections(pid: i32, at: &Path) -> Vec<OwnedFd> {
    let Ok(at) = SocketAddrUnix::new(at) else {
        return Vec::new();
    };
    let at = SocketAddrAny::from(at);
    let is_one = |socket: &OwnedFd| {
        let listens = sockopt::socket_acceptconn(socket).unwrap_or(true);
        !listens && getsockname(socket).is_ok_and(|name| name == at)
    };
    sockets(pid).filter(is_one).collect()
}

/// Duplicates of a process's sockets, as far as it may be asked for them.
fn sockets(pid: i32) -> impl Iterator<Item = OwnedFd> {
    let process = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let open = process
        .iter()
        .flat_map(|_| std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten());
    let is_socket = |entry: &std::fs::DirEntry| {
        std::fs::read_link(entry.path())
            .is_ok_and(|to| to.as_os_str().as_encoded_bytes().starts_with(b"socket:"))
    };
    let numbers: Vec<i32> = open
        .flatten()
        .filter(is_socket)
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    numbers
        .into_iter()
        .filter_map(move |number| pidfd_getfd(process.as_ref()?, number, PidfdGetfdFlags::empty()).ok())
}

/// Whether more cannot be sent, since what was sent has not been taken: what QEMU waits for.
fn is_full(socket: &OwnedFd) -> bool {
    let mut watched = [PollFd::new(socket, PollFlags::OUT)];
    // One that is shut down already, and still full, hangs up: QEMU does not hear that while it waits for room.
    poll(&mut watched, Some(&Timespec::default())).is_ok() && !watched[0].revents().contains(PollFlags::OUT)
}

fn end(stalled: &[OwnedFd]) {
    for socket in stalled {
        let client = sockopt::socket_peercred(socket.as_fd()).map(|peer| peer.pid.as_raw_nonzero().get());
        tracing::warn!(
            client = client.unwrap_or_default(),
            "QEMU and its guest waited for an NBD client that takes nothing: its connection was ended"
        );
        // It fails only where it has ended already. A unix socket that is shut down wakes nobody who waits for room in it: there
        // has to be some, though it is used for nothing any more. Only who has CAP_NET_ADMIN can give so much.
        let _ = rustix::net::shutdown(socket, Shutdown::Both);
        let _ = sockopt::set_socket_send_buffer_size_force(socket, ROOM);
    }
}
