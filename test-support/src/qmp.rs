//! A tiny blocking QMP client, for the tests' own second monitor. The product has its own.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::process::PATIENCE;

/// A connection to a QMP or guest agent socket.
#[derive(Debug)]
pub struct Monitor {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Monitor {
    /// Connects to a QMP socket, reads the greeting and enters command mode.
    ///
    /// Waits for the socket to appear as long as `alive` holds; panics with its message otherwise.
    pub fn connect(path: &Path, alive: impl Fn() -> Result<(), String>) -> Self {
        let mut monitor = Self::open(path, alive);
        let greeting = monitor.read_line();
        assert!(greeting.get("QMP").is_some(), "not a QMP greeting: {greeting}");
        monitor.execute("qmp_capabilities", json!({}));
        monitor
    }

    /// Connects to a guest agent's socket and waits until the agent answers `guest-ping`.
    ///
    /// Gives up after some minutes with the agent's last answer.
    pub fn connect_agent(path: &Path, alive: impl Fn() -> Result<(), String>) -> Self {
        let begun = Instant::now();
        let mut agent = Self::open(path, &alive);
        let timeout = |x| agent_timeout(&agent.stream, x);
        timeout(Duration::from_millis(500));
        loop {
            match agent.try_execute("guest-ping", &json!({})) {
                Ok(Ok(_)) => break,
                answer => {
                    assert!(
                        begun.elapsed() < PATIENCE,
                        "the guest agent is silent: {answer:?}"
                    );
                    alive().unwrap_or_else(|why| panic!("{why}"));
                }
            }
        }
        // An earlier ping may still be answered: take a numbered answer as the line to begin from.
        agent_timeout(&agent.stream, PATIENCE);
        let id = 0x5eed;
        agent.send(&json!({"execute": "guest-sync", "arguments": {"id": id}}));
        while agent.read_line().get("return") != Some(&json!(id)) {}
        agent
    }

    fn open(path: &Path, alive: impl Fn() -> Result<(), String>) -> Self {
        let begun = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => {
                    alive().unwrap_or_else(|why| panic!("{why}"));
                    let waited = begun.elapsed();
                    assert!(waited < PATIENCE, "no socket {}: {error}", path.display());
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        };
        agent_timeout(
            &BufReader::new(stream.try_clone().expect("a socket clones")),
            PATIENCE,
        );
        Self {
            stream: BufReader::new(stream),
            events: Vec::new(),
        }
    }

    /// Runs a command and returns its `return` value; panics with QEMU's error.
    #[expect(clippy::needless_pass_by_value, reason = "callers write json!({…}) in place")]
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let shown = arguments.to_string();
        match self.try_execute(command, &arguments) {
            Ok(Ok(value)) => value,
            Ok(Err(error)) => panic!("{command} {shown}: {error}"),
            Err(error) => panic!("{command} {shown}: no answer: {error}"),
        }
    }

    /// Runs a command: the outer error is the connection's, the inner one QEMU's `error` object.
    pub fn try_execute(&mut self, command: &str, arguments: &Value) -> std::io::Result<Result<Value, Value>> {
        self.try_send(&json!({"execute": command, "arguments": arguments}))?;
        loop {
            let mut line = self.try_read_line()?;
            if line.get("event").is_some() {
                self.events.push(line);
            } else if let Some(error) = line.get_mut("error") {
                return Ok(Err(error.take()));
            } else if let Some(value) = line.get_mut("return") {
                return Ok(Ok(value.take()));
            }
        }
    }

    /// Whether the other end has closed the connection.
    pub(crate) fn is_closed(&mut self) -> bool {
        use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        let asked = self.try_execute("query-version", &json!({}));
        asked.is_err_and(|e| matches!(e.kind(), BrokenPipe | ConnectionReset | UnexpectedEof))
    }

    /// Takes the first event of that name, waiting for it; events of other names are kept.
    pub fn wait_event(&mut self, name: &str) -> Value {
        loop {
            if let Some(at) = self.events.iter().position(|x| x["event"] == name) {
                return self.events.remove(at);
            }
            let line = self.read_line();
            self.events.push(line);
        }
    }

    /// The names of the events seen so far and not taken, in order.
    #[must_use]
    pub fn events(&self) -> Vec<String> {
        let name = |x: &Value| x["event"].as_str().unwrap_or_default().to_owned();
        self.events.iter().map(name).collect()
    }

    fn send(&mut self, value: &Value) {
        self.try_send(value)
            .unwrap_or_else(|error| panic!("cannot send {value}: {error}"));
    }

    fn try_send(&mut self, value: &Value) -> std::io::Result<()> {
        self.stream.get_mut().write_all(format!("{value}\n").as_bytes())
    }

    fn read_line(&mut self) -> Value {
        self.try_read_line()
            .unwrap_or_else(|error| panic!("the monitor does not answer: {error}"))
    }

    fn try_read_line(&mut self) -> std::io::Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        serde_json::from_str(&line).map_err(std::io::Error::other)
    }
}

fn agent_timeout(stream: &BufReader<UnixStream>, timeout: Duration) {
    stream
        .get_ref()
        .set_read_timeout(Some(timeout))
        .expect("a socket takes a timeout");
}
