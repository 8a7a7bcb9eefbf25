//! `qemu-img`, for what is done to images while no hypervisor has them open.

use std::path::PathBuf;

use disksnap_core::{Error, ErrorKind, Result, Source};
use serde_json::{Value, json};

use crate::layer::Layer;

/// Where `qemu-img` is looked for.
const PLACES: [&str; 2] = ["/usr/bin/qemu-img", "/usr/local/bin/qemu-img"];
/// Names another `qemu-img`, by absolute path.
const ELSEWHERE: &str = "DISKSNAP_QEMU_IMG";

/// The `qemu-img` at hand.
///
/// # Errors
/// `Unavailable` when there is none.
pub(crate) fn program() -> Result<PathBuf> {
    let named = std::env::var_os(ELSEWHERE)
        .map(PathBuf::from)
        .filter(|path| path.is_absolute());
    let mut all = named.into_iter().chain(PLACES.map(PathBuf::from));
    all.find(|path| path.is_file()).ok_or_else(|| {
        Error::new(
            ErrorKind::Unavailable,
            "there is no qemu-img, and with the domain off the images cannot be merged without it",
        )
        .hint(format!(
            "Install qemu-img (Debian: qemu-utils), or name it in {ELSEWHERE}."
        ))
    })
}

/// Runs it; what it printed is the answer.
pub(crate) async fn run(arguments: Vec<String>) -> Result<String> {
    let program = program()?;
    let what = format!("qemu-img {}", arguments.first().map_or("", String::as_str));
    let command = duct::cmd(program, arguments)
        .stdin_null()
        .stdout_capture()
        .stderr_capture()
        .unchecked();
    let output = tokio::task::spawn_blocking(move || command.run()).await;
    let output = output
        .map_err(|e| Error::new(ErrorKind::Internal, "the task that runs qemu-img died").because(e))?
        .map_err(|e| Error::io("cannot run qemu-img", e))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    // QEMU locks the images that it has open.
    let kind = if said.contains("lock") {
        ErrorKind::Busy
    } else {
        ErrorKind::Io
    };
    Err(Error::new(kind, format!("{what} failed: {said}"))
        .hint("The images must not be in use; what was being merged can be merged again."))
}

/// The arguments that commit the top image of a chain into the one below; each layer is opened as given.
pub(crate) fn commit(layers: &[Layer]) -> Vec<String> {
    let image = format!("json:{}", opened(layers));
    // `-d`: the overlay is going to be removed, so it need not be emptied.
    ["commit", "-q", "-d", &image].map(str::to_owned).to_vec()
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
