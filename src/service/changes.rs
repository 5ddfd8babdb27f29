//! Describes in the log what a reload has changed.

use std::time::{Duration, SystemTime};

use nbd_gateway::Policy;
use nbd_gateway::tls::{ServerTls, TlsChange};
use rustls::pki_types::UnixTime;

/// Difference between the settings before and after a reload.
#[derive(Debug)]
pub(super) struct ReloadChanges {
    tls: Vec<TlsChange>,
    rules: bool,
    exports: bool,
    /// The new TLS settings.
    now: Option<ServerTls>,
}

impl ReloadChanges {
    /// Compares two policies. `exports` is true if the options for archives differ.
    pub(super) fn between(before: &Policy, after: &Policy, exports: bool) -> Self {
        let tls = match (&before.tls, &after.tls) {
            (Some(before), Some(after)) => after.changes_since(before),
            // A reload can't switch TLS on or off.
            _ => Vec::new(),
        };
        Self { tls, rules: before.rules != after.rules, exports, now: after.tls.clone() }
    }

    /// Returns the labels of what has changed, or `nothing`.
    pub(super) fn labels(&self) -> String {
        let others = [self.rules.then_some("rules"), self.exports.then_some("exports")];
        let tls = self.tls.iter().map(|change| change.label());
        let labels: Vec<_> = tls.chain(others.into_iter().flatten()).collect();
        if labels.is_empty() { "nothing".to_owned() } else { labels.join(",") }
    }

    /// Logs the details: which certificate is used from now on, and how many are revoked.
    pub(super) fn log(&self) {
        let Some(now) = &self.now else { return };
        for change in &self.tls {
            match change {
                TlsChange::Certificate => {
                    let not_after = now.expiry().certificate.map(format_unix);
                    let sha256 = now.certificate_sha256();
                    tracing::info!(not_after, sha256, "the server's certificate has changed");
                }
                TlsChange::RevocationLists => {
                    let revoked = now.revoked_certificates();
                    tracing::info!(revoked, "the revocation lists have changed");
                }
                TlsChange::ClientCas | TlsChange::Settings => {}
            }
        }
    }
}

fn format_unix(time: UnixTime) -> String {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(time.as_secs());
    humantime::format_rfc3339_seconds(time).to_string()
}
