//! A clock for a machine with other things to do: it counts rests of 10 ms, however long each of them becomes. Where nobody gets
//! his turn it stands still too, so that what is late by it is late by itself.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

const REST: Duration = Duration::from_millis(10);

static RESTS: AtomicU32 = AtomicU32::new(0);

/// Its thread ends with the test's process.
static BEGUN: LazyLock<()> = LazyLock::new(|| {
    std::thread::spawn(|| {
        loop {
            std::thread::sleep(REST);
            RESTS.fetch_add(1, Ordering::Relaxed);
        }
    });
});

/// The time of this process by that clock; it begins with the first call.
pub(crate) fn now() -> Duration {
    LazyLock::force(&BEGUN);
    REST * RESTS.load(Ordering::Relaxed)
}
