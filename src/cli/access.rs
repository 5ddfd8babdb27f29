//! Options for access control.

use std::path::PathBuf;

use clap::Args;
use nbd_gateway::access::{
    CommandLineRules, IdentityPattern, PeerMatcher, Rules, RulesFile, RulesFileError,
};
use serde::Deserialize;

use super::from_file;
use super::values::trimmed;

/// Who may come in: for serving, and for asking what would be answered.
#[derive(Debug, Default, Clone, PartialEq, Eq, Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
#[command(next_help_heading = "Access")]
pub(crate) struct Access {
    /// Who may connect: networks such as 10.0.0.0/8 or 2001:db8::/32, or addresses; unix; virtual
    /// machines as vsock:CID, or vsock for all of them [comma-separated, repeatable; default: this
    /// machine only]
    #[arg(
        long, value_name = "CIDR", value_delimiter = ',', value_parser = trimmed::<PeerMatcher>
    )]
    #[serde(deserialize_with = "from_file::comma_list")]
    allow: Vec<PeerMatcher>,
    /// Whose certificate may come in, from where --allow says, or else from anywhere: a
    /// pattern with * and ? for its URI, DNS name or e-mail address, or, where it has none,
    /// its common name; for one kind alone uri:…, dns:…, email:…, cn:… or sha256:…
    /// [repeatable]
    #[arg(long, value_name = "PATTERN")]
    #[serde(deserialize_with = "from_file::list")]
    allow_identity: Vec<IdentityPattern>,
    /// Who may not connect, whatever else is said [comma-separated, repeatable]
    #[arg(
        long, value_name = "CIDR", value_delimiter = ',', value_parser = trimmed::<PeerMatcher>
    )]
    #[serde(deserialize_with = "from_file::comma_list")]
    deny: Vec<PeerMatcher>,
    /// Rules for addresses, identities, exports and hours, of which the first that fits
    /// judges. See examples/rules.toml
    #[arg(long, value_name = "FILE")]
    rules: Option<PathBuf>,
}

impl Access {
    /// Returns the access rules; reads the rules file if there is one.
    pub(crate) fn rules(&self) -> Result<Rules, RulesFileError> {
        match &self.rules {
            Some(path) => Ok(Rules::from_file(&self.deny, RulesFile(path.clone()).read()?)),
            None => Ok(Rules::from_command_line(&CommandLineRules {
                allow: self.allow.clone(),
                allow_identity: self.allow_identity.clone(),
                deny: self.deny.clone(),
            })),
        }
    }

    /// Returns the path of the rules file, if there is one.
    pub(crate) fn file(&self) -> Option<&PathBuf> {
        self.rules.as_ref()
    }
}
