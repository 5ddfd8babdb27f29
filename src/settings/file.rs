//! Reads a configuration file.

#[cfg(feature = "remote")]
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use clap::Command;
use hexz_exports::NamedArchive;
use nbd_gateway::tls::{TlsFileProblem, check_not_exposed};
use nbd_telemetry::escape;
use serde::de::{Error, IntoDeserializer, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use toml::Spanned;
use toml::de::{DeArray, DeString, DeTable, DeValue};

use super::Warning;
use super::keys::{self, EXPORTS, STORES, ValueKind};
use super::problem::{ConfigProblem, ProblemKind};
#[cfg(feature = "remote")]
use crate::cli::StoreSettings;
use crate::cli::{LogOptions, ServeOptions, location};

/// Maximum size of a configuration file, in bytes; enough for 10,000 archives.
const MAX_FILE_SIZE: u64 = 1024 * 1024;

/// Maximum number of problems that are reported: a file of another kind has one on each line.
const MAX_PROBLEMS: usize = 50;

/// All options of a configuration file. Those that it doesn't set have arbitrary values.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct FileOptions {
    #[serde(deserialize_with = "archives")]
    pub(super) exports: Vec<NamedArchive>,
    /// Options by URL of the store.
    #[cfg(feature = "remote")]
    pub(super) stores: BTreeMap<String, StoreSettings>,
    #[serde(flatten)]
    pub(super) serve: ServeOptions,
    #[serde(flatten)]
    pub(super) log: LogOptions,
}

type Key<'a> = Spanned<DeString<'a>>;
type Value<'a> = Spanned<DeValue<'a>>;

/// A parsed configuration file.
pub(super) struct ConfigFile<'a> {
    path: &'a Path,
    text: &'a str,
    table: DeTable<'a>,
    /// Keys whose values are ignored.
    ignored: &'static [&'static str],
}

/// Returns the content of a configuration file, and a warning if others can change it.
pub(super) fn read(path: &Path) -> Result<(String, Option<Warning>), ConfigProblem> {
    let problem = |what| ConfigProblem { path: path.to_owned(), line: None, what };
    let file = File::open(path).map_err(|error| problem(error.into()))?;
    let warning = file.metadata().ok().and_then(|file| {
        warn_other_writers(path, file.mode(), file.uid(), rustix::process::geteuid().as_raw())
    });
    let mut text = String::new();
    file.take(MAX_FILE_SIZE + 1)
        .read_to_string(&mut text)
        .map_err(|error| problem(error.into()))?;
    if text.len() as u64 > MAX_FILE_SIZE {
        return Err(problem(ProblemKind::TooLarge));
    }
    Ok((text, warning))
}

/// Returns a warning if others than root and the user of this process can modify a file of this
/// mode and owner. Permissions of its group are left to the owner.
fn warn_other_writers(path: &Path, mode: u32, owner: u32, own: u32) -> Option<Warning> {
    let path = escape::path(path);
    let text = |who: &str| format!("{path} determines who has access, and {who} can change it");
    if mode & 0o002 != 0 {
        let text = text("every user of this machine");
        return Some(Warning { label: "writable_by_all", text });
    }
    let is_foreign = owner != 0 && owner != own;
    let text = text(&format!("its owner, user {owner},"));
    is_foreign.then_some(Warning { label: "writable_by_owner", text })
}

impl<'a> ConfigFile<'a> {
    /// Parses the content of the file at `path`, without its values. Those of `ignored` keys are
    /// never parsed.
    pub(super) fn parse(
        text: &'a str,
        path: &'a Path,
        ignored: &'static [&'static str],
    ) -> Result<Self, ConfigProblem> {
        match DeTable::parse(text) {
            Ok(table) => Ok(Self { path, text, table: table.into_inner(), ignored }),
            Err(error) => Err(ConfigProblem {
                path: path.to_owned(),
                line: error.span().map(|span| line(text, span.start)),
                what: ProblemKind::Syntax(error.message().to_owned()),
            }),
        }
    }

    /// Returns all problems of keys and values, in the order of their lines. `command` has the
    /// options that the keys mean.
    pub(super) fn problems(&self, command: &Command) -> Vec<ConfigProblem> {
        let mut items: Vec<_> = self.table.iter().collect();
        items.sort_by_key(|(key, _)| key.span().start);
        let problems = items.into_iter().flat_map(|(key, value)| {
            let name = key.get_ref().as_ref();
            let option = keys::option(command, name);
            if name == STORES && cfg!(feature = "remote") {
                return self.problems_of_stores(command, key, value);
            }
            if option.is_none() && name != EXPORTS {
                let what = unknown_key(command, name, value.get_ref());
                return vec![self.problem(key.span().start, what)];
            }
            // Each part is deserialized alone, so that every problem is found.
            let is_list = option.is_some_and(|option| keys::kind(option) == ValueKind::Many);
            let parts = parts(key, value, is_list).into_iter();
            parts.filter_map(|part| self.problem_of_part(command, part)).collect()
        });
        problems.take(MAX_PROBLEMS).collect()
    }

    /// Returns the problems of the tables of stores.
    fn problems_of_stores(
        &self,
        command: &Command,
        key: &Key<'a>,
        value: &Value<'a>,
    ) -> Vec<ConfigProblem> {
        let tables = value.get_ref().as_table().into_iter().flatten();
        let keys = tables.filter_map(|(_, table)| table.get_ref().as_table()).flatten();
        let unknown = keys.filter(|(key, _)| {
            let key = key.get_ref().as_ref();
            !keys::is_of_one_store(key) || keys::option(command, key).is_none()
        });
        let problem = |(key, value): (&Key<'_>, &Value<'_>)| {
            let what = match keys::option(command, key.get_ref()) {
                Some(_) => ProblemKind::NotOfOneStore(key.get_ref().to_string()),
                None => unknown_key(command, key.get_ref(), value.get_ref()),
            };
            self.problem(key.span().start, what)
        };
        let unknown: Vec<_> = unknown.map(problem).collect();
        if !unknown.is_empty() {
            return unknown;
        }
        let parts = parts(key, value, false).into_iter();
        parts.filter_map(|part| self.problem_of_part(command, part)).collect()
    }

    fn problem_of_part(&self, command: &Command, part: Part<'a>) -> Option<ConfigProblem> {
        let Part { start, key, name, item, is_empty } = part;
        if self.ignored.contains(&key.as_str()) {
            return None;
        }
        if key == EXPORTS && keys::option(command, &name).is_some() {
            return Some(self.problem(start, ProblemKind::OptionInExports(name)));
        }
        let why = match is_empty {
            true => "it must not be empty".to_owned(),
            false => deserialize(item).err()?.message().to_owned(),
        };
        let key = if key == name { key } else { format!("[{key}] {name}") };
        Some(self.problem(start, ProblemKind::InvalidValue { key, why }))
    }

    /// Returns the keys that set something, with their line numbers.
    pub(super) fn set_keys(&self) -> impl Iterator<Item = (String, usize)> {
        let set = self.table.iter().filter(|(_, value)| {
            !matches!(value.get_ref(), DeValue::Boolean(false) | DeValue::Table(_))
        });
        set.map(|(key, _)| (key.get_ref().to_string(), line(self.text, key.span().start)))
    }

    /// Removes all keys that `is_used` rejects.
    pub(super) fn retain(&mut self, is_used: impl Fn(&str) -> bool) {
        let unused = self.table.keys().filter(|key| !is_used(key.get_ref()));
        for key in unused.cloned().collect::<Vec<_>>() {
            self.table.remove(&key);
        }
    }

    /// Returns a warning if the file has URLs with secrets, and every user can read it.
    pub(super) fn warn_exposed(&self) -> Option<Warning> {
        if !self.table.values().any(|value| has_secret_url(value.get_ref())) {
            return None;
        }
        let problem = check_not_exposed(self.path).err()?;
        // It was readable a moment ago, and whether others can read it isn't known.
        if !matches!(problem, TlsFileProblem::Exposed { .. }) {
            return None;
        }
        let path = escape::path(self.path);
        let text = format!("{path} has URLs with a query, a user or a password, and {problem}");
        Some(Warning { label: problem.label(), text })
    }

    /// Returns true if the file contains a key.
    pub(super) fn has(&self, key: &str) -> bool {
        self.table.keys().any(|name| name.get_ref() == key)
    }

    /// Returns the values of a key as they are written.
    pub(super) fn values(&self, key: &str) -> Option<Vec<String>> {
        let text = |value: &Value<'_>| match value.get_ref() {
            DeValue::String(text) => text.to_string(),
            DeValue::Integer(number) => number.to_string(),
            other => other.as_bool().map_or_else(String::new, |flag| flag.to_string()),
        };
        let (_, value) = self.table.iter().find(|(name, _)| name.get_ref() == key)?;
        Some(match value.get_ref() {
            DeValue::Array(values) => values.iter().map(text).collect(),
            _ => vec![text(value)],
        })
    }

    /// Returns the options of a file without [`problems`](Self::problems).
    pub(super) fn options(mut self) -> Result<FileOptions, ConfigProblem> {
        let ignored = self.ignored;
        self.retain(|key| !ignored.contains(&key));
        let problem = |error| ConfigProblem { path: self.path.to_owned(), line: None, what: error };
        deserialize(self.table).map_err(|error| problem(ProblemKind::Syntax(error.to_string())))
    }

    fn problem(&self, start: usize, what: ProblemKind) -> ConfigProblem {
        ConfigProblem { path: self.path.to_owned(), line: Some(line(self.text, start)), what }
    }
}

fn deserialize(table: DeTable<'_>) -> Result<FileOptions, toml::de::Error> {
    FileOptions::deserialize(Spanned::new(0..0, table).into_deserializer())
}

/// A value, an element of a list or an archive, as a table of its own.
struct Part<'a> {
    /// Offset of the part in the file.
    start: usize,
    key: String,
    /// Name of the archive, or else the key.
    name: String,
    item: DeTable<'a>,
    /// True for an empty string.
    is_empty: bool,
}

/// Splits the value of a key into parts.
fn parts<'a>(key: &Key<'a>, value: &Value<'a>, is_list: bool) -> Vec<Part<'a>> {
    let part = |start: usize, name: &str, value: &Value<'a>, wrapped: DeValue<'a>| {
        let mut item = DeTable::new();
        item.insert(key.clone(), Spanned::new(value.span(), wrapped));
        let is_empty = value.get_ref().as_str() == Some("");
        Part { start, key: key.get_ref().to_string(), name: name.to_owned(), item, is_empty }
    };
    let name = key.get_ref().as_ref();
    match value.get_ref() {
        DeValue::Array(elements) if is_list && !elements.is_empty() => {
            let parts = elements.iter().map(|element| {
                let mut array = DeArray::new();
                array.push(element.clone());
                part(element.span().start, name, element, DeValue::Array(array))
            });
            parts.collect()
        }
        DeValue::Table(archives) if name == EXPORTS => {
            let parts = archives.iter().map(|(name, path)| {
                let mut table = DeTable::new();
                table.insert(name.clone(), path.clone());
                part(name.span().start, name.get_ref(), path, DeValue::Table(table))
            });
            let mut parts: Vec<_> = parts.collect();
            parts.sort_by_key(|part| part.start);
            parts
        }
        whole => vec![part(key.span().start, name, value, whole.clone())],
    }
}

/// Deserializes the table of archives, in the order of the file.
fn archives<'de, D>(deserializer: D) -> Result<Vec<NamedArchive>, D::Error>
where
    D: Deserializer<'de>,
{
    struct ArchivesVisitor;

    impl<'de> Visitor<'de> for ArchivesVisitor {
        type Value = Vec<(usize, NamedArchive)>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a table of NAME = \"PATH\"")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut archives = Vec::new();
            while let Some((name, path)) = map.next_entry::<Spanned<String>, toml::Value>()? {
                let path = archive_path(name.get_ref(), path).map_err(A::Error::custom)?;
                let archive = location::archive_named(name.get_ref(), &path);
                let archive = archive.map_err(A::Error::custom)?;
                archives.push((name.span().start, archive));
            }
            Ok(archives)
        }
    }

    let mut archives = deserializer.deserialize_map(ArchivesVisitor)?;
    archives.sort_by_key(|(start, _)| *start);
    Ok(archives.into_iter().map(|(_, archive)| archive).collect())
}

/// Returns the path of an archive.
fn archive_path(name: &str, value: toml::Value) -> Result<String, String> {
    match value {
        toml::Value::String(path) => Ok(path),
        toml::Value::Table(inner) => {
            let rest = inner.keys().next().map_or("", String::as_str);
            let name = format!("{name}.{rest}");
            Err(format!("a name with dots must be in quotes: {:?}", escape::path(&name)))
        }
        other => Err(format!("invalid type: {}, expected a path in quotes", other.type_str())),
    }
}

/// Describes a key that means nothing.
fn unknown_key(command: &Command, key: &str, value: &DeValue<'_>) -> ProblemKind {
    if let Some(why) = keys::command_line_only_reason(key) {
        return ProblemKind::CommandLineOnly { key: key.to_owned(), why };
    }
    let nearest = keys::nearest(command, key);
    match value {
        DeValue::Table(_) if nearest.as_deref().is_some_and(keys::is_table) => {
            let meant = nearest.unwrap_or_default();
            ProblemKind::MisspelledTable { table: key.to_owned(), meant }
        }
        // It may be a group of options, such as `[tls] cert = …`.
        DeValue::Table(table) => {
            let options = table.keys().filter_map(|inner| {
                let inner = inner.get_ref().as_ref();
                let joined = format!("{key}-{inner}");
                let known =
                    [&joined, inner].into_iter().find(|key| keys::option(command, key).is_some());
                known.map(str::to_owned).or_else(|| keys::nearest(command, inner))
            });
            let options: Vec<_> = options.take(3).collect();
            let examples = format!(", as {}", options.join(", "));
            let examples = if options.is_empty() { String::new() } else { examples };
            ProblemKind::UnknownTable { table: key.to_owned(), examples }
        }
        _ if key == "password" => ProblemKind::Password,
        _ => {
            let hint = nearest.map(|key| format!("did you mean {key}?"));
            let hint = hint.unwrap_or_else(|| "hexz-nbd --help lists all options".to_owned());
            ProblemKind::UnknownOption { key: key.to_owned(), hint }
        }
    }
}

/// Returns true if a value is or contains a URL with a query, a user or a password.
fn has_secret_url(value: &DeValue<'_>) -> bool {
    match value {
        DeValue::String(text) => {
            text.contains("://")
                && escape::path(&**text).to_string() != escape::name(&**text).to_string()
        }
        DeValue::Array(values) => values.iter().any(|value| has_secret_url(value.get_ref())),
        DeValue::Table(table) => table.values().any(|value| has_secret_url(value.get_ref())),
        _ => false,
    }
}

/// Returns the number of the line that contains the offset `start`.
fn line(text: &str, start: usize) -> usize {
    text.bytes().take(start).filter(|byte| *byte == b'\n').count() + 1
}
