//! Describes what a reload changes, for the log and for `hexz-nbd reload`.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use nbd_gateway::Policy;
use nbd_gateway::tls::ServerTls;
use nbd_telemetry::escape;

use super::watch::WatchedFiles;
use crate::cli::{ReloadableOptions, SnapshotOptions};

/// Maximum number of exports or files that are named; the others are counted.
const MAX_NAMED: usize = 10;

/// Settings in force, as far as a reload can change them.
#[derive(Debug)]
pub(super) struct ActiveSettings {
    pub(super) options: ReloadableOptions,
    pub(super) tls: Option<ServerTls>,
    /// Description of who may connect.
    open_to: String,
    /// Stamps of the files from before they were read.
    files: WatchedFiles,
}

impl ActiveSettings {
    pub(super) fn new(options: ReloadableOptions, policy: &Policy, files: WatchedFiles) -> Self {
        let (tls, open_to) = (policy.tls.clone(), policy.rules.to_string());
        Self { options, tls, open_to, files }
    }

    /// Describes what differs from `before`, one entry per subject.
    pub(super) fn changes_since(&self, before: &Self) -> Vec<String> {
        let mut changes = Vec::new();
        changes.extend(export_changes(&before.options.snapshots, &self.options.snapshots));
        if before.open_to != self.open_to {
            changes.push(format!("open to {}, before: {}", self.open_to, before.open_to));
        } else if before.options.access != self.options.access {
            changes.push("access options".to_owned());
        }
        if before.options.tls != self.options.tls {
            changes.push("TLS options".to_owned());
        }
        changes.extend(certificate_change(before.tls.as_ref(), self.tls.as_ref()));
        let files = self.files.changed_since(&before.files);
        let files: Vec<String> = files.map(|path| escape::name(path).to_string()).collect();
        if !files.is_empty() {
            changes.push(format!("changed files: {}", first(&files)));
        }
        changes
    }
}

/// Describes changes of the exports and of how archives are opened.
fn export_changes(before: &SnapshotOptions, after: &SnapshotOptions) -> Vec<String> {
    let by_name = |options: &SnapshotOptions| -> BTreeMap<String, Box<Path>> {
        let named = options.named.iter();
        named.map(|named| (named.name.clone(), named.path.as_path().into())).collect()
    };
    let (old, new) = (by_name(before), by_name(after));
    let names = |names: Vec<&String>| -> Vec<String> {
        names.into_iter().map(|name| escape::name(name).to_string()).collect()
    };
    let added = names(new.keys().filter(|name| !old.contains_key(*name)).collect());
    let removed = names(old.keys().filter(|name| !new.contains_key(*name)).collect());
    let is_moved =
        |(name, path): &(&String, &Box<Path>)| old.get(*name).is_some_and(|before| before != *path);
    let moved = names(new.iter().filter(is_moved).map(|(name, _)| name).collect());
    let mut changes = Vec::new();
    for (what, names) in
        [("exports added", added), ("exports removed", removed), ("exports with a new path", moved)]
    {
        if !names.is_empty() {
            changes.push(format!("{what}: {}", first(&names)));
        }
    }
    if before.export_dir != after.export_dir {
        let folder = |folder: &Option<std::path::PathBuf>| match folder {
            Some(folder) => escape::name(folder).to_string(),
            None => "none".to_owned(),
        };
        let (before, after) = (folder(&before.export_dir), folder(&after.export_dir));
        changes.push(format!("export folder: {after}, before: {before}"));
    }
    if before.default_export != after.default_export {
        let name = |name: &Option<String>| match name {
            Some(name) => escape::name(name).to_string(),
            None => "none".to_owned(),
        };
        let (before, after) = (name(&before.default_export), name(&after.default_export));
        changes.push(format!("default export: {after}, before: {before}"));
    }
    if before.opening != after.opening || before.strict != after.strict {
        changes.push("options for opening archives".to_owned());
    }
    changes
}

/// Describes a change of the server's certificate.
fn certificate_change(before: Option<&ServerTls>, after: Option<&ServerTls>) -> Option<String> {
    let expiry = |tls: Option<&ServerTls>| tls.and_then(|tls| tls.expiry().certificate);
    let (before, after) = (expiry(before), expiry(after)?);
    if before == Some(after) {
        return None;
    }
    let expires = SystemTime::UNIX_EPOCH + Duration::from_secs(after.as_secs());
    Some(format!("certificate expires {}", humantime::format_rfc3339_seconds(expires)))
}

/// Joins the first names, and counts the others.
fn first(names: &[String]) -> String {
    let named = names.get(..MAX_NAMED).unwrap_or(names).join(", ");
    match names.len().saturating_sub(MAX_NAMED) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exports(named: &[(&str, &str)]) -> SnapshotOptions {
        let named = named.iter().map(|(name, path)| format!("{name}={path}").parse().unwrap());
        SnapshotOptions { named: named.collect(), ..SnapshotOptions::default() }
    }

    #[test]
    fn changed_exports_are_named() {
        let before = exports(&[("a", "1"), ("b", "2"), ("c", "3")]);
        assert_eq!(export_changes(&before, &before), [""; 0]);
        let after = SnapshotOptions {
            export_dir: Some("/srv".into()),
            default_export: Some("a\n".to_owned()),
            strict: true,
            ..exports(&[("c", "3"), ("a", "2"), ("d", "4")])
        };
        let changes = [
            "exports added: d",
            "exports removed: b",
            "exports with a new path: a",
            "export folder: /srv, before: none",
            "default export: a\\n, before: none",
            "options for opening archives",
        ];
        assert_eq!(export_changes(&before, &after), changes);
    }

    #[test]
    fn long_lists_are_cut() {
        let names: Vec<String> = (0..12).map(|number| number.to_string()).collect();
        assert_eq!(first(&names[..10]), "0, 1, 2, 3, 4, 5, 6, 7, 8, 9");
        assert_eq!(first(&names), "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more");
    }
}
