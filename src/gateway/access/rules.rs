//! Rules, of which the first that fits a client judges it. Whom none fits may not come in.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use super::facts::{Facts, Known};
use super::identity::IdentityPattern;
use super::network::{Network, Place};
use super::pattern::Pattern;
use super::window::{Moment, TimeWindow};
use crate::escape;

/// What a rule does with whom it fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Lets them.
    Allow,
    /// Doesn't.
    Deny,
}

/// Where a rule was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nowhere: what holds unless something else is said.
    Default,
    /// `--allow` and `--allow-identity`.
    Allow,
    /// `--deny`.
    Deny,
    /// A rules file.
    File {
        /// Which.
        path: Arc<PathBuf>,
        /// The rule's number in it, from 1 on.
        number: usize,
        /// The line on which it begins, from 1 on.
        line: usize,
    },
}

/// A rule. It fits whoever fits each of its criteria; a criterion without an entry fits
/// everybody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Where it was written.
    pub origin: Origin,
    /// What its author calls it.
    pub name: Option<String>,
    /// What it does.
    pub action: Action,
    /// Where clients come from: one of these.
    pub places: Vec<Place>,
    /// Who they are: one of these.
    pub identities: Vec<IdentityPattern>,
    /// What they want: one of these.
    pub exports: Vec<Pattern>,
    /// When in the week: in one of these.
    pub windows: Vec<TimeWindow>,
    /// From when on it holds.
    pub from: Option<Moment>,
    /// From when on it doesn't hold any more.
    pub until: Option<Moment>,
}

/// Whether a rule fits, as far as that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fit {
    No,
    /// It depends on what isn't known yet.
    Maybe,
    Yes,
}

impl Rule {
    /// A rule without criteria.
    pub fn new(action: Action, origin: Origin) -> Self {
        Self {
            origin,
            name: None,
            action,
            places: Vec::new(),
            identities: Vec::new(),
            exports: Vec::new(),
            windows: Vec::new(),
            from: None,
            until: None,
        }
    }

    fn fit(&self, facts: &Facts<'_>) -> Fit {
        let identity = match facts.identity {
            Known::NotYet => Known::NotYet,
            Known::Known(None) => Known::Known(false),
            Known::Known(Some(identity)) => {
                Known::Known(self.identities.iter().any(|pattern| match self.action {
                    Action::Allow => pattern.matches(identity),
                    Action::Deny => pattern.may_mean(identity),
                }))
            }
        };
        let export = match facts.export {
            Known::NotYet => Known::NotYet,
            Known::Known(export) => {
                Known::Known(self.exports.iter().any(|pattern| pattern.matches(export)))
            }
        };
        let place = self.places.iter().any(|place| place.contains(facts.peer));
        let window = self.windows.iter().any(|window| window.contains(facts.now));
        let in_period = self.from.is_none_or(|from| from <= facts.now)
            && self.until.is_none_or(|until| facts.now < until);
        [
            criterion(self.places.is_empty(), Known::Known(place)),
            criterion(self.windows.is_empty(), Known::Known(window)),
            criterion(false, Known::Known(in_period)),
            criterion(self.identities.is_empty(), identity),
            criterion(self.exports.is_empty(), export),
        ]
        .into_iter()
        .min()
        .unwrap_or(Fit::No)
    }
}

fn criterion(is_empty: bool, fits: Known<bool>) -> Fit {
    match fits {
        _ if is_empty => Fit::Yes,
        Known::NotYet => Fit::Maybe,
        Known::Known(true) => Fit::Yes,
        Known::Known(false) => Fit::No,
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.origin {
            Origin::Default => f.write_str("default: this machine")?,
            Origin::Deny => write!(f, "--deny {}", list(&self.places))?,
            Origin::Allow => {
                f.write_str("--allow")?;
                if !self.places.is_empty() {
                    write!(f, " {}", list(&self.places))?;
                }
                if !self.identities.is_empty() {
                    write!(f, "-identity {}", list(&self.identities))?;
                }
            }
            Origin::File { path, number, line } => {
                write!(f, "rule {number}, line {line} of {}", escape::name(path.as_path()))?;
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

/// What the command line says of who may come in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CommandLine {
    /// Whose address may.
    pub allow: Vec<Place>,
    /// Who may: of those whose address may, if any were named.
    pub allow_identity: Vec<IdentityPattern>,
    /// Whose address may not, whatever else is said.
    pub deny: Vec<Place>,
}

/// All rules, in the order in which they are asked.
#[derive(Debug, Clone)]
pub struct Rules(Vec<Arc<Rule>>);

/// Why somebody may or may not come in: the rule that fits, or that none does.
#[derive(Debug, Clone)]
pub enum Reason {
    /// This one.
    Rule(Arc<Rule>),
    /// None allows whoever has this address.
    NoRuleForAddress,
    /// None allows whoever this is.
    NoRuleForClient,
    /// None allows this client this export.
    NoRuleForExport,
}

/// The judgement: `Ok` may, `Err` may not.
pub type Verdict = Result<Reason, Reason>;

impl Default for Rules {
    /// This machine may come in, and nobody else.
    fn default() -> Self {
        Self::of_command_line(&CommandLine::default())
    }
}

impl Rules {
    /// What the command line says: `--deny` first, then one rule of `--allow` and
    /// `--allow-identity`. Without them this machine may come in.
    pub fn of_command_line(said: &CommandLine) -> Self {
        let mut allow = Rule::new(Action::Allow, Origin::Allow);
        allow.places.clone_from(&said.allow);
        allow.identities.clone_from(&said.allow_identity);
        if said.allow_identity.is_empty() {
            // Whoever can open the socket is let in by its permissions. A virtual machine is
            // another machine, and there are no permissions for it.
            if !allow.places.contains(&Place::Unix) {
                allow.places.push(Place::Unix);
            }
            if said.allow.is_empty() {
                allow.origin = Origin::Default;
                allow.places.extend(Network::loopback().map(Place::from));
            }
        }
        Self::behind_denials(&said.deny, vec![allow])
    }

    /// What `--deny` says, and then the rules of a file.
    pub fn of_file(deny: &[Place], rules: Vec<Rule>) -> Self {
        Self::behind_denials(deny, rules)
    }

    fn behind_denials(deny: &[Place], rules: Vec<Rule>) -> Self {
        let denials = deny.iter().map(|place| {
            let mut rule = Rule::new(Action::Deny, Origin::Deny);
            rule.places = vec![*place];
            rule
        });
        Self(denials.chain(rules).map(Arc::new).collect())
    }

    /// Judges a client by what is known of it. As long as something isn't known, this
    /// says whether it may still turn out to be allowed.
    ///
    /// # Errors
    /// It may not come in, or open that export.
    pub fn judge(&self, facts: &Facts<'_>) -> Verdict {
        for rule in &self.0 {
            match (rule.fit(facts), rule.action) {
                (Fit::No, _) | (Fit::Maybe, Action::Deny) => {}
                (Fit::Yes | Fit::Maybe, Action::Allow) => return Ok(Reason::Rule(rule.clone())),
                (Fit::Yes, Action::Deny) => return Err(Reason::Rule(rule.clone())),
            }
        }
        Err(match (facts.identity, facts.export) {
            (_, Known::Known(_)) => Reason::NoRuleForExport,
            (Known::Known(_), _) => Reason::NoRuleForClient,
            _ => Reason::NoRuleForAddress,
        })
    }

    /// Whether nobody may come in but who is on this machine, virtual machines among them: what
    /// those are sent passes no network.
    pub fn is_local_only(&self) -> bool {
        let is_local =
            |rule: &Rule| !rule.places.is_empty() && rule.places.iter().all(Place::is_local);
        self.0.iter().filter(|rule| rule.action == Action::Allow).all(|rule| is_local(rule))
    }

    /// Whether a virtual machine may come in.
    pub fn are_open_to_vsock(&self) -> bool {
        let is_open = |rule: &Rule| {
            rule.places.is_empty()
                || rule.places.iter().any(|place| matches!(place, Place::Vsock(_)))
        };
        self.0.iter().any(|rule| rule.action == Action::Allow && is_open(rule))
    }

    /// Whether some rule asks who a client is.
    pub fn ask_for_identity(&self) -> bool {
        self.0.iter().any(|rule| !rule.identities.is_empty())
    }

    /// Whether what they say changes with time.
    pub fn depend_on_time(&self) -> bool {
        let depends =
            |rule: &Rule| !rule.windows.is_empty() || rule.from.is_some() || rule.until.is_some();
        self.0.iter().any(|rule| depends(rule))
    }
}

/// Who may come in, for people.
impl fmt::Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of_file = self.0.iter().filter(|rule| matches!(rule.origin, Origin::File { .. }));
        match of_file.count() {
            0 => {}
            1 => f.write_str("whom the one rule of the file allows")?,
            count => write!(f, "whom the {count} rules of the file allow")?,
        }
        for rule in &self.0 {
            match rule.origin {
                Origin::Default => f.write_str("this machine only")?,
                Origin::Allow => {
                    // Those of Unix sockets are let in beside others without being named.
                    let is_unix = |place: &&Place| **place == Place::Unix;
                    let networks = rule.places.iter().filter(|place| !is_unix(place));
                    let mut networks: Vec<_> = networks.collect();
                    if networks.is_empty() {
                        networks = rule.places.iter().filter(is_unix).collect();
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
            .flat_map(|rule| &rule.places)
            .collect();
        if denied.is_empty() { Ok(()) } else { write!(f, " except {}", list(&denied)) }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule(rule) => match (&rule.origin, rule.action) {
                (Origin::Default, _) => f.write_str("it is on this machine"),
                (_, Action::Allow) => write!(f, "allowed by {rule}"),
                (_, Action::Deny) => write!(f, "denied by {rule}"),
            },
            Self::NoRuleForAddress => f.write_str("not in any allowed network"),
            Self::NoRuleForClient => f.write_str("no rule allows this client"),
            Self::NoRuleForExport => f.write_str("no rule allows it to open that export"),
        }
    }
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
