//! Values on the command line: sizes, seconds, names, disks.

use std::time::Duration;

use disksnap::{CheckpointName, DiskChoice, Error, MethodChoice, NewCheckpoint, Options, SnapshotName};
use uuid::Uuid;

/// The longest deadline that makes sense, in seconds.
const LONGEST: f64 = 3600.0;

/// A number of bytes, with K, M, G or T (also `KiB`, …) for the powers of 1024.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, suffix) = text.split_at(end);
    let power = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 1,
        "m" | "mib" => 2,
        "g" | "gib" => 3,
        "t" | "tib" => 4,
        _ => return Err("expected bytes, such as 4096, 64K, 10M or 2G".to_owned()),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "expected bytes, such as 4096, 64K, 10M or 2G".to_owned())?;
    number
        .checked_mul(1 << (10 * power))
        .ok_or_else(|| "more bytes than any disk has".to_owned())
}

pub(crate) fn parse_seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= LONGEST => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(format!("expected seconds, more than 0 and at most {LONGEST}")),
    }
}

pub(crate) fn parse_name(text: &str) -> Result<SnapshotName, String> {
    text.parse().map_err(|error: Error| match error.next_step() {
        Some(hint) => format!("{}. {hint}", error.message()),
        None => error.message().to_owned(),
    })
}

/// The name of a checkpoint.
pub(crate) fn parse_checkpoint(text: &str) -> Result<CheckpointName, String> {
    text.parse().map_err(|error: Error| match error.next_step() {
        Some(hint) => format!("{}. {hint}", error.message()),
        None => error.message().to_owned(),
    })
}

/// The same, where nothing means the snapshot's name.
pub(crate) fn parse_new_checkpoint(text: &str) -> Result<NewCheckpoint, String> {
    if text.is_empty() {
        return Ok(NewCheckpoint::AsSnapshot);
    }
    parse_checkpoint(text).map(NewCheckpoint::Named)
}

/// `KEY=VALUE`.
pub(crate) fn parse_option(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".to_owned()),
    }
}

/// `TARGET=UUID`.
pub(crate) fn parse_disk_id(text: &str) -> Result<(String, Uuid), String> {
    let pair = text.split_once('=').filter(|(target, _)| !target.is_empty());
    let pair = pair.and_then(|(target, id)| Some((target.to_owned(), id.parse().ok()?)));
    pair.ok_or_else(|| "expected TARGET=UUID, such as vda=5768a388-c1c4-414c-ac4e-eab216ba7c0c".to_owned())
}

/// `TARGET[,method=METHOD][,KEY=VALUE]…`, in which a comma in a value is written twice.
pub(crate) fn parse_disk(text: &str) -> Result<DiskChoice, String> {
    let mut parts = split_at_commas(text).into_iter();
    let target = parts.next().unwrap_or_default();
    if target.is_empty() || target.contains('=') {
        return Err("expected the disk's target first, such as vda or vda,method=memory".to_owned());
    }
    let (mut method, mut options) = (None, Options::default());
    for part in parts {
        match part.split_once('=') {
            Some(("method", name)) if method.is_none() => method = Some(name.to_owned()),
            Some(("method", _)) => return Err("the method is given twice".to_owned()),
            Some((key, value)) if !key.is_empty() => options.push(key, value),
            _ => {
                return Err(format!(
                    "expected KEY=VALUE instead of {part:?}; a comma in a value is written twice"
                ));
            }
        }
    }
    let mut choice = DiskChoice::new(target);
    match method {
        Some(method) => choice.method = Some(MethodChoice { method, options }),
        None => choice.options = options,
    }
    Ok(choice)
}

fn split_at_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, parts.last_mut()) {
            (',', _) if chars.peek() != Some(&',') => parts.push(String::new()),
            (_, Some(part)) => {
                part.push(c);
                if c == ',' {
                    chars.next();
                }
            }
            (_, None) => {}
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64K", 65536),
            ("3m", 3 << 20),
            ("2GiB", 2 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "K",
            "-1",
            "1.5G",
            "1 K",
            "1X",
            "99999999999T",
            "0x10",
            "18446744073709551616",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn seconds() {
        assert_eq!(parse_seconds("2.5"), Ok(Duration::from_millis(2500)));
        for text in ["0", "-1", "nan", "inf", "4000", "x", ""] {
            assert!(parse_seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn disks() {
        let disk = parse_disk("vda").unwrap();
        assert_eq!(disk, DiskChoice::new("vda"));
        let disk = parse_disk("vda,method=memory,copy.dir=/a,,b=c,,,x=").unwrap();
        let method = disk.method.unwrap();
        assert_eq!(method.method, "memory");
        let options: Vec<_> = method.options.iter().collect();
        assert_eq!(options, [("copy.dir", "/a,b=c,"), ("x", "")]);
        let disk = parse_disk("vda,fleece.file=/f").unwrap();
        assert_eq!(disk.options.get("fleece.file"), Some("/f"));
        for text in ["", "method=x", "vda,", "vda,x", "vda,=1", "vda,method=a,method=b"] {
            assert!(parse_disk(text).is_err(), "{text}");
        }
    }
}
