//! `./x fuzz`: every fuzz target for a while, several at once, and what they found.
//!
//! Without the address sanitizer: the workspace has no unsafe code, and so the stable compiler does. What a target shows is a
//! panic, a hang, or memory beyond [`MEMORY`].

use std::collections::VecDeque;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use disksnap_test_support::tools::workspace_root;

use crate::cargo_tools;
use crate::suite;

/// What one input may take, in MiB; the longest line of a peer's has 64.
const MEMORY: u32 = 1024;
/// How long one input may take, in seconds.
const PATIENCE: u32 = 25;

/// What is to be run.
#[derive(Debug)]
pub(crate) struct Plan {
    /// All where there is none.
    pub(crate) targets: Vec<String>,
    /// For each target.
    pub(crate) seconds: u32,
    /// How many at once.
    pub(crate) at_once: usize,
    /// Where the choices begin; at random where there is none.
    pub(crate) seed: Option<u32>,
}

impl Plan {
    /// `[TARGET…] [--seconds N] [--at-once N]`.
    pub(crate) fn from_args(args: &[String]) -> Result<Self> {
        let mut plan = Self {
            targets: Vec::new(),
            seconds: 600,
            at_once: std::thread::available_parallelism().map_or(1, usize::from),
            seed: None,
        };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut number = || {
                let text = args.next().with_context(|| format!("{arg} wants a number"))?;
                text.parse::<u32>()
                    .with_context(|| format!("`{text}` is not a number"))
            };
            match arg.as_str() {
                "--seconds" => plan.seconds = number()?,
                "--at-once" => plan.at_once = usize::try_from(number()?)?.max(1),
                flag if flag.starts_with('-') => bail!("`{flag}` is not an option of ./x fuzz"),
                target => plan.targets.push(target.to_owned()),
            }
        }
        Ok(plan)
    }

    /// What CI runs: each target for 20 seconds, from the same seed every time, so that what it finds is what a change has broken.
    pub(crate) fn short() -> Self {
        Self {
            targets: Vec::new(),
            seconds: 20,
            at_once: 2 * std::thread::available_parallelism().map_or(1, usize::from),
            seed: Some(1),
        }
    }
}

/// Builds and runs them.
///
/// # Errors
/// Which targets found something, and where it is.
pub(crate) fn run(plan: &Plan) -> Result<()> {
    let known = targets()?;
    if let Some(unknown) = plan.targets.iter().find(|target| !known.contains(target)) {
        bail!(
            "there is no fuzz target `{unknown}`; there are {}",
            known.join(", ")
        );
    }
    let chosen = if plan.targets.is_empty() {
        known
    } else {
        plan.targets.clone()
    };
    let programs = build(&chosen, plan)?;
    println!(
        "{} fuzz targets for {} s each, {} at once; what they say is in fuzz/artifacts/TARGET.log",
        chosen.len(),
        plan.seconds,
        plan.at_once
    );
    let (waiting, found) = (Mutex::new(VecDeque::from(chosen)), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..plan.at_once {
            scope.spawn(|| {
                let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                while let Some(target) = next() {
                    let outcome = run_one(&programs, &target, plan);
                    println!("  {target:<20} {}", shown(&outcome));
                    found
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push((target, outcome));
                }
            });
        }
    });
    conclude(&found.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// The names of all targets, as the folder has them.
fn targets() -> Result<Vec<String>> {
    let folder = workspace_root().join("fuzz/fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(path.file_stem().map(|name| name.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    ensure!(!names.is_empty(), "there are no fuzz targets");
    Ok(names)
}

/// Builds the targets; returns where the programs are. For a short run they are optimized less, which takes half the time.
fn build(chosen: &[String], plan: &Plan) -> Result<PathBuf> {
    let program = cargo_tools::FUZZ.get()?;
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut command = suite::tool_command(&program);
    command.args(["fuzz", "build", "--sanitizer", "none", "--target", &target]);
    if let [only] = chosen {
        command.arg(only);
    }
    if plan.seed.is_some() {
        command.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1");
    }
    suite::run(&mut command)?;
    Ok(workspace_root().join("fuzz/target").join(target).join("release"))
}

/// What a target came to.
#[derive(Debug)]
struct Outcome {
    status: ExitStatus,
    runs: u64,
    /// The inputs that it found, as files.
    inputs: Vec<PathBuf>,
    seconds: u64,
}

fn run_one(programs: &Path, target: &str, plan: &Plan) -> Result<Outcome> {
    let fuzz = workspace_root().join("fuzz");
    let (corpus, artifacts) = (
        fuzz.join("corpus").join(target),
        fuzz.join("artifacts").join(target),
    );
    for folder in [&corpus, &artifacts] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let before = inputs(&artifacts)?;
    let log = fuzz.join("artifacts").join(format!("{target}.log"));
    let to = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let begun = Instant::now();
    // What is found goes to the first folder; the seeds stay as they are.
    let status = Command::new(programs.join(target))
        .arg(&corpus)
        .args(Some(fuzz.join("seeds").join(target)).filter(|seeds| seeds.is_dir()))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args([
            format!("-max_total_time={}", plan.seconds),
            format!("-timeout={PATIENCE}"),
        ])
        .args([
            format!("-rss_limit_mb={MEMORY}"),
            "-print_final_stats=1".to_owned(),
        ])
        .args(plan.seed.map(|seed| format!("-seed={seed}")))
        .stdin(Stdio::null())
        .stdout(to.try_clone()?)
        .stderr(to)
        .status()
        .with_context(|| format!("cannot start the fuzz target {target}"))?;
    let mut found = inputs(&artifacts)?;
    found.retain(|input| !before.contains(input));
    Ok(Outcome {
        status,
        runs: runs(&fs::read(&log)?),
        inputs: found,
        seconds: begun.elapsed().as_secs(),
    })
}

fn inputs(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path()));
    Ok(entries.collect::<std::io::Result<_>>()?)
}

/// What libFuzzer says at its end, or 0.
fn runs(log: &[u8]) -> u64 {
    let log = String::from_utf8_lossy(log);
    let told = log
        .lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    told.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}

fn shown(outcome: &Result<Outcome>) -> String {
    match outcome {
        Err(error) => format!("not run: {error:#}"),
        Ok(outcome) => {
            let Outcome {
                status,
                runs,
                inputs,
                seconds,
            } = outcome;
            let verdict = match inputs.len() {
                0 if status.success() => "0 crashes".to_owned(),
                crashes => format!("{} crashes ({status})", crashes.max(1)),
            };
            format!("{runs:>10} runs in {seconds:>4} s   {verdict}")
        }
    }
}

fn conclude(found: &[(String, Result<Outcome>)]) -> Result<()> {
    let mut failed = Vec::new();
    for (target, outcome) in found {
        match outcome {
            Ok(outcome) if outcome.status.success() && outcome.inputs.is_empty() => {}
            Ok(outcome) => {
                let inputs = outcome
                    .inputs
                    .iter()
                    .map(|input| format!("\n    {}", input.display()));
                failed.push(format!(
                    "{target}: see fuzz/artifacts/{target}.log{}",
                    inputs.collect::<String>()
                ));
            }
            Err(error) => failed.push(format!("{target}: {error:#}")),
        }
    }
    let (all, crashes) = (found.len(), failed.len());
    println!("{all} fuzz targets, {crashes} of them with crashes");
    ensure!(
        failed.is_empty(),
        "fuzzing found something:\n  {}",
        failed.join("\n  ")
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    fn plan(args: &[&str]) -> Result<Plan> {
        Plan::from_args(&args.iter().map(|&arg| arg.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn a_plan_is_read() {
        assert_eq!(plan(&[]).unwrap().seconds, 600);
        let chosen = plan(&["nbd_uri", "--seconds", "5", "qmp_lines", "--at-once", "0"]).unwrap();
        assert_eq!((chosen.seconds, chosen.at_once), (5, 1));
        assert_eq!(chosen.targets, ["nbd_uri", "qmp_lines"]);
        for bad in [&["--seconds"][..], &["--seconds", "x"], &["--sekonds", "5"]] {
            assert!(plan(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn every_target_has_a_seed_a_binary_and_a_line() {
        let fuzz = workspace_root().join("fuzz");
        let read = |name: &str| fs::read_to_string(fuzz.join(name)).unwrap();
        let (manifest, readme) = (read("Cargo.toml"), read("README.md"));
        for target in targets().unwrap() {
            assert!(
                manifest.contains(&format!("\nname = \"{target}\"\n")),
                "{target} is not in Cargo.toml"
            );
            assert!(
                readme.contains(&format!("`{target}`")),
                "{target} is not in README.md"
            );
            let seeds = fuzz.join("seeds").join(&target);
            assert!(
                seeds.read_dir().is_ok_and(|mut seeds| seeds.next().is_some()),
                "{target} has no seed"
            );
        }
    }

    #[test]
    fn what_libfuzzer_says_at_its_end_is_read() {
        assert_eq!(
            runs(b"#2 INITED\nstat::number_of_executed_units: 1234\nstat::average_exec_per_sec: 1\n"),
            1234
        );
        assert_eq!(runs(b""), 0);
    }
}
