//! `qemu-img`, for what is done to images while no hypervisor has them open.

use disksnap_core::{ErrorKind, Result, Source};
use disksnap_image_file::QemuImg;
use serde_json::{Value, json};

use crate::layer::Layer;

/// The `qemu-img` at hand.
///
/// # Errors
/// `Unavailable` when there is none.
pub(crate) fn program() -> Result<QemuImg> {
    QemuImg::find().ok_or_else(|| {
        QemuImg::missing(
            ErrorKind::Unavailable,
            "there is no qemu-img, and with the domain off the images cannot be merged without it",
        )
    })
}

/// Runs it; what it printed is the answer.
pub(crate) async fn run<A: Into<String>>(arguments: impl IntoIterator<Item = A>) -> Result<String> {
    let ran = program()?.run(arguments, "").await;
    ran.map_err(|e| e.hint("The images must not be in use; what was being merged can be merged again."))
}

/// The arguments that commit the top image of a chain into the one below; each layer is opened as given.
pub(crate) fn commit(layers: &[Layer]) -> [String; 4] {
    // `-d`: the overlay is going to be removed, so it need not be emptied.
    let [commit, quietly, kept] = ["commit", "-q", "-d"].map(str::to_owned);
    [commit, quietly, kept, format!("json:{}", opened(layers))]
}

/// Copies into the top image of a chain what it reads from the second, and puts it on the third, or on nothing.
pub(crate) async fn rebase(chain: &[Layer]) -> Result<()> {
    let image = format!("json:{}", opened(chain));
    let mut arguments = vec!["rebase".to_owned(), "-q".to_owned(), "-b".to_owned()];
    match chain.get(2) {
        Some(below) => {
            let path = below.path.to_string_lossy().into_owned();
            arguments.extend([path, "-F".to_owned(), below.format.clone()]);
        }
        None => arguments.push(String::new()),
    }
    arguments.push(image);
    run(arguments).await.map(drop)
}

/// Writes into the header of an image what is below it, and nothing else.
pub(crate) async fn name_below(image: &Layer, below: Option<&Layer>) -> Result<()> {
    let Some(below) = below else {
        return Ok(());
    };
    let (name, path) = (below.name_from(&image.path), image.path.to_string_lossy());
    let arguments = [
        "rebase",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-b",
        &name,
        "-F",
        &below.format,
        &path,
    ];
    run(arguments).await.map(drop)
}

/// What opens a chain whatever the headers in it say.
fn opened(layers: &[Layer]) -> Value {
    let Some((top, below)) = layers.split_first() else {
        return Value::Null;
    };
    let device = matches!(top.source(), Source::Block { .. });
    let driver = if device { "host_device" } else { "file" };
    let mut options = json!({ "driver": top.format, "file": { "driver": driver, "filename": top.path } });
    if top.format == "qcow2" {
        options["backing"] = opened(below);
    }
    options
}
