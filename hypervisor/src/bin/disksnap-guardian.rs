//! The thaw guardian as a program of its own, for programs that cannot be their own guardian.

use std::process::ExitCode;

#[expect(clippy::print_stderr, reason = "this is a program")]
fn main() -> ExitCode {
    disksnap_hypervisor::guardian::run_if_asked();
    eprintln!(
        "disksnap-guardian is started by disksnap while it pauses or freezes a guest, and lets the guest run again \
         if disksnap dies. It does nothing when started by hand."
    );
    ExitCode::from(2)
}
