//! The access policy: rules and TLS settings, replaced as a whole on reload.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::pki_types::UnixTime;

use crate::access::{AccessRequest, Reason, Rules, Timestamp};
use crate::tls::{Credentials, HandshakeFailure, HandshakeFailureCause, ServerTls};

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
pub(crate) struct ActivePolicy(ArcSwap<VersionedPolicy>);

/// A policy and its number: the number of policies that were active before it.
#[derive(Debug)]
pub(crate) struct VersionedPolicy {
    pub(crate) policy: Policy,
    pub(crate) number: u64,
    /// Rules that must also allow a client to open an export. Set while the policy is already that
    /// of a reload, but the exports served are still those that the former rules were written for.
    former_rules: Option<Rules>,
}

impl ActivePolicy {
    pub(crate) fn new(policy: Policy) -> Self {
        Self(ArcSwap::from_pointee(VersionedPolicy { policy, number: 0, former_rules: None }))
    }

    pub(crate) fn load(&self) -> Arc<VersionedPolicy> {
        self.0.load_full()
    }

    /// Runs a closure on the active policy without keeping a reference to it.
    pub(crate) fn with<T>(&self, read: impl FnOnce(&VersionedPolicy) -> T) -> T {
        read(&self.0.load())
    }

    pub(crate) fn replace(&self, policy: Policy) {
        self.swap(&policy, |_| None);
    }

    /// Replaces the policy before the exports that it is meant for are served.
    pub(crate) fn replace_before_exports(&self, policy: Policy) {
        self.swap(&policy, |it| Some(it.former_rules.as_ref().unwrap_or(&it.policy.rules).clone()));
    }

    fn swap(&self, policy: &Policy, former_rules: impl Fn(&VersionedPolicy) -> Option<Rules>) {
        self.0.rcu(|it| VersionedPolicy {
            policy: policy.clone(),
            number: it.number + 1,
            former_rules: former_rules(it),
        });
    }

    /// Records that the exports which the policy is meant for are now served.
    pub(crate) fn drop_former_rules(&self) {
        self.0.rcu(|it| match it.former_rules {
            None => Arc::clone(it),
            Some(_) => {
                let policy = it.policy.clone();
                Arc::new(VersionedPolicy { policy, number: it.number, former_rules: None })
            }
        });
    }

    /// Checks against the active rules whether a client may open an export.
    pub(crate) fn authorize(&self, request: &AccessRequest<'_>) -> Result<Reason, Reason> {
        self.with(|it| {
            let reason = it.policy.rules.evaluate(request)?;
            it.former_rules
                .as_ref()
                .map_or(Ok(reason), |former_rules| former_rules.evaluate(request))
        })
    }
}

/// Reason for dismissing a connection that had been admitted.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum Dismissal {
    #[error("{0}")]
    Rules(Reason),
    #[error("{0}")]
    Certificate(#[from] HandshakeFailure),
    #[error("the client's certificate has expired")]
    Expired,
}

impl Dismissal {
    /// Returns the stable label for log fields and audit events.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Rules(reason) => reason.label(),
            Self::Certificate(failure) => failure.cause.label(),
            Self::Expired => HandshakeFailureCause::Expired.label(),
        }
    }
}

impl VersionedPolicy {
    /// Checks the credentials of a client whose TLS handshake succeeded under policy number
    /// `verified_by`. Signatures are verified again only if this policy has another number, or a CA
    /// has expired since.
    pub(crate) fn check_credentials(
        &self,
        credentials: Option<&Credentials>,
        verified_by: u64,
        now: Timestamp,
    ) -> Result<(), Dismissal> {
        if credentials.is_some_and(|credentials| credentials.expires() < now) {
            return Err(Dismissal::Expired);
        }
        let Some(tls) = &self.policy.tls else { return Ok(()) };
        let now = UnixTime::since_unix_epoch(Duration::from_secs(now.0));
        let has_ca_expired = tls.first_ca_expiry().is_some_and(|end| end < now);
        if verified_by != self.number || has_ca_expired {
            Ok(tls.reverify(credentials, now)?)
        } else {
            Ok(())
        }
    }
}
