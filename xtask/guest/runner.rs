//! Runs in the guest that has LVM, as its first process: carries out what a test says over a port.
//!
//! Each message is a letter, the length of its body (u32, little endian) and the body. The test sends
//! `F` (a path, a zero byte, the contents of a file, which it appends to; an empty one begins it anew) or
//! `R` (`NAME=VALUE` of the environment, an empty one, the program and its arguments, each ended by a zero
//! byte). The guest answers with `O` and `E`, pieces of standard output and standard error, then `X`, the
//! exit status (i32). It begins with an `H`.

#![allow(clippy::print_stdout, reason = "the serial console is its only output")]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

type Port = Arc<Mutex<File>>;

fn main() -> io::Result<()> {
    let path = std::env::args().nth(1).unwrap_or_default();
    let mut from = OpenOptions::new().read(true).write(true).open(path)?;
    let port: Port = Arc::new(Mutex::new(from.try_clone()?));
    send(&port, b'H', &[]);
    loop {
        let mut head = [0; 5];
        receive(&mut from, &mut head);
        let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]);
        let mut body = vec![0; usize::try_from(length).unwrap_or(0)];
        receive(&mut from, &mut body);
        let done = match head[0] {
            b'F' => put(&body).map(|()| 0),
            b'R' => run(&body, &port),
            _ => Err(io::Error::other("not a message")),
        };
        let status = done.unwrap_or_else(|error| {
            send(&port, b'E', format!("the guest: {error}\n").as_bytes());
            127
        });
        send(&port, b'X', &status.to_le_bytes());
    }
}

fn send(port: &Port, letter: u8, body: &[u8]) {
    let mut message = vec![letter];
    message.extend(u32::try_from(body.len()).unwrap_or(0).to_le_bytes());
    message.extend(body);
    let mut port = port.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(error) = port.write_all(&message) {
        println!("GUEST FAILED: the test does not listen: {error}");
    }
}

/// Nothing to read means that the other side is not there yet.
fn receive(port: &mut File, bytes: &mut [u8]) {
    let mut filled = 0;
    while filled < bytes.len() {
        match port.read(&mut bytes[filled..]) {
            Ok(n) if n > 0 => filled += n,
            _ => thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn put(body: &[u8]) -> io::Result<()> {
    let mut parts = body.splitn(2, |byte| *byte == 0);
    let path = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
    let data = parts.next().unwrap_or_default();
    let mut options = OpenOptions::new();
    options
        .create(true)
        .write(true)
        .append(!data.is_empty())
        .truncate(data.is_empty());
    options.open(&path)?.write_all(data)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
}

fn run(body: &[u8], port: &Port) -> io::Result<i32> {
    let words: Vec<String> = body
        .split(|byte| *byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    let end = words.iter().position(String::is_empty).unwrap_or(0);
    let (variables, rest) = words.split_at(end);
    let [_, program, arguments @ .., _] = rest else {
        return Err(io::Error::other("no program"));
    };
    let variables = variables.iter().filter_map(|text| text.split_once('='));
    let mut child = Command::new(program)
        .args(arguments)
        .envs(variables)
        .current_dir("/tmp")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let pumps = [
        child.stdout.take().map(|from| pump(from, b'O', port)),
        child.stderr.take().map(|from| pump(from, b'E', port)),
    ];
    let status = child.wait()?;
    for pump in pumps.into_iter().flatten() {
        // It ends when the last process that has the pipe does.
        let _ = pump.join();
    }
    Ok(status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

fn pump(mut from: impl Read + Send + 'static, letter: u8, port: &Port) -> JoinHandle<()> {
    let port = Arc::clone(port);
    thread::spawn(move || {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(n) = from.read(&mut bytes) {
            if n == 0 {
                break;
            }
            send(&port, letter, &bytes[..n]);
        }
    })
}
