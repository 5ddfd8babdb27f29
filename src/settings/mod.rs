//! Reads all options: from the command line, then from the configuration file, then certificate
//! and key from the service manager's credentials.
//!
//! Clap and serde fill the same structures of [`cli`](crate::cli), which define each option once.
//! `constraints` decides which source of an option takes precedence, and rejects options that
//! exclude or lack another one. What remains of the file (`file`) is deserialized, and everything
//! else is updated from the command line and its defaults. `advice` improves the errors for
//! command lines that clap rejects.

mod advice;
mod constraints;
mod file;
pub(crate) mod keys;
mod problem;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{ArgMatches, Command, CommandFactory, FromArgMatches};
use hexz_reader::storage::FileStamp;

use crate::cli::escaped_error::escaped_text;
use crate::cli::{Cli, LogOptions, ServeOptions};
use crate::exit_status::{self, ExitStatus};
use crate::log;
use constraints::OptionSources;
use file::{ConfigFile, FileOptions};
use keys::{EXPORTS, STORES};
use problem::{ConfigProblem, ProblemKind};

/// Names of the credentials under systemd's `LoadCredential=`.
const CERTIFICATE: &str = "hexz-nbd.tls-cert";
const KEY: &str = "hexz-nbd.tls-key";

/// Options whose values can't be resolved inside the sandbox. None of them can change at run
/// time.
const RESOLVED_AT_STARTUP: &[&str] = &["listen", "monitor", "socket-group", "user"];

/// Options that a reload replaces.
#[rustfmt::skip]
const RELOADABLE: [&str; 22] = [
    "allow", "allow-identity", "allow-parent-anywhere", "default-export", "deny", "digest",
    "export-dir", "max-key-iterations", "parent-dir", "password-file", "raw", "resolve-references",
    "rules", "strict", "tls-cert", "tls-client-auth", "tls-client-ca", "tls-client-crl", "tls-key",
    "tls-min", "verify-key", "zero-uncovered",
];

/// All options at startup.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) cli: Cli,
    pub(crate) warnings: Vec<Warning>,
    /// Stamp of the configuration file from before it was read.
    pub(crate) stamp: Option<FileStamp>,
    pub(crate) fixed: FixedOptions,
    pub(crate) source: OptionSource,
}

/// A warning about the configuration file or the command line.
#[derive(Debug)]
pub(crate) struct Warning {
    /// Stable name of the kind of warning.
    pub(crate) label: &'static str,
    pub(crate) text: String,
}

/// Source of the options, which can be read again for a reload.
#[derive(Debug, Clone)]
pub(crate) struct OptionSource {
    command_line: ArgMatches,
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

/// Options of all sources.
#[derive(Debug)]
pub(crate) struct MergedOptions {
    pub(crate) serve: ServeOptions,
    log: LogOptions,
    pub(crate) fixed: FixedOptions,
    warnings: Vec<Warning>,
    /// Stamp of the configuration file from before it was read.
    pub(crate) stamp: Option<FileStamp>,
}

/// Returns true if the command line contains `--stdio`, which isn't allowed in a file: standard
/// error may be the client's connection.
pub(crate) fn is_stdio(arguments: &[OsString]) -> bool {
    arguments.iter().any(|argument| argument == "--stdio")
}

impl Settings {
    /// Reads all options. Reports all problems of a configuration file.
    pub(crate) fn read(arguments: &[OsString]) -> Result<Self, SettingsError> {
        let mut command = Cli::command();
        let command_line = command.try_get_matches_from_mut(arguments).map_err(|error| {
            SettingsError::CommandLine(advice::advise(error, &command, arguments))
        })?;
        let source = OptionSource { command_line };
        let merged = source.merge(&command, &[])?;
        let cli =
            Cli::from_arg_matches(&source.command_line).map_err(SettingsError::CommandLine)?;
        let cli = Cli { serve: merged.serve, log: merged.log, ..cli };
        let misspelled = advice::misspelled_command(&command, &source.command_line)
            .map(|text| Warning { label: "misspelled_command", text });
        let warnings = merged.warnings.into_iter().chain(misspelled).collect();
        Ok(Self { cli, warnings, stamp: merged.stamp, fixed: merged.fixed, source })
    }

    /// Returns true if this is a server, and a client has started it.
    pub(crate) fn is_started_by_client(&self) -> bool {
        let is_server = self.cli.command.is_none() && !self.cli.file.check_config;
        is_server && log::is_started_by_client(self.cli.serve.network.stdio)
    }
}

impl OptionSource {
    /// Reads the configuration file and the credentials again, inside the sandbox.
    pub(crate) fn reread(&self) -> Result<MergedOptions, SettingsError> {
        let mut command = Cli::command();
        command.build();
        self.merge(&command, RESOLVED_AT_STARTUP)
    }

    /// Merges the options of all sources. Values of the file for `ignored` keys aren't parsed.
    fn merge(
        &self,
        command: &Command,
        ignored: &'static [&'static str],
    ) -> Result<MergedOptions, SettingsError> {
        let matches = &self.command_line;
        let path = matches.get_one::<PathBuf>("config").map(PathBuf::as_path);
        let stamp = path.and_then(FileStamp::of);
        let (text, writable) = match path {
            Some(path) => file::read(path).map_err(|problem| self.refused(vec![problem]))?,
            None => Default::default(),
        };
        let mut file = ConfigFile::parse(&text, path.unwrap_or(Path::new("")), ignored)
            .map_err(|problem| self.refused(vec![problem]))?;
        let warnings = writable.into_iter().chain(file.warn_exposed()).collect();
        let problems = file.problems(command);
        if !problems.is_empty() {
            return Err(self.refused(problems));
        }

        // The command line of a subcommand has options of its own.
        let (command, given) = match matches.subcommand() {
            Some((name, given)) => (command.find_subcommand(name).unwrap_or(command), given),
            None => (command, matches),
        };
        let mut sources = OptionSources::of_command_line(command, given);
        sources.add_file(file.set_keys());
        let credentials = match matches.subcommand() {
            Some(_) => None,
            None => find_credentials(&sources).map_err(|problem| self.refused(vec![problem]))?,
        };
        if credentials.is_some() {
            sources.add_credential("tls-cert");
            sources.add_credential("tls-key");
        }
        self.check_constraints(command, &sources, path.unwrap_or(Path::new("")))?;

        // What remains of the file takes precedence over defaults.
        let has_archives = matches.contains_id("named");
        file.retain(|key| match key {
            EXPORTS => !has_archives,
            STORES => true,
            key => sources.uses_file(key),
        });
        let fixed = FixedOptions::of(command, given, &file);
        let mut matches = matches.clone();
        for arg in keys::all(command).filter(|arg| arg.get_long().is_some_and(|key| file.has(key)))
        {
            matches.try_clear_id(arg.get_id().as_str()).unwrap_or_default();
        }
        let options = file.options().map_err(|problem| self.refused(vec![problem]))?;
        #[cfg(feature = "remote")]
        let stores = options.stores;
        #[cfg(feature = "remote")]
        let fixed = fixed.with(STORES, stores.iter().map(|store| format!("{store:?}").into()));
        let FileOptions { exports, mut serve, mut log, .. } = options;
        // Without a file, clap requires an archive.
        if let Some(path) = path
            && !has_archives
            && exports.is_empty()
            && !sources.contains("export-dir")
        {
            let what = ProblemKind::NothingToServe;
            let problem = ConfigProblem { path: path.to_owned(), line: None, what };
            return Err(self.refused(vec![problem]));
        }
        serve.changeable.snapshots.named = exports;
        serve.update_from_arg_matches(&matches).map_err(SettingsError::CommandLine)?;
        log.update_from_arg_matches(&matches).map_err(SettingsError::CommandLine)?;
        #[cfg(feature = "remote")]
        {
            serve.stores.tables = stores;
            serve.take_queries();
        }
        if let Some((certificate, key)) = credentials {
            let tls = &mut serve.changeable.tls;
            (tls.tls_cert, tls.tls_key) = (Some(certificate), Some(key));
        }
        Ok(MergedOptions { serve, log, fixed, warnings, stamp })
    }

    /// Checks constraints between options. Violations are attributed to the command line or to the
    /// file at `path`.
    fn check_constraints(
        &self,
        command: &Command,
        sources: &OptionSources,
        path: &Path,
    ) -> Result<(), SettingsError> {
        let mut problems = Vec::new();
        for (source, what) in sources.violations() {
            let line = source.line();
            if line.is_none() {
                let error = command.clone().error(ErrorKind::ArgumentConflict, what);
                return Err(SettingsError::CommandLine(error));
            }
            problems.push(ConfigProblem { path: path.to_owned(), line, what });
        }
        problems.sort_by_key(|problem| problem.line);
        if problems.is_empty() { Ok(()) } else { Err(self.refused(problems)) }
    }

    fn refused(&self, problems: Vec<ConfigProblem>) -> SettingsError {
        match LogOptions::from_arg_matches(&self.command_line) {
            Ok(log) => SettingsError::File { log, problems },
            Err(error) => SettingsError::CommandLine(error),
        }
    }
}

/// Returns the paths of certificate and key in credentials, unless other options determine them.
fn find_credentials(sources: &OptionSources) -> Result<Option<(PathBuf, PathBuf)>, ConfigProblem> {
    let Some(folder) = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from) else {
        return Ok(None);
    };
    if sources.determine("tls-cert") || sources.determine("tls-key") {
        return Ok(None);
    }
    let (certificate, key) = (folder.join(CERTIFICATE), folder.join(KEY));
    let missing = |path, other| {
        Err(ConfigProblem { path, line: None, what: ProblemKind::MissingCredential(other) })
    };
    // If it can't be checked, assume that it exists: falling back to no TLS would be unsafe.
    let exists = |path: &Path| path.try_exists().unwrap_or(true);
    match (exists(&certificate), exists(&key)) {
        (false, false) => Ok(None),
        (true, false) => missing(key, CERTIFICATE),
        (false, true) => missing(certificate, KEY),
        (true, true) => Ok(Some((certificate, key))),
    }
}

impl FixedOptions {
    /// Collects the options that a reload can't replace, from the file or else from the command
    /// line, whose defaults are included.
    fn of(command: &Command, matches: &ArgMatches, file: &ConfigFile<'_>) -> Self {
        let values = keys::all(command).filter_map(|arg| {
            let key = arg.get_long().filter(|key| !RELOADABLE.contains(key))?;
            let values = match file.values(key) {
                Some(values) => values.into_iter().map(OsString::from).collect(),
                None => {
                    let values = matches.get_raw(arg.get_id().as_str()).into_iter().flatten();
                    values.map(ToOwned::to_owned).collect()
                }
            };
            Some((key.to_owned(), values))
        });
        Self(values.collect())
    }

    /// Adds the values of a key that isn't an option.
    #[cfg(feature = "remote")]
    fn with(mut self, key: &str, values: impl Iterator<Item = OsString>) -> Self {
        self.0.insert(key.to_owned(), values.collect());
        self
    }

    /// Returns the keys whose values differ from `other`.
    pub(crate) fn changed_keys<'a>(&'a self, other: &Self) -> Vec<&'a str> {
        let differs = |(key, value): &(&String, &Vec<OsString>)| other.0.get(*key) != Some(*value);
        self.0.iter().filter(differs).map(|(key, _)| key.as_str()).collect()
    }
}

impl ExitStatus for SettingsError {
    fn exit_status(&self) -> u8 {
        exit_status::USAGE
    }

    /// Returns the label of the first problem.
    fn label(&self) -> &'static str {
        match self {
            Self::File { problems, .. } => problems.first().map_or("usage", ConfigProblem::label),
            Self::CommandLine(_) => "usage",
        }
    }
}

impl std::error::Error for SettingsError {}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CommandLine(error) => escaped_text(error).fmt(f),
            Self::File { problems, .. } => {
                let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
                f.write_str(&problems.join("; "))
            }
        }
    }
}
