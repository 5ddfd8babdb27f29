//! Determines the keys of a configuration file from clap's long options, so that a new option is
//! available in both.

use clap::builder::ValueParser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, Command};

/// Options that aren't allowed in a file, and why.
const COMMAND_LINE_ONLY: [(&str, &str); 5] = [
    ("check-config", "it asks about this file"),
    ("config", "a configuration file can't name another one"),
    ("help", "it is a question"),
    ("stdio", "whoever starts the program for a single client says so"),
    ("version", "it is a question"),
];

/// Options whose values can't be resolved inside the sandbox. None of them can change at run
/// time.
const RESOLVED_AT_STARTUP: [&str; 4] = ["listen", "monitor", "socket-group", "user"];

/// Returns the command without those lookups, for parsing inside the sandbox.
pub(super) fn without_lookups(command: Command) -> Command {
    command.mut_args(|arg| match arg.get_long() {
        Some(long) if RESOLVED_AT_STARTUP.contains(&long) => {
            arg.value_parser(ValueParser::os_string())
        }
        _ => arg,
    })
}

/// Type of a key's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ValueKind {
    /// A boolean.
    Flag,
    /// Number of times that the option is given.
    Count,
    /// One value.
    One,
    /// One value, or an array of values.
    Many,
}

/// Returns the reason for which a key isn't allowed in a file, if it isn't.
pub(super) fn command_line_only_reason(key: &str) -> Option<&'static str> {
    COMMAND_LINE_ONLY.iter().find(|(only, _)| *only == key).map(|(_, why)| *why)
}

/// Returns the option of a key.
pub(super) fn option<'a>(command: &'a Command, key: &str) -> Option<&'a Arg> {
    all(command).find(|arg| arg.get_long() == Some(key))
}

/// Returns all options that are allowed in a file.
pub(crate) fn all(command: &Command) -> impl Iterator<Item = &Arg> {
    command
        .get_arguments()
        .filter(|arg| arg.get_long().is_some_and(|long| command_line_only_reason(long).is_none()))
}

pub(crate) fn kind(arg: &Arg) -> ValueKind {
    match arg.get_action() {
        ArgAction::SetTrue | ArgAction::SetFalse => ValueKind::Flag,
        ArgAction::Count => ValueKind::Count,
        ArgAction::Append => ValueKind::Many,
        _ => ValueKind::One,
    }
}

/// Returns the key that was probably meant by the unknown `key`.
pub(super) fn nearest(command: &Command, key: &str) -> Option<String> {
    let wanted = key.trim_start_matches('-').to_lowercase().replace(['_', ' '], "-");
    let keys = || all(command).filter_map(Arg::get_long).chain(["exports"]);
    let part = |known: &&str| {
        known.strip_suffix(wanted.as_str()).is_some_and(|rest| rest.ends_with('-'))
            || known.strip_prefix(wanted.as_str()).is_some_and(|rest| rest.starts_with('-'))
    };
    let distance = |known: &str| strsim::damerau_levenshtein(known, &wanted);
    keys()
        .find(|known| *known == wanted)
        .or_else(|| {
            // One letter in three may be wrong.
            let near = keys().filter(|known| distance(known) <= wanted.chars().count().div_ceil(3));
            near.min_by_key(|known| distance(known))
        })
        .or_else(|| keys().find(part))
        .map(str::to_owned)
}

/// Checks that the option accepts a value. The error is the part that was rejected, and the
/// reason.
pub(super) fn check_value(arg: &Arg, value: &str) -> Result<(), (String, String)> {
    // Uses a separate option, since the real one may require others.
    let parser: ValueParser = arg.get_value_parser().clone();
    let mut alone = Arg::new("value").long("value").action(arg.get_action().clone());
    alone = alone.value_parser(parser).ignore_case(arg.is_ignore_case_set());
    if let Some(delimiter) = arg.get_value_delimiter() {
        alone = alone.value_delimiter(delimiter);
    }
    let command = Command::new("").no_binary_name(true).disable_help_flag(true).arg(alone);
    let parsed = command.try_get_matches_from([format!("--value={value}")]);
    parsed.map(|_| ()).map_err(|error| (rejected_part(&error, value), rejection_reason(&error)))
}

/// Returns the part of a value that was rejected.
fn rejected_part(error: &clap::Error, value: &str) -> String {
    match error.get(ContextKind::InvalidValue) {
        Some(ContextValue::String(part)) if !part.is_empty() => part.clone(),
        _ => value.to_owned(),
    }
}

/// Returns clap's reason for rejecting a value, without its text about the command line.
fn rejection_reason(error: &clap::Error) -> String {
    if let Some(source) = std::error::Error::source(error) {
        return source.to_string();
    }
    match (error.kind(), error.get(ContextKind::ValidValue)) {
        (ErrorKind::InvalidValue, Some(ContextValue::Strings(valid))) if !valid.is_empty() => {
            format!("expected {}", valid.join(" or "))
        }
        (ErrorKind::InvalidUtf8, _) => "it isn't UTF-8".to_owned(),
        _ => "there is nothing in it".to_owned(),
    }
}
