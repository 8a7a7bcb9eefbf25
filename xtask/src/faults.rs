//! `./x faults [METHOD…] [--act ACT] [--point NAME:K] [--seed N]`: acts killed at each of their points, and the table of what came of it.

use anyhow::{Context, Result, bail};

use crate::suite;

/// The test that walks over all of them.
const TEST: &str = "faults::every_point";

/// What is walked.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// What the scenes' names begin with; all scenes where there is none.
    methods: Vec<String>,
    act: Option<String>,
    /// One point alone, with how many times it is passed.
    point: Option<String>,
    seed: Option<u64>,
}

impl Plan {
    pub(crate) fn from_args(args: &[String]) -> Result<Self> {
        let mut plan = Self::default();
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} wants a value"));
            match arg.as_str() {
                "--act" => plan.act = Some(value()?.clone()),
                "--point" => plan.point = Some(value()?.clone()),
                "--seed" => {
                    let text = value()?;
                    let seed = text.parse();
                    plan.seed = Some(seed.with_context(|| format!("`{text}` is not a number"))?);
                }
                flag if flag.starts_with('-') => bail!("`{flag}` is not an option of ./x faults"),
                method => plan.methods.push(method.to_owned()),
            }
        }
        Ok(plan)
    }
}

/// Runs them, and shows what the walk tells. Not by nextest, which ends what takes long.
pub(crate) fn run(plan: &Plan) -> Result<()> {
    let words = ["test", "-p", "disksnap-cli", "--test", "trials", "--"];
    let chosen = ["--ignored", "--exact", "--nocapture", TEST];
    let mut command = suite::cargo_command(&[&words[..], &chosen].concat());
    // A scene's name may have a comma in it.
    command.env("DISKSNAP_TRIALS_METHODS", plan.methods.join(";"));
    command.envs(plan.act.as_ref().map(|act| ("DISKSNAP_TRIALS_ACT", act)));
    command.envs(plan.point.as_ref().map(|point| ("DISKSNAP_TRIALS_POINT", point)));
    command.envs(plan.seed.map(|seed| ("DISKSNAP_TRIALS_SEED", seed.to_string())));
    suite::run(&mut command)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    #[test]
    fn a_plan_is_read() {
        let plan =
            |args: &[&str]| Plan::from_args(&args.iter().map(|&arg| arg.to_owned()).collect::<Vec<_>>());
        let chosen = plan(&[
            "btrfs",
            "--act",
            "create",
            "lvm",
            "--seed",
            "7",
            "--point",
            "after x:1",
        ])
        .unwrap();
        assert_eq!(chosen.point.as_deref(), Some("after x:1"));
        assert_eq!(chosen.methods, ["btrfs", "lvm"]);
        assert_eq!((chosen.act.as_deref(), chosen.seed), (Some("create"), Some(7)));
        for bad in [&["--act"][..], &["--seed", "x"], &["--acts", "create"]] {
            assert!(plan(bad).is_err(), "{bad:?}");
        }
    }
}
