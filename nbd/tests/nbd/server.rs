//! Real NBD servers for the tests, each in a directory of its own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use disksnap_nbd::{BASE_ALLOCATION, Client, ConnectOptions, Uri};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A directory for images and sockets. Its path is short: a socket's path may have 107 bytes.
pub(crate) fn directory() -> TempDir {
    tempfile::Builder::new()
        .prefix("nbd-")
        .tempdir_in("/tmp")
        .unwrap()
}

/// A program by its variable (`DISKSNAP_QEMU_NBD`), or its name on the path.
fn program(name: &str) -> Command {
    let variable = format!("DISKSNAP_{}", name.to_uppercase().replace('-', "_"));
    Command::new(std::env::var_os(variable).unwrap_or_else(|| name.into()))
}

/// Runs a program to its end; its standard output.
pub(crate) fn run(name: &str, arguments: &[&str]) -> String {
    let output = program(name)
        .args(arguments)
        .output()
        .unwrap_or_else(|e| panic!("{name}: {e}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn image(directory: &Path, name: &str, format: &str, size: u64) -> PathBuf {
    let path = directory.join(name);
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            format,
            path.to_str().unwrap(),
            &size.to_string(),
        ],
    );
    path
}

/// Repeatable bytes that look random, different for every seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A server process, stopped with the value.
pub(crate) struct Server {
    child: Child,
    pub(crate) uri: Uri,
    _directory: TempDir,
}

impl Server {
    /// qemu-nbd on a unix socket, serving many clients. The last argument is the image.
    pub(crate) fn qemu_nbd(arguments: &[&str]) -> Self {
        let directory = directory();
        let socket = directory.path().join("s");
        let uri = Uri::unix(&socket, "");
        let mut command = program("qemu-nbd");
        command.args(["--persistent", "--shared=8", "--socket", socket.to_str().unwrap()]);
        let pid_file = directory.path().join("pid");
        command
            .args(["--pid-file", pid_file.to_str().unwrap()])
            .args(arguments);
        Self::start(command, &pid_file, directory, uri).unwrap()
    }

    /// qemu-nbd on a TCP port of the loopback interface.
    pub(crate) fn qemu_nbd_tcp(arguments: &[&str]) -> Self {
        // The port may be taken by someone else between our asking and qemu-nbd's: then once more.
        for _ in 0..10 {
            let probe = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let port = probe.local_addr().unwrap().port();
            drop(probe);
            let directory = directory();
            let pid_file = directory.path().join("pid");
            let mut command = program("qemu-nbd");
            command.args(["--persistent", "--bind", "127.0.0.1", "--port", &port.to_string()]);
            command
                .args(["--pid-file", pid_file.to_str().unwrap()])
                .args(arguments);
            let uri = Uri::tcp("127.0.0.1", port, "");
            match Self::start(command, &pid_file, directory, uri) {
                Ok(server) => return server,
                Err(error) if error.contains("in use") => {}
                Err(error) => panic!("{error}"),
            }
        }
        panic!("no port for qemu-nbd");
    }

    /// qemu-storage-daemon with these block devices, exporting the node `disk` as `vda` and whatever
    /// else the arguments say.
    pub(crate) fn storage_daemon(blockdevs: &[&str], export: &str) -> Self {
        let directory = directory();
        let socket = directory.path().join("s");
        let uri = Uri::unix(&socket, "vda");
        let pid_file = directory.path().join("pid");
        let mut command = program("qemu-storage-daemon");
        for blockdev in blockdevs {
            command.args(["--blockdev", blockdev]);
        }
        command.args([
            "--nbd-server",
            &format!("addr.type=unix,addr.path={}", socket.display()),
        ]);
        command.args([
            "--export",
            &format!("type=nbd,id=e,node-name=disk,name=vda,{export}"),
        ]);
        command.args(["--pidfile", pid_file.to_str().unwrap()]);
        Self::start(command, &pid_file, directory, uri).unwrap()
    }

    /// Waits for the file that the server writes when it is ready.
    fn start(mut command: Command, pid_file: &Path, directory: TempDir, uri: Uri) -> Result<Self, String> {
        let log = directory.path().join("log");
        let output = std::fs::File::create(&log).unwrap();
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output);
        let child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let mut server = Self {
            child,
            uri,
            _directory: directory,
        };
        for _ in 0..1000 {
            if std::fs::read(pid_file).is_ok_and(|pid| pid.ends_with(b"\n")) {
                return Ok(server);
            }
            let gone = server.child.try_wait().unwrap().is_some();
            if gone {
                return Err(std::fs::read_to_string(&log).unwrap());
            }
            sleep(Duration::from_millis(20));
        }
        panic!("not ready: {command:?}")
    }

    /// Stops it in order: only so are the image's bitmaps written back.
    pub(crate) fn stop(mut self) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::TERM).unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) async fn connect(&self) -> Client {
        Client::connect(&self.uri, &ConnectOptions::default())
            .await
            .unwrap()
    }

    /// A connection with these metadata contexts and `base:allocation`.
    pub(crate) async fn connect_with(&self, contexts: &[&str]) -> Client {
        Client::connect(&self.uri, &with_contexts(contexts))
            .await
            .unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn with_contexts(contexts: &[&str]) -> ConnectOptions {
    let mut meta_contexts = vec![BASE_ALLOCATION.to_owned()];
    meta_contexts.extend(contexts.iter().map(|context| (*context).to_owned()));
    ConnectOptions {
        meta_contexts,
        ..ConnectOptions::default()
    }
}
