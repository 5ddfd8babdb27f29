//! Merges the command line, the configuration file and credentials. Conflicts and requirements
//! between options are determined by clap.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, Id};

use super::file::{Entry, Written};
use super::problem::{Problem, What};

/// Names of the credentials under systemd's `LoadCredential=`.
const CERTIFICATE: &str = "hexz-nbd.tls-cert";
const KEY: &str = "hexz-nbd.tls-key";

/// Placeholder for the archives of a file where clap checks that there are any.
const ARCHIVES: &str = "[exports]";

/// Returns the command without requirements and conflicts: missing options may be in the file,
/// and options of the file that conflict with the command line are dropped.
pub(super) fn lenient(command: Command) -> Command {
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
    said: Vec<String>,
    names_archives: bool,
    /// Options of the file and of credentials that apply.
    kept: Vec<Entry>,
    /// Keys of the file that don't apply, since they conflict with the command line.
    dropped: Vec<String>,
}

impl<'a> Merge<'a> {
    /// Starts with the leniently parsed command line.
    pub(super) fn new(command: &'a Command, said: &ArgMatches) -> Self {
        let is_said =
            |arg: &&Arg| said.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine);
        let arguments = command.get_arguments().filter(is_said);
        Self {
            command,
            said: arguments.filter_map(|arg| Some(arg.get_long()?.to_owned())).collect(),
            names_archives: command.get_positionals().any(|arg| is_said(&arg)),
            kept: Vec::new(),
            dropped: Vec::new(),
        }
    }

    /// Adds the options of the file that the command line neither sets nor conflicts with.
    /// Options that require a dropped one are dropped as well.
    pub(super) fn add_file(&mut self, file: &Written) {
        let (kept, dropped): (Vec<_>, Vec<_>) = file.entries.iter().cloned().partition(|entry| {
            let contradicts = self.said.iter().any(|said| self.contradict(said, &entry.key));
            !self.said.contains(&entry.key) && !contradicts
        });
        let dropped = dropped.into_iter().map(|entry| entry.key);
        self.dropped = dropped.filter(|key| !self.said.contains(key)).collect();
        self.kept = kept;
        loop {
            let lost = |entry: &Entry| {
                self.needs(entry).iter().any(|needed| self.dropped.contains(needed))
            };
            let (lost, kept) = self.kept.iter().cloned().partition::<Vec<_>, _>(lost);
            if lost.is_empty() {
                return;
            }
            self.dropped.extend(lost.into_iter().map(|entry| entry.key));
            self.kept = kept;
        }
    }

    /// Adds certificate and key from credentials, unless other options decide about them.
    pub(super) fn add_credentials(&mut self, folder: Option<&Path>) -> Result<(), Problem> {
        let Some((certificate, key)) = folder.map(|it| (it.join(CERTIFICATE), it.join(KEY))) else {
            return Ok(());
        };
        let is_decided = |key: &str| {
            self.has(key)
                || self.dropped.iter().any(|dropped| dropped == key)
                || self.keys().any(|other| self.contradict(other, key))
        };
        if is_decided("tls-cert") || is_decided("tls-key") {
            return Ok(());
        }
        let missing = |path: PathBuf, other| {
            Err(Problem { path, line: None, what: What::OneCredential(other) })
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
            let entry = Entry { key: key.to_owned(), line: None, arguments: vec![argument] };
            self.kept.push(entry);
        }
        Ok(())
    }

    /// Returns the problems of options of the file that conflict with each other, or lack options
    /// that they require.
    pub(super) fn problems(&self, path: &Path) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut problem = |line, what| problems.push(Problem { path: path.to_owned(), line, what });
        let mut before: Vec<&Entry> = Vec::new();
        for entry in self.kept.iter().filter(|entry| entry.line.is_some()) {
            let key = entry.key.clone();
            for other in before.iter().filter(|other| self.contradict(&other.key, &key)) {
                let (other, other_line) = (other.key.clone(), other.line);
                problem(entry.line, What::Conflict { key: key.clone(), other, other_line });
            }
            for needs in self.needs(entry).into_iter().filter(|needed| !self.has(needed)) {
                problem(entry.line, What::Needs { key: key.clone(), needs });
            }
            before.push(entry);
        }
        problems
    }

    /// Returns true if the archives of the file are served; those of the command line take
    /// precedence.
    pub(super) fn takes_archives(&self) -> bool {
        !self.names_archives
    }

    /// Returns a command line with all options.
    pub(super) fn arguments(&self, said: &[OsString], archives: bool) -> Vec<OsString> {
        let (program, said) = match said.split_first() {
            Some((program, said)) => (program.as_os_str(), said),
            None => (OsStr::new("hexz-nbd"), said),
        };
        let kept = self.kept.iter().flat_map(|entry| &entry.arguments).map(OsString::as_os_str);
        let archives = archives.then_some(OsStr::new(ARCHIVES));
        let said = said.iter().map(OsString::as_os_str);
        [program].into_iter().chain(kept).chain(archives).chain(said).map(OsStr::to_owned).collect()
    }

    /// Attributes a remaining error to the file; `None` if it concerns the command line.
    pub(super) fn blame(&self, error: &clap::Error, path: &Path) -> Option<Problem> {
        let names = named_by(error);
        let is_of_file = |name: &String| {
            let key = name.trim_start_matches('-');
            self.kept.iter().any(|entry| entry.line.is_some() && entry.key == key)
        };
        let is_missing = error.kind() == ErrorKind::MissingRequiredArgument;
        let what = match names.iter().find(|name| !name.starts_with("--")) {
            // The archives are the only positional arguments.
            Some(_) if is_missing => What::NothingToServe,
            _ if !is_missing && names.iter().any(is_of_file) => What::Together(names.join(", ")),
            _ => return None,
        };
        Some(Problem { path: path.to_owned(), line: None, what })
    }

    fn keys(&self) -> impl Iterator<Item = &str> {
        let kept = self.kept.iter().map(|entry| entry.key.as_str());
        self.said.iter().map(String::as_str).chain(kept)
    }

    fn has(&self, key: &str) -> bool {
        self.keys().any(|other| other == key)
    }

    /// Returns true if two options conflict.
    fn contradict(&self, one: &str, other: &str) -> bool {
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
    fn needs(&self, entry: &Entry) -> Vec<String> {
        let alone = [OsString::from("hexz-nbd")].into_iter().chain(entry.arguments.iter().cloned());
        let alone = alone.chain([ARCHIVES.into()]);
        match self.command.clone().try_get_matches_from(alone) {
            Err(error) if error.kind() == ErrorKind::MissingRequiredArgument => {
                let names = named_by(&error).into_iter();
                names.map(|name| name.trim_start_matches('-').to_owned()).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// Returns the names of the arguments that an error is about, without their values.
fn named_by(error: &clap::Error) -> Vec<String> {
    let texts = [ContextKind::InvalidArg, ContextKind::PriorArg].into_iter().flat_map(|kind| {
        match error.get(kind) {
            Some(ContextValue::String(text)) => vec![text.clone()],
            Some(ContextValue::Strings(texts)) => texts.clone(),
            _ => Vec::new(),
        }
    });
    texts.map(|text| text.split(' ').next().unwrap_or_default().to_owned()).collect()
}
