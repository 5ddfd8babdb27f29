//! Finds the problems that an operator should know about, in plain words.

use std::borrow::Cow;
use std::fmt::Display;
use std::time::Duration;

use nbd_gateway::{ExpiringClient, LabelCounts};
use nbd_telemetry::escape;
use serde::{Deserialize, Serialize};

use super::history::LastFailures;
use super::reasons;
use super::status::{ArchivesStatus, Status};

const DAY: f64 = 86_400.0;
const HOUR: f64 = 3600.0;

/// Time after which a failed read or a lost audit event isn't critical any more, unless another one
/// follows.
const RECENT: f64 = HOUR;

/// Remaining validity of certificates in seconds: below the first, it is critical.
const CERTIFICATE_LIMITS: [f64; 2] = [7.0 * DAY, 30.0 * DAY];

/// The same for revocation lists, which some CAs issue daily.
const LIST_LIMITS: [f64; 2] = [12.0 * HOUR, 0.0];

/// Remaining validity of a store's credentials below which they should have been renewed.
const CREDENTIALS_LIMIT: f64 = 180.0;

/// Maximum number of archives or clients that a message names.
const NAMED: usize = 3;

/// A problem that an operator should know about.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Problem {
    /// `critical` if clients are affected or will soon be, else `warning`.
    pub(crate) severity: Cow<'static, str>,
    /// Stable label of the problem.
    pub(crate) problem: Cow<'static, str>,
    /// Description of the problem, and what to do about it.
    pub(crate) message: String,
}

/// Severity of a problem, worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Severity {
    Critical,
    Warning,
}

use Severity::{Critical, Warning};

impl Severity {
    fn name(self) -> &'static str {
        match self {
            Critical => "critical",
            Warning => "warning",
        }
    }
}

/// Problems in the order in which they were found.
#[derive(Debug, Default)]
struct Problems(Vec<(Severity, Problem)>);

impl Problems {
    fn add(&mut self, severity: Severity, problem: &'static str, message: String) {
        let name = severity.name().into();
        self.0.push((severity, Problem { severity: name, problem: problem.into(), message }));
    }
}

/// Returns the problems that `status` shows, worst first. `stuck` and `fault` are reasons why the
/// process should be restarted; with the first, clients get no replies.
pub(super) fn find(
    status: &Status,
    failures: LastFailures,
    stuck: Option<&'static str>,
    fault: Option<&'static str>,
) -> Vec<Problem> {
    let mut found = Problems::default();
    if let Some(why) = stuck {
        let text = format!("Clients get no replies: {}; restart the server", without_label(why));
        found.add(Critical, "stuck", text);
    }
    if let Some(why) = fault {
        let text =
            format!("Only what is cached can be read: {}; restart the server", without_label(why));
        found.add(Critical, "dialer_gone", text);
    }
    readiness(&mut found, status);
    failed_reads(&mut found, status, failures.reads);
    lost_events(&mut found, status, failures.audit);
    expiries(&mut found, status);
    client_certificates(&mut found, status);
    stores(&mut found, status);
    unavailable_archives(&mut found, &status.archives);
    failed_reload(&mut found, status);
    // Stable, so that those found first come first.
    found.0.sort_by_key(|(severity, _)| *severity);
    found.0.into_iter().map(|(_, problem)| problem).collect()
}

fn readiness(found: &mut Problems, status: &Status) {
    let Some(why) = status.unready.as_deref() else { return };
    match why {
        "starting" => found.add(Warning, "starting", "The server is starting".to_owned()),
        "shutting down" => {
            found.add(Warning, "shutting_down", "The server is shutting down".to_owned());
        }
        why => {
            let text = format!("No client can be served: {}", without_label(why));
            found.add(Critical, "not_ready", text);
        }
    }
}

/// Returns a reason without the label that it may start with.
fn without_label(why: &str) -> &str {
    why.split_once(": ").map_or(why, |(_, text)| text)
}

fn failed_reads(found: &mut Problems, status: &Status, last: Option<f64>) {
    let of = |kind: ReadFailureKind| -> LabelCounts {
        let counts = status.verification_failures.iter();
        let counts = counts.filter(|(label, _)| ReadFailureKind::of(label) == kind);
        counts.map(|(label, count)| (label.clone(), *count)).collect()
    };
    let when = time_since(status, last);
    let severity = severity_since(status, last);
    if let Some((many, reasons)) = summarize(&of(ReadFailureKind::Damage)) {
        let text = format!(
            "Damage: {} failed because blocks are damaged or missing ({reasons}){when}. Find the \
             affected archive in the errors, and run hexz-nbd verify",
            reads(many),
        );
        found.add(severity, "damage", text);
    }
    if let Some((many, reasons)) = summarize(&of(ReadFailureKind::Disk)) {
        let text = format!(
            "Disk: {} failed because files couldn't be read ({reasons}){when}: see the errors",
            reads(many)
        );
        found.add(severity, "storage", text);
    }
    if let Some((many, reasons)) = summarize(&of(ReadFailureKind::Store)) {
        let text = format!("Stores: {} failed ({reasons}){when}: see the errors", reads(many));
        found.add(Warning, "store_reads", text);
    }
}

/// Cause of a failed read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReadFailureKind {
    /// A block is damaged, or missing from all parents.
    Damage,
    /// A file couldn't be read.
    Disk,
    /// A store failed.
    Store,
}

impl ReadFailureKind {
    fn of(label: &str) -> Self {
        match label {
            "io" | "panicked" => Self::Disk,
            "shutting_down" => Self::Store,
            label if label.starts_with("store_") => Self::Store,
            _ => Self::Damage,
        }
    }
}

fn reads(count: u64) -> String {
    plural(count, "read")
}

fn lost_events(found: &mut Problems, status: &Status, last: Option<f64>) {
    let Some(lost) = status.audit.map(|audit| audit.lost).filter(|lost| *lost > 0) else { return };
    let text = format!(
        "Audit: {} couldn't be written{}: check the disk of the audit file",
        plural(lost, "event"),
        time_since(status, last)
    );
    found.add(severity_since(status, last), "audit_lost", text);
}

fn expiries(found: &mut Problems, status: &Status) {
    let Some(tls) = &status.gateway.tls else { return };
    let renew = "renew it, and reload the server";
    for (what, end, limits, label, effect) in [
        (
            "The server's certificate",
            tls.certificate_expires,
            CERTIFICATE_LIMITS,
            "certificate",
            "clients refuse the server",
        ),
        (
            "A CA of clients",
            tls.client_ca_expires,
            CERTIFICATE_LIMITS,
            "client_ca",
            "its clients are refused",
        ),
        (
            "A revocation list",
            tls.client_crl_expires,
            LIST_LIMITS,
            "client_crl",
            "clients of its CA are refused",
        ),
    ] {
        let Some(left) = end.map(|end| end - status.now) else { continue };
        let [critical, warning] = limits;
        if left <= 0.0 {
            let text = format!("{what} expired {} ago, so {effect}: {renew}", duration(-left));
            found.add(Critical, label, text);
        } else if left < critical || left < warning {
            let severity = if left < critical { Critical } else { Warning };
            found.add(severity, label, format!("{what} expires in {}: {renew}", duration(left)));
        }
    }
}

fn client_certificates(found: &mut Problems, status: &Status) {
    let clients = &status.gateway.client_certificates;
    let Some(first) = clients.expiring.first() else { return };
    let when = |client: &ExpiringClient| match client.expires - status.now {
        left if left > 0.0 => format!("expires in {}", duration(left)),
        left => format!("expired {} ago", duration(-left)),
    };
    let count = clients.expires_soon.saturating_add(clients.expired);
    let text = if count <= 1 {
        let (identity, when) = (escape::text(&first.identity), when(first));
        format!(
            "The certificate of the client {identity} {when}: renew it, and give it to the client"
        )
    } else {
        let named = clients.expiring.iter();
        let named = named.map(|it| format!("{} {}", escape::text(&it.identity), when(it)));
        let named = name_some(count, named);
        format!("Certificates of {count} clients have to be renewed: {named}")
    };
    found.add(Warning, "client_certificate", text);
}

fn stores(found: &mut Problems, status: &Status) {
    for store in status.remote.stores.iter().filter(|store| store.is_down()) {
        let text = format!("The store {} is down: reads from it wait", escape::text(&store.name));
        found.add(Critical, "store_down", text);
    }
    for store in &status.remote.stores {
        let Some(why) = &store.rejection else { continue };
        let why = match &**why {
            "credentials_expired" => "the credentials have expired",
            "clock_skew" => "this machine's clock is wrong",
            "denied" => "access is denied",
            why => why,
        };
        let text = format!(
            "The store {} rejects requests ({}): only what is cached can be read",
            escape::text(&store.name),
            escape::text(why)
        );
        found.add(Critical, "store_rejects", text);
    }
    for store in &status.remote.stores {
        let Some(left) = store.credentials_expire.map(|end| end - status.now) else { continue };
        if left < CREDENTIALS_LIMIT {
            let text = format!(
                "The credentials for {} {}, and haven't been renewed",
                escape::text(&store.name),
                if left <= 0.0 {
                    "have expired".to_owned()
                } else {
                    format!("expire in {}", duration(left))
                },
            );
            found.add(Warning, "store_credentials", text);
        }
    }
    if status.remote.disk_cache.as_ref().is_some_and(|cache| cache.is_off) {
        let text = "The disk of --disk-cache has failed: everything is fetched from the stores";
        found.add(Warning, "disk_cache_off", text.to_owned());
    }
}

fn unavailable_archives(found: &mut Problems, archives: &ArchivesStatus) {
    let folder = archives.folder.as_ref();
    if let Some(fault) = folder.and_then(|folder| folder.fault.as_deref())
        // The others make the server unready.
        && fault == "folder_store"
    {
        found.add(Warning, "folder", "The export folder can't be listed: see the errors".into());
    }
    let Some(first) = archives.unavailable.first() else { return };
    let text = if archives.unavailable_count <= 1 {
        format!("An archive can't be opened: {}", first.message)
    } else {
        let count = archives.unavailable_count;
        let named = archives.unavailable.iter().map(|it| {
            let why = reasons::describe(reasons::ARCHIVES, &it.reason);
            format!("{} ({})", escape::text(&it.name), escape::text(why))
        });
        format!("{count} archives can't be opened: {}", name_some(count, named))
    };
    found.add(Warning, "archives", text);
}

fn failed_reload(found: &mut Problems, status: &Status) {
    let reloads = &status.gateway.reloads;
    if let Some(error) = &reloads.last_error {
        let when = reloads.last.map(|last| format!(" {} ago", duration(status.now - last)));
        let text = format!(
            "The reload{} failed, so the previous settings apply: {}",
            when.unwrap_or_default(),
            escape::text(error)
        );
        found.add(Warning, "reload", text);
    }
}

/// Joins the first of `count` items.
fn name_some(count: u64, items: impl Iterator<Item = String>) -> String {
    let named: Vec<String> = items.take(NAMED).collect();
    let more = count.saturating_sub(named.len() as u64);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", named.join(", "))
}

/// Returns the severity of failures of which the last was at `last`.
fn severity_since(status: &Status, last: Option<f64>) -> Severity {
    // Without a time, it happened a moment ago.
    if last.is_none_or(|last| status.now - last < RECENT) { Critical } else { Warning }
}

/// Returns ", the last one … ago".
fn time_since(status: &Status, last: Option<f64>) -> String {
    match last.map(|last| status.now - last) {
        Some(age) if age >= 60.0 => format!(", the last one {} ago", duration(age)),
        _ => ", the last one a moment ago".to_owned(),
    }
}

/// Returns the sum of the counts, and the words for the labels, most frequent first.
fn summarize(counts: &LabelCounts) -> Option<(u64, String)> {
    let total = counts.values().fold(0_u64, |sum, count| sum.saturating_add(*count));
    let mut labels: Vec<_> = counts.iter().filter(|(_, count)| **count > 0).collect();
    labels.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let words = labels.into_iter().map(|(label, _)| reasons::describe(reasons::ARCHIVES, label));
    let words: Vec<&str> = words.collect();
    (total > 0).then(|| (total, words.join(", ")))
}

fn plural(count: u64, noun: impl Display) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

/// Formats a duration in its largest unit, for people.
fn duration(seconds: f64) -> String {
    let seconds = Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX).as_secs();
    let units = [("day", 86_400), ("hour", 3600), ("minute", 60)];
    // Two days rather than 48 hours, but 30 hours rather than one day.
    let unit = units.into_iter().find(|(_, unit)| seconds >= 2 * unit);
    let (name, unit) = unit.unwrap_or(("second", 1));
    plural(seconds / unit, name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(json: serde_json::Value) -> Vec<(String, String)> {
        let mut json = json;
        json["format"] = 1.into();
        json["now"] = 1_000_000.into();
        let status = Status::parse(json.to_string().as_bytes()).unwrap();
        let failures = LastFailures { reads: Some(999_000.0), audit: Some(900_000.0) };
        let problems = find(&status, failures, None, None).into_iter();
        problems.map(|it| (it.severity.into_owned(), it.problem.into_owned())).collect()
    }

    fn texts(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
    }

    #[test]
    fn a_healthy_server_has_no_problems() {
        let healthy = serde_json::json!({
            "ready": true, "audit": { "written": 9, "lost": 0 },
            "verification_failures": { "crc": 0 }, "reloads": { "failed": 3, "last": 5 },
            "open_failures": { "crc": 3 },
            "tls": { "certificate_expires": 9_000_000, "client_ca_expires": 9_000_000,
                     "client_crl_expires": 1_080_000 },
            "stores": [{ "name": "s3://x", "breaker": "closed", "credentials_expire": 1_000_600 }],
        });
        assert_eq!(found(healthy), []);
    }

    #[test]
    fn the_worst_problem_comes_first() {
        let broken = serde_json::json!({
            "unready": "folder_missing: the export folder doesn't exist",
            "audit": { "lost": 2 },
            "verification_failures": { "crc": 2, "io": 1, "store_down": 3 },
            "reloads": { "failed": 1, "last": 999_990, "last_error": "bad rules" },
            "tls": { "certificate_expires": 1_900_000, "client_crl_expires": 999_999 },
            "client_certificates": { "expired": 1, "expiring": [{ "expires": 999_999 }] },
            "stores": [{ "name": "s3://x", "breaker": "open", "rejection": "denied",
                         "credentials_expire": 1_000_100 }],
            "disk_cache": { "is_off": true },
            "archives": { "unavailable": [{ "name": "a" }], "unavailable_count": 1 },
        });
        let expected = texts(&[
            ("critical", "not_ready"),
            ("critical", "damage"),
            ("critical", "storage"),
            ("critical", "client_crl"),
            ("critical", "store_down"),
            ("critical", "store_rejects"),
            ("warning", "store_reads"),
            ("warning", "audit_lost"),
            ("warning", "certificate"),
            ("warning", "client_certificate"),
            ("warning", "store_credentials"),
            ("warning", "disk_cache_off"),
            ("warning", "archives"),
            ("warning", "reload"),
        ]);
        assert_eq!(found(broken), expected);
        let starting = serde_json::json!({ "unready": "starting" });
        assert_eq!(found(starting), texts(&[("warning", "starting")]));
    }

    #[test]
    fn expiry_is_critical_when_it_is_near() {
        let of = |left: i64| {
            let tls = serde_json::json!({ "certificate_expires": 1_000_000 + left });
            found(serde_json::json!({ "tls": tls })).pop().map(|(severity, _)| severity)
        };
        let day = 86_400;
        assert_eq!(of(31 * day), None);
        assert_eq!(of(29 * day).as_deref(), Some("warning"));
        assert_eq!(of(6 * day).as_deref(), Some("critical"));
        assert_eq!(of(-day).as_deref(), Some("critical"));
    }

    #[test]
    fn messages_name_what_is_affected() {
        let archives = ArchivesStatus {
            unavailable: ["a", "b", "c", "d\u{202e}"]
                .map(|name| super::super::status::UnavailableStatus {
                    name: name.to_owned(),
                    reason: "crc".into(),
                    message: format!("/srv/{name}: damaged"),
                })
                .into(),
            unavailable_count: 200,
            ..ArchivesStatus::default()
        };
        let message = |archives: ArchivesStatus| {
            let status = Status { archives, ..Status::default() };
            find(&status, LastFailures::default(), None, None).remove(0).message
        };
        let many = "200 archives can't be opened: a (wrong checksum), b (wrong checksum), \
                    c (wrong checksum) and 197 more";
        assert_eq!(message(archives.clone()), many);
        let one = ArchivesStatus { unavailable_count: 1, ..archives };
        assert_eq!(message(one), "An archive can't be opened: /srv/a: damaged");
    }

    #[test]
    fn certificates_of_clients_are_named() {
        let message = |expires_soon: u64, expired: u64, clients: &[(&str, f64)]| {
            let expiring = clients.iter().map(|(identity, left)| ExpiringClient {
                identity: (*identity).to_owned(),
                expires: 1e6 + left,
                ..ExpiringClient::default()
            });
            let mut status = Status { now: 1e6, ..Status::default() };
            let clients = &mut status.gateway.client_certificates;
            (clients.expires_soon, clients.expired) = (expires_soon, expired);
            clients.expiring = expiring.collect();
            find(&status, LastFailures::default(), None, None).remove(0).message
        };
        let alone = "The certificate of the client dns:a\\u{202e} expires in 3 days: renew it, and \
                     give it to the client";
        assert_eq!(message(1, 0, &[("dns:a\u{202e}", 3.5 * DAY)]), alone);
        let expired = "The certificate of the client cn:b expired 2 hours ago: renew it, and give \
                       it to the client";
        assert_eq!(message(0, 1, &[("cn:b", -2.0 * HOUR)]), expired);
        let many = "Certificates of 9 clients have to be renewed: cn:b expired 2 hours ago, cn:c \
                    expires in 3 days, cn:d expires in 4 days and 6 more";
        let clients =
            [("cn:b", -2.0 * HOUR), ("cn:c", 3.0 * DAY), ("cn:d", 4.0 * DAY), ("cn:e", 5.0 * DAY)];
        assert_eq!(message(8, 1, &clients), many);
    }

    #[test]
    fn durations_are_rounded_to_a_unit() {
        let day = 86_400.0;
        for (seconds, text) in [
            (-5.0, "0 seconds"),
            (1.5, "1 second"),
            (119.0, "119 seconds"),
            (120.0, "2 minutes"),
            (1.5 * day, "36 hours"),
            (2.0 * day, "2 days"),
            (f64::INFINITY, "213503982334601 days"),
        ] {
            assert_eq!(duration(seconds), text);
        }
    }
}
