//! Rate limits of clients. Connections of one identity share a limit; without an identity, those of
//! one address do.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::access::{Identity, Peer};
use crate::admission::slots::{ClientKey, client_key};
use crate::config::Rate;
use nbd_server::Throttle;

/// Throttles of connected clients, and of those that left while in debt: reconnecting doesn't clear
/// a debt.
#[derive(Debug)]
pub(crate) struct Throttles {
    rate: Rate,
    by_client: Mutex<HashMap<ThrottleKey, Arc<Throttle>>>,
}

/// Key under which connections share a throttle.
#[derive(Debug, PartialEq, Eq, Hash)]
enum ThrottleKey {
    Identity(String),
    Client(ClientKey),
    Unix,
}

impl Throttles {
    pub(crate) fn new(rate: Rate) -> Self {
        Self { rate, by_client: Mutex::default() }
    }

    /// Returns the throttle that the client's connections share, or `None` if there is no rate
    /// limit.
    pub(crate) fn get_or_create(
        &self,
        peer: Peer,
        identity: Option<&Identity>,
    ) -> Option<Arc<Throttle>> {
        let client = match (identity, client_key(peer)) {
            (Some(identity), _) => ThrottleKey::Identity(identity.to_string()),
            (None, Some(client)) => ThrottleKey::Client(client),
            (None, None) => ThrottleKey::Unix,
        };
        let mut by_client = self.by_client.lock();
        if let Some(throttle) = by_client.get(&client) {
            return Some(Arc::clone(throttle));
        }
        let throttle = self.rate.throttle()?;
        by_client.retain(|_, throttle| Arc::strong_count(throttle) > 1 || !throttle.is_debt_free());
        by_client.insert(client, Arc::clone(&throttle));
        Some(throttle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::{IdentityName, NameKind};
    use std::num::NonZeroU64;

    #[test]
    fn connections_of_one_client_share_a_throttle() {
        let rate = Rate { requests: NonZeroU64::new(10), ..Rate::default() };
        let throttles = Throttles::new(rate);
        let alice = Identity::new(vec![IdentityName { kind: NameKind::Dns, text: "alice".into() }]);
        let (here, there) = ("10.0.0.1", "10.0.0.2");
        let of = |address: &str, who| {
            throttles.get_or_create(Peer::ip(address.parse().unwrap()), who).unwrap()
        };
        let first = of(here, Some(&alice));
        assert!(Arc::ptr_eq(&first, &of(there, Some(&alice))));
        let anonymous = of(here, None);
        assert!(!Arc::ptr_eq(&first, &anonymous));
        assert!(Arc::ptr_eq(&anonymous, &of(here, None)));
        assert!(!Arc::ptr_eq(&anonymous, &of(there, None)));
        assert_eq!(throttles.by_client.lock().len(), 3);
        // A client that has left without a debt is forgotten.
        drop((first, anonymous));
        of("10.0.0.3", None);
        assert_eq!(throttles.by_client.lock().len(), 1);
        assert!(Throttles::new(Rate::default()).get_or_create(Peer::Unix, None).is_none());
    }
}
