//! Reads all options: from the command line, then from the configuration file, then certificate
//! and key from the service manager's credentials.
//!
//! `keys` determines the available options from clap, `file` converts a file to arguments, and
//! `merge` combines these with the command line. Clap parses the result, so every option can be
//! used in the file and has the same meaning in both. `advice` improves the errors for command
//! lines that clap rejects.

mod advice;
mod file;
pub(crate) mod keys;
mod merge;
mod problem;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{ArgMatches, Args, Command, CommandFactory, FromArgMatches};

use crate::monitor::RecentErrors;
use hexz_exports::NamedArchive;
use hexz_reader::storage::FileStamp;

use crate::cli::{Cli, LogOptions, ReloadableOptions};
use crate::exit_status::{self, ExitStatus};
use crate::log;
use file::FileContents;
use merge::Merge;
use problem::ConfigProblem;

/// Source of the options, which can be read again for a reload.
#[derive(Debug, Clone)]
pub(crate) struct OptionSource {
    arguments: Vec<OsString>,
}

/// All options at startup.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) cli: Cli,
    /// Warnings about the configuration file and the command line.
    pub(crate) warnings: Vec<String>,
    /// Stamp of the configuration file from before it was read.
    pub(crate) stamp: Option<FileStamp>,
    pub(crate) fixed: FixedOptions,
}

/// Options that can't change at run time, as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FixedOptions(BTreeMap<String, Vec<OsString>>);

/// Reason for which there are no settings.
#[derive(Debug)]
pub(crate) enum SettingsError {
    /// An invalid command line, or a request for help or the version.
    CommandLine(clap::Error),
    /// An invalid configuration file, or invalid credentials.
    File {
        /// Logging options of the command line.
        log: LogOptions,
        problems: Vec<ConfigProblem>,
    },
}

/// Options of a reload.
#[derive(Debug)]
pub(crate) struct ReloadedOptions {
    pub(crate) options: ReloadableOptions,
    /// Stamp of the configuration file from before it was read.
    pub(crate) stamp: Option<FileStamp>,
    pub(crate) fixed: FixedOptions,
}

/// Parsed options from all sources.
struct ParsedOptions {
    matches: ArgMatches,
    /// Archives of the file, if these are served.
    exports: Option<Vec<NamedArchive>>,
    warnings: Vec<String>,
    stamp: Option<FileStamp>,
}

impl OptionSource {
    /// Returns the command line of this process as a source.
    pub(crate) fn of_process() -> Self {
        Self { arguments: std::env::args_os().collect() }
    }

    /// Returns true if the command line contains `--stdio`, which isn't allowed in a file:
    /// standard error may be the client's connection.
    pub(crate) fn is_stdio(&self) -> bool {
        self.arguments.iter().any(|argument| argument == "--stdio")
    }

    /// Reads all options. Reports all problems of a configuration file.
    pub(crate) fn read(&self) -> Result<Settings, SettingsError> {
        let command = Cli::command();
        let found = self.parse(command.clone()).map_err(|refused| match refused {
            SettingsError::CommandLine(error) => {
                SettingsError::CommandLine(advice::advise(error, &command, &self.arguments))
            }
            file => file,
        });
        let ParsedOptions { matches, exports, mut warnings, stamp } = found?;
        warnings.extend(advice::misspelled_command(&command, &matches));
        let mut cli = Cli::from_arg_matches(&matches).map_err(SettingsError::CommandLine)?;
        cli.serve.changeable.set_exports(exports);
        Ok(Settings { cli, warnings, stamp, fixed: FixedOptions::of(&matches) })
    }

    /// Reads all options again, inside the sandbox.
    pub(crate) fn reread(&self) -> Result<ReloadedOptions, SettingsError> {
        let ParsedOptions { matches, exports, stamp, .. } =
            self.parse(keys::without_lookups(Cli::command()))?;
        let options =
            ReloadableOptions::from_arg_matches(&matches).map_err(SettingsError::CommandLine);
        let mut options = options?;
        options.set_exports(exports);
        Ok(ReloadedOptions { options, stamp, fixed: FixedOptions::of(&matches) })
    }

    fn parse(&self, command: Command) -> Result<ParsedOptions, SettingsError> {
        let command_line =
            merge::without_constraints(command.clone()).try_get_matches_from(&self.arguments);
        let mut command = command;
        command.build();
        let command_line = match command_line {
            Ok(command_line) if command_line.subcommand().is_none() => command_line,
            // Reports errors in terms of the real command.
            _ => {
                let matches = command.try_get_matches_from(&self.arguments);
                let matches = matches.map_err(SettingsError::CommandLine)?;
                return Ok(ParsedOptions { matches, exports: None, warnings: vec![], stamp: None });
            }
        };
        let refused = |problems| match LogOptions::from_arg_matches(&command_line) {
            Ok(log) => SettingsError::File { log, problems },
            Err(error) => SettingsError::CommandLine(error),
        };

        let path = command_line.get_one::<PathBuf>("config").map(PathBuf::as_path);
        let stamp = path.and_then(FileStamp::of);
        let (written, warnings) = match path {
            Some(path) => read_file(path, &command).map_err(refused)?,
            None => Default::default(),
        };
        let mut merge = Merge::new(&command, &command_line);
        merge.add_file(&written);
        let folder = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
        merge.add_credentials(folder.as_deref()).map_err(|problem| refused(vec![problem]))?;
        let problems = path.map(|path| merge.problems(path)).unwrap_or_default();
        if !problems.is_empty() {
            return Err(refused(problems));
        }

        let takes_archives = merge.uses_file_archives() && !written.exports.is_empty();
        let arguments = merge.arguments(&self.arguments, takes_archives);
        let matches =
            command.clone().try_get_matches_from(arguments).map_err(|error| {
                match path.and_then(|path| merge.attribute_to_file(&error, path)) {
                    Some(problem) => refused(vec![problem]),
                    None => SettingsError::CommandLine(error),
                }
            })?;
        let exports = takes_archives.then_some(written.exports);
        Ok(ParsedOptions { matches, exports, warnings, stamp })
    }
}

/// Returns the contents of the file, and warnings about it.
fn read_file(
    path: &Path,
    command: &Command,
) -> Result<(FileContents, Vec<String>), Vec<ConfigProblem>> {
    let (text, note) = file::read(path).map_err(|problem| vec![problem])?;
    let (written, problems) = file::parse(&text, path, command);
    if problems.is_empty() { Ok((written, note.into_iter().collect())) } else { Err(problems) }
}

impl ReloadableOptions {
    /// Sets the archives of a file, if these are served.
    fn set_exports(&mut self, exports: Option<Vec<NamedArchive>>) {
        if let Some(exports) = exports {
            self.snapshots.replace_named(exports);
        }
    }
}

impl FixedOptions {
    /// Collects all options except those of [`Changeable`].
    fn of(matches: &ArgMatches) -> Self {
        let changeable = ReloadableOptions::augment_args(Command::new(""));
        let is_changeable =
            |id: &clap::Id| changeable.get_arguments().any(|arg| arg.get_id() == id);
        let command = Cli::command();
        let fixed = keys::all(&command).filter(|arg| !is_changeable(arg.get_id()));
        let values = fixed.filter_map(|arg| {
            let values = matches.get_raw(arg.get_id().as_str()).into_iter().flatten();
            Some((arg.get_long()?.to_owned(), values.map(ToOwned::to_owned).collect()))
        });
        Self(values.collect())
    }

    /// Returns the keys whose values differ from `other`.
    pub(crate) fn changed_keys<'a>(&'a self, other: &Self) -> Vec<&'a str> {
        let differs = |(key, value): &(&String, &Vec<OsString>)| other.0.get(*key) != Some(*value);
        self.0.iter().filter(differs).map(|(key, _)| key.as_str()).collect()
    }
}

impl SettingsError {
    /// Reports the reason, and ends the program.
    pub(crate) fn report_and_exit(self) -> ! {
        let (log, problems) = match self {
            Self::CommandLine(error) => advice::print_and_exit(error),
            Self::File { log, problems } => (log, problems),
        };
        if let Err(error) = log::start(&log, &RecentErrors::default()) {
            let why = format!("RUST_LOG: {error}");
            advice::print_and_exit(Cli::command().error(ErrorKind::InvalidValue, why));
        }
        for problem in problems {
            tracing::error!("{problem}");
        }
        std::process::exit(exit_status::USAGE.into())
    }
}

impl ExitStatus for SettingsError {
    fn exit_status(&self) -> u8 {
        exit_status::USAGE
    }
}

impl std::error::Error for SettingsError {}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CommandLine(error) => advice::escaped(error).fmt(f),
            Self::File { problems, .. } => {
                let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
                f.write_str(&problems.join("; "))
            }
        }
    }
}
