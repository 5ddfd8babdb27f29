//! The handle for reconfiguring and querying a running gateway.

use std::sync::Arc;

use arc_swap::ArcSwap;
use nbd_server::ExportCatalog;
use nbd_server::budget::Budget;
use nbd_telemetry::Counts;

use crate::access::Timestamp;
use crate::admission::slots::Slots;
use crate::policy::{ActivePolicy, Policy};
use crate::registry::ConnectionRegistry;
use crate::stats::{GatewayPhase, Stats};

/// Handle for reconfiguring and querying a running gateway.
#[derive(Debug)]
pub struct Control<X> {
    pub(crate) policy: Arc<ActivePolicy>,
    pub(crate) exports: Arc<ArcSwap<X>>,
    pub(crate) registry: Arc<ConnectionRegistry>,
    pub(crate) slots: Arc<Slots>,
    pub(crate) budget: Arc<Budget>,
    pub(crate) stats: Arc<Stats>,
}

impl<X> Clone for Control<X> {
    fn clone(&self) -> Self {
        Self {
            policy: Arc::clone(&self.policy),
            exports: Arc::clone(&self.exports),
            registry: Arc::clone(&self.registry),
            slots: Arc::clone(&self.slots),
            budget: Arc::clone(&self.budget),
            stats: Arc::clone(&self.stats),
        }
    }
}

impl<X: ExportCatalog> Control<X> {
    /// Replaces the policy atomically, for new and existing connections. Connections that are no
    /// longer authorized are dropped; returns their number.
    pub fn replace_policy(&self, policy: Policy) -> usize {
        self.policy.replace(policy);
        self.stats.reloads.record_success();
        self.review()
    }

    /// Replaces the policy before the exports that it is meant for are passed to
    /// [`Control::replace_exports`].
    ///
    /// Until then a client must also be allowed by the previous rules to open an export, because a
    /// name may come to mean a different archive.
    pub fn replace_policy_before_exports(&self, policy: Policy) -> usize {
        self.policy.replace_before_exports(policy);
        self.stats.reloads.record_success();
        self.review()
    }

    /// Returns the active policy.
    pub fn policy(&self) -> Policy {
        self.policy.with(|it| it.policy.clone())
    }

    /// Returns the number of the active policy: the number of policies that were active before it.
    pub fn policy_number(&self) -> u64 {
        self.policy.with(|it| it.number)
    }

    /// Records a failed reload and the reason for it.
    pub fn record_failed_reload(&self, why: &str) {
        self.stats.reloads.record_failure(why);
    }

    /// Reports the gateway as not ready, since it is going to shut down. It still accepts
    /// connections: load balancers take some time to notice.
    pub fn announce_shutdown(&self) {
        self.stats.set_phase(GatewayPhase::Draining);
    }

    /// Replaces the exports that clients can choose from. Clients that already read an export keep
    /// it.
    pub fn replace_exports(&self, exports: Arc<X>) {
        self.exports.store(exports);
        self.policy.drop_former_rules();
    }

    /// Returns the current exports.
    pub fn exports(&self) -> Arc<X> {
        self.exports.load_full()
    }

    /// Returns the number of clients that are reading an export.
    pub fn active_sessions(&self) -> usize {
        self.slots.active_sessions()
    }

    /// Returns the number of connections that were refused or failed, by reason.
    pub fn failure_counts(&self) -> Counts {
        self.stats.refusals.so_far().and(self.stats.failures.so_far())
    }

    /// Returns the number of failed TLS handshakes, by cause
    /// ([`HandshakeFailureCause::label`](crate::tls::HandshakeFailureCause::label)).
    pub fn handshake_failure_counts(&self) -> Counts {
        self.stats.handshake_failures.so_far()
    }

    /// Reviews all connections against the active policy at the current time.
    fn review(&self) -> usize {
        self.registry.review(&self.policy.load(), Timestamp::now())
    }
}
