//! `./x test`, `lint` and `fuzz`: which cargo commands make them up.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use disksnap_test_support::require::SKIPPED_ENV;
use disksnap_test_support::tools::workspace_root;

use crate::tools;

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
        step(build_fuzz());
    }
    if let Ok(lines) = std::fs::read_to_string(&skipped) {
        println!("tests that this machine cannot run:\n{}", lines.trim_end());
    }
    conclude("tests", &failed)
}

/// The fuzz targets build; where there is no cargo-fuzz they are only checked.
fn build_fuzz() -> Result<()> {
    if has_fuzz() {
        return cargo(&["+nightly", "fuzz", "build"]);
    }
    println!("cargo-fuzz with a nightly is not installed: the fuzz targets are only checked");
    let args = [
        "check",
        "--manifest-path",
        "fuzz/Cargo.toml",
        "--target-dir",
        "target/fuzz",
    ];
    // Nothing is linked here, so libfuzzer need not be built, which takes a C++ compiler.
    run(cargo_command(&args).env("CUSTOM_LIBFUZZER_PATH", "/nowhere/libfuzzer.a"))
}

fn has_fuzz() -> bool {
    has(&["+nightly", "fuzz", "--version"])
}

/// Formatting, clippy, documentation, and the dependencies where a program for that is installed.
pub(crate) fn lint() -> Result<()> {
    let mut failed = Vec::new();
    let mut step = |result: Result<()>| failed.extend(result.err().map(|x| format!("{x:#}")));
    step(cargo(&["fmt", "--all", "--check"]));
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
    for (tool, args) in [("deny", &["deny", "check"][..]), ("audit", &["audit"])] {
        if has(&[tool, "--version"]) {
            step(cargo(args));
        } else {
            println!("skipped: cargo-{tool} is not installed");
        }
    }
    conclude("lints", &failed)
}

/// Every fuzz target, one after the other, for so many seconds each.
pub(crate) fn fuzz(seconds: &str) -> Result<()> {
    seconds
        .parse::<u32>()
        .with_context(|| format!("`{seconds}` is not a number of seconds"))?;
    ensure!(exists("fuzz/Cargo.toml"), "there are no fuzz targets yet");
    if !has_fuzz() {
        bail!(
            "fuzzing needs a nightly compiler and cargo-fuzz:\n  rustup toolchain install nightly\n  \
             cargo install cargo-fuzz"
        );
    }
    let list = cargo_command(&["+nightly", "fuzz", "list"])
        .output()
        .context("cannot start cargo")?;
    for target in String::from_utf8_lossy(&list.stdout).lines() {
        let time = format!("-max_total_time={seconds}");
        // What is found goes to the first folder; the seeds stay as they are.
        let (corpus, seeds) = (format!("fuzz/corpus/{target}"), format!("fuzz/seeds/{target}"));
        std::fs::create_dir_all(workspace_root().join(&corpus))?;
        cargo(&["+nightly", "fuzz", "run", target, &corpus, &seeds, "--", &time])?;
    }
    Ok(())
}

fn conclude(what: &str, failed: &[String]) -> Result<()> {
    ensure!(failed.is_empty(), "{what} failed:\n  {}", failed.join("\n  "));
    println!("all {what} passed");
    Ok(())
}

fn exists(path: &str) -> bool {
    workspace_root().join(Path::new(path)).exists()
}

fn cargo_command(args: &[&str]) -> Command {
    // `+toolchain` is rustup's, and the cargo that runs us is a toolchain's own.
    let plain = args.first().is_some_and(|x| x.starts_with('+'));
    let own = std::env::var_os("CARGO").filter(|_| !plain);
    let mut command = Command::new(own.unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(workspace_root());
    // It fails only where the checkout's path has a colon; whoever misses a program then says so.
    command.envs(tools::environment().unwrap_or_default());
    // What cargo told this program of its own package is not for others.
    for (key, _) in std::env::vars_os() {
        let name = key.to_string_lossy();
        let ours = name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
        if ours || (plain && name == "RUSTUP_TOOLCHAIN") {
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

fn run(command: &mut Command) -> Result<()> {
    let args: Vec<_> = command
        .get_args()
        .map(|x| x.to_string_lossy().into_owned())
        .collect();
    let shown = format!("cargo {}", args.join(" "));
    println!("$ {shown}");
    let status = command
        .status()
        .with_context(|| format!("cannot start {shown}"))?;
    ensure!(status.success(), "`{shown}` ended with {status}");
    Ok(())
}
