//! Who may come in, all of it in one piece: it is swapped whole when it is read anew.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::pki_types::UnixTime;

use super::access::{Facts, Moment, Reason, Rules};
use super::tls::{Credentials, HandshakeFailure, ServerTls};

/// Who may come in.
#[derive(Debug, Clone)]
pub struct Policy {
    /// By address, identity, export and time.
    pub rules: Rules,
    /// By certificate; `None` serves in clear.
    pub tls: Option<ServerTls>,
}

/// The policy that is in force.
#[derive(Debug)]
pub(super) struct InForce(ArcSwap<Numbered>);

/// A policy, and how many were in force before it.
#[derive(Debug)]
pub(super) struct Numbered {
    pub(super) policy: Policy,
    pub(super) number: u64,
    /// Rules that have to let somebody open an export as well: what is served was chosen for
    /// them, and the policy is for what will be.
    before: Option<Rules>,
}

impl InForce {
    pub(super) fn new(policy: Policy) -> Self {
        Self(ArcSwap::from_pointee(Numbered { policy, number: 0, before: None }))
    }

    pub(super) fn now(&self) -> Arc<Numbered> {
        self.0.load_full()
    }

    /// Looks at something of it, without keeping it.
    pub(super) fn look<T>(&self, look: impl FnOnce(&Numbered) -> T) -> T {
        look(&self.0.load())
    }

    pub(super) fn replace(&self, policy: Policy) {
        self.put(&policy, |_| None);
    }

    /// The same with a policy that is for exports which aren't served yet.
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

    /// The exports that the policy is for are served.
    pub(super) fn exports_follow(&self) {
        self.0.rcu(|it| match it.before {
            None => Arc::clone(it),
            Some(_) => {
                let policy = it.policy.clone();
                Arc::new(Numbered { policy, number: it.number, before: None })
            }
        });
    }

    /// Asks the rules that are in force whether somebody may open an export.
    pub(super) fn judge(&self, facts: &Facts<'_>) -> Result<Reason, Reason> {
        self.look(|it| {
            let reason = it.policy.rules.judge(facts)?;
            it.before.as_ref().map_or(Ok(reason), |before| before.judge(facts))
        })
    }
}

/// Why somebody who was in may not stay.
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
    /// Judges somebody whom TLS has let in, when the policy had that number. Signatures are
    /// verified again only if it has another one by now, or a CA has run out since.
    pub(super) fn judge_credentials(
        &self,
        who: Option<&Credentials>,
        verified_by: u64,
        now: Moment,
    ) -> Result<(), Dismissal> {
        if who.is_some_and(|who| who.ends() < now) {
            return Err(Dismissal::Expired);
        }
        let Some(tls) = &self.policy.tls else { return Ok(()) };
        let now = UnixTime::since_unix_epoch(Duration::from_secs(now.0));
        let a_ca_has_ended = tls.first_ca_ends().is_some_and(|end| end < now);
        if verified_by != self.number || a_ca_has_ended { Ok(tls.judge(who, now)?) } else { Ok(()) }
    }
}
