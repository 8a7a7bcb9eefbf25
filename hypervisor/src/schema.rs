//! What this QEMU can do, as its own schema says (`query-qmp-schema`), never as its version suggests.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use disksnap_core::{Command, Error, ErrorKind, Host, Result};
use serde::Deserialize;
use serde_json::Value;

/// The commands, events and types of one QEMU.
///
/// Reading it takes a few milliseconds, so hold it for the length of a call. The session asks QEMU once per
/// connection and answers `query-qmp-schema` from memory after that.
#[derive(Debug, Clone, Default)]
pub struct Schema {
    entries: HashMap<String, Entry>,
}

/// What is kept of a `SchemaInfo` (QEMU's qapi/introspect.json).
#[derive(Debug, Clone)]
enum Entry {
    Command {
        arguments: String,
    },
    Event {
        data: String,
    },
    Object {
        members: HashMap<String, String>,
        variants: HashMap<String, String>,
    },
    Enum {
        values: HashSet<String>,
    },
    Array {
        element: String,
    },
    Alternate {
        members: Vec<String>,
    },
    Other,
}

impl Schema {
    /// Asks the domain's hypervisor.
    ///
    /// # Errors
    /// The monitor's; `Protocol` when the answer is no schema.
    pub async fn of(host: &dyn Host) -> Result<Arc<Self>> {
        let reply = host.monitor(Command::bare("query-qmp-schema")).await?;
        Ok(Arc::new(Self::parse(reply)?))
    }

    /// Reads the answer of `query-qmp-schema`. Kinds of entries that it does not know are passed over.
    ///
    /// # Errors
    /// `Protocol` when it is no list of named entries.
    pub fn parse(reply: Value) -> Result<Self> {
        let infos: Vec<Info> = serde_json::from_value(reply).map_err(|error| {
            Error::new(ErrorKind::Protocol, "the monitor's schema cannot be read")
                .with("command", "query-qmp-schema")
                .because(error)
        })?;
        let entries = infos.into_iter().map(Info::entry).collect();
        Ok(Self { entries })
    }

    /// Whether there is this command.
    #[must_use]
    pub fn has_command(&self, name: &str) -> bool {
        matches!(self.entries.get(name), Some(Entry::Command { .. }))
    }

    /// Whether there is this event.
    #[must_use]
    pub fn has_event(&self, name: &str) -> bool {
        matches!(self.entries.get(name), Some(Entry::Event { .. }))
    }

    /// Whether the command takes this argument: `("blockdev-backup", "discard-source")`.
    #[must_use]
    pub fn command_has_arg(&self, command: &str, argument: &str) -> bool {
        self.has(&format!("{command}/{argument}"))
    }

    /// Whether `blockdev-add` knows this driver.
    #[must_use]
    pub fn has_driver(&self, driver: &str) -> bool {
        self.has(&format!("blockdev-add/driver/^{driver}"))
    }

    /// Whether `blockdev-add` takes this option for this driver: `("copy-before-write", "on-cbw-error")`.
    #[must_use]
    pub fn driver_has_option(&self, driver: &str, option: &str) -> bool {
        self.has(&format!("blockdev-add/+{driver}/{option}"))
    }

    /// Whether a path leads somewhere. It starts with a command or event; each further step is a member
    /// (`name`), the variant of a union (`+name`) or a value of an enum (`^name`). Lists are stepped through.
    ///
    /// `blockdev-add/+copy-before-write/on-cbw-error/^break-snapshot`, `transaction/actions/+blockdev-backup`
    #[must_use]
    pub fn has(&self, path: &str) -> bool {
        self.find(path).is_some()
    }

    /// The values of the enum that a path leads to, in no order; empty where it leads to none.
    #[must_use]
    pub fn enum_values(&self, path: &str) -> Vec<&str> {
        match self.find(path).and_then(|name| self.resolve(name)) {
            Some(Entry::Enum { values }) => values.iter().map(String::as_str).collect(),
            _ => Vec::new(),
        }
    }

    /// The name of the type that the path leads to.
    fn find<'a>(&'a self, path: &'a str) -> Option<&'a str> {
        let mut steps = path.split('/');
        let mut at = match self.entries.get(steps.next()?)? {
            Entry::Command { arguments } => arguments.as_str(),
            Entry::Event { data } => data.as_str(),
            _ => return None,
        };
        for step in steps {
            at = self.step(at, step)?;
        }
        Some(at)
    }

    fn step<'a>(&'a self, from: &str, step: &'a str) -> Option<&'a str> {
        match (self.resolve(from)?, step.split_at_checked(1)) {
            (Entry::Object { variants, .. }, Some(("+", name))) => variants.get(name).map(String::as_str),
            (Entry::Enum { values }, Some(("^", name))) => values.contains(name).then_some(name),
            (Entry::Object { members, .. }, _) => members.get(step).map(String::as_str),
            (Entry::Alternate { members }, _) => members.iter().find_map(|m| self.step(m, step)),
            _ => None,
        }
    }

    /// The entry of a type, seen through lists.
    fn resolve(&self, name: &str) -> Option<&Entry> {
        let mut entry = self.entries.get(name)?;
        // A list of lists of lists is deeper than any schema goes; a circle must not trap us.
        for _ in 0..8 {
            match entry {
                Entry::Array { element } => entry = self.entries.get(element)?,
                _ => return Some(entry),
            }
        }
        None
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    name: String,
    meta_type: String,
    #[serde(default)]
    arg_type: String,
    #[serde(default)]
    element_type: String,
    #[serde(default)]
    members: Vec<Member>,
    #[serde(default)]
    variants: Vec<Variant>,
    #[serde(default)]
    values: Vec<String>,
}

#[derive(Deserialize)]
struct Member {
    #[serde(default)]
    name: String,
    #[serde(default)]
    r#type: String,
}

#[derive(Deserialize)]
struct Variant {
    case: String,
    r#type: String,
}

impl Info {
    fn entry(self) -> (String, Entry) {
        let entry = match self.meta_type.as_str() {
            "command" => Entry::Command {
                arguments: self.arg_type,
            },
            "event" => Entry::Event { data: self.arg_type },
            "object" => Entry::Object {
                members: self.members.into_iter().map(|m| (m.name, m.r#type)).collect(),
                variants: self.variants.into_iter().map(|v| (v.case, v.r#type)).collect(),
            },
            "enum" => Entry::Enum {
                values: self.values.into_iter().collect(),
            },
            "array" => Entry::Array {
                element: self.element_type,
            },
            "alternate" => Entry::Alternate {
                members: self.members.into_iter().map(|m| m.r#type).collect(),
            },
            _ => Entry::Other,
        };
        (self.name, entry)
    }
}
