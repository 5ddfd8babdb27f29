//! Access rules. The first rule that matches a client decides; a client that matches none is
//! refused.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use super::identity::IdentityPattern;
use super::network::{Network, PeerMatcher};
use super::pattern::Pattern;
use super::request::{AccessRequest, Fact};
use super::window::{TimeWindow, Timestamp};
use nbd_telemetry::escape;

/// Effect of a rule on the clients that it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Access is granted.
    Allow,
    /// Access is denied.
    Deny,
}

/// Source of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The built-in default, which applies unless other rules are given.
    Default,
    /// The options `--allow` and `--allow-identity`.
    Allow,
    /// The option `--deny`.
    Deny,
    /// A rules file.
    File {
        /// Path of the file.
        path: Arc<PathBuf>,
        /// Number of the rule in the file, counted from 1.
        number: usize,
        /// Line on which the rule begins, counted from 1.
        line: usize,
    },
}

/// An access rule. It matches if each of its criteria does; a criterion without an entry matches
/// every client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Source of the rule.
    pub origin: Origin,
    /// Name that its author gave it.
    pub name: Option<String>,
    /// Effect on matching clients.
    pub action: Action,
    /// Origins of connections, one of which must match.
    pub peers: Vec<PeerMatcher>,
    /// Identity patterns, one of which must match.
    pub identities: Vec<IdentityPattern>,
    /// Patterns for the export's name, one of which must match.
    pub exports: Vec<Pattern>,
    /// Weekly time windows, one of which must contain the current time.
    pub windows: Vec<TimeWindow>,
    /// Time from which the rule applies, inclusive.
    pub from: Option<Timestamp>,
    /// Time until which the rule applies, exclusive.
    pub until: Option<Timestamp>,
}

/// Result of matching a rule, based on the facts known so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum MatchResult {
    No,
    /// The result depends on facts that aren't known yet.
    Maybe,
    Yes,
}

impl Rule {
    /// Creates a rule without criteria, which matches every client.
    pub fn new(action: Action, origin: Origin) -> Self {
        Self {
            origin,
            name: None,
            action,
            peers: Vec::new(),
            identities: Vec::new(),
            exports: Vec::new(),
            windows: Vec::new(),
            from: None,
            until: None,
        }
    }

    fn match_request(&self, request: &AccessRequest<'_>) -> MatchResult {
        let identity = match request.identity {
            Fact::Pending => Fact::Pending,
            Fact::Known(None) => Fact::Known(false),
            Fact::Known(Some(identity)) => {
                Fact::Known(self.identities.iter().any(|pattern| match self.action {
                    Action::Allow => pattern.matches(identity),
                    Action::Deny => pattern.may_match(identity),
                }))
            }
        };
        let export = match request.export {
            Fact::Pending => Fact::Pending,
            Fact::Known(export) => {
                Fact::Known(self.exports.iter().any(|pattern| pattern.matches(export)))
            }
        };
        let peer = self.peers.iter().any(|peer| peer.contains(request.peer));
        let window = self.windows.iter().any(|window| window.contains(request.now));
        let in_period = self.from.is_none_or(|from| from <= request.now)
            && self.until.is_none_or(|until| request.now < until);
        [
            match_criterion(self.peers.is_empty(), Fact::Known(peer)),
            match_criterion(self.windows.is_empty(), Fact::Known(window)),
            match_criterion(false, Fact::Known(in_period)),
            match_criterion(self.identities.is_empty(), identity),
            match_criterion(self.exports.is_empty(), export),
        ]
        .into_iter()
        .min()
        .unwrap_or(MatchResult::No)
    }
}

fn match_criterion(is_empty: bool, fits: Fact<bool>) -> MatchResult {
    match fits {
        _ if is_empty => MatchResult::Yes,
        Fact::Pending => MatchResult::Maybe,
        Fact::Known(true) => MatchResult::Yes,
        Fact::Known(false) => MatchResult::No,
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.origin {
            Origin::Default => f.write_str("the default rule for local clients")?,
            Origin::Deny => write!(f, "--deny {}", list(&self.peers))?,
            Origin::Allow => {
                if !self.peers.is_empty() {
                    write!(f, "--allow {}", list(&self.peers))?;
                }
                if !self.identities.is_empty() {
                    let gap = if self.peers.is_empty() { "" } else { " " };
                    write!(f, "{gap}--allow-identity {}", list(&self.identities))?;
                }
            }
            Origin::File { path, number, line } => {
                write!(f, "rule {number}, line {line} of {}", escape::path(path.as_path()))?;
            }
        }
        match &self.name {
            Some(name) => write!(f, " ({})", escape::name(name)),
            None => Ok(()),
        }
    }
}

fn list(items: &[impl fmt::Display]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Access rules given on the command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CommandLineRules {
    /// Origins of connections that are allowed.
    pub allow: Vec<PeerMatcher>,
    /// Identities that are allowed. If `allow` has entries too, both must match.
    pub allow_identity: Vec<IdentityPattern>,
    /// Origins of connections that are denied, regardless of other rules.
    pub deny: Vec<PeerMatcher>,
}

/// All rules, in the order of evaluation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules(Vec<Arc<Rule>>);

/// Reason for a decision: the rule that matches, or the lack of one.
#[derive(Debug, Clone)]
pub enum Reason {
    /// This rule matches.
    Rule(Arc<Rule>),
    /// No rule allows a client with this address.
    NoRuleForAddress,
    /// No rule allows this client.
    NoRuleForClient,
    /// No rule allows this client to open this export.
    NoRuleForExport,
}

/// Decision about a client: `Ok` if it is allowed, `Err` if it is refused.
pub type Decision = Result<Reason, Reason>;

impl Default for Rules {
    /// Returns rules that admit only clients on this machine.
    fn default() -> Self {
        Self::from_command_line(&CommandLineRules::default())
    }
}

impl Rules {
    /// Creates the rules of the command line: `--deny` first, then one rule for `--allow` and
    /// `--allow-identity`. Without these two, clients on this machine are admitted.
    pub fn from_command_line(options: &CommandLineRules) -> Self {
        let mut allow = Rule::new(Action::Allow, Origin::Allow);
        allow.peers.clone_from(&options.allow);
        allow.identities.clone_from(&options.allow_identity);
        if options.allow_identity.is_empty() {
            // The permissions of a Unix socket authorize its clients. A virtual machine is another
            // machine, and no permissions apply to it.
            if !allow.peers.contains(&PeerMatcher::Unix) {
                allow.peers.push(PeerMatcher::Unix);
            }
            if options.allow.is_empty() {
                allow.origin = Origin::Default;
                allow.peers.extend(Network::loopback().map(PeerMatcher::from));
            }
        }
        Self::with_denials(&options.deny, vec![allow])
    }

    /// Creates rules from `--deny`, followed by the rules of a file.
    pub fn from_file(deny: &[PeerMatcher], rules: Vec<Rule>) -> Self {
        Self::with_denials(deny, rules)
    }

    fn with_denials(deny: &[PeerMatcher], rules: Vec<Rule>) -> Self {
        let denials = deny.iter().map(|peer| {
            let mut rule = Rule::new(Action::Deny, Origin::Deny);
            rule.peers = vec![*peer];
            rule
        });
        Self(denials.chain(rules).map(Arc::new).collect())
    }

    /// Evaluates the rules for a client, based on the facts known so far. As long as some are
    /// missing, returns `Ok` if the client may still turn out to be allowed.
    ///
    /// # Errors
    /// The client isn't authorized to connect, or to open the export.
    pub fn evaluate(&self, request: &AccessRequest<'_>) -> Decision {
        for rule in &self.0 {
            match (rule.match_request(request), rule.action) {
                (MatchResult::No, _) | (MatchResult::Maybe, Action::Deny) => {}
                (MatchResult::Yes | MatchResult::Maybe, Action::Allow) => {
                    return Ok(Reason::Rule(rule.clone()));
                }
                (MatchResult::Yes, Action::Deny) => return Err(Reason::Rule(rule.clone())),
            }
        }
        Err(match (request.identity, request.export) {
            (_, Fact::Known(_)) => Reason::NoRuleForExport,
            (Fact::Known(_), _) => Reason::NoRuleForClient,
            _ => Reason::NoRuleForAddress,
        })
    }

    /// Returns true if the rules admit only local peers (loopback, Unix, vsock). Data sent to these
    /// crosses no network.
    pub fn is_local_only(&self) -> bool {
        let is_local =
            |rule: &Rule| !rule.peers.is_empty() && rule.peers.iter().all(PeerMatcher::is_local);
        self.0.iter().filter(|rule| rule.action == Action::Allow).all(|rule| is_local(rule))
    }

    /// Returns true if the rules may admit a virtual machine.
    pub fn may_admit_vsock(&self) -> bool {
        let is_open = |rule: &Rule| {
            rule.peers.is_empty()
                || rule.peers.iter().any(|peer| matches!(peer, PeerMatcher::Vsock(_)))
        };
        self.0.iter().any(|rule| rule.action == Action::Allow && is_open(rule))
    }

    /// Returns true if any rule has an identity criterion.
    pub fn use_identities(&self) -> bool {
        self.0.iter().any(|rule| !rule.identities.is_empty())
    }

    /// Returns true if decisions depend on the time.
    pub fn depend_on_time(&self) -> bool {
        let depends =
            |rule: &Rule| !rule.windows.is_empty() || rule.from.is_some() || rule.until.is_some();
        self.0.iter().any(|rule| depends(rule))
    }
}

/// Writes a summary of the clients that are admitted, for people.
impl fmt::Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of_file = self.0.iter().filter(|rule| matches!(rule.origin, Origin::File { .. }));
        match of_file.count() {
            0 => {}
            1 => f.write_str("clients that 1 rule of the file allows")?,
            count => write!(f, "clients that {count} rules of the file allow")?,
        }
        for rule in &self.0 {
            match rule.origin {
                Origin::Default => f.write_str("this machine only")?,
                Origin::Allow => {
                    // Without identities, clients of Unix sockets are allowed even if `unix` isn't
                    // given, so the entry isn't shown beside others.
                    let is_shown = |peer: &&PeerMatcher| {
                        **peer != PeerMatcher::Unix || !rule.identities.is_empty()
                    };
                    let mut networks: Vec<_> = rule.peers.iter().filter(is_shown).collect();
                    if networks.is_empty() {
                        networks = rule.peers.iter().collect();
                    }
                    match (rule.identities.as_slice(), networks.as_slice()) {
                        ([], networks) => f.write_str(&list(networks))?,
                        (identities, []) => f.write_str(&list(identities))?,
                        (identities, networks) => {
                            write!(f, "{} from {}", list(identities), list(networks))?;
                        }
                    }
                }
                Origin::Deny | Origin::File { .. } => {}
            }
        }
        let denied: Vec<_> = self
            .0
            .iter()
            .filter(|rule| rule.origin == Origin::Deny)
            .flat_map(|rule| &rule.peers)
            .collect();
        if denied.is_empty() { Ok(()) } else { write!(f, " except {}", list(&denied)) }
    }
}

impl Reason {
    /// Returns the stable label for log fields and audit events.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Rule(rule) => match (&rule.origin, rule.action) {
                (Origin::Default, _) => "default",
                (_, Action::Allow) => "allowed_by_rule",
                (_, Action::Deny) => "denied_by_rule",
            },
            Self::NoRuleForAddress => "no_rule_for_address",
            Self::NoRuleForClient => "no_rule_for_client",
            Self::NoRuleForExport => "no_rule_for_export",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule(rule) => match (&rule.origin, rule.action) {
                (Origin::Default, _) => f.write_str("local client, allowed by default"),
                (_, Action::Allow) => write!(f, "allowed by {rule}"),
                (_, Action::Deny) => write!(f, "denied by {rule}"),
            },
            Self::NoRuleForAddress => f.write_str("no rule allows this address"),
            Self::NoRuleForClient => f.write_str("no rule allows this client"),
            Self::NoRuleForExport => f.write_str("no rule allows access to this export"),
        }
    }
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
