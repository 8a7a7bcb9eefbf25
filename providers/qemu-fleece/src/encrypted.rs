//! Encrypted fleece images, made by `qemu-img` in a process of its own: QEMU's own `blockdev-create`
//! measures the host's speed for the key derivation in its main loop, and stalls the guest for seconds.

use std::fmt::Write as _;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use disksnap_core::{Error, ErrorKind, Result};

use crate::choice::Choice;
use crate::settings::Way;

/// Where `qemu-img` is looked for.
const PLACES: [&str; 2] = ["/usr/bin/qemu-img", "/usr/local/bin/qemu-img"];
/// Names another `qemu-img`, by absolute path.
const ELSEWHERE: &str = "DISKSNAP_QEMU_IMG";

/// The `qemu-img` at hand, if there is one.
pub(crate) fn qemu_img() -> Option<PathBuf> {
    let named = std::env::var_os(ELSEWHERE)
        .map(PathBuf::from)
        .filter(|path| path.is_absolute());
    named
        .into_iter()
        .chain(PLACES.map(PathBuf::from))
        .find(|path| path.is_file())
}

/// A key for one fleece image, as text that QEMU takes for a secret: 256 bits from the system's random
/// source. It is in QEMU's memory and nowhere else, and ends with it, as the snapshot does.
pub(crate) fn random_key() -> Result<String> {
    let mut bytes = [0; 32];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .map_err(|e| Error::io("cannot make a key for the fleece image: /dev/urandom", e))?;
    Ok(bytes.iter().fold(String::new(), |mut key, byte| {
        let _ = write!(key, "{byte:02x}");
        key
    }))
}

/// Writes the format into an image file that exists; takes seconds of processor time.
pub(crate) async fn make(choice: &Choice, key: &str) -> Result<()> {
    let program = qemu_img().ok_or_else(missing)?;
    // The key comes over a pipe: an argument could be read by every user of the host. A slow key
    // derivation guards guessable passwords; this key is random.
    let (format, options) = match choice.way {
        Way::Classic => (
            "qcow2",
            "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=1",
        ),
        Way::Filter | Way::Job => ("luks", "key-secret=key,iter-time=1"),
    };
    let (path, size) = (choice.image.path.clone(), choice.size.to_string());
    let command = duct::cmd!(
        program,
        "create",
        "-q",
        "-f",
        format,
        "--object",
        "secret,id=key,file=/dev/stdin",
        "-o",
        options,
        &path,
        size
    );
    let command = command
        .stdin_bytes(key)
        .stdout_null()
        .stderr_capture()
        .unchecked();
    let output = tokio::task::spawn_blocking(move || command.run()).await;
    let output = output
        .map_err(|e| Error::new(ErrorKind::Internal, "the task that runs qemu-img died").because(e))?
        .map_err(|e| Error::io("cannot run qemu-img", e))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Error::new(
        ErrorKind::Io,
        format!("qemu-img cannot make the encrypted fleece image: {said}"),
    )
    .with("path", Path::new(&path).display()))
}

/// The error where there is no `qemu-img`.
pub(crate) fn missing() -> Error {
    Error::new(
        ErrorKind::Unsupported,
        "QEMU encrypts this disk, and there is no qemu-img to make an encrypted fleece image",
    )
    .hint(format!(
        "Install qemu-img (Debian: qemu-utils), or name it in {ELSEWHERE}."
    ))
}
