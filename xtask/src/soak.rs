//! `./x soak [--minutes N] [--seed N]`: eight machines, whatever can be done with them, and kills, for as long as one likes.

use anyhow::{Context, Result, bail};

use crate::suite;

/// The test that it is. `./x test` leaves it out as long as it finds something now and then.
const TEST: &str = "soak::whatever_is_done_and_killed_for_as_long_as_one_likes";

/// How long, and which numbers are drawn.
#[derive(Debug)]
pub(crate) struct Plan {
    minutes: u64,
    /// Another one each time where there is none.
    seed: Option<u64>,
}

impl Plan {
    pub(crate) fn from_args(args: &[String]) -> Result<Self> {
        let mut plan = Self {
            minutes: 60,
            seed: None,
        };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut number = || {
                let text = args.next().with_context(|| format!("{arg} wants a number"))?;
                text.parse::<u64>()
                    .with_context(|| format!("`{text}` is not a number"))
            };
            match arg.as_str() {
                "--minutes" => plan.minutes = number()?,
                "--seed" => plan.seed = Some(number()?),
                other => bail!("`{other}` is not an option of ./x soak"),
            }
        }
        Ok(plan)
    }
}

/// Runs it, and shows what it tells. Not by nextest, which ends what takes long.
pub(crate) fn run(plan: &Plan) -> Result<()> {
    let words = ["test", "-p", "disksnap-cli", "--test", "trials"];
    let mut command =
        suite::cargo_command(&[&words[..], &["--", "--ignored", "--exact", "--nocapture", TEST]].concat());
    command.env("DISKSNAP_SOAK_SECONDS", (plan.minutes * 60).to_string());
    command.envs(plan.seed.map(|seed| ("DISKSNAP_SOAK_SEED", seed.to_string())));
    suite::run(&mut command)
}
