//! `qemu-img`, for what is done to images while no hypervisor has them open.

use disksnap_core::{Error, ErrorKind, Result, Source};
use disksnap_image_file::QemuImg;
use serde_json::{Value, json};

use crate::layer::Layer;
use crate::remote;

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

/// The virtual size in bytes of an image that cannot be looked at as a file.
pub(crate) async fn size_of(layer: &Layer) -> Result<u64> {
    let image = format!("json:{}", opened(std::slice::from_ref(layer)));
    let told = run(["info", "-U", "--output=json", &image]).await?;
    let told: Value = serde_json::from_str(&told).unwrap_or_default();
    let size = told["virtual-size"].as_u64();
    size.ok_or_else(|| Error::new(ErrorKind::Protocol, "qemu-img info tells no virtual-size"))
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
    let file = match top.remote() {
        Some(uri) => remote::options(&uri),
        None => json!({ "driver": driver, "filename": top.path }),
    };
    let mut options = json!({ "driver": top.format, "file": file });
    if let Some(data) = &top.data {
        options["data-file"] = json!({ "driver": "file", "filename": data });
    }
    // QEMU does not take the options of an export beside the name in the header, which names it as well.
    let named = below.first().is_some_and(|layer| layer.remote().is_some());
    if top.format == "qcow2" && !named {
        options["backing"] = opened(below);
    }
    options
}
