//! Encrypted fleece images, made by `qemu-img` in a process of its own: QEMU's own `blockdev-create`
//! measures the host's speed for the key derivation in its main loop, and stalls the guest for seconds.

use std::fmt::Write as _;
use std::io::Read as _;

use disksnap_core::{Error, ErrorKind, Result};
use disksnap_image_file::QemuImg;

use crate::choice::Choice;
use crate::settings::Way;

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
    let qemu_img = QemuImg::find().ok_or_else(missing)?;
    // A slow key derivation guards guessable passwords; this key is random.
    let (format, options) = match choice.way {
        Way::Classic => (
            "qcow2",
            "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=1",
        ),
        Way::Filter | Way::Job => ("luks", "key-secret=key,iter-time=1"),
    };
    let path = choice.image.path.to_string_lossy();
    let size = choice.size.to_string();
    let secret = "secret,id=key,file=/dev/stdin";
    let arguments = [
        "create", "-q", "-f", format, "--object", secret, "-o", options, &path, &size,
    ];
    let made = qemu_img.run(arguments, key).await;
    made.map(drop)
        .map_err(|e| e.with("fleece image", choice.image.path.display()))
}

/// The error where there is no `qemu-img`.
pub(crate) fn missing() -> Error {
    QemuImg::missing(
        ErrorKind::Unsupported,
        "QEMU encrypts this disk, and there is no qemu-img to make an encrypted fleece image",
    )
}
