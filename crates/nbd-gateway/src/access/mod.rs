//! Authorizes clients: pure decisions about an address, an identity, an export and the time, each
//! with the rule that made it.

mod file;
mod identity;
mod network;
mod pattern;
mod request;
mod rules;
mod window;

pub use file::{RuleProblem, RulesFile, RulesFileError, RulesFileProblem, parse as parse_rules};
pub use identity::{Identity, IdentityName, IdentityPattern, IdentityPatternError, NameKind};
pub use network::{Network, NetworkError, Peer, PeerMatcher, PeerMatcherError};
pub use pattern::{Pattern, PatternError};
pub use request::{AccessRequest, Fact};
pub use rules::{Action, CommandLineRules, Decision, Origin, Reason, Rule, Rules};
pub use window::{TimeWindow, TimeWindowError, Timestamp};
