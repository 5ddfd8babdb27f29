//! Defines the problems of a configuration file. Their messages are about the file, not about a
//! command line that nobody wrote.

use std::fmt;
use std::io;
use std::path::PathBuf;

use nbd_telemetry::escape;

/// A problem in a configuration file, with its location.
#[derive(Debug, thiserror::Error)]
#[error("{}{}: {what}", escape::name(.path), LineSuffix(*.line))]
pub(crate) struct ConfigProblem {
    pub(super) path: PathBuf,
    /// Line number, starting at 1.
    pub(super) line: Option<usize>,
    pub(super) what: ProblemKind,
}

/// Description of the problem.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProblemKind {
    #[error("can't read it: {0}")]
    Io(#[from] io::Error),
    #[error("it is larger than 1 MiB, which no configuration file should be")]
    TooLarge,
    #[error("it isn't TOML: {}", escape::text(.0))]
    Syntax(String),
    #[error("there is no option {:?}{}", escape::name(.key), NearestSuffix(.nearest.as_deref()))]
    UnknownKey { key: String, nearest: Option<String> },
    #[error(
        "a password doesn't belong in here: password-file names a file that has it and that only \
         its owner can read"
    )]
    Password,
    #[error(
        "there is no table [{}]: options stand above all tables{}",
        escape::name(.table),
        SuggestionsSuffix(.there)
    )]
    UnknownTable { table: String, there: Vec<String> },
    #[error("{key} is for the command line alone: {why}")]
    CommandLineOnly { key: String, why: &'static str },
    #[error("{}: expected {expected}, found {found}", escape::name(.key))]
    WrongType { key: String, expected: &'static str, found: &'static str },
    #[error("{0} = [] means nothing: leave it out, or name some")]
    EmptyList(String),
    #[error("{key}: {:?} can't be used: {}", escape::name(.value), escape::text(.why))]
    Value { key: String, value: String, why: String },
    #[error(
        "{0} stands in [exports], where each key is the name of an export; options stand above \
         all tables"
    )]
    OptionInExports(String),
    #[error(
        "[exports] {}: expected a path in quotes, found a table; a name with dots is written in \
         quotes, as {:?}",
        escape::name(.name),
        escape::name(.quoted)
    )]
    DottedExport { name: String, quoted: String },
    #[error("[exports]: {}", escape::text(.0))]
    Export(String),
    #[error("{key} can't stand beside {other}{}", LocationSuffix(.other_line))]
    Conflict { key: String, other: String, other_line: Option<usize> },
    #[error("{key} takes {needs} as well, which is neither here nor on the command line")]
    MissingRequirement { key: String, needs: String },
    #[error(
        "there is nothing to serve, here or on the command line: name archives in the table \
         [exports], or a folder with export-dir"
    )]
    NothingToServe,
    #[error("together with the command line it makes no sense: {}", escape::text(.0))]
    Combination(String),
    #[error(
        "this systemd credential isn't there, but {0} is: pass both with LoadCredential=, or none"
    )]
    OneCredential(&'static str),
}

/// Formatter that writes ", line 3" if the line is known.
struct LineSuffix(Option<usize>);

impl fmt::Display for LineSuffix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |line| write!(f, ", line {line}"))
    }
}

/// Formatter that writes " (line 3)", or " (on the command line)".
struct LocationSuffix<'a>(&'a Option<usize>);

impl fmt::Display for LocationSuffix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(line) => write!(f, " (line {line})"),
            None => f.write_str(" (on the command line)"),
        }
    }
}

struct NearestSuffix<'a>(Option<&'a str>);

impl fmt::Display for NearestSuffix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(nearest) => write!(f, "; {nearest} is meant, perhaps"),
            None => f.write_str("; hexz-nbd --help lists all, here without the dashes in front"),
        }
    }
}

/// Formatter that writes the options that the keys of an unknown table probably mean.
struct SuggestionsSuffix<'a>(&'a [String]);

impl fmt::Display for SuggestionsSuffix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => Ok(()),
            options => write!(f, ", as {}", options.join(", ")),
        }
    }
}
