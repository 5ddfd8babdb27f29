//! Describes what a reload changes, for the log and for `hexz-nbd reload`.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use nbd_gateway::Policy;
use nbd_gateway::tls::{ServerTls, TlsChange};
use nbd_telemetry::escape;
use rustls::pki_types::UnixTime;

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
        changes.extend(self.tls_changes(before).into_iter().filter_map(|it| self.describe(it)));
        let files = self.files.changed_since(&before.files);
        let files: Vec<String> = files.map(|path| escape::path(path).to_string()).collect();
        if !files.is_empty() {
            changes.push(format!("changed files: {}", first(&files)));
        }
        changes
    }

    /// Returns the labels of what differs from `before`, or `nothing`.
    pub(super) fn labels_since(&self, before: &Self) -> String {
        let (old, new) = (&before.options, &self.options);
        let rules = before.open_to != self.open_to || old.access != new.access;
        let others = [("rules", rules), ("exports", old.snapshots != new.snapshots)];
        let others = others.into_iter().filter_map(|(label, differs)| differs.then_some(label));
        let tls = self.tls_changes(before).into_iter().map(TlsChange::label);
        let labels: Vec<&str> = tls.chain(others).collect();
        if labels.is_empty() { "nothing".to_owned() } else { labels.join(",") }
    }

    fn tls_changes(&self, before: &Self) -> Vec<TlsChange> {
        match (&before.tls, &self.tls) {
            (Some(before), Some(after)) => after.changes_since(before),
            // A reload can't switch TLS on or off.
            _ => Vec::new(),
        }
    }

    /// Describes what has changed in the TLS settings. Options are described elsewhere.
    fn describe(&self, change: TlsChange) -> Option<String> {
        let tls = self.tls.as_ref()?;
        match change {
            TlsChange::Certificate => {
                let expiry = tls.expiry().certificate.map(format_unix).unwrap_or_default();
                let sha256 = tls.certificate_sha256().unwrap_or_default();
                Some(format!("certificate expires {expiry}, SHA-256 {sha256}"))
            }
            TlsChange::ClientCas => Some("client CAs".to_owned()),
            TlsChange::RevocationLists => {
                Some(format!("revocation lists, {} revoked", tls.revoked_certificates()))
            }
            TlsChange::Settings => None,
        }
    }
}

fn format_unix(time: UnixTime) -> String {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(time.as_secs());
    humantime::format_rfc3339_seconds(time).to_string()
}

fn by_name(options: &SnapshotOptions) -> BTreeMap<&str, &Path> {
    options.named.iter().map(|named| (named.name.as_str(), named.path.as_path())).collect()
}

/// Describes changes of the exports and of how archives are opened.
fn export_changes(before: &SnapshotOptions, after: &SnapshotOptions) -> Vec<String> {
    let (old, new) = (by_name(before), by_name(after));
    let names = |names: Vec<&&str>| -> Vec<String> {
        names.into_iter().map(|name| escape::name(*name).to_string()).collect()
    };
    let added = names(new.keys().filter(|name| !old.contains_key(*name)).collect());
    let removed = names(old.keys().filter(|name| !new.contains_key(*name)).collect());
    let moved = new.iter().filter(|(name, path)| old.get(*name).is_some_and(|it| it != *path));
    let moved = names(moved.map(|(name, _)| name).collect());
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
            Some(folder) => escape::path(folder).to_string(),
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
