//! Instants as text: RFC 3339 in UTC, with as much of a fraction as there is.

use std::time::{SystemTime, UNIX_EPOCH};

use disksnap_core::{Checkpoint, Error, ErrorKind, Result};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::{Deserialize, Deserializer, Serializer, de, ser};

const EXPECTED: &str = "expected a date and time, such as 2026-11-22T04:30:00.25Z";

/// The instant, in the text's own offset; in UTC where it names none, as a database's `TIMESTAMP` does not.
fn parse(text: &str) -> std::result::Result<SystemTime, String> {
    let wrong = || format!("{text:?} is no instant: {EXPECTED}");
    let instant = match text.parse::<Timestamp>() {
        Ok(instant) => instant,
        Err(_) => text
            .parse::<DateTime>()
            // A mere date is no instant.
            .ok()
            .filter(|_| text.contains(':'))
            .and_then(|civil| civil.to_zoned(TimeZone::UTC).ok())
            .ok_or_else(wrong)?
            .timestamp(),
    };
    let instant = SystemTime::from(instant);
    if instant < UNIX_EPOCH {
        return Err(format!("{text:?} is before 1970: {EXPECTED}"));
    }
    Ok(instant)
}

/// Refuses a time that has no such text: one after the year 9999.
pub(crate) fn check(checkpoint: &Checkpoint) -> Result<()> {
    match Timestamp::try_from(checkpoint.created) {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the checkpoint '{}' is of a time that has no date",
                checkpoint.name
            ),
        )
        .with("checkpoint", &checkpoint.name)),
    }
}

pub(crate) fn serialize<S: Serializer>(time: &SystemTime, to: S) -> std::result::Result<S::Ok, S::Error> {
    let instant = Timestamp::try_from(*time).map_err(ser::Error::custom)?;
    to.collect_str(&instant)
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<SystemTime, D::Error> {
    let text = String::deserialize(from)?;
    parse(&text).map_err(de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn instants_come_as_programs_and_databases_write_them() {
        let at = |seconds, nanos| Ok(UNIX_EPOCH + Duration::new(seconds, nanos));
        for (text, instant) in [
            ("2019-03-12T21:35:23Z", at(1_552_426_523, 0)),
            (
                "2019-03-12T22:35:23.123456789+01:00",
                at(1_552_426_523, 123_456_789),
            ),
            ("2019-03-12 21:35:23.12+00", at(1_552_426_523, 120_000_000)),
            ("2019-03-12 21:35:23.12", at(1_552_426_523, 120_000_000)),
            ("1970-01-01T00:00:00Z", at(0, 0)),
        ] {
            assert_eq!(parse(text), instant, "{text}");
        }
        for text in [
            "",
            "2019-03-12",
            "yesterday",
            "1969-12-31T23:59:59Z",
            "1552426523",
            "2019-02-30T00:00:00Z",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
