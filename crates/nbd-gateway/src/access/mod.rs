//! Authorizes clients: pure decisions about an address, an identity, an export and the time, each
//! with the rule that made it.

mod facts;
mod file;
mod identity;
mod network;
mod pattern;
mod rules;
mod window;

pub use facts::{Facts, Known};
pub use file::{RuleProblem, RulesFile, RulesFileError, RulesFileProblem, parse as parse_rules};
pub use identity::{Identity, IdentityPattern, IdentityPatternError, Name, NameKind};
pub use network::{Network, NetworkError, Peer, Place, PlaceError};
pub use pattern::{Pattern, PatternError};
pub use rules::{Action, CommandLine, Origin, Reason, Rule, Rules, Verdict};
pub use window::{Moment, TimeWindow, TimeWindowError};
