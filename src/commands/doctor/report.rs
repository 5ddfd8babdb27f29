//! The findings of an examination, as data. `text.rs` and `json.rs` render them.

use std::fmt;
use std::time::Duration;

use nbd_telemetry::escape;
use serde_json::{Map, Value};

/// Maximum length of text from a server that is shown, in characters.
const MAX_SHOWN: usize = 200;

/// Outcome of a step, ordered from best to worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outcome {
    /// Success.
    Good,
    /// Success, but something may fail for some clients.
    Warning,
    /// Failure.
    Bad,
}

/// Side on which something has to be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// The client's machine, or the client's options.
    Client,
    /// The server's machine, or the server's configuration.
    Server,
    /// The network between the two.
    Network,
}

/// A recommended change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Advice {
    pub(crate) side: Side,
    /// Label of the problem that it is about.
    pub(crate) reason: &'static str,
    pub(crate) text: String,
}

/// One thing that was tried, and its result.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Step {
    /// Label of the thing that was tried, such as `greeting`.
    pub(crate) name: &'static str,
    pub(crate) outcome: Outcome,
    /// Labels of the problems; empty if the outcome is good.
    pub(crate) reasons: Vec<&'static str>,
    /// Result, in one phrase.
    pub(crate) found: String,
    /// Further lines, for people.
    pub(crate) lines: Vec<String>,
    /// The same information, for programs.
    pub(crate) details: Map<String, Value>,
    pub(crate) advice: Vec<Advice>,
    pub(crate) took: Option<Duration>,
}

impl Step {
    pub(crate) fn good(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            outcome: Outcome::Good,
            reasons: Vec::new(),
            found: found.into(),
            lines: Vec::new(),
            details: Map::new(),
            advice: Vec::new(),
            took: None,
        }
    }

    pub(crate) fn warning(
        name: &'static str,
        reason: &'static str,
        found: impl Into<String>,
    ) -> Self {
        Self::good(name, found).problem(Outcome::Warning, reason)
    }

    pub(crate) fn bad(name: &'static str, reason: &'static str, found: impl Into<String>) -> Self {
        Self::good(name, found).problem(Outcome::Bad, reason)
    }

    /// Adds a problem, given by its label. The outcome never becomes better.
    pub(crate) fn problem(mut self, outcome: Outcome, reason: &'static str) -> Self {
        self.outcome = self.outcome.max(outcome);
        self.reasons.push(reason);
        self
    }

    pub(crate) fn line(mut self, text: impl Into<String>) -> Self {
        self.lines.push(text.into());
        self
    }

    pub(crate) fn detail(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.details.insert(key.to_owned(), value.into());
        self
    }

    /// Adds advice on the latest problem.
    pub(crate) fn advise(mut self, side: Side, text: impl Into<String>) -> Self {
        let reason = self.reasons.last().copied().unwrap_or_default();
        self.advice.push(Advice { side, reason, text: text.into() });
        self
    }

    pub(crate) fn took(mut self, time: Duration) -> Self {
        self.took = Some(time);
        self
    }
}

/// All steps, in the order in which they were tried.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) target: String,
    pub(crate) steps: Vec<Step>,
}

impl Report {
    pub(crate) fn new(target: String) -> Self {
        Self { target, steps: Vec::new() }
    }

    pub(crate) fn add(&mut self, step: Step) {
        self.steps.push(step);
    }

    /// Returns the overall outcome, which is that of the worst step.
    pub(crate) fn outcome(&self) -> Outcome {
        self.steps.iter().map(|step| step.outcome).max().unwrap_or(Outcome::Good)
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Client => "client",
            Self::Server => "server",
            Self::Network => "network",
        })
    }
}

/// Escapes text from a server, so that it can disturb neither a terminal nor a reader: one line, at
/// most `MAX_SHOWN` characters, and no invisible characters.
pub(crate) fn escape_and_cut(text: &str) -> String {
    match text.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}…", escape::name(text.get(..end).unwrap_or_default())),
        None => escape::name(text).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_servers_is_escaped_and_cut() {
        assert_eq!(
            escape_and_cut("it's \"this\"\n\u{1b}[31m\u{202e}\0"),
            r#"it's "this"\n\u{1b}[31m\u{202e}\0"#
        );
        let long = escape_and_cut(&"\u{7}".repeat(10_000));
        assert!(long.ends_with('…') && long.len() < 2000, "{}", long.len());
    }

    #[test]
    fn the_worst_step_determines_the_outcome() {
        let mut report = Report::new("x".to_owned());
        assert_eq!(report.outcome(), Outcome::Good);
        report.add(Step::warning("a", "x", "b"));
        report.add(Step::good("c", "d"));
        assert_eq!(report.outcome(), Outcome::Warning);
        report.add(Step::bad("e", "x", "f").problem(Outcome::Warning, "y"));
        assert_eq!(report.outcome(), Outcome::Bad);
    }
}
