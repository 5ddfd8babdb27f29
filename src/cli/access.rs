//! Options for access control.

use std::path::PathBuf;

use clap::Args;
use nbd_gateway::access::{
    CommandLineRules, IdentityPattern, PeerMatcher, Rules, RulesFile, RulesFileError,
};
use serde::Deserialize;

use super::from_file;
use super::values::trimmed;

/// Access rules, for serving and for checking what they decide.
#[derive(Debug, Default, Clone, PartialEq, Eq, Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
#[command(next_help_heading = "Access")]
pub(crate) struct Access {
    /// Peers that may connect: networks such as 10.0.0.0/8 or 2001:db8::/32, addresses, unix, or
    /// virtual machines as vsock:CID or vsock [comma-separated, repeatable; default: this machine
    /// only]
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = trimmed::<PeerMatcher>)]
    #[serde(deserialize_with = "from_file::comma_list")]
    allow: Vec<PeerMatcher>,
    /// Clients that are authorized by their certificate, from the peers of --allow, or from
    /// anywhere without --allow: a pattern with * and ? for the URI, DNS name or e-mail address, or
    /// the common name if the certificate has none of these; uri:…, dns:…, email:…, cn:… or
    /// sha256:… matches one kind only [repeatable]
    #[arg(long, value_name = "PATTERN")]
    #[serde(deserialize_with = "from_file::list")]
    allow_identity: Vec<IdentityPattern>,
    /// Peers that may not connect, whatever the other options admit [comma-separated, repeatable]
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = trimmed::<PeerMatcher>)]
    #[serde(deserialize_with = "from_file::comma_list")]
    deny: Vec<PeerMatcher>,
    /// File with rules for addresses, identities, exports and hours; the first rule that matches
    /// decides. See examples/rules.toml
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
