//! Constraints between options. They apply to the merged options, whichever source sets them.

use std::collections::{BTreeMap, BTreeSet};

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command};

use super::problem::ProblemKind;

/// Options that exclude each other.
const CONFLICTS: [(&str, &[&str]); 4] = [
    ("rules", &["allow", "allow-identity"]),
    ("insecure-no-tls", &["tls-cert"]),
    ("stdio", &["listen", "socket-mode", "socket-group", "monitor", "control-socket"]),
    ("quiet", &["verbose"]),
];

/// Options that require another one.
const REQUIREMENTS: [(&str, &str); 7] = [
    ("tls-cert", "tls-key"),
    ("tls-key", "tls-cert"),
    ("tls-client-ca", "tls-cert"),
    ("tls-client-crl", "tls-client-ca"),
    ("tls-client-auth", "tls-client-ca"),
    ("monitor-tls-cert", "monitor-tls-key"),
    ("monitor-tls-key", "monitor-tls-cert"),
];

/// Source of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Source {
    CommandLine,
    File {
        /// Line number, starting at 1.
        line: usize,
    },
    Credential,
}

impl Source {
    /// Returns the name of an option as this source spells it.
    fn name(self, key: &str) -> String {
        if self == Self::CommandLine { format!("--{key}") } else { key.to_owned() }
    }

    /// Returns the line of the file.
    pub(super) fn line(self) -> Option<usize> {
        if let Self::File { line } = self { Some(line) } else { None }
    }
}

/// Options that are set, by key, with the source that takes precedence.
#[derive(Debug, Clone, Default)]
pub(super) struct OptionSources {
    set: BTreeMap<String, Source>,
    /// Keys of the file that are ignored since they contradict the command line.
    overridden: BTreeSet<String>,
}

impl OptionSources {
    /// Returns the options of `command` that the command line sets.
    pub(super) fn of_command_line(command: &Command, matches: &ArgMatches) -> Self {
        let is_set = |arg: &&Arg| {
            matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine)
        };
        let keys = command.get_arguments().filter(is_set).filter_map(Arg::get_long);
        let set = keys.map(|key| (key.to_owned(), Source::CommandLine)).collect();
        Self { set, overridden: BTreeSet::new() }
    }

    /// Adds the options of the file, except for those that the command line sets or conflicts
    /// with, and for those that require one of the latter.
    pub(super) fn add_file(&mut self, options: impl Iterator<Item = (String, usize)>) {
        let mut file: BTreeMap<String, usize> =
            options.filter(|(key, _)| !self.set.contains_key(key)).collect();
        let conflicts = file.keys().filter(|key| self.conflicts(key).next().is_some());
        self.overridden = conflicts.cloned().collect();
        while let Some(lost) = file.keys().find(|key| {
            !self.overridden.contains(*key)
                && requirement(key).is_some_and(|needed| self.overridden.contains(needed))
        }) {
            self.overridden.insert(lost.clone());
        }
        file.retain(|key, _| !self.overridden.contains(key));
        self.set.extend(file.into_iter().map(|(key, line)| (key, Source::File { line })));
    }

    /// Adds an option that a credential sets.
    pub(super) fn add_credential(&mut self, key: &str) {
        self.set.insert(key.to_owned(), Source::Credential);
    }

    /// Returns true if the command line or the file determines the value of an option, if only by
    /// excluding it.
    pub(super) fn determine(&self, key: &str) -> bool {
        self.set.contains_key(key)
            || self.overridden.contains(key)
            || self.conflicts(key).next().is_some()
    }

    /// Returns true if the option of the file is used.
    pub(super) fn uses_file(&self, key: &str) -> bool {
        matches!(self.set.get(key), Some(Source::File { .. }))
    }

    /// Returns true if any source sets an option.
    pub(super) fn contains(&self, key: &str) -> bool {
        self.set.contains_key(key)
    }

    /// Returns all violations of constraints, with the source of the option.
    pub(super) fn violations(&self) -> Vec<(Source, ProblemKind)> {
        let mut violations = Vec::new();
        for (key, &source) in &self.set {
            // Each conflict is reported for the later option.
            let conflicts = self.conflicts(key).filter(|other| *other < (source, key.as_str()));
            violations.extend(conflicts.map(|(other_source, other)| {
                let (key, other) = (source.name(key), other_source.name(other));
                (source, ProblemKind::Conflict { key, other, line: other_source.line() })
            }));
            if let Some(needed) = requirement(key).filter(|needed| !self.contains(needed)) {
                let (key, needed) = (source.name(key), source.name(needed));
                violations.push((source, ProblemKind::Requirement { key, needed }));
            }
        }
        violations
    }

    /// Returns the options that are set and that conflict with `key`.
    fn conflicts(&self, key: &str) -> impl Iterator<Item = (Source, &str)> {
        let others = self.set.iter().map(|(other, source)| (*source, other.as_str()));
        others.filter(move |(_, other)| {
            let excludes = |one: &str, other: &str| {
                CONFLICTS.iter().any(|(key, others)| *key == one && others.contains(&other))
            };
            excludes(key, other) || excludes(other, key)
        })
    }
}

/// Returns the option that `key` requires.
fn requirement(key: &str) -> Option<&'static str> {
    REQUIREMENTS.iter().find(|(option, _)| *option == key).map(|(_, needed)| *needed)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    fn sources(command_line: &[&str], file: &[(&str, usize)]) -> OptionSources {
        let set = command_line.iter().map(|key| ((*key).to_owned(), Source::CommandLine));
        let mut sources = OptionSources { set: set.collect(), ..OptionSources::default() };
        sources.add_file(file.iter().map(|(key, line)| ((*key).to_owned(), *line)));
        sources
    }

    #[test]
    fn constraints_name_existing_options() {
        let command = Cli::command();
        let conflicts = CONFLICTS.iter().flat_map(|(key, others)| others.iter().chain([key]));
        for key in conflicts.chain(REQUIREMENTS.iter().flat_map(|(key, needed)| [key, needed])) {
            assert!(command.get_arguments().any(|arg| arg.get_long() == Some(key)), "{key}");
        }
    }

    #[test]
    fn violations_name_the_later_option() {
        let file = [("rules", 2), ("allow", 1), ("allow-identity", 3), ("tls-client-ca", 4)];
        let violations = sources(&["tls-key"], &file).violations();
        let texts = violations.iter().map(|(source, what)| format!("{:?}: {what}", source.line()));
        assert_eq!(
            texts.collect::<Vec<_>>(),
            [
                "Some(3): allow-identity conflicts with rules, line 2",
                "Some(2): rules conflicts with allow, line 1",
                "Some(4): tls-client-ca requires tls-cert",
                "None: --tls-key requires --tls-cert",
            ]
        );
    }
}
