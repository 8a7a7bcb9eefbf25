//! The `disksnap` command.
fn main() {}
