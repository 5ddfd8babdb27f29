//! Which keys a configuration file has: the long options of the command line, as clap knows
//! them, so that an option that is added there has its place here.

use clap::builder::ValueParser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, Command};

/// Options that make no sense in a file, and why.
const COMMAND_LINE_ONLY: [(&str, &str); 5] = [
    ("check-config", "it asks about this file"),
    ("config", "a configuration file can't name another one"),
    ("help", "it is a question"),
    ("stdio", "whoever starts the program for a single client says so"),
    ("version", "it is a question"),
];

/// Options whose values are looked up where the sandbox doesn't let this program look. None
/// of them can change while it runs.
const LOOKED_UP: [&str; 4] = ["listen", "monitor", "socket-group", "user"];

/// The options, as they are judged again in the sandbox.
pub(super) fn without_lookups(command: Command) -> Command {
    command.mut_args(|arg| match arg.get_long() {
        Some(long) if LOOKED_UP.contains(&long) => arg.value_parser(ValueParser::os_string()),
        _ => arg,
    })
}

/// What a key's value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// true or false.
    Flag,
    /// How often the option is given.
    Count,
    /// One value.
    One,
    /// One value, or an array of some.
    Many,
}

/// Why it may not be in a file, if it may not.
pub(super) fn only_on_the_command_line(key: &str) -> Option<&'static str> {
    COMMAND_LINE_ONLY.iter().find(|(only, _)| *only == key).map(|(_, why)| *why)
}

/// The option of that key.
pub(super) fn option<'a>(command: &'a Command, key: &str) -> Option<&'a Arg> {
    all(command).find(|arg| arg.get_long() == Some(key))
}

/// All options that have a place in a file.
pub(crate) fn all(command: &Command) -> impl Iterator<Item = &Arg> {
    command
        .get_arguments()
        .filter(|arg| arg.get_long().is_some_and(|long| only_on_the_command_line(long).is_none()))
}

pub(crate) fn kind(arg: &Arg) -> Kind {
    match arg.get_action() {
        ArgAction::SetTrue | ArgAction::SetFalse => Kind::Flag,
        ArgAction::Count => Kind::Count,
        ArgAction::Append => Kind::Many,
        _ => Kind::One,
    }
}

/// A key that somebody may have meant who wrote `key`.
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

/// Whether the option takes that value; if not, which part of it, and why.
pub(super) fn accepts(arg: &Arg, value: &str) -> Result<(), (String, String)> {
    // An option of its own, since the real one wants others beside it.
    let parser: ValueParser = arg.get_value_parser().clone();
    let mut alone = Arg::new("value").long("value").action(arg.get_action().clone());
    alone = alone.value_parser(parser).ignore_case(arg.is_ignore_case_set());
    if let Some(delimiter) = arg.get_value_delimiter() {
        alone = alone.value_delimiter(delimiter);
    }
    let command = Command::new("").no_binary_name(true).disable_help_flag(true).arg(alone);
    let parsed = command.try_get_matches_from([format!("--value={value}")]);
    parsed.map(|_| ()).map_err(|error| (refused(&error, value), why(&error)))
}

/// The part of a value that was refused.
fn refused(error: &clap::Error, value: &str) -> String {
    match error.get(ContextKind::InvalidValue) {
        Some(ContextValue::String(part)) if !part.is_empty() => part.clone(),
        _ => value.to_owned(),
    }
}

/// What clap says of a value, without what it says of the command line.
fn why(error: &clap::Error) -> String {
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
