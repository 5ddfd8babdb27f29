//! A DNS name by which the monitor may be asked.

use std::fmt;
use std::str::FromStr;

/// Maximum length of a name in DNS, in bytes.
const MAX_NAME_BYTES: usize = 253;

/// A DNS name that requests to the monitor may use, in lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostName(String);

/// Error for a text that isn't a DNS name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{:?} is no DNS name: expected letters, digits, hyphens and dots, without a port",
    nbd_telemetry::escape::name(.0)
)]
pub(crate) struct HostNameError(String);

impl FromStr for HostName {
    type Err = HostNameError;

    fn from_str(text: &str) -> Result<Self, HostNameError> {
        let is_known = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        let name = text.trim_end_matches('.');
        if name.is_empty() || text.len() > MAX_NAME_BYTES || !text.bytes().all(is_known) {
            return Err(HostNameError(text.to_owned()));
        }
        Ok(Self(name.to_ascii_lowercase()))
    }
}

impl HostName {
    /// Returns the name in lower case, without a dot at its end.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_host_names_are_rejected() {
        for junk in ["", ".", "..", "a b", "a:80", "https://a", "*.example.org", &"a".repeat(254)] {
            assert!(junk.parse::<HostName>().is_err(), "{junk}");
        }
    }
}
