//! Names of files and folders in a repository.

use std::fmt::Write;

/// A name as one part of a key: letters, digits and `._-` stay, all else is percent-encoded, and so is a `.` at the beginning.
pub(crate) fn encoded(name: &str) -> String {
    let mut out = String::new();
    for byte in name.bytes() {
        let plain =
            byte.is_ascii_alphanumeric() || b"_-".contains(&byte) || (byte == b'.' && !out.is_empty());
        if plain {
            out.push(byte.into());
        } else {
            // A string takes whatever is written to it.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_leads_elsewhere() {
        assert_eq!(encoded("web1"), "web1");
        assert_eq!(encoded(".."), "%2E.");
        assert_eq!(encoded("a/b c%"), "a%2Fb%20c%25");
        assert_eq!(encoded("ä.b"), "%C3%A4.b");
    }
}
