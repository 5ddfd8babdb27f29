//! The command line, the configuration file and credentials put together. Which options
//! contradict each other, and which need others, is asked of clap.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, Id};

use super::file::{Entry, Written};
use super::problem::{Problem, What};

/// The credentials' names under systemd's LoadCredential=.
const CERTIFICATE: &str = "hexz-nbd.tls-cert";
const KEY: &str = "hexz-nbd.tls-key";

/// Stands for the archives of a file where clap looks whether there are some.
const ARCHIVES: &str = "[exports]";

/// The options of the command line, without any that they need, and beside any: what is
/// missing may be in the file, and what of the file they contradict is dropped.
pub(super) fn lenient(command: Command) -> Command {
    command.mut_args(|arg| {
        arg.required(false)
            .required_unless_present(Resettable::<Id>::Reset)
            .requires(Resettable::<Id>::Reset)
            .conflicts_with(Resettable::<Id>::Reset)
    })
}

/// Everything that was said, in the order in which it counts.
pub(super) struct Merge<'a> {
    command: &'a Command,
    /// The keys of the command line, and whether it names archives.
    said: Vec<String>,
    names_archives: bool,
    /// What counts of the file and of credentials.
    kept: Vec<Entry>,
    /// Keys of the file that don't count, since the command line contradicts them.
    dropped: Vec<String>,
}

impl<'a> Merge<'a> {
    /// What the command line said, parsed leniently.
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

    /// Adds what of the file the command line neither says itself nor contradicts. What needs
    /// something that is dropped so is dropped, too.
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

    /// Adds certificate and key from credentials, unless something else was said of them.
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
        // Where nobody may look, there is something: to serve without TLS would be a bad guess.
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

    /// Options of the file that can't stand beside each other, or lack others.
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

    /// Whether the archives of the file are those that are served.
    pub(super) fn takes_archives(&self) -> bool {
        !self.names_archives
    }

    /// A command line that says all of it.
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

    /// What the file is to blame for, of an error that remains. `None` is the command line's.
    pub(super) fn blame(&self, error: &clap::Error, path: &Path) -> Option<Problem> {
        let names = named_by(error);
        let is_of_file = |name: &String| {
            let key = name.trim_start_matches('-');
            self.kept.iter().any(|entry| entry.line.is_some() && entry.key == key)
        };
        let is_missing = error.kind() == ErrorKind::MissingRequiredArgument;
        let what = match names.iter().find(|name| !name.starts_with("--")) {
            // Archives are the only arguments that are no options.
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

    /// Whether two options can't stand beside each other.
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

    /// Which other options it takes: what clap misses where there is nothing else.
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

/// The arguments that an error is about, without their values.
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
