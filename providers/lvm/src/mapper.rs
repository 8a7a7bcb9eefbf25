//! Thin volumes and their pools as device-mapper has them, by `dmsetup` (dmsetup(8), the kernel's
//! `admin-guide/device-mapper/thin-provisioning.rst`).

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use disksnap_core::{Error, ErrorKind, Result};

use crate::program::{self, Known, apart};

const PROGRAM: Known = Known {
    name: "dmsetup",
    package: "dmsetup",
    install: "dmsetup (Debian) or device-mapper (Fedora)",
    elsewhere: "DISKSNAP_DMSETUP",
};

/// Where the kernel shows all block devices (its `Documentation/ABI/stable/sysfs-block`).
const DEVICES: &str = "/sys/class/block";
/// Device-mapper counts in these.
const SECTOR: u64 = 512;

/// A `dmsetup` at hand.
#[derive(Debug, Clone)]
pub(crate) struct Dmsetup {
    program: PathBuf,
}

/// What an active thin volume is to its pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Thin {
    /// The number of the pool's device, `MAJOR:MINOR`.
    pub(crate) pool: String,
    /// Its own number in the pool's metadata.
    pub(crate) id: u64,
    /// The size in bytes.
    pub(crate) size: u64,
    /// What is read where nothing is mapped, if not zeros: another device's number.
    external: Option<String>,
}

impl Thin {
    /// Whether both read the same where neither has anything mapped.
    pub(crate) fn reads_alike(&self, other: &Self) -> bool {
        self.external == other.external
    }
}

/// An active thin pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pool {
    /// The device that takes messages: `VG-POOL-tpool`.
    pub(crate) name: String,
    /// The same, by an id that no other device ever has.
    pub(crate) id: String,
    /// The device with its metadata: `VG-POOL_tmeta`.
    metadata: String,
    /// The size in bytes of what is mapped as one.
    pub(crate) chunk: u64,
}

impl Pool {
    /// The device with its metadata.
    pub(crate) fn metadata(&self) -> PathBuf {
        Path::new("/dev/mapper").join(&self.metadata)
    }
}

impl Dmsetup {
    /// Finds it.
    ///
    /// # Errors
    /// `Unavailable` where there is none.
    pub(crate) fn find() -> Result<Self> {
        PROGRAM.find().map(|program| Self { program })
    }

    /// The thin volume with this id (group's and volume's, 64 letters), `None` where it is not active.
    pub(crate) fn thin(&self, id: &str) -> Result<Option<Thin>> {
        let uuid = format!("LVM-{id}");
        let table = match self.run(&["table", "--uuid", &uuid], None) {
            Err(error) if error.message().contains("No such device") => return Ok(None),
            other => other?,
        };
        thin(&table)
            .map(Some)
            .ok_or_else(|| unlike("thin", &uuid, &table))
    }

    /// The pool whose device has this number.
    pub(crate) fn pool(&self, number: &str) -> Result<Pool> {
        let name = told_by_kernel(number, "name")?;
        let table = self.run(&["table", &name], None)?;
        let (metadata, sectors) = pool(&table).ok_or_else(|| unlike("thin-pool", &name, &table))?;
        Ok(Pool {
            id: told_by_kernel(number, "uuid")?,
            metadata: told_by_kernel(metadata, "name")?,
            chunk: sectors * SECTOR,
            name,
        })
    }

    /// The pool with this id, `None` where it is not active.
    pub(crate) fn pool_with_id(&self, id: &str) -> Result<Option<Pool>> {
        let failed = |e| Error::io(format!("cannot read {DEVICES}"), e);
        for device in fs::read_dir(DEVICES).map_err(failed)? {
            let device = device.map_err(failed)?.path();
            // Most are no devices of device-mapper, and any may go meanwhile.
            let told = |file: &str| fs::read_to_string(device.join(file));
            if told("dm/uuid").is_ok_and(|uuid| uuid.trim() == id) {
                let number = told("dev").map_err(failed)?;
                return self.pool(number.trim()).map(Some);
            }
        }
        Ok(None)
    }

    /// The block of the metadata in which a metadata snapshot begins, `None` where none is reserved.
    ///
    /// # Errors
    /// `Broken` when the pool has failed.
    pub(crate) fn held_root(&self, pool: &Pool) -> Result<Option<u64>> {
        let status = self.run(&["status", &pool.name], None)?;
        held_root(&status).map_err(|word| {
            let what = format!(
                "the thin pool {} does not tell of its metadata: its status is {word:?}",
                pool.name
            );
            Error::new(ErrorKind::Broken, what).hint("See what is wrong with it by `lvs -a` and `dmesg`.")
        })
    }

    /// How many have the device with the metadata open. The pool is one of them.
    pub(crate) fn readers(&self, pool: &Pool) -> Result<u64> {
        let asked = ["info", "-c", "--noheadings", "-o", "open", &pool.metadata];
        let told = self.run(&asked, None)?;
        let number = told.trim().parse();
        number.map_err(|_| unlike("open count", &pool.metadata, &told))
    }

    /// Sends the pool a message. `held` is open in the program for as long as it lives.
    pub(crate) fn message(&self, pool: &Pool, message: &str, held: &File) -> Result<()> {
        let held = held.try_clone().map_err(|e| Error::io("cannot hold a file", e))?;
        self.run(&["message", &pool.name, "0", message], Some(held))
            .map(drop)
    }

    fn run(&self, arguments: &[&str], held: Option<File>) -> Result<String> {
        let expression = duct::cmd(&self.program, arguments);
        let expression = match held {
            Some(file) => expression.stdin_file(file),
            None => expression.stdin_null(),
        };
        let expression = apart(&expression)
            // Its messages are told apart by their English words.
            .env("LC_ALL", "C")
            .stdout_capture()
            .stderr_capture();
        let message = arguments.last().filter(|_| arguments.first() == Some(&"message"));
        let effect = message.map(|message| format!("dmsetup {message}"));
        let output = program::run(&expression, effect.as_deref())
            .map_err(|e| Error::io(format!("cannot run {}", self.program.display()), e))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said: Vec<&str> = said.lines().map(str::trim).collect();
        let said = said.join("; ");
        let what = format!("dmsetup {} failed: {said}", arguments.join(" "));
        if ["Permission denied", "not permitted", "/dev/mapper/control"]
            .iter()
            .any(|word| said.contains(word))
        {
            return Err(Error::new(ErrorKind::Denied, what).hint("Run disksnap as root: dmsetup needs it."));
        }
        Err(Error::new(ErrorKind::Refused, what))
    }
}

/// `name` or `uuid` of the device with this number.
fn told_by_kernel(number: &str, of: &str) -> Result<String> {
    let file = format!("/sys/dev/block/{number}/dm/{of}");
    let told = fs::read_to_string(&file).map_err(|e| Error::io(format!("cannot read {file}"), e))?;
    Ok(told.trim().to_owned())
}

fn unlike(what: &str, name: &str, told: &str) -> Error {
    Error::new(
        ErrorKind::Protocol,
        format!("dmsetup tells of {name} what is no {what}: {told:?}"),
    )
}

/// The words of a table with one line, after its target's.
fn targets<'a>(table: &'a str, target: &str) -> Option<(u64, Vec<&'a str>)> {
    let mut lines = table.lines();
    let words: Vec<&str> = lines.next()?.split_whitespace().collect();
    let ["0", sectors, of, rest @ ..] = words.as_slice() else {
        return None;
    };
    let one = *of == target && lines.next().is_none();
    one.then_some((sectors.parse().ok()?, rest.to_vec()))
}

/// `0 4224 thin 253:2 2`, and an external origin where there is one.
fn thin(table: &str) -> Option<Thin> {
    let (sectors, words) = targets(table, "thin")?;
    let (pool, id, external) = match words.as_slice() {
        [pool, id] => (pool, id, None),
        [pool, id, external] => (pool, id, Some((*external).to_owned())),
        _ => return None,
    };
    Some(Thin {
        pool: (*pool).to_owned(),
        id: id.parse().ok()?,
        size: sectors.checked_mul(SECTOR)?,
        external,
    })
}

/// `0 131072 thin-pool 253:0 253:1 256 0 1 skip_block_zeroing`: the device with the metadata, and the sectors of a chunk.
fn pool(table: &str) -> Option<(&str, u64)> {
    let (_, words) = targets(table, "thin-pool")?;
    let [metadata, _, sectors, ..] = words.as_slice() else {
        return None;
    };
    // The kernel's own limits: 64 KiB to 1 GiB.
    let sectors = sectors
        .parse()
        .ok()
        .filter(|sectors| (128..=1 << 21).contains(sectors))?;
    Some((metadata, sectors))
}

/// `0 131072 thin-pool 4 64/512 14/512 56 rw …`, where a dash stands for no held root. One that has failed has a word instead.
fn held_root(status: &str) -> std::result::Result<Option<u64>, String> {
    let (_, words) = targets(status, "thin-pool").ok_or(status)?;
    match words.get(3) {
        Some(&"-") => Ok(None),
        Some(root) => root.parse().map(Some).map_err(|_| status.to_owned()),
        None => Err(words.join(" ")),
    }
}

/// Reads a line as each of those that the device mapper prints; for fuzzing.
pub(crate) fn parse_each(line: &str) {
    let _ = (thin(line), pool(line), held_root(line));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

    use super::*;

    #[test]
    fn thin_volumes_are_read() {
        let volume = thin("0 4224 thin 253:2 2").unwrap();
        assert_eq!(
            (volume.pool.as_str(), volume.id, volume.size),
            ("253:2", 2, 4224 * 512)
        );
        let external = thin("0 4224 thin 253:2 3 253:9").unwrap();
        assert!(volume.reads_alike(&volume) && !volume.reads_alike(&external));
        for bad in [
            "",
            "0 4224 linear 253:2 2",
            "0 4224 thin 253:2",
            "0 4224 thin 253:2 -1",
            "0 8 thin 253:2 2\n8 8 thin 253:2 3",
            "0 36028797018963968 thin 253:2 2",
        ] {
            assert_eq!(thin(bad), None, "{bad}");
        }
    }

    #[test]
    fn pools_are_read() {
        let table = "0 131072 thin-pool 253:0 253:1 256 0 1 skip_block_zeroing";
        assert_eq!(pool(table), Some(("253:0", 256)));
        assert_eq!(pool("0 131072 thin-pool 253:0 253:1 0 0"), None);
        let status = "0 131072 thin-pool 4 64/512 14/512 56 rw discard_passdown queue_if_no_space - 128";
        assert_eq!(held_root(status), Ok(Some(56)));
        assert_eq!(held_root(&status.replace(" 56 ", " - ")), Ok(None));
        assert_eq!(
            held_root(&status.replace(" 56 ", " x ")),
            Err(status.replace(" 56 ", " x "))
        );
        for word in ["Fail", "Error"] {
            assert_eq!(
                held_root(&format!("0 131072 thin-pool {word}")),
                Err(word.to_owned())
            );
        }
    }
}
