//! Merges the command line, the configuration file and credentials. Conflicts and requirements
//! between options are determined by clap.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, Id};

use super::file::{FileContents, OptionEntry};
use super::problem::{ConfigProblem, ProblemKind};

/// Names of the credentials under systemd's `LoadCredential=`.
const CERTIFICATE: &str = "hexz-nbd.tls-cert";
const KEY: &str = "hexz-nbd.tls-key";

/// Placeholder for the archives of a file where clap checks that there are any.
const ARCHIVES_PLACEHOLDER: &str = "[exports]";

/// Returns the command without requirements and conflicts: missing options may be in the file,
/// and options of the file that conflict with the command line are dropped.
pub(super) fn without_constraints(command: Command) -> Command {
    command.mut_args(|arg| {
        arg.required(false)
            .required_unless_present(Resettable::<Id>::Reset)
            .requires(Resettable::<Id>::Reset)
            .conflicts_with(Resettable::<Id>::Reset)
    })
}

/// Options from all sources, in order of precedence.
pub(super) struct Merge<'a> {
    command: &'a Command,
    /// Keys that the command line sets.
    command_line_keys: Vec<String>,
    names_archives: bool,
    /// Options of the file and of credentials that apply.
    applied: Vec<OptionEntry>,
    /// Keys of the file that don't apply, since they conflict with the command line.
    overridden: Vec<String>,
}

impl<'a> Merge<'a> {
    /// Starts with the leniently parsed command line.
    pub(super) fn new(command: &'a Command, command_line: &ArgMatches) -> Self {
        let is_said = |arg: &&Arg| {
            command_line.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine)
        };
        let arguments = command.get_arguments().filter(is_said);
        Self {
            command,
            command_line_keys: arguments
                .filter_map(|arg| Some(arg.get_long()?.to_owned()))
                .collect(),
            names_archives: command.get_positionals().any(|arg| is_said(&arg)),
            applied: Vec::new(),
            overridden: Vec::new(),
        }
    }

    /// Adds the options of the file that the command line neither sets nor conflicts with.
    /// Options that require a dropped one are dropped as well.
    pub(super) fn add_file(&mut self, file: &FileContents) {
        let (kept, dropped): (Vec<_>, Vec<_>) = file.entries.iter().cloned().partition(|entry| {
            let contradicts = self
                .command_line_keys
                .iter()
                .any(|command_line| self.conflict(command_line, &entry.key));
            !self.command_line_keys.contains(&entry.key) && !contradicts
        });
        let dropped = dropped.into_iter().map(|entry| entry.key);
        self.overridden = dropped.filter(|key| !self.command_line_keys.contains(key)).collect();
        self.applied = kept;
        loop {
            let lost = |entry: &OptionEntry| {
                self.requirements(entry).iter().any(|needed| self.overridden.contains(needed))
            };
            let (lost, kept) = self.applied.iter().cloned().partition::<Vec<_>, _>(lost);
            if lost.is_empty() {
                return;
            }
            self.overridden.extend(lost.into_iter().map(|entry| entry.key));
            self.applied = kept;
        }
    }

    /// Adds certificate and key from credentials, unless other options decide about them.
    pub(super) fn add_credentials(&mut self, folder: Option<&Path>) -> Result<(), ConfigProblem> {
        let Some((certificate, key)) = folder.map(|it| (it.join(CERTIFICATE), it.join(KEY))) else {
            return Ok(());
        };
        let is_decided = |key: &str| {
            self.has(key)
                || self.overridden.iter().any(|dropped| dropped == key)
                || self.keys().any(|other| self.conflict(other, key))
        };
        if is_decided("tls-cert") || is_decided("tls-key") {
            return Ok(());
        }
        let missing = |path: PathBuf, other| {
            Err(ConfigProblem { path, line: None, what: ProblemKind::OneCredential(other) })
        };
        // If it can't be checked, assume that it exists: falling back to no TLS would be unsafe.
        let is_there = |path: &Path| path.try_exists().unwrap_or(true);
        match (is_there(&certificate), is_there(&key)) {
            (false, false) => return Ok(()),
            (true, false) => return missing(key, CERTIFICATE),
            (false, true) => return missing(certificate, KEY),
            (true, true) => {}
        }
        for (key, path) in [("tls-cert", certificate), ("tls-key", key)] {
            let mut argument = OsString::from(format!("--{key}="));
            argument.push(path);
            let entry = OptionEntry { key: key.to_owned(), line: None, arguments: vec![argument] };
            self.applied.push(entry);
        }
        Ok(())
    }

    /// Returns the problems of options of the file that conflict with each other, or lack options
    /// that they require.
    pub(super) fn problems(&self, path: &Path) -> Vec<ConfigProblem> {
        let mut problems = Vec::new();
        let mut problem =
            |line, what| problems.push(ConfigProblem { path: path.to_owned(), line, what });
        let mut before: Vec<&OptionEntry> = Vec::new();
        for entry in self.applied.iter().filter(|entry| entry.line.is_some()) {
            let key = entry.key.clone();
            for other in before.iter().filter(|other| self.conflict(&other.key, &key)) {
                let (other, other_line) = (other.key.clone(), other.line);
                problem(entry.line, ProblemKind::Conflict { key: key.clone(), other, other_line });
            }
            for needs in self.requirements(entry).into_iter().filter(|needed| !self.has(needed)) {
                problem(entry.line, ProblemKind::MissingRequirement { key: key.clone(), needs });
            }
            before.push(entry);
        }
        problems
    }

    /// Returns true if the archives of the file are served; those of the command line take
    /// precedence.
    pub(super) fn uses_file_archives(&self) -> bool {
        !self.names_archives
    }

    /// Returns a command line with all options.
    pub(super) fn arguments(&self, command_line: &[OsString], archives: bool) -> Vec<OsString> {
        let (program, command_line) = match command_line.split_first() {
            Some((program, command_line)) => (program.as_os_str(), command_line),
            None => (OsStr::new("hexz-nbd"), command_line),
        };
        let kept = self.applied.iter().flat_map(|entry| &entry.arguments).map(OsString::as_os_str);
        let archives = archives.then_some(OsStr::new(ARCHIVES_PLACEHOLDER));
        let command_line = command_line.iter().map(OsString::as_os_str);
        [program]
            .into_iter()
            .chain(kept)
            .chain(archives)
            .chain(command_line)
            .map(OsStr::to_owned)
            .collect()
    }

    /// Attributes a remaining error to the file; `None` if it concerns the command line.
    pub(super) fn attribute_to_file(
        &self,
        error: &clap::Error,
        path: &Path,
    ) -> Option<ConfigProblem> {
        let names = argument_names(error);
        let is_of_file = |name: &String| {
            let key = name.trim_start_matches('-');
            self.applied.iter().any(|entry| entry.line.is_some() && entry.key == key)
        };
        let is_missing = error.kind() == ErrorKind::MissingRequiredArgument;
        let what = match names.iter().find(|name| !name.starts_with("--")) {
            // The archives are the only positional arguments.
            Some(_) if is_missing => ProblemKind::NothingToServe,
            _ if !is_missing && names.iter().any(is_of_file) => {
                ProblemKind::Combination(names.join(", "))
            }
            _ => return None,
        };
        Some(ConfigProblem { path: path.to_owned(), line: None, what })
    }

    fn keys(&self) -> impl Iterator<Item = &str> {
        let kept = self.applied.iter().map(|entry| entry.key.as_str());
        self.command_line_keys.iter().map(String::as_str).chain(kept)
    }

    fn has(&self, key: &str) -> bool {
        self.keys().any(|other| other == key)
    }

    /// Returns true if two options conflict.
    fn conflict(&self, one: &str, other: &str) -> bool {
        let says = |one: &str, other: &str| {
            let option = |key| self.command.get_arguments().find(|arg| arg.get_long() == Some(key));
            option(one).is_some_and(|one| {
                let conflicts = self.command.get_arg_conflicts_with(one);
                conflicts.iter().any(|arg| arg.get_long() == Some(other))
            })
        };
        says(one, other) || says(other, one)
    }

    /// Returns the other options that an option requires: those that clap misses if it is given
    /// alone.
    fn requirements(&self, entry: &OptionEntry) -> Vec<String> {
        let alone = [OsString::from("hexz-nbd")].into_iter().chain(entry.arguments.iter().cloned());
        let alone = alone.chain([ARCHIVES_PLACEHOLDER.into()]);
        match self.command.clone().try_get_matches_from(alone) {
            Err(error) if error.kind() == ErrorKind::MissingRequiredArgument => {
                let names = argument_names(&error).into_iter();
                names.map(|name| name.trim_start_matches('-').to_owned()).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// Returns the names of the arguments that an error is about, without their values.
fn argument_names(error: &clap::Error) -> Vec<String> {
    let texts = [ContextKind::InvalidArg, ContextKind::PriorArg].into_iter().flat_map(|kind| {
        match error.get(kind) {
            Some(ContextValue::String(text)) => vec![text.clone()],
            Some(ContextValue::Strings(texts)) => texts.clone(),
            _ => Vec::new(),
        }
    });
    texts.map(|text| text.split(' ').next().unwrap_or_default().to_owned()).collect()
}
