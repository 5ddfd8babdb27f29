//! Environment variables.

use std::collections::HashMap;
use std::fmt;

use super::Secret;

/// Environment variables. `Debug` doesn't show them, since some are secrets.
#[derive(Clone, Default)]
pub struct Environment(HashMap<String, Secret>);

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Environment").finish_non_exhaustive()
    }
}

impl Environment {
    /// Returns the variables of this process that this package may need.
    pub fn from_process() -> Self {
        let is_needed = |name: &str| {
            let name = name.to_ascii_uppercase();
            let prefixes = ["AWS_", "AZURE_", "GOOGLE_", "GCE_"];
            name == "HOME"
                || name.ends_with("_PROXY")
                || prefixes.iter().any(|prefix| name.starts_with(prefix))
        };
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Self::from_pairs(std::env::vars_os().filter_map(text).filter(|(name, _)| is_needed(name)))
    }

    /// Creates an environment from names and values.
    pub fn from_pairs<N, V>(pairs: impl IntoIterator<Item = (N, V)>) -> Self
    where
        N: Into<String>,
        V: Into<String>,
    {
        Self(pairs.into_iter().map(|(name, value)| (name.into(), Secret::new(value))).collect())
    }

    /// Returns a variable, unless it is empty.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(Secret::expose).filter(|value| !value.is_empty())
    }
}
