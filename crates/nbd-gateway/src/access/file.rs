//! Parses the rules file, which is TOML.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use serde::Deserialize;
use toml::Spanned;
use toml::value::{Date, Datetime, Offset, Time};

use super::identity::{IdentityPattern, IdentityPatternError};
use super::network::{PeerMatcher, PeerMatcherError};
use super::pattern::{Pattern, PatternError};
use super::rules::{Action, Origin, Rule};
use super::window::{TimeWindow, TimeWindowError, Timestamp};

/// Maximum size of a rules file, in bytes.
const MAX_FILE: u64 = 1024 * 1024;

/// Maximum number of rules in a file. Each client may be checked against all of them.
const MAX_RULES: usize = 10_000;

/// Path of a rules file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RulesFile(pub PathBuf);

/// An error in a rules file.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", nbd_telemetry::escape::path(.path))]
pub struct RulesFileError {
    /// Path of the file.
    pub path: PathBuf,
    /// Problem with the file.
    pub problem: RulesFileProblem,
}

/// Problem with a rules file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RulesFileProblem {
    /// The file can't be read.
    #[error("can't be read: {0}")]
    Io(#[from] io::Error),
    /// The file is larger than any rules file should be.
    #[error("the file is larger than {MAX_FILE} bytes")]
    TooLarge,
    /// The file isn't valid TOML, or has unknown keys.
    #[error("line {line}: {message}")]
    Toml {
        /// Line of the error, counted from 1.
        line: usize,
        /// Message of the parser.
        message: String,
    },
    /// The file has no rule, so nobody could connect. More likely, something is missing.
    #[error("no [[rule]] found; to admit nobody, add one with action = \"deny\"")]
    NoRule,
    /// The file has more rules than the maximum.
    #[error("the file has more than {MAX_RULES} rules")]
    TooManyRules,
    /// A single rule is invalid.
    #[error("rule {number}, line {line}: {problem}")]
    Rule {
        /// Number of the rule, counted from 1.
        number: usize,
        /// Line on which the rule begins, counted from 1.
        line: usize,
        /// Problem with the rule.
        problem: RuleProblem,
    },
}

/// Problem with a single rule.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuleProblem {
    /// An empty list, which could mean everybody or nobody.
    #[error("{0} = [] is ambiguous: omit {0} to match everything, or list some")]
    EmptyList(&'static str),
    /// An invalid network.
    #[error("network: {0}")]
    Network(#[from] PeerMatcherError),
    /// An invalid identity pattern.
    #[error("identity: {0}")]
    Identity(#[from] IdentityPatternError),
    /// An invalid export pattern.
    #[error("export: {0}")]
    Export(#[from] PatternError),
    /// An invalid time window.
    #[error("hours: {0}")]
    Hours(#[from] TimeWindowError),
    /// A time without a date, a time of day or an offset from UTC.
    #[error("{0} needs a date, a time and an offset from UTC, as 2027-01-31T18:00:00Z has")]
    InvalidTime(&'static str),
    /// An empty period.
    #[error("until must be later than from")]
    EmptyPeriod,
}

impl RulesFileProblem {
    /// Returns the stable label for log fields.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Io(_) => "rules_unreadable",
            Self::TooLarge => "rules_too_large",
            Self::Toml { .. } => "rules_malformed",
            Self::NoRule => "rules_empty",
            Self::TooManyRules => "too_many_rules",
            Self::Rule { .. } => "invalid_rule",
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RulesToml {
    #[serde(default)]
    rule: Vec<Spanned<RuleToml>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleToml {
    name: Option<String>,
    action: ActionToml,
    network: Option<OneOrMany>,
    identity: Option<OneOrMany>,
    export: Option<OneOrMany>,
    hours: Option<OneOrMany>,
    from: Option<Datetime>,
    until: Option<Datetime>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum ActionToml {
    Allow,
    Deny,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl RulesFile {
    /// Reads the rules, in the order of the file.
    ///
    /// # Errors
    /// The file can't be read, or any part of it is invalid; then none of its rules applies.
    pub fn read(&self) -> Result<Vec<Rule>, RulesFileError> {
        let text = read(&self.0);
        text.and_then(|text| parse(&text, &self.0))
            .map_err(|problem| RulesFileError { path: self.0.clone(), problem })
    }
}

fn read(path: &Path) -> Result<String, RulesFileProblem> {
    let mut text = String::new();
    File::open(path)?.take(MAX_FILE + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE { Err(RulesFileProblem::TooLarge) } else { Ok(text) }
}

/// Parses the rules in `text`, the content of the file at `path`.
///
/// # Errors
/// Any part of the text is invalid.
pub fn parse(text: &str, path: &Path) -> Result<Vec<Rule>, RulesFileProblem> {
    let file: RulesToml = toml::from_str(text).map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        RulesFileProblem::Toml { line, message: error.message().replace('\n', "; ") }
    })?;
    if file.rule.is_empty() {
        return Err(RulesFileProblem::NoRule);
    }
    if file.rule.len() > MAX_RULES {
        return Err(RulesFileProblem::TooManyRules);
    }
    let path = Arc::new(path.to_owned());
    let mut rules = Vec::with_capacity(file.rule.len());
    let mut line = 1;
    let mut counted = 0;
    for (position, written) in file.rule.into_iter().enumerate() {
        // Rules come in the order of the text, so each line is counted once.
        let start = written.span().start;
        let before = text.get(counted..start).unwrap_or_default();
        line += before.matches('\n').count();
        counted = start.max(counted);
        let number = position + 1;
        let origin = Origin::File { path: Arc::clone(&path), number, line };
        let rule = build_rule(written.into_inner(), origin)
            .map_err(|problem| RulesFileProblem::Rule { number, line, problem })?;
        rules.push(rule);
    }
    Ok(rules)
}

fn build_rule(written: RuleToml, origin: Origin) -> Result<Rule, RuleProblem> {
    let action = match written.action {
        ActionToml::Allow => Action::Allow,
        ActionToml::Deny => Action::Deny,
    };
    let rule = Rule {
        origin,
        name: written.name,
        action,
        peers: parse_list::<PeerMatcher, _>("network", written.network)?,
        identities: parse_list::<IdentityPattern, _>("identity", written.identity)?,
        exports: parse_list::<Pattern, _>("export", written.export)?,
        windows: parse_list::<TimeWindow, _>("hours", written.hours)?,
        from: written.from.map(|time| parse_time("from", time)).transpose()?,
        until: written.until.map(|time| parse_time("until", time)).transpose()?,
    };
    match (rule.from, rule.until) {
        (Some(from), Some(until)) if until <= from => Err(RuleProblem::EmptyPeriod),
        _ => Ok(rule),
    }
}

fn parse_list<T, E>(key: &'static str, written: Option<OneOrMany>) -> Result<Vec<T>, RuleProblem>
where
    T: FromStr<Err = E>,
    RuleProblem: From<E>,
{
    let texts = match written {
        None => return Ok(Vec::new()),
        Some(OneOrMany::One(text)) => vec![text],
        Some(OneOrMany::Many(texts)) if texts.is_empty() => {
            return Err(RuleProblem::EmptyList(key));
        }
        Some(OneOrMany::Many(texts)) => texts,
    };
    Ok(texts.iter().map(|text| text.parse()).collect::<Result<_, E>>()?)
}

fn parse_time(key: &'static str, written: Datetime) -> Result<Timestamp, RuleProblem> {
    let unclear = RuleProblem::InvalidTime(key);
    let (Some(date), Some(time), Some(offset)) = (written.date, written.time, written.offset)
    else {
        return Err(unclear);
    };
    let minutes = match offset {
        Offset::Z => 0,
        Offset::Custom { minutes } => i64::from(minutes),
    };
    let Time { hour, minute, second, .. } = time;
    let of_day =
        i64::from(hour) * 3600 + i64::from(minute) * 60 + i64::from(second.unwrap_or_default());
    let seconds = days_since_1970(date) * 86_400 + of_day - minutes * 60;
    u64::try_from(seconds).map(Timestamp).map_err(|_| unclear)
}

/// Returns the number of days from 1970-01-01 to a date of the Gregorian calendar. Years are
/// counted from March, so that a leap day is the last day of its year.
fn days_since_1970(date: Date) -> i64 {
    const DAYS_OF_400_YEARS: i64 = 146_097;
    const FROM_MARCH_0_TO_1970: i64 = 719_468;
    let (year, month, day) = (i64::from(date.year), i64::from(date.month), i64::from(date.day));
    let year = if month <= 2 { year - 1 } else { year };
    let month_from_march = (month + 9) % 12;
    let of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year;
    era * DAYS_OF_400_YEARS + of_era - FROM_MARCH_0_TO_1970
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(text: &str) -> Result<Vec<Rule>, RulesFileProblem> {
        parse(text, Path::new("rules.toml"))
    }

    #[test]
    fn all_keys_of_a_rule_are_parsed() {
        let text = r#"
            # Backups at night.
            [[rule]]
            name = "backup"
            action = "allow"
            network = ["10.0.0.0/8", "unix"]
            identity = "spiffe://corp/backup/*"
            export = ["web-*", "db.hxz"]
            hours = "Mon-Fri 22:00-06:00"
            from = 2026-12-01T00:00:00Z
            until = 2027-01-01T02:00:00+02:00

            [[rule]]
            action = "deny"
        "#;
        let rules = rules(text).unwrap();
        let [first, second] = rules.as_slice() else { panic!("{rules:?}") };
        assert_eq!(first.to_string(), "rule 1, line 3 of rules.toml (backup)");
        assert_eq!((first.peers.len(), first.exports.len()), (2, 2));
        assert_eq!((first.identities.len(), first.windows.len()), (1, 1));
        assert_eq!(first.from, Some(Timestamp(1_796_083_200)));
        assert_eq!(first.until, Some(Timestamp(1_798_761_600)));
        assert_eq!(second.to_string(), "rule 2, line 13 of rules.toml");
        assert_eq!(second.action, Action::Deny);
    }

    #[test]
    fn invalid_rules_are_rejected() {
        for (text, label, named) in [
            ("", "rules_empty", "[[rule]]"),
            ("rule = []", "rules_empty", "[[rule]]"),
            ("nonsense", "rules_malformed", "line 1"),
            ("[[rule]]", "rules_malformed", "`action`"),
            ("[[rule]]\naction = \"permit\"", "rules_malformed", "`permit`"),
            (
                "\n[[rule]]\naction = \"allow\"\nnetwrok = \"::1\"",
                "rules_malformed",
                "line 4: unknown field `netwrok`",
            ),
            ("[[rules]]\naction = \"allow\"", "rules_malformed", "`rules`"),
            ("[[rule]]\naction = \"allow\"\nnetwork = 10", "rules_malformed", "line 3"),
            ("[[rule]]\naction = \"allow\"\nnetwork = []", "invalid_rule", "network = []"),
            (
                "[[rule]]\naction = \"allow\"\nnetwork = \"10.0.0.1/8\"",
                "invalid_rule",
                "rule 1, line 1: network: ",
            ),
            ("[[rule]]\naction = \"allow\"\nidentity = \"\"", "invalid_rule", "identity: "),
            ("[[rule]]\naction = \"allow\"\nexport = [\"\"]", "invalid_rule", "export: "),
            ("[[rule]]\naction = \"allow\"\nhours = \"always\"", "invalid_rule", "hours: "),
            ("[[rule]]\naction = \"allow\"\nfrom = 2026-12-01", "invalid_rule", "from "),
            ("[[rule]]\naction = \"allow\"\nuntil = 2026-12-01T00:00:00", "invalid_rule", "until "),
            (
                "[[rule]]\naction = \"allow\"\nfrom = 2026-12-01T00:00:00Z\nuntil = 2026-12-01T00:00:00Z",
                "invalid_rule",
                "until ",
            ),
        ] {
            let problem = rules(text).unwrap_err();
            assert_eq!(problem.label(), label, "{text}: {problem}");
            let message = problem.to_string();
            assert!(message.contains(named) && !message.contains('\n'), "{text}: {message}");
        }
    }

    #[test]
    fn times_are_converted_to_utc_seconds() {
        for (text, seconds) in [
            ("2026-12-01T00:00:00Z", 0),
            ("2026-12-01T01:02:03Z", 3723),
            ("2026-12-01T03:32:03+02:30", 3723),
            ("2026-11-30T23:02:03-02:00", 3723),
        ] {
            let rules = rules(&format!("[[rule]]\naction = \"allow\"\nfrom = {text}")).unwrap();
            assert_eq!(rules[0].from, Some(Timestamp(1_796_083_200 + seconds)), "{text}");
        }
    }

    #[test]
    fn file_size_and_rule_count_are_limited() {
        let rule = "[[rule]]\naction = \"allow\"\n";
        assert_eq!(rules(&rule.repeat(10_000)).unwrap().len(), 10_000);
        let error = parse(&rule.repeat(10_001), Path::new("x")).unwrap_err();
        assert!(matches!(error, RulesFileProblem::TooManyRules), "{error}");

        let folder = tempfile::tempdir().unwrap();
        let file = RulesFile(folder.path().join("rules.toml"));
        let padded = |length: usize| format!("{rule}#{}", "x".repeat(length - rule.len() - 1));
        std::fs::write(&file.0, padded(1 << 20)).unwrap();
        assert_eq!(file.read().unwrap().len(), 1);
        for length in [(1 << 20) + 1, 2 << 20] {
            std::fs::write(&file.0, padded(length)).unwrap();
            let error = file.read().unwrap_err();
            assert!(matches!(error.problem, RulesFileProblem::TooLarge), "{error}");
        }
    }

    #[test]
    fn dates_are_converted_to_days_since_1970() {
        let days = |year, month, day| days_since_1970(Date { year, month, day });
        assert_eq!(days(1970, 1, 1), 0);
        assert_eq!((days(2000, 2, 29), days(2000, 3, 1)), (11_016, 11_017));
        assert_eq!(days(2026, 11, 24), 20_781);
        assert_eq!(days(1969, 12, 31), -1);
    }
}
