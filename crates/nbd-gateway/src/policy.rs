//! The access policy: rules and TLS settings, replaced as a whole on reload.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::pki_types::UnixTime;

use super::access::{AccessRequest, Reason, Rules, Timestamp};
use super::tls::{Credentials, HandshakeFailure, ServerTls};

/// Access policy of a gateway.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Access rules by address, identity, export and time.
    pub rules: Rules,
    /// TLS settings, including client authentication; `None` serves in clear.
    pub tls: Option<ServerTls>,
}

/// The active policy.
#[derive(Debug)]
pub(super) struct InForce(ArcSwap<Numbered>);

/// A policy and its number: the number of policies that were active before it.
#[derive(Debug)]
pub(super) struct Numbered {
    pub(super) policy: Policy,
    pub(super) number: u64,
    /// Rules that must also allow a client to open an export. Set while the policy is already that
    /// of a reload, but the exports served are still those that the former rules were written for.
    before: Option<Rules>,
}

impl InForce {
    pub(super) fn new(policy: Policy) -> Self {
        Self(ArcSwap::from_pointee(Numbered { policy, number: 0, before: None }))
    }

    pub(super) fn now(&self) -> Arc<Numbered> {
        self.0.load_full()
    }

    /// Runs a closure on the active policy without keeping a reference to it.
    pub(super) fn look<T>(&self, look: impl FnOnce(&Numbered) -> T) -> T {
        look(&self.0.load())
    }

    pub(super) fn replace(&self, policy: Policy) {
        self.put(&policy, |_| None);
    }

    /// Replaces the policy before the exports that it is meant for are served.
    pub(super) fn replace_early(&self, policy: Policy) {
        self.put(&policy, |it| Some(it.before.as_ref().unwrap_or(&it.policy.rules).clone()));
    }

    fn put(&self, policy: &Policy, before: impl Fn(&Numbered) -> Option<Rules>) {
        self.0.rcu(|it| Numbered {
            policy: policy.clone(),
            number: it.number + 1,
            before: before(it),
        });
    }

    /// Records that the exports which the policy is meant for are now served.
    pub(super) fn exports_follow(&self) {
        self.0.rcu(|it| match it.before {
            None => Arc::clone(it),
            Some(_) => {
                let policy = it.policy.clone();
                Arc::new(Numbered { policy, number: it.number, before: None })
            }
        });
    }

    /// Checks against the active rules whether a client may open an export.
    pub(super) fn judge(&self, facts: &AccessRequest<'_>) -> Result<Reason, Reason> {
        self.look(|it| {
            let reason = it.policy.rules.evaluate(facts)?;
            it.before.as_ref().map_or(Ok(reason), |before| before.evaluate(facts))
        })
    }
}

/// Reason for dismissing a connection that had been admitted.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum Dismissal {
    #[error("{0}")]
    Rules(Reason),
    #[error("{0}")]
    Certificate(#[from] HandshakeFailure),
    #[error("its certificate has expired")]
    Expired,
}

impl Numbered {
    /// Checks the credentials of a client whose TLS handshake succeeded under policy number
    /// `verified_by`. Signatures are verified again only if this policy has another number, or a CA
    /// has expired since.
    pub(super) fn judge_credentials(
        &self,
        who: Option<&Credentials>,
        verified_by: u64,
        now: Timestamp,
    ) -> Result<(), Dismissal> {
        if who.is_some_and(|who| who.expires() < now) {
            return Err(Dismissal::Expired);
        }
        let Some(tls) = &self.policy.tls else { return Ok(()) };
        let now = UnixTime::since_unix_epoch(Duration::from_secs(now.0));
        let a_ca_has_ended = tls.first_ca_expiry().is_some_and(|end| end < now);
        if verified_by != self.number || a_ca_has_ended {
            Ok(tls.reverify(who, now)?)
        } else {
            Ok(())
        }
    }
}
