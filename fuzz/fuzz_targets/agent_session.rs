//! Any lines as the answers of a guest agent: freezing and thawing end, with a result or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // With a clock that jumps to whatever is waited for, no input takes longer than it computes.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build();
    runtime
        .expect("a runtime")
        .block_on(disksnap_hypervisor::fuzzing::agent(data));
});
