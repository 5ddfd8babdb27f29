//! Rate limits of clients. Connections of one identity share a limit; without an identity, those of
//! one address do.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::access::{Identity, Peer};
use super::slots::{Counted, counted_as};
use crate::config::Rate;
use nbd_server::Throttle;

/// Throttles of connected clients, and of those that left while in debt: reconnecting doesn't clear
/// a debt.
#[derive(Debug)]
pub(super) struct Throttles {
    rate: Rate,
    known: Mutex<HashMap<Client, Arc<Throttle>>>,
}

/// Key under which connections share a throttle.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Client {
    Identity(String),
    Counted(Counted),
    Unix,
}

impl Throttles {
    pub(super) fn new(rate: Rate) -> Self {
        Self { rate, known: Mutex::default() }
    }

    /// Returns the throttle that the client's connections share, or `None` if there is no rate
    /// limit.
    pub(super) fn of(&self, peer: Peer, identity: Option<&Identity>) -> Option<Arc<Throttle>> {
        let client = match (identity, counted_as(peer)) {
            (Some(identity), _) => Client::Identity(identity.to_string()),
            (None, Some(client)) => Client::Counted(client),
            (None, None) => Client::Unix,
        };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(throttle) = known.get(&client) {
            return Some(Arc::clone(throttle));
        }
        let throttle = self.rate.throttle()?;
        known.retain(|_, throttle| Arc::strong_count(throttle) > 1 || !throttle.is_debt_free());
        known.insert(client, Arc::clone(&throttle));
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
        let of =
            |address: &str, who| throttles.of(Peer::ip(address.parse().unwrap()), who).unwrap();
        let first = of(here, Some(&alice));
        assert!(Arc::ptr_eq(&first, &of(there, Some(&alice))));
        let nameless = of(here, None);
        assert!(!Arc::ptr_eq(&first, &nameless));
        assert!(Arc::ptr_eq(&nameless, &of(here, None)));
        assert!(!Arc::ptr_eq(&nameless, &of(there, None)));
        assert_eq!(throttles.known.lock().unwrap().len(), 3);
        // A client that has left without a debt is forgotten.
        drop((first, nameless));
        of("10.0.0.3", None);
        assert_eq!(throttles.known.lock().unwrap().len(), 1);
        assert!(Throttles::new(Rate::default()).of(Peer::Unix, None).is_none());
    }
}
