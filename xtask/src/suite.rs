//! `./x test` and `lint`: which cargo commands make them up.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use disksnap_test_support::require::SKIPPED_ENV;
use disksnap_test_support::tools::workspace_root;

use crate::{cargo_tools, fuzz, tools};

/// A provider as a vendor would write it, outside the workspace.
const VENDOR: &str = "examples/vendor-provider/Cargo.toml";

/// Every test; with arguments only those tests of the workspace that they select.
pub(crate) fn test(args: &[String]) -> Result<()> {
    let nextest = has(&["nextest", "--version"]);
    let runner: &[&str] = if nextest { &["nextest", "run"] } else { &["test"] };
    if !nextest {
        println!("cargo-nextest is not installed: using `cargo test`");
    }
    let chosen: Vec<&str> = args.iter().map(String::as_str).collect();
    if !chosen.is_empty() {
        // Without either, cargo takes the package at the root alone.
        let named = chosen
            .iter()
            .any(|x| x.starts_with("-p") || x.starts_with("--package"));
        let scope: &[&str] = if named { &[] } else { &["--workspace"] };
        return cargo(&[runner, scope, &chosen].concat());
    }
    let skipped = workspace_root().join("target/skipped.txt");
    // What an earlier run left; not being there is as good.
    let _ = std::fs::remove_file(&skipped);
    let cargo = |args: &[&str]| run(cargo_command(args).env(SKIPPED_ENV, &skipped));
    let mut failed = Vec::new();
    let mut step = |result: Result<()>| failed.extend(result.err().map(|x| format!("{x:#}")));
    if nextest {
        step(cargo(&[
            "nextest",
            "run",
            "--workspace",
            "--no-fail-fast",
            "--no-tests=pass",
        ]));
        step(cargo(&["test", "--workspace", "--doc", "--no-fail-fast"]));
    } else {
        step(cargo(&["test", "--workspace", "--no-fail-fast"]));
    }
    if exists(VENDOR) {
        step(cargo(&[
            "test",
            "--manifest-path",
            VENDOR,
            "--target-dir",
            "target/vendor-provider",
        ]));
    }
    if exists("fuzz/Cargo.toml") {
        step(fuzz::run(&fuzz::Plan::short()));
    }
    if let Ok(lines) = std::fs::read_to_string(&skipped) {
        println!("tests that this machine cannot run:\n{}", lines.trim_end());
    }
    conclude("tests", &failed)
}

/// Formatting, clippy, documentation, and the dependencies where a program for that is installed.
pub(crate) fn lint() -> Result<()> {
    let mut failed = Vec::new();
    let mut step = |result: Result<()>| failed.extend(result.err().map(|x| format!("{x:#}")));
    step(cargo(&["fmt", "--all", "--check"]));
    step(cargo(&["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"]));
    let clippy = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
    step(cargo(&clippy));
    step(run(
        cargo_command(&["doc", "--workspace", "--no-deps", "--lib"]).env("RUSTDOCFLAGS", "-D warnings")
    ));
    if exists(VENDOR) {
        let at = ["--manifest-path", VENDOR];
        step(cargo(&[&["fmt", "--check"], &at[..]].concat()));
        let target = [
            "--all-targets",
            "--target-dir",
            "target/vendor-provider",
            "--",
            "-D",
            "warnings",
        ];
        step(cargo(&[&["clippy"], &at[..], &target].concat()));
    }
    step(deny());
    conclude("lints", &failed)
}

/// The dependencies' licences, sources and versions (`deny.toml`), and those of the fuzz targets.
fn deny() -> Result<()> {
    let program = cargo_tools::DENY.get()?;
    for manifest in ["Cargo.toml", "fuzz/Cargo.toml"] {
        let mut command = tool_command(&program);
        command.args([
            "--manifest-path",
            manifest,
            "--config",
            "deny.toml",
            "--all-features",
            "check",
        ]);
        command.args(["--hide-inclusion-graph", "licenses", "bans", "sources"]);
        run(&mut command)?;
    }
    advisories(&program)
}

/// The advisories of `RustSec`. Their database is a git repository and no package: it is never fetched here, only used.
fn advisories(program: &Path) -> Result<()> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let there = home.is_some_and(|home| home.join("advisory-dbs").is_dir());
    if !there {
        println!(
            "NOT CHECKED: the advisories of RustSec (cargo deny, cargo audit): their database is not on this machine; \
             `cargo deny fetch db` gets it where its repository can be reached"
        );
        return Ok(());
    }
    run(tool_command(program).args(["--offline", "check", "advisories"]))
}

fn conclude(what: &str, failed: &[String]) -> Result<()> {
    ensure!(failed.is_empty(), "{what} failed:\n  {}", failed.join("\n  "));
    println!("all {what} passed");
    Ok(())
}

fn exists(path: &str) -> bool {
    workspace_root().join(Path::new(path)).exists()
}

pub(crate) fn cargo_command(args: &[&str]) -> Command {
    let own = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = tool_command(Path::new(&own));
    command.args(args);
    command
}

/// A program that is to work on the workspace, as cargo does.
pub(crate) fn tool_command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(workspace_root());
    // It fails only where the checkout's path has a colon; whoever misses a program then says so.
    command.envs(tools::environment().unwrap_or_default());
    // What cargo told this program of its own package is not for others.
    for (key, _) in std::env::vars_os() {
        let name = key.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&key);
        }
    }
    command
}

fn has(args: &[&str]) -> bool {
    let mut command = cargo_command(args);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|x| x.success())
}

pub(crate) fn cargo(args: &[&str]) -> Result<()> {
    run(&mut cargo_command(args))
}

pub(crate) fn run(command: &mut Command) -> Result<()> {
    let args: Vec<_> = command
        .get_args()
        .map(|x| x.to_string_lossy().into_owned())
        .collect();
    let program = Path::new(command.get_program()).file_name().unwrap_or_default();
    let shown = format!("{} {}", program.to_string_lossy(), args.join(" "));
    println!("$ {shown}");
    let status = command
        .status()
        .with_context(|| format!("cannot start {shown}"))?;
    ensure!(status.success(), "`{shown}` ended with {status}");
    Ok(())
}
