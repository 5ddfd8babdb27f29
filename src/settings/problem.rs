//! Problems of a configuration file.

use std::fmt;
use std::io;
use std::path::PathBuf;

use nbd_telemetry::escape;

/// A problem in a configuration file, with its location.
#[derive(Debug, thiserror::Error)]
#[error("{}{}: {what}", escape::path(.path), Line(*.line))]
pub(crate) struct ConfigProblem {
    pub(super) path: PathBuf,
    /// Line number, starting at 1.
    pub(super) line: Option<usize>,
    pub(super) what: ProblemKind,
}

/// Kind of a problem.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProblemKind {
    #[error("can't read the configuration file: {0}")]
    Unreadable(#[from] io::Error),
    #[error("the configuration file is larger than 1 MiB")]
    TooLarge,
    #[error("invalid TOML: {}", escape::text(&escape::without_secrets(.0)))]
    Syntax(String),
    #[error("unknown option {:?}; {hint}", escape::path(.key))]
    UnknownOption { key: String, hint: String },
    #[error("unknown table [{}]: options belong above all tables{examples}", escape::path(.table))]
    UnknownTable { table: String, examples: String },
    #[error("unknown table [{}]; did you mean [{meant}]?", escape::path(.table))]
    MisspelledTable { table: String, meant: String },
    #[error("{0} isn't an option of a single store: put it above all tables")]
    NotOfOneStore(String),
    #[error("a password can't be in this file: set password-file to the file that contains it")]
    Password,
    #[error("{key} is allowed on the command line only: {why}")]
    CommandLineOnly { key: String, why: &'static str },
    #[error("{}: {}", escape::path(.key), escape::text(&escape::without_secrets(.why)))]
    InvalidValue { key: String, why: String },
    #[error("{0} is in [exports], which lists archives; options belong above all tables")]
    OptionInExports(String),
    #[error("{key} conflicts with {other}{}", Line(*.line))]
    Conflict { key: String, other: String, line: Option<usize> },
    #[error("{key} requires {needed}")]
    Requirement { key: String, needed: String },
    #[error("no archive to serve: list archives in [exports], or a folder in export-dir")]
    NothingToServe,
    #[error(
        "systemd credential not found, although {0} exists: set both with LoadCredential=, or \
         neither"
    )]
    MissingCredential(&'static str),
}

impl ConfigProblem {
    /// Returns the stable name of the kind of problem.
    pub(crate) fn label(&self) -> &'static str {
        match self.what {
            ProblemKind::Unreadable(_) | ProblemKind::TooLarge => "config_unreadable",
            ProblemKind::Syntax(_) => "config_syntax",
            ProblemKind::UnknownOption { .. }
            | ProblemKind::UnknownTable { .. }
            | ProblemKind::MisspelledTable { .. } => "config_unknown_option",
            ProblemKind::Password
            | ProblemKind::CommandLineOnly { .. }
            | ProblemKind::NotOfOneStore(_)
            | ProblemKind::OptionInExports(_) => "config_misplaced_option",
            ProblemKind::InvalidValue { .. } => "config_invalid_value",
            ProblemKind::Conflict { .. } => "config_conflict",
            ProblemKind::Requirement { .. } | ProblemKind::MissingCredential(_) => {
                "config_missing_option"
            }
            ProblemKind::NothingToServe => "config_nothing_to_serve",
        }
    }
}

/// Formatter that writes ", line 3" if the line is known.
struct Line(Option<usize>);

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |line| write!(f, ", line {line}"))
    }
}
