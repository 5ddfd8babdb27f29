//! Reads the configuration file: converts TOML to options of the command line.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use clap::{Arg, Command};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use hexz_exports::NamedArchive;
use nbd_telemetry::escape;

use super::keys::{self, ValueKind};
use super::problem::{ConfigProblem, ProblemKind};

/// Maximum size of a configuration file, in bytes; enough for 10,000 archives.
const MAX_FILE_SIZE: u64 = 1024 * 1024;

/// Maximum number of repetitions of a counted option; more have no effect.
const MAX_REPETITIONS: u8 = 9;

/// Maximum number of problems that are reported: enough to see what is wrong, and a file of
/// another kind has one on each line.
const MAX_PROBLEMS: usize = 50;

/// Name of the table of archives.
const EXPORTS: &str = "exports";

/// An option that a file sets.
#[derive(Debug, Clone)]
pub(super) struct OptionEntry {
    pub(super) key: String,
    /// Line number, starting at 1; `None` for credentials.
    pub(super) line: Option<usize>,
    /// Equivalent arguments of the command line.
    pub(super) arguments: Vec<OsString>,
}

/// Contents of a configuration file.
#[derive(Debug, Default)]
pub(super) struct FileContents {
    /// Options in their order; flags that are false are left out.
    pub(super) entries: Vec<OptionEntry>,
    pub(super) exports: Vec<NamedArchive>,
}

/// Returns the content of a configuration file, and a warning about its permissions, if any.
pub(super) fn read(path: &Path) -> Result<(String, Option<String>), ConfigProblem> {
    let problem = |what| ConfigProblem { path: path.to_owned(), line: None, what };
    let file = File::open(path).map_err(|error| problem(error.into()))?;
    let note = file.metadata().ok().and_then(|file| {
        describe_other_writers(file.mode(), file.uid(), rustix::process::geteuid().as_raw())
    });
    let note = note.map(|who| {
        format!("{} can be changed by {who}, and so can be who may come in", escape::name(path))
    });
    let mut text = String::new();
    file.take(MAX_FILE_SIZE + 1)
        .read_to_string(&mut text)
        .map_err(|error| problem(error.into()))?;
    if text.len() as u64 > MAX_FILE_SIZE {
        return Err(problem(ProblemKind::TooLarge));
    }
    Ok((text, note))
}

/// Returns who can modify a file of this mode and owner, besides root and the user of this
/// process. Permissions of its group are left to the owner.
fn describe_other_writers(mode: u32, owner: u32, own: u32) -> Option<String> {
    if mode & 0o002 != 0 {
        return Some("every user of this machine".to_owned());
    }
    (owner != 0 && owner != own).then(|| format!("the user with the number {owner}"))
}

/// Parses `text`, the content of the file at `path`. Returns its contents and all problems.
pub(super) fn parse(
    text: &str,
    path: &Path,
    command: &Command,
) -> (FileContents, Vec<ConfigProblem>) {
    let mut reader =
        FileParser { text, path, command, contents: FileContents::default(), problems: vec![] };
    match DeTable::parse(text) {
        Ok(table) => reader.table(table.get_ref()),
        Err(error) => {
            let at = error.span().map(|span| span.start);
            reader.problem(at, ProblemKind::Syntax(error.message().to_owned()));
        }
    }
    reader.problems.sort_by_key(|problem| problem.line);
    (reader.contents, reader.problems)
}

struct FileParser<'a> {
    text: &'a str,
    path: &'a Path,
    command: &'a Command,
    contents: FileContents,
    problems: Vec<ConfigProblem>,
}

impl FileParser<'_> {
    fn table(&mut self, table: &DeTable<'_>) {
        for (key, value) in items_in_order(table) {
            let (name, at) = (key.get_ref().as_ref(), key.span().start);
            match (keys::option(self.command, name), value.get_ref()) {
                (Some(option), _) => self.option(option, name, at, value),
                (None, DeValue::Table(exports)) if name == EXPORTS => self.exports(exports),
                (None, found) if name == EXPORTS => {
                    let expected = "a table of NAME = \"PATH\"";
                    self.wrong_type(at, name, expected, found);
                }
                (None, DeValue::Table(table)) => self.unknown_table(at, name, table),
                (None, _) => self.unknown(at, name),
            }
        }
    }

    fn option(&mut self, option: &Arg, key: &str, at: usize, value: &Spanned<DeValue<'_>>) {
        let long = format!("--{key}");
        let arguments = match (keys::kind(option), value.get_ref()) {
            (ValueKind::Flag, DeValue::Boolean(true)) => vec![long.into()],
            (ValueKind::Flag, DeValue::Boolean(false)) => return,
            (ValueKind::Flag, found) => return self.wrong_type(at, key, "true or false", found),
            (ValueKind::Count, DeValue::Integer(number)) => {
                match number.to_string().parse::<u8>() {
                    Ok(times) if times <= MAX_REPETITIONS => vec![long.into(); times.into()],
                    _ => {
                        let why = format!("expected a whole number from 0 to {MAX_REPETITIONS}");
                        return self.value(at, key, number.to_string(), why);
                    }
                }
            }
            (ValueKind::Count, found) => return self.wrong_type(at, key, "a whole number", found),
            (ValueKind::Many, DeValue::Array(values)) if values.is_empty() => {
                return self.problem(Some(at), ProblemKind::EmptyList(key.to_owned()));
            }
            (ValueKind::Many, DeValue::Array(values)) => {
                let values = values.iter().filter_map(|value| self.argument(option, key, value));
                values.collect()
            }
            (ValueKind::One | ValueKind::Many, _) => {
                self.argument(option, key, value).into_iter().collect()
            }
        };
        if !arguments.is_empty() {
            let entry = OptionEntry { key: key.to_owned(), line: Some(self.line(at)), arguments };
            self.contents.entries.push(entry);
        }
    }

    /// Converts one value to an argument of the command line.
    fn argument(
        &mut self,
        option: &Arg,
        key: &str,
        value: &Spanned<DeValue<'_>>,
    ) -> Option<OsString> {
        let at = value.span().start;
        let text = match value.get_ref() {
            DeValue::String(text) => text.to_string(),
            // As written: a number that isn't decimal is kept as it is, and rejected by the
            // option's parser.
            DeValue::Integer(number) => number.to_string(),
            DeValue::Float(number) => number.as_str().to_owned(),
            found => {
                let expected = match keys::kind(option) {
                    ValueKind::Many => "a string or an array of strings",
                    _ => "a string or a number",
                };
                self.wrong_type(at, key, expected, found);
                return None;
            }
        };
        match keys::check_value(option, &text) {
            Ok(()) => Some(format!("--{key}={text}").into()),
            Err((refused, why)) => {
                self.value(at, key, refused, why);
                None
            }
        }
    }

    fn exports(&mut self, table: &DeTable<'_>) {
        for (key, value) in items_in_order(table) {
            let (name, at) = (key.get_ref().as_ref(), key.span().start);
            if keys::option(self.command, name).is_some() {
                self.problem(Some(at), ProblemKind::OptionInExports(name.to_owned()));
                continue;
            }
            match value.get_ref() {
                DeValue::String(path) if name.is_empty() || path.is_empty() => {
                    let what = "a name and a path have one character at the least".to_owned();
                    self.problem(Some(at), ProblemKind::Export(what));
                }
                DeValue::String(path) => match NamedArchive::new(name, path.as_ref()) {
                    Ok(named) => self.contents.exports.push(named),
                    Err(error) => self.problem(Some(at), ProblemKind::Export(error.to_string())),
                },
                DeValue::Table(inner) => {
                    let rest = inner.keys().next().map(|key| key.get_ref().as_ref());
                    let quoted = format!("{name}.{}", rest.unwrap_or_default());
                    let name = name.to_owned();
                    self.problem(Some(at), ProblemKind::DottedExport { name, quoted });
                }
                found => {
                    self.wrong_type(at, &format!("[exports] {name}"), "a path in quotes", found);
                }
            }
        }
    }

    fn unknown(&mut self, at: usize, key: &str) {
        let what = match keys::command_line_only_reason(key) {
            Some(why) => ProblemKind::CommandLineOnly { key: key.to_owned(), why },
            None if key == "password" => ProblemKind::Password,
            None => {
                let nearest = keys::nearest(self.command, key);
                ProblemKind::UnknownKey { key: key.to_owned(), nearest }
            }
        };
        self.problem(Some(at), what);
    }

    /// Reports an unknown table, which may be a group of options, such as `[tls] cert = …`.
    fn unknown_table(&mut self, at: usize, name: &str, table: &DeTable<'_>) {
        let there = items_in_order(table).into_iter().filter_map(|(key, _)| {
            let key = key.get_ref().as_ref();
            let joined = format!("{name}-{key}");
            let known =
                [&joined, key].into_iter().find(|key| keys::option(self.command, key).is_some());
            known.map(str::to_owned).or_else(|| keys::nearest(self.command, key))
        });
        let there = there.collect();
        self.problem(Some(at), ProblemKind::UnknownTable { table: name.to_owned(), there });
    }

    fn wrong_type(&mut self, at: usize, key: &str, expected: &'static str, found: &DeValue<'_>) {
        let found = match found {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) | DeValue::Float(_) => "a number",
            DeValue::Boolean(_) => "true or false",
            DeValue::Datetime(_) => "a date",
            DeValue::Array(_) => "an array",
            DeValue::Table(_) => "a table",
        };
        self.problem(Some(at), ProblemKind::WrongType { key: key.to_owned(), expected, found });
    }

    fn value(&mut self, at: usize, key: &str, value: String, why: String) {
        self.problem(Some(at), ProblemKind::Value { key: key.to_owned(), value, why });
    }

    fn problem(&mut self, at: Option<usize>, what: ProblemKind) {
        if self.problems.len() >= MAX_PROBLEMS {
            return;
        }
        let line = at.map(|at| self.line(at));
        self.problems.push(ConfigProblem { path: self.path.to_owned(), line, what });
    }

    fn line(&self, at: usize) -> usize {
        let before = self.text.as_bytes().iter().take(at);
        before.filter(|byte| **byte == b'\n').count() + 1
    }
}

type Item<'a, 'i> = (&'a Spanned<toml::de::DeString<'i>>, &'a Spanned<DeValue<'i>>);

/// Returns the items of a table in the order in which they were written.
fn items_in_order<'a, 'i>(table: &'a DeTable<'i>) -> Vec<Item<'a, 'i>> {
    let mut items: Vec<_> = table.iter().collect();
    items.sort_by_key(|(key, _)| key.span().start);
    items
}
