//! What can happen. The names of events and members are those of `docs/audit.md`, which is
//! checked; they stay what they are, and others may be added.

use std::time::Duration;

use serde::{Serialize, Serializer};

use super::line::{Text, Time};

/// Something that has happened.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// The program serves.
    Start(Start),
    /// It ends.
    Stop(Stop),
    /// Another policy is in force.
    Reload(Reload),
    /// What was to be read anew can't be used; everything stays as it was.
    ReloadFailed(ReloadFailed),
    /// A connection was closed before a byte was sent.
    Refused(Refused),
    /// A client reads from now on.
    Reading(Reading),
    /// A client asked for an export that it may not open. It may go on and ask for another; not
    /// all that it asks for is told.
    ExportDenied(ExportDenied),
    /// A client asked for an export that isn't there. It may go on and ask for another; not all
    /// that it asks for is told.
    ExportMissing(ExportMissing),
    /// A connection ended with its TLS handshake.
    HandshakeFailed(HandshakeFailed),
    /// A connection ended when it was known who it is.
    NotAllowed(NotAllowed),
    /// A connection ended since the client may not stay.
    Dismissed(Dismissed),
    /// A connection ended in another way.
    Ended(Ended),
    /// So many events are missing just before this one. Made by [`Recorder`](super::Recorder).
    Lost {
        /// How many.
        count: u64,
    },
}

/// See [`Event::Start`].
#[derive(Debug, Clone, Serialize)]
pub struct Start {
    /// Of this program.
    pub version: Text,
    /// The process.
    pub pid: u32,
    /// Where it listens.
    pub listen: Vec<Text>,
    /// Whether clients have to speak TLS.
    pub tls: bool,
    /// The number of the policy; 0 at the start.
    pub policy: u64,
    /// Who may come in, for people.
    pub open_to: Text,
}

/// See [`Event::Stop`].
#[derive(Debug, Clone, Serialize)]
pub struct Stop {
    /// `told` or `failed`.
    pub how: Text,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<Text>,
}

/// See [`Event::Reload`].
#[derive(Debug, Clone, Serialize)]
pub struct Reload {
    /// The number of the policy.
    pub policy: u64,
    /// Who may come in, for people.
    pub open_to: Text,
    /// How many connections may not stay.
    pub dropped: usize,
}

/// See [`Event::ReloadFailed`].
#[derive(Debug, Clone, Serialize)]
pub struct ReloadFailed {
    /// What is wrong.
    pub why: Text,
}

/// A connection, as far as it is known.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Who {
    /// The connection's number in this run.
    pub id: u64,
    /// Its address, or `unix`.
    pub peer: Text,
    /// The load balancer that it came by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub via: Option<Text>,
    /// The name in its certificate that says most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<Text>,
    /// The SHA-256 of its certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Text>,
}

/// See [`Event::Refused`].
#[derive(Debug, Clone, Serialize)]
pub struct Refused {
    /// Which connection.
    #[serde(flatten)]
    pub who: Who,
    /// A label, as it is counted.
    pub reason: Text,
    /// The same in words.
    pub why: Text,
}

/// A client's certificate.
#[derive(Debug, Clone, Serialize)]
pub struct Certificate {
    /// Its subject, as RFC 4514 writes it.
    pub subject: Text,
    /// Its alternative and common names, such as `dns:backup.example.org`.
    pub names: Vec<Text>,
    /// Who signed it, as RFC 4514 writes it.
    pub issuer: Text,
    /// Its serial number, in hexadecimal digits.
    pub serial: Text,
    /// When it ends.
    pub not_after: Time,
}

/// See [`Event::Reading`].
#[derive(Debug, Clone, Serialize)]
pub struct Reading {
    /// Who reads.
    #[serde(flatten)]
    pub who: Who,
    /// With which certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<Certificate>,
    /// The version of TLS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<Text>,
    /// The cipher suite, by IANA's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cipher: Option<Text>,
    /// What it reads.
    pub export: Text,
    /// The rule that lets it, in words.
    pub rule: Text,
    /// The number of the policy that has this rule.
    pub policy: u64,
}

/// See [`Event::ExportDenied`].
#[derive(Debug, Clone, Serialize)]
pub struct ExportDenied {
    /// Who asked.
    #[serde(flatten)]
    pub who: Who,
    /// For what.
    pub export: Text,
    /// Which rule says so.
    pub why: Text,
}

/// See [`Event::ExportMissing`].
#[derive(Debug, Clone, Serialize)]
pub struct ExportMissing {
    /// Client that asked.
    #[serde(flatten)]
    pub who: Who,
    /// Name that it asked for.
    pub export: Text,
    /// Label of the reason.
    pub reason: Text,
}

/// See [`Event::HandshakeFailed`].
#[derive(Debug, Clone, Serialize)]
pub struct HandshakeFailed {
    /// Which connection.
    #[serde(flatten)]
    pub who: Who,
    /// A label, as it is counted.
    pub cause: Text,
    /// The same in words.
    pub why: Text,
    /// How long the connection had been there, in seconds.
    #[serde(serialize_with = "seconds")]
    pub duration: Duration,
}

/// See [`Event::NotAllowed`].
#[derive(Debug, Clone, Serialize)]
pub struct NotAllowed {
    /// Who it is.
    #[serde(flatten)]
    pub who: Who,
    /// Which rule says so.
    pub why: Text,
    /// How long the connection had been there, in seconds.
    #[serde(serialize_with = "seconds")]
    pub duration: Duration,
}

/// What a client was served until its end.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Served {
    /// What it had chosen to read, if it had.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub export: Option<Text>,
    /// Its requests, if it had chosen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests: Option<u64>,
    /// The bytes with which its reads were answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Requests that were answered with an error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub errors: Option<u64>,
    /// How often it asked for an export that it may not open, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub denied: Option<u64>,
    /// Number of requests for exports that aren't there, if it sent some.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missing: Option<u64>,
}

/// See [`Event::Dismissed`].
#[derive(Debug, Clone, Serialize)]
pub struct Dismissed {
    /// Who it is.
    #[serde(flatten)]
    pub who: Who,
    /// What it had been served.
    #[serde(flatten)]
    pub served: Served,
    /// Why it may not stay.
    pub why: Text,
    /// How long the connection had been there, in seconds.
    #[serde(serialize_with = "seconds")]
    pub duration: Duration,
}

/// See [`Event::Ended`].
#[derive(Debug, Clone, Serialize)]
pub struct Ended {
    /// Who it was.
    #[serde(flatten)]
    pub who: Who,
    /// What it had been served.
    #[serde(flatten)]
    pub served: Served,
    /// A label.
    pub how: Text,
    /// The same in words, where the client didn't just leave.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<Text>,
    /// How long the connection had been there, in seconds.
    #[serde(serialize_with = "seconds")]
    pub duration: Duration,
}

/// As a number with microseconds, which is what a clock is good for.
fn seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64((duration.as_secs_f64() * 1e6).round() / 1e6)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::super::line;
    use super::*;

    type Members = BTreeMap<String, BTreeSet<String>>;

    fn who() -> Who {
        Who {
            id: 7,
            peer: "10.1.2.3".into(),
            via: Some("192.0.2.1".into()),
            identity: Some("dns:backup.example.org".into()),
            sha256: Some("ab".into()),
        }
    }

    fn served() -> Served {
        Served {
            export: Some("snap.hexz".into()),
            requests: Some(1),
            bytes: Some(512),
            errors: Some(0),
            denied: Some(1),
            missing: Some(1),
        }
    }

    /// One of each, with all members that there can be.
    fn all() -> Vec<Event> {
        let duration = Duration::from_micros(1_500_000);
        let why = || Text::from("because");
        vec![
            Event::Start(Start {
                version: "0".into(),
                pid: 1,
                listen: vec!["[::]:10809".into()],
                tls: true,
                policy: 0,
                open_to: "all".into(),
            }),
            Event::Stop(Stop { how: "failed".into(), why: Some(why()) }),
            Event::Reload(Reload { policy: 1, open_to: "all".into(), dropped: 2 }),
            Event::ReloadFailed(ReloadFailed { why: why() }),
            Event::Refused(Refused { who: who(), reason: "address".into(), why: why() }),
            Event::Reading(Reading {
                who: who(),
                certificate: Some(Certificate {
                    subject: "CN=x".into(),
                    names: vec!["cn:x".into()],
                    issuer: "CN=ca".into(),
                    serial: "01".into(),
                    not_after: Time::of_unix(0),
                }),
                tls: Some("TLS 1.3".into()),
                cipher: Some("TLS13_AES_128_GCM_SHA256".into()),
                export: "snap.hexz".into(),
                rule: why(),
                policy: 1,
            }),
            Event::ExportDenied(ExportDenied { who: who(), export: "x".into(), why: why() }),
            Event::ExportMissing(ExportMissing {
                who: who(),
                export: "x".into(),
                reason: "unknown_name".into(),
            }),
            Event::HandshakeFailed(HandshakeFailed {
                who: who(),
                cause: "not_tls".into(),
                why: why(),
                duration,
            }),
            Event::NotAllowed(NotAllowed { who: who(), why: why(), duration }),
            Event::Dismissed(Dismissed { who: who(), served: served(), why: why(), duration }),
            Event::Ended(Ended {
                who: who(),
                served: served(),
                how: "left".into(),
                why: Some(why()),
                duration,
            }),
            Event::Lost { count: 3 },
        ]
    }

    /// The members of the certificate are written `certificate.subject` and so on.
    fn emitted() -> Members {
        let mut members = Members::new();
        for event in all() {
            let line = line::body(&event).unwrap();
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

    /// The table of each event stands below a heading of its name: "| `member` | … |".
    fn documented() -> Members {
        let page = include_str!("../../docs/audit.md");
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

    /// What every connection's event has stands in a table of its own on the page.
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
        let line = line::body(&all()[9]).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(json["duration"].as_f64(), Some(1.5));
    }
}
