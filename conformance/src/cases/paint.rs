//! What the cases write on disks: the places where copy-on-write goes wrong.

use crate::stage::{Stage, Verdict};

/// The unit that copy-on-write most often works in: 64 KiB.
const CLUSTER: u64 = 64 << 10;

/// Ranges (offset, length) at, across and within cluster edges, at the start and at the tail.
///
/// They leave the ranges of [`holes`] alone.
pub(super) fn edges(size: u64) -> Vec<(u64, u64)> {
    vec![
        (0, 512),
        (CLUSTER - 512, 1024),
        (2 * CLUSTER, CLUSTER),
        (3 * CLUSTER + 512, 512),
        (5 * CLUSTER - 4096, 3 * CLUSTER),
        (size - 512, 512),
    ]
}

/// Ranges that [`picture`] leaves unwritten.
pub(super) fn holes() -> Vec<(u64, u64)> {
    vec![
        (9 * CLUSTER, CLUSTER),
        (11 * CLUSTER + 4096, 8192),
        (13 * CLUSTER - 512, 512),
    ]
}

/// Writes a picture that differs with each seed.
pub(super) async fn picture(stage: &Stage, target: &str, seed: u8) -> Verdict {
    for ((offset, len), n) in edges(stage.setting.size(target)).into_iter().zip(1..) {
        stage
            .write(target, offset, len, seed.wrapping_mul(16).wrapping_add(n))
            .await?;
    }
    Ok(())
}

/// Writes over every range of the picture, and into the holes.
pub(super) async fn scribble(stage: &Stage, target: &str, byte: u8) -> Verdict {
    for (offset, len) in edges(stage.setting.size(target)).into_iter().chain(holes()) {
        stage.write(target, offset, len, byte).await?;
    }
    Ok(())
}

/// Writes a little: enough to change what a snapshot that does not hold would show.
pub(super) async fn dab(stage: &Stage, target: &str, byte: u8) -> Verdict {
    stage.write(target, 0, 512, byte).await?;
    stage.write(target, 5 * CLUSTER - 512, 1024, byte).await
}
