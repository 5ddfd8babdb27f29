//! Compares the events with their documentation in `docs/audit.md`.

use std::collections::{BTreeMap, BTreeSet};

use std::time::Duration;

use nbd_gateway::audit::*;

use super::line;

type Members = BTreeMap<String, BTreeSet<String>>;

fn who() -> ConnectionInfo {
    ConnectionInfo {
        id: 7,
        peer: "10.1.2.3".into(),
        via: Some("192.0.2.1".into()),
        identity: Some("dns:backup.example.org".into()),
        sha256: Some("ab".into()),
    }
}

fn served() -> ActivityTotals {
    ActivityTotals {
        export: Some("snap.hexz".into()),
        requests: Some(1),
        bytes: Some(512),
        errors: Some(0),
        denied: Some(1),
        missing: Some(1),
    }
}

/// Returns one event of each kind, with all optional members present.
fn all() -> Vec<Event> {
    let duration = Duration::from_micros(1_500_000);
    let why = || BoundedText::from("because");
    vec![
        Event::Start(ServiceStarted {
            version: "0".into(),
            pid: 1,
            listen: vec!["[::]:10809".into()],
            tls: true,
            policy: 0,
            open_to: "all".into(),
        }),
        Event::Stop(ServiceStopped { how: "failed".into(), why: Some(why()) }),
        Event::Reload(PolicyReloaded { policy: 1, open_to: "all".into(), dropped: 2 }),
        Event::ReloadFailed(ReloadFailed { why: why() }),
        Event::Refused(ConnectionRefused {
            connection: who(),
            reason: "address".into(),
            cause: Some("denied_by_rule".into()),
            why: why(),
        }),
        Event::Reading(ReadingStarted {
            connection: who(),
            certificate: Some(ClientCertificate {
                subject: "CN=x".into(),
                names: vec!["cn:x".into()],
                issuer: "CN=ca".into(),
                serial: "01".into(),
                not_after: Rfc3339Time::from_unix(0),
            }),
            tls: Some("TLS 1.3".into()),
            cipher: Some("TLS13_AES_128_GCM_SHA256".into()),
            export: "snap.hexz".into(),
            rule: why(),
            policy: 1,
        }),
        Event::ExportDenied(ExportDenied {
            connection: who(),
            export: "x".into(),
            cause: "denied_by_rule".into(),
            why: why(),
        }),
        Event::ExportMissing(ExportMissing {
            connection: who(),
            export: "x".into(),
            reason: "unknown_name".into(),
        }),
        Event::HandshakeFailed(HandshakeFailed {
            connection: who(),
            cause: "not_tls".into(),
            why: why(),
            duration,
        }),
        Event::NotAllowed(ClientNotAuthorized {
            connection: who(),
            cause: "no_rule_for_client".into(),
            why: why(),
            duration,
        }),
        Event::Dismissed(ConnectionDismissed {
            connection: who(),
            activity: served(),
            cause: "expired".into(),
            why: why(),
            duration,
        }),
        Event::Ended(ConnectionEnded {
            connection: who(),
            activity: served(),
            how: "session".into(),
            cause: Some("stalled".into()),
            why: Some(why()),
            duration,
        }),
        Event::Lost { count: 3 },
    ]
}

/// Collects the members that events have when written. Nested members are named
/// `certificate.subject` and so on.
fn emitted() -> Members {
    let mut members = Members::new();
    for event in all() {
        let line = line::serialize_members(&event).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&line).unwrap();
        let name = json["event"].as_str().unwrap().to_owned();
        let of = members.entry(name).or_default();
        for (member, value) in json.as_object().unwrap() {
            match value.as_object() {
                Some(inner) => of.extend(inner.keys().map(|key| format!("{member}.{key}"))),
                None if member == "event" => {}
                None => {
                    of.insert(member.clone());
                }
            }
        }
    }
    members
}

/// Collects the members that the page documents. The table of each event stands below a heading
/// with its name, and its rows begin with "| `member` |".
fn documented() -> Members {
    let page = include_str!("../../../docs/audit.md");
    let mut members = Members::new();
    let mut event = None;
    for line in page.lines() {
        if let Some(heading) = line.strip_prefix('#') {
            let name = heading.trim_start_matches('#').trim();
            let name = name.strip_prefix('`').and_then(|name| name.strip_suffix('`'));
            event = name.map(str::to_owned);
            if let Some(name) = &event {
                members.entry(name.clone()).or_default();
            }
        } else if let Some(event) = &event
            && let Some(row) = line.strip_prefix("| `")
        {
            let member = row.split('`').next().unwrap().to_owned();
            members.get_mut(event).unwrap().insert(member);
        }
    }
    members
}

/// Members common to all connection events have a table of their own on the page.
#[test]
fn the_page_has_what_is_emitted_and_nothing_else() {
    let mut documented = documented();
    let who = documented.remove("who").unwrap();
    assert_eq!(who.len(), 5, "{who:?}");
    let mut emitted = emitted();
    for members in emitted.values_mut().filter(|members| members.contains("id")) {
        assert!(who.is_subset(members));
        members.retain(|member| !who.contains(member));
    }
    assert_eq!(documented, emitted);
}

#[test]
fn times_are_in_seconds() {
    let line = line::serialize_members(&all()[9]).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&line).unwrap();
    assert_eq!(json["duration"].as_f64(), Some(1.5));
}
