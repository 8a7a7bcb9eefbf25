//! An image that is a file in a device that nobody mounts here, as JSON and as rows of text.

use disksnap::{Access, FileInside, Inside};
use serde::Serialize;

/// Where the image is.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct InsideView {
    device: String,
    file_system: String,
    #[serde(flatten)]
    image: FileView,
    /// The layers below the image, nearest first.
    below: Vec<FileView>,
    /// How another machine mounts it without writing to it.
    mount_options: String,
    /// Why the file system is not mounted on this host.
    reason: String,
}

/// A file, by its path in that file system.
#[derive(Debug, Clone, Serialize)]
struct FileView {
    path: String,
    format: String,
}

impl FileView {
    fn new(file: &FileInside) -> Self {
        Self {
            path: file.path.display().to_string(),
            format: file.format.clone(),
        }
    }

    fn text(&self) -> String {
        format!("{} ({})", self.path, self.format)
    }
}

impl InsideView {
    pub(crate) fn of(access: &Access) -> Option<Self> {
        match access {
            Access::Inside(inside) => Some(Self::new(inside)),
            _ => None,
        }
    }

    fn new(inside: &Inside) -> Self {
        Self {
            device: inside.device.display().to_string(),
            file_system: inside.file_system.clone(),
            image: FileView::new(&inside.image),
            below: inside.below.iter().map(FileView::new).collect(),
            mount_options: inside.options.clone(),
            reason: inside.why.clone(),
        }
    }

    /// Its path, and those of the layers below.
    pub(crate) fn path_text(&self) -> String {
        let below = self.below.iter().map(|file| format!(", over {}", file.text()));
        let below = below.collect::<String>();
        let (image, options) = (self.image.text(), &self.mount_options);
        format!(
            "{image}{below}, in the {} mounted with `-o {options}`",
            self.file_system
        )
    }

    pub(crate) fn rows<'a>(&self) -> [(&'a str, String); 3] {
        [
            ("inside", format!("the {} on {}", self.file_system, self.device)),
            ("image", self.path_text()),
            ("not mounted", self.reason.clone()),
        ]
    }
}
