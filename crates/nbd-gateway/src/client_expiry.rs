//! Record of when the certificates of recent clients expire, so that an administrator learns of a
//! forgotten renewal before the client is locked out.

use std::collections::HashMap;
use std::time::Duration;

use aws_lc_rs::digest;
use parking_lot::Mutex;

use crate::access::{Identity, NameKind, Timestamp};
use crate::report::MAX_LISTED;
use crate::tls::{Credentials, is_renewal_due};

const DAY: u64 = 24 * 3600;

/// Time after which a client that hasn't connected again is forgotten, in seconds. It may have been
/// decommissioned.
const MEMORY: u64 = 7 * DAY;

/// Time between two warnings about the same client, in seconds.
const WARNING_INTERVAL: u64 = DAY;

/// Certificates of clients that connected within the last seven days: of each identity the one
/// presented last, so that a renewed certificate replaces the former one.
#[derive(Debug, Default)]
pub(crate) struct ClientExpiries {
    clients: Mutex<HashMap<IdentityKey, RecentClient>>,
}

/// SHA-256 of a client's names, which don't change with a renewal.
type IdentityKey = [u8; digest::SHA256_OUTPUT_LEN];

/// A client that connected recently, and the certificate that it presented last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RecentClient {
    /// Most specific name in the certificate, escaped.
    pub(crate) identity: String,
    /// SHA-256 of the certificate.
    pub(crate) sha256: String,
    pub(crate) expires: Timestamp,
    /// Validity of the certificate as a whole, in seconds.
    lifetime: u64,
    pub(crate) last_seen: Timestamp,
    warned: Option<Timestamp>,
}

/// State of a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExpiryState {
    Valid,
    ExpiresSoon,
    Expired,
}

impl ClientExpiries {
    /// Records a client that has authenticated. Returns the time left until its certificate expires
    /// if a warning is due.
    pub(crate) fn record(&self, credentials: &Credentials, now: Timestamp) -> Option<Duration> {
        let identity = credentials.identity();
        let sha256 = identity.names().iter().find(|name| name.kind == NameKind::Sha256);
        let mut client = RecentClient {
            identity: identity.to_string(),
            sha256: sha256.map(|name| name.text.clone()).unwrap_or_default(),
            expires: credentials.expires(),
            lifetime: credentials.expires().0.saturating_sub(credentials.not_before().0),
            last_seen: now,
            warned: None,
        };
        let key = identity_key(identity);
        let mut clients = self.clients.lock();
        client.warned = clients.get(&key).and_then(|before| before.warned);
        let is_due = client.state(now) != ExpiryState::Valid
            && client.warned.is_none_or(|at| now.0.saturating_sub(at.0) >= WARNING_INTERVAL);
        if is_due {
            client.warned = Some(now);
        }
        let left = Duration::from_secs(client.expires.0.saturating_sub(now.0));
        if clients.contains_key(&key) || make_room(&mut clients, client.expires, now) {
            clients.insert(key, client);
        }
        is_due.then_some(left)
    }

    /// Returns the recent clients and the states of their certificates, those that expire first
    /// before the others.
    pub(crate) fn recent(&self, now: Timestamp) -> Vec<(RecentClient, ExpiryState)> {
        let mut clients = self.clients.lock();
        clients.retain(|_, client| !client.is_forgotten(now));
        let mut all: Vec<_> =
            clients.values().map(|client| (client.clone(), client.state(now))).collect();
        drop(clients);
        all.sort_by(|(one, _), (other, _)| {
            (one.expires, &one.identity).cmp(&(other.expires, &other.identity))
        });
        all
    }
}

/// Makes room for a client, if necessary by dropping the one whose certificate expires last.
/// Returns false if that would be the new one.
fn make_room(
    clients: &mut HashMap<IdentityKey, RecentClient>,
    expires: Timestamp,
    now: Timestamp,
) -> bool {
    if clients.len() < MAX_LISTED {
        return true;
    }
    clients.retain(|_, client| !client.is_forgotten(now));
    if clients.len() < MAX_LISTED {
        return true;
    }
    let last = clients.iter().max_by_key(|(_, client)| client.expires);
    match last.map(|(key, client)| (*key, client.expires)) {
        Some((key, latest)) if latest > expires => clients.remove(&key).is_some(),
        _ => false,
    }
}

impl RecentClient {
    fn is_forgotten(&self, now: Timestamp) -> bool {
        now.0.saturating_sub(self.last_seen.0) > MEMORY
    }

    fn state(&self, now: Timestamp) -> ExpiryState {
        let seconds = Duration::from_secs;
        if self.expires < now {
            ExpiryState::Expired
        } else if is_renewal_due(seconds(self.lifetime), seconds(self.expires.0 - now.0)) {
            ExpiryState::ExpiresSoon
        } else {
            ExpiryState::Valid
        }
    }
}

/// Returns the key of an identity: its names without the hash of the certificate, unless there are
/// no others.
fn identity_key(identity: &Identity) -> IdentityKey {
    let names = identity.names();
    let has_names = names.iter().any(|name| name.kind != NameKind::Sha256);
    let mut hash = digest::Context::new(&digest::SHA256);
    for name in names.iter().filter(|name| !has_names || name.kind != NameKind::Sha256) {
        hash.update(name.kind.prefix().as_bytes());
        hash.update(&name.text.len().to_be_bytes());
        hash.update(name.text.as_bytes());
    }
    let mut key = IdentityKey::default();
    key.copy_from_slice(hash.finish().as_ref());
    key
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DnType, KeyPair};

    /// The beginning of 2027.
    const NOW: u64 = 1_798_761_600;

    /// A client whose certificate is valid for the given days, counted from `NOW`.
    fn client(name: &str, days: std::ops::Range<i64>) -> Credentials {
        let day = |days: i64| {
            rcgen::date_time_ymd(1970, 1, 1)
                + Duration::from_secs(NOW.checked_add_signed(days * DAY.cast_signed()).unwrap())
        };
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        if !name.is_empty() {
            parameters.distinguished_name.push(DnType::CommonName, name);
        }
        parameters.not_before = day(days.start);
        parameters.not_after = day(days.end);
        let own = parameters.self_signed(&KeyPair::generate().unwrap()).unwrap();
        Credentials::from_chain(&[own.der().clone()], Timestamp(NOW)).unwrap()
    }

    fn states(clients: &ClientExpiries, now: u64) -> Vec<(String, ExpiryState)> {
        let recent = clients.recent(Timestamp(now)).into_iter();
        recent.map(|(client, state)| (client.identity, state)).collect()
    }

    #[test]
    fn a_client_whose_certificate_expires_soon_is_warned_about_once_a_day() {
        let clients = ClientExpiries::default();
        let record = |who: &Credentials, now| clients.record(who, Timestamp(now));
        let (old, fresh) = (client("backup", -80..10), client("fresh", 0..90));
        assert_eq!(record(&fresh, NOW), None);
        assert_eq!(record(&old, NOW), Some(Duration::from_secs(10 * DAY)));
        assert_eq!(record(&old, NOW + DAY - 1), None);
        assert_eq!(record(&old, NOW + DAY), Some(Duration::from_secs(9 * DAY)));
        let soon = ("cn:backup".to_owned(), ExpiryState::ExpiresSoon);
        let valid = |name: &str| (format!("cn:{name}"), ExpiryState::Valid);
        assert_eq!(states(&clients, NOW + DAY), [soon, valid("fresh")]);
        // The former certificate is still in use elsewhere.
        assert_eq!(record(&client("backup", 1..91), NOW + DAY), None);
        assert_eq!(record(&old, NOW + DAY + 1), None);
        // Another certificate of the same identity replaces it.
        assert_eq!(record(&client("backup", 1..91), NOW + DAY), None);
        assert_eq!(states(&clients, NOW + DAY), [valid("fresh"), valid("backup")]);
    }

    #[test]
    fn short_lived_certificates_are_due_in_their_last_quarter() {
        let clients = ClientExpiries::default();
        let short = client("short", 0..1);
        assert_eq!(clients.record(&short, Timestamp(NOW + DAY / 2)), None);
        let late = NOW + DAY - DAY / 5;
        assert_eq!(clients.record(&short, Timestamp(late)), Some(Duration::from_secs(DAY / 5)));
    }

    #[test]
    fn clients_that_stay_away_are_forgotten() {
        let clients = ClientExpiries::default();
        clients.record(&client("gone", -80..3), Timestamp(NOW));
        let state = |now| states(&clients, now).first().map(|(_, state)| *state);
        assert_eq!(state(NOW + 3 * DAY), Some(ExpiryState::ExpiresSoon));
        assert_eq!(state(NOW + 3 * DAY + 1), Some(ExpiryState::Expired));
        assert_eq!(state(NOW + MEMORY), Some(ExpiryState::Expired));
        assert_eq!(state(NOW + MEMORY + 1), None);
    }

    #[test]
    fn clients_without_names_are_told_apart() {
        let clients = ClientExpiries::default();
        for _ in 0..2 {
            clients.record(&client("", 0..90), Timestamp(NOW));
        }
        assert_eq!(clients.recent(Timestamp(NOW)).len(), 2);
    }

    #[test]
    fn the_clients_that_expire_first_are_kept() {
        let mut clients = HashMap::new();
        let one = |number: u64| RecentClient {
            identity: format!("cn:{number}"),
            sha256: String::new(),
            expires: Timestamp(NOW + number),
            lifetime: DAY,
            last_seen: Timestamp(NOW),
            warned: None,
        };
        for number in 0..MAX_LISTED as u64 {
            let mut key = IdentityKey::default();
            key[..8].copy_from_slice(&number.to_be_bytes());
            assert!(make_room(&mut clients, Timestamp(NOW), Timestamp(NOW)));
            clients.insert(key, one(number));
        }
        let latest = Timestamp(NOW + MAX_LISTED as u64);
        assert!(!make_room(&mut clients, latest, Timestamp(NOW)));
        assert_eq!(clients.len(), MAX_LISTED);
        assert!(make_room(&mut clients, Timestamp(NOW), Timestamp(NOW)));
        let last = clients.values().map(|it| it.expires.0).max();
        assert_eq!((clients.len(), last), (MAX_LISTED - 1, Some(latest.0 - 2)));
        // Those that haven't connected for a week make room first.
        let mut later = Timestamp(NOW + MEMORY + 1);
        assert!(make_room(&mut clients, latest, later));
        later.0 -= 1;
        assert!(make_room(&mut clients, latest, later));
    }
}
