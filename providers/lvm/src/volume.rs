//! Logical volumes as lvm2 reports them (`lvs --reportformat json`, lvs(8), lvmreport(7)).

use disksnap_core::{Error, ErrorKind, Result};
use serde::Deserialize;
use serde_json::{Map, Value};

/// What is asked of every volume. None of them is of a segment, so that each volume is one line.
pub(crate) const FIELDS: [&str; 20] = [
    "vg_name",
    "vg_uuid",
    "vg_extent_size",
    "vg_free",
    "lv_name",
    "lv_uuid",
    "lv_attr",
    "lv_size",
    "lv_path",
    "lv_active",
    "lv_tags",
    "lv_snapshot_invalid",
    "lv_merging",
    "lv_merge_failed",
    "lv_device_open",
    "lv_health_status",
    "origin",
    "pool_lv",
    "data_percent",
    "metadata_percent",
];

/// One logical volume. Sizes are bytes.
#[derive(Debug, Clone, PartialEq, Default)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "they are lvm2's own fields, each by itself"
)]
pub(crate) struct Volume {
    pub(crate) group: String,
    /// Without dashes, as device-mapper has it.
    pub(crate) group_uuid: String,
    pub(crate) extent: u64,
    pub(crate) free: u64,
    /// Without the brackets that lvm2 puts around the name of a hidden one.
    pub(crate) name: String,
    /// Without dashes, as device-mapper has it.
    pub(crate) uuid: String,
    /// `lv_attr`: ten letters.
    pub(crate) attributes: String,
    pub(crate) size: u64,
    pub(crate) path: String,
    pub(crate) active: bool,
    pub(crate) tags: Vec<String>,
    /// An overflowed classic snapshot.
    pub(crate) invalid: bool,
    /// A snapshot that is being merged, or an origin that is being merged into.
    pub(crate) merging: bool,
    pub(crate) merge_failed: bool,
    pub(crate) open: bool,
    /// `lv_health_status`: empty when all is well.
    pub(crate) health: String,
    pub(crate) origin: String,
    pub(crate) pool: String,
    pub(crate) data_percent: Option<f64>,
    pub(crate) metadata_percent: Option<f64>,
}

impl Volume {
    /// `vg/lv`, as lvm2's commands take it.
    pub(crate) fn full_name(&self) -> String {
        format!("{}/{}", self.group, self.name)
    }

    /// What kind of volume it is: the first letter of `lv_attr`.
    pub(crate) fn kind(&self) -> char {
        self.attributes.chars().next().unwrap_or('-')
    }

    /// The letter of its target, the seventh of `lv_attr`.
    fn target(&self) -> char {
        self.attributes.chars().nth(6).unwrap_or('-')
    }

    /// A volume of a thin pool, not the pool itself.
    pub(crate) fn is_thin(&self) -> bool {
        self.target() == 't' && !self.pool.is_empty()
    }

    /// The id of its device, its group's and its own.
    pub(crate) fn id(&self) -> String {
        format!("{}{}", self.group_uuid, self.uuid)
    }

    pub(crate) fn is_thin_pool(&self) -> bool {
        self.kind() == 't'
    }

    /// A classic snapshot, also while it is being merged.
    pub(crate) fn is_classic_snapshot(&self) -> bool {
        matches!(self.kind(), 's' | 'S')
    }

    pub(crate) fn has_tag(&self, tag: &str) -> bool {
        self.tags.iter().any(|t| t == tag)
    }
}

#[derive(Deserialize)]
struct Report {
    report: Vec<Lines>,
}

#[derive(Deserialize)]
struct Lines {
    #[serde(default)]
    lv: Vec<Map<String, Value>>,
}

/// Reads what `lvs` printed.
///
/// # Errors
/// `Protocol` when it is no such report.
pub(crate) fn parse(printed: &str) -> Result<Vec<Volume>> {
    let bad = |why: String| {
        Error::new(
            ErrorKind::Protocol,
            format!("lvs printed something else than its report: {why}"),
        )
        .hint("lvm2 must be 2.02.158 or newer, which print reports as JSON.")
    };
    let report: Report = serde_json::from_str(printed).map_err(|e| bad(e.to_string()))?;
    let lines = report.report.iter().flat_map(|lines| &lines.lv);
    lines.map(|line| volume(line).map_err(bad)).collect()
}

fn volume(line: &Map<String, Value>) -> std::result::Result<Volume, String> {
    let text = |key: &str| match line.get(key) {
        Some(Value::String(text)) => Ok(text.as_str()),
        // Newer lvm2 can be told to print numbers as such.
        None | Some(_) => Err(format!("a volume without {key}")),
    };
    let bytes = |key: &str| {
        let text = text(key)?;
        let parsed = text.parse::<u64>();
        parsed.map_err(|_| format!("{key} is {text:?} and not a number of bytes"))
    };
    let percent = |key: &str| Ok::<_, String>(text(key)?.parse::<f64>().ok());
    // lvm2's words for yes and no: `snapshot invalid`, `merging`, `open`, or nothing, or `unknown`.
    let is = |key: &str, word: &str| Ok::<_, String>(text(key)? == word);
    let plain = |name: &str| name.trim_start_matches('[').trim_end_matches(']').to_owned();
    let tags = text("lv_tags")?.split(',').filter(|tag| !tag.is_empty());
    Ok(Volume {
        group: text("vg_name")?.to_owned(),
        group_uuid: text("vg_uuid")?.replace('-', ""),
        extent: bytes("vg_extent_size")?,
        free: bytes("vg_free")?,
        name: plain(text("lv_name")?),
        uuid: text("lv_uuid")?.replace('-', ""),
        attributes: text("lv_attr")?.to_owned(),
        size: bytes("lv_size")?,
        path: text("lv_path")?.to_owned(),
        active: text("lv_active")?.starts_with("active"),
        tags: tags.map(str::to_owned).collect(),
        invalid: is("lv_snapshot_invalid", "snapshot invalid")?,
        // The origin of a thin snapshot says so in its first letter alone.
        merging: is("lv_merging", "merging")? || text("lv_attr")?.starts_with(['O', 'S']),
        merge_failed: is("lv_merge_failed", "merge failed")?,
        open: is("lv_device_open", "open")?,
        health: text("lv_health_status")?.to_owned(),
        origin: plain(text("origin")?),
        pool: plain(text("pool_lv")?),
        data_percent: percent("data_percent")?,
        metadata_percent: percent("metadata_percent")?,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

    use super::*;

    /// As the real `lvs` printed it.
    const PRINTED: &str = r#"{ "report": [ { "lv": [
        {"vg_name":"vg-0", "vg_uuid":"FwJ4Yk-1111-2222-3333-4444-5555-abcdef", "vg_extent_size":"4194304", "vg_free":"792723456",
         "lv_name":"disk", "lv_uuid":"orz3sC-JmO2-0u3P-Yupq-Xsld-YIUx-lH10br", "lv_path":"/dev/vg-0/disk", "lv_attr":"Owi-aos---",
         "lv_size":"268435456", "origin":"", "pool_lv":"", "data_percent":"", "metadata_percent":"", "lv_snapshot_invalid":"unknown",
         "lv_merge_failed":"unknown", "lv_merging":"merging", "lv_active":"active", "lv_tags":"", "lv_device_open":"open", "lv_health_status":""},
        {"vg_name":"vg-0", "vg_uuid":"FwJ4Yk-1111-2222-3333-4444-5555-abcdef", "vg_extent_size":"4194304", "vg_free":"792723456",
         "lv_name":"[snap]", "lv_uuid":"wVknSy-XTec-mdrp-CTzG-0D6s-PPQc-qPedle", "lv_path":"", "lv_attr":"Swi-I-s---",
         "lv_size":"16777216", "origin":"disk", "pool_lv":"", "data_percent":"100.00", "metadata_percent":"", "lv_snapshot_invalid":"snapshot invalid",
         "lv_merge_failed":"", "lv_merging":"merging", "lv_active":"active", "lv_tags":"disksnap,disksnap.id=1", "lv_device_open":"", "lv_health_status":""}
    ] } ] , "log": [] }"#;

    #[test]
    fn a_real_report_is_read() {
        let volumes = parse(PRINTED).unwrap();
        let [disk, snapshot] = volumes.as_slice() else {
            panic!("{volumes:?}")
        };
        assert_eq!(disk.full_name(), "vg-0/disk");
        assert_eq!(disk.uuid, "orz3sCJmO20u3PYupqXsldYIUxlH10br");
        assert_eq!((disk.kind(), disk.open, disk.merging), ('O', true, true));
        assert_eq!((disk.size, disk.free), (268_435_456, 792_723_456));
        assert_eq!(snapshot.name, "snap");
        assert!(snapshot.is_classic_snapshot() && snapshot.invalid && snapshot.has_tag("disksnap"));
        assert!(!snapshot.has_tag("disksnap.id"));
        assert_eq!(snapshot.data_percent, Some(100.0));
    }

    #[test]
    fn what_is_no_report_is_refused() {
        for bad in [
            "",
            "LV VG Attr",
            "{}",
            r#"{"report":[{"lv":[{"vg_name":"vg"}]}]}"#,
        ] {
            assert_eq!(parse(bad).unwrap_err().kind(), ErrorKind::Protocol, "{bad}");
        }
        assert_eq!(parse(r#"{"report":[{"lv":[]}]}"#).unwrap(), Vec::new());
        let big = PRINTED.replace("268435456", "much");
        assert!(parse(&big).unwrap_err().message().contains("lv_size"));
    }
}
