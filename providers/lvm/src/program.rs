//! Where the programs that this method runs are: in fixed places, or where the environment says; and how a terminal's
//! signals are kept from them.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Output;

use disksnap_core::{Error, ErrorKind, Result, faults};
use duct::Expression;

/// Where they are looked for.
const PLACES: [&str; 5] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin"];

/// The same in a process group of its own: Ctrl-C, which this process outlives to bring its act to an end, goes to all of a
/// terminal's group, and would end the program in the middle of that act.
pub(crate) fn apart(expression: &Expression) -> Expression {
    expression.before_spawn(|command| {
        command.process_group(0);
        Ok(())
    })
}

/// Runs it to its end. `effect` is what it is called as an effect; `None` where it only looks.
pub(crate) fn run(expression: &Expression, effect: Option<&str>) -> io::Result<Output> {
    let expression = ours_alone(&expression.unchecked());
    let Some(effect) = effect else {
        return expression.run();
    };
    faults::before("program", effect);
    let running = expression.start()?;
    faults::amid("program", effect);
    let output = running.into_output();
    faults::after("program", effect);
    output
}

/// What a trial tells this process is not for the program.
pub(crate) fn ours_alone(expression: &Expression) -> Expression {
    let each = faults::VARIABLES.iter();
    each.fold(expression.clone(), |expression, variable| {
        expression.env_remove(variable)
    })
}

/// A program that an operator may have to install.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Known {
    /// Its file's name.
    pub(crate) name: &'static str,
    /// What is said of it when it is missing.
    pub(crate) package: &'static str,
    /// How to get it: the packages' names.
    pub(crate) install: &'static str,
    /// The variable that names another, by absolute path.
    pub(crate) elsewhere: &'static str,
}

impl Known {
    /// Finds it.
    ///
    /// # Errors
    /// `Unavailable` where there is none.
    pub(crate) fn find(&self) -> Result<PathBuf> {
        let named = std::env::var_os(self.elsewhere).map(PathBuf::from);
        let places: Vec<PathBuf> = match named.filter(|path| path.is_absolute()) {
            Some(path) => vec![path],
            None => PLACES
                .iter()
                .map(|place| [place, self.name].iter().collect())
                .collect(),
        };
        let found = places.iter().find(|path| path.is_file()).cloned();
        found.ok_or_else(|| {
            let looked: Vec<String> = places.iter().map(|path| path.display().to_string()).collect();
            Error::new(
                ErrorKind::Unavailable,
                format!(
                    "{} is not installed: there is no {}",
                    self.package,
                    looked.join(", ")
                ),
            )
            .retryable(false)
            .hint(format!(
                "Install {}, or name its program `{}` by absolute path in {}.",
                self.install, self.name, self.elsewhere
            ))
        })
    }
}
