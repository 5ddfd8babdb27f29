//! The keys of a configuration file: the names of clap's long options.

use clap::{Arg, ArgAction, Command};

/// Options that aren't allowed in a file, and why.
const COMMAND_LINE_ONLY: [(&str, &str); 5] = [
    ("check-config", "it checks this file"),
    ("config", "a configuration file can't include another one"),
    ("help", "it prints the help"),
    ("stdio", "it is for programs that start a server for a single client"),
    ("version", "it prints the version"),
];

/// Name of the table of archives.
pub(super) const EXPORTS: &str = "exports";

/// Name of the table of stores, each of which has a table of options of its own.
pub(super) const STORES: &str = "stores";

/// Returns true for the key of a table, rather than an option.
pub(super) fn is_table(key: &str) -> bool {
    [EXPORTS, STORES].contains(&key)
}

/// Returns true if an option may be in the table of a store.
pub(super) fn is_of_one_store(key: &str) -> bool {
    key.starts_with("store-") && !["store-timeout", "store-connections"].contains(&key)
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

/// Returns the type of an option's value.
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
    let keys = || all(command).filter_map(Arg::get_long).chain([EXPORTS, STORES]);
    let is_part = |known: &&str| {
        known.strip_suffix(wanted.as_str()).is_some_and(|rest| rest.ends_with('-'))
            || known.strip_prefix(wanted.as_str()).is_some_and(|rest| rest.starts_with('-'))
    };
    let distance = |known: &str| strsim::damerau_levenshtein(known, &wanted);
    // One letter in three may be wrong.
    let near = keys().filter(|known| distance(known) <= wanted.chars().count().div_ceil(3));
    near.min_by_key(|known| distance(known)).or_else(|| keys().find(is_part)).map(str::to_owned)
}
