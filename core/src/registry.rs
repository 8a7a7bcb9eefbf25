//! Which methods there are: registered statically by the crates that are linked, or at run time.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::names::nearest;
use crate::{DiskSnapshot, Error, ErrorKind, Method, Result};

/// A static registration; submit one with [`register!`](crate::register).
#[derive(Debug)]
pub struct Registration {
    /// Makes the provider.
    pub make: fn() -> Arc<dyn DiskSnapshot>,
}

inventory::collect!(Registration);

/// Registers a provider for every program that links the crate.
///
/// A crate that nothing names is not linked and registers nothing: programs write
/// `use vendor_crate as _;`.
#[macro_export]
macro_rules! register {
    ($make:expr) => {
        $crate::private::inventory::submit! { $crate::Registration { make: $make } }
    };
}

/// The methods a dispatcher can use, by name.
#[derive(Debug, Clone, Default)]
pub struct Registry {
    providers: BTreeMap<String, Arc<dyn DiskSnapshot>>,
    /// The name that each alias stands for.
    aliases: BTreeMap<String, String>,
}

impl Registry {
    /// A registry without methods.
    #[must_use]
    pub fn empty() -> Self {
        Self::default()
    }

    /// All methods registered by linked crates.
    ///
    /// # Errors
    /// `AlreadyExists` when two crates register one name; `Invalid` for a name that is not one.
    pub fn linked() -> Result<Self> {
        let mut registry = Self::empty();
        for registration in inventory::iter::<Registration> {
            registry.add((registration.make)())?;
        }
        Ok(registry)
    }

    /// Adds a provider at run time.
    ///
    /// # Errors
    /// `AlreadyExists` when the name is taken; `Invalid` for a name that is not lower-case letters,
    /// digits and dashes.
    pub fn add(&mut self, provider: Arc<dyn DiskSnapshot>) -> Result<()> {
        let Method { name, aliases, .. } = provider.method();
        for name in aliases.iter().chain([&name]) {
            check(name)?;
            if self.get(name).is_ok() {
                return Err(Error::new(
                    ErrorKind::AlreadyExists,
                    format!("two providers register the method '{name}'"),
                )
                .hint("Leave one of them out of the build, or rename it."));
            }
        }
        for alias in aliases {
            self.aliases.insert(alias, name.clone());
        }
        self.providers.insert(name, provider);
        Ok(())
    }

    /// The provider of a method, by its name or one of its aliases.
    ///
    /// # Errors
    /// `NotFound`, naming the methods there are.
    pub fn get(&self, method: &str) -> Result<&Arc<dyn DiskSnapshot>> {
        let name = self.aliases.get(method).map_or(method, String::as_str);
        self.providers.get(name).ok_or_else(|| {
            let known = self.providers.keys().map(String::as_str);
            Error::new(ErrorKind::NotFound, format!("there is no method '{method}'"))
                .hint(nearest("methods", method, known))
        })
    }

    /// All providers with their names, in order of the names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Arc<dyn DiskSnapshot>)> {
        self.providers
            .iter()
            .map(|(name, provider)| (name.as_str(), provider))
    }
}

fn check(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.starts_with('-') || !name.chars().all(plain) {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("{name:?} cannot be the name of a method"),
        )
        .hint("A method's name is lower-case letters, digits and dashes."));
    }
    Ok(())
}
