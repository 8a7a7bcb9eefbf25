//! Debian's kernel image, uncompressed: QEMU boots the ELF file directly (PVH), which under emulation
//! saves the seconds that unpacking itself takes.

use anyhow::{Context, Result, ensure};

/// The ELF file inside a `bzImage`. The places are from the kernel's `Documentation/arch/x86/boot.rst`.
pub(crate) fn vmlinux(image: &[u8]) -> Result<Vec<u8>> {
    ensure!(
        image.get(0x202..0x206) == Some(b"HdrS".as_slice()),
        "not a bzImage"
    );
    let sectors = match image[0x1f1] {
        0 => 4,
        count => usize::from(count),
    };
    let start = (sectors + 1) * 512 + number(image, 0x248)?;
    let payload = image
        .get(start..start + number(image, 0x24c)?)
        .context("the image is cut off")?;
    let kernel = decompress(payload)?;
    ensure!(
        kernel.starts_with(b"\x7fELF"),
        "the kernel inside the image is no ELF file"
    );
    Ok(kernel)
}

fn number(image: &[u8], at: usize) -> Result<usize> {
    let bytes = image.get(at..at + 4).context("the image is cut off")?;
    let bytes: [u8; 4] = bytes.try_into().context("four bytes")?;
    Ok(usize::try_from(u32::from_le_bytes(bytes))?)
}

/// LZ4 in its "legacy" form, which is what Debian's kernels for virtual machines are compressed with:
/// a magic number, then blocks with their compressed size before them. The kernel's build appends the
/// size of the whole.
fn decompress(payload: &[u8]) -> Result<Vec<u8>> {
    const BLOCK: usize = 8 << 20;
    let start = payload.get(..4).unwrap_or_default();
    ensure!(
        start == b"\x02\x21\x4c\x18",
        "it is compressed in another way than LZ4: {start:02x?}"
    );
    let whole = number(payload, payload.len() - 4)?;
    let (mut at, mut out) = (4, Vec::with_capacity(whole));
    while out.len() < whole {
        let size = number(payload, at)?;
        let block = payload
            .get(at + 4..at + 4 + size)
            .context("the image is cut off")?;
        out.extend(lz4_flex::block::decompress(block, BLOCK).context("bad LZ4 data")?);
        at += 4 + size;
    }
    ensure!(out.len() == whole, "{} bytes instead of {whole}", out.len());
    Ok(out)
}
