//! The provider writer's guide lists every case, in the order in which they are run, and no other.
#![allow(clippy::unwrap_used, reason = "a test says what failed by panicking")]

#[test]
fn the_guide_lists_every_case_with_what_it_wants() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/provider-guide.md");
    let guide = std::fs::read_to_string(path).unwrap();
    let rows: Vec<&str> = guide
        .lines()
        .skip_while(|line| *line != "| case | what it wants |")
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .collect();
    let cases: Vec<String> = disksnap_conformance::cases()
        .map(|(name, purpose)| format!("| `{name}` | {purpose} |"))
        .collect();
    assert_eq!(rows, cases);
}
