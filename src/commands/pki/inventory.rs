//! Decides which certificates have been replaced by newer ones, and which expire soon. Pure.

use std::time::{Duration, SystemTime};

use super::certificate::{CertificateInfo, CertificateKind};
use super::names::SubjectName;
use super::revocations::Revocations;

/// Certificates that a CA has issued, with what it has revoked.
#[derive(Debug)]
pub(super) struct Inventory {
    /// Certificates, in any order.
    pub(super) issued: Vec<CertificateInfo>,
    pub(super) revocations: Revocations,
    pub(super) now: SystemTime,
}

impl Inventory {
    pub(super) fn is_revoked(&self, certificate: &CertificateInfo) -> bool {
        self.revocations.find(&certificate.serial).is_some()
    }

    /// Returns true if newer certificates of the same kind, which can be used now, have all names
    /// of this one.
    pub(super) fn is_superseded(&self, certificate: &CertificateInfo) -> bool {
        let has_successor = |name: &SubjectName| {
            let name = name.to_string();
            self.issued.iter().any(|newer| {
                newer.kind == certificate.kind
                    && newer.not_before > certificate.not_before
                    && newer.has_name(&name)
                    && self.is_usable(newer)
            })
        };
        !certificate.names.is_empty() && certificate.names.iter().all(has_successor)
    }

    fn is_usable(&self, certificate: &CertificateInfo) -> bool {
        certificate.not_after > self.now && !self.is_revoked(certificate)
    }

    /// Returns true if a certificate expires within the given time or has expired, and isn't
    /// revoked or superseded.
    pub(super) fn is_expiring(&self, certificate: &CertificateInfo, within: Duration) -> bool {
        let is_issued = certificate.kind != CertificateKind::Authority;
        let is_obsolete =
            is_issued && (self.is_revoked(certificate) || self.is_superseded(certificate));
        !is_obsolete && certificate.not_after <= self.now + within
    }

    /// Returns the certificates to renew if none are named: those that expire within the given
    /// time. Expired ones may belong to a machine that no longer exists.
    pub(super) fn due_for_renewal(&self, within: Duration) -> Vec<&CertificateInfo> {
        let renewable = |it: &&CertificateInfo| {
            matches!(it.kind, CertificateKind::Server | CertificateKind::Client)
        };
        let issued = self.issued.iter().filter(renewable);
        issued.filter(|it| it.not_after > self.now && self.is_expiring(it, within)).collect()
    }
}

/// Returns the time after which the validity of a new certificate with these names has to begin, so
/// that it is newer than those with one of its names.
pub(super) fn newest_start(
    issued: &[CertificateInfo],
    kind: CertificateKind,
    names: &[SubjectName],
) -> Option<SystemTime> {
    let has_name = |it: &&CertificateInfo| {
        it.kind == kind && names.iter().any(|name| it.has_name(&name.to_string()))
    };
    issued.iter().filter(has_name).map(|it| it.not_before).max()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::pki::authority::{CertificateAuthority, KeyAlgorithm};

    const DAY: Duration = Duration::from_secs(24 * 3600);

    struct Ca(CertificateAuthority);

    impl Ca {
        fn new() -> Self {
            let key = KeyAlgorithm::P256.generate().unwrap();
            Self(CertificateAuthority::create("ca", 3650, key).unwrap())
        }

        /// A certificate that became valid so many days ago, and expires in as many days.
        fn issue(
            &self,
            kind: CertificateKind,
            names: &[&str],
            now: SystemTime,
            days: (u32, u32),
        ) -> CertificateInfo {
            let names: Vec<_> =
                names.iter().map(|name| SubjectName::parse_client(name).unwrap()).collect();
            let issued = self.0.issue(kind, &names, 1, KeyAlgorithm::P256, None).unwrap();
            let mut certificate = issued.certificate;
            certificate.not_before = now - DAY * days.0;
            certificate.not_after = now + DAY * days.1;
            certificate
        }
    }

    #[test]
    fn a_certificate_is_superseded_when_all_its_names_are_renewed() {
        use CertificateKind::{Client, Server};
        let (ca, now) = (Ca::new(), SystemTime::now());
        let both = ca.issue(Client, &["web.example.org", "db.example.org"], now, (80, 10));
        let web = ca.issue(Client, &["web.example.org"], now, (20, 70));
        let db = ca.issue(Client, &["db.example.org"], now, (10, 80));
        let server = ca.issue(Server, &["db.example.org"], now, (5, 300));
        let superseded = |issued: &[&CertificateInfo], revoked: Option<&CertificateInfo>| {
            let mut revocations = Revocations::empty();
            if let Some(revoked) = revoked {
                revocations.add(&revoked.serial, None);
            }
            let issued = issued.iter().copied().cloned().collect();
            let inventory = Inventory { issued, revocations, now };
            inventory.is_superseded(&both)
        };
        assert!(!superseded(&[&both], None));
        assert!(!superseded(&[&both, &web], None));
        assert!(!superseded(&[&both, &web, &server], None));
        assert!(superseded(&[&both, &web, &db], None));
        // A revoked or expired certificate replaces nothing.
        assert!(!superseded(&[&both, &web, &db], Some(&db)));
        let expired = CertificateInfo { not_after: now - DAY, ..db.clone() };
        assert!(!superseded(&[&both, &web, &expired], None));
        let older = CertificateInfo { not_before: both.not_before, ..db };
        assert!(!superseded(&[&both, &web, &older], None));
    }

    #[test]
    fn only_current_certificates_are_due() {
        let (ca, now) = (Ca::new(), SystemTime::now());
        let issue = |name: &str, days| ca.issue(CertificateKind::Client, &[name], now, days);
        let renewed = [issue("renewed", (80, 10)), issue("renewed", (1, 89))];
        let (revoked, late) = (issue("revoked", (80, 10)), issue("late", (80, 31)));
        let (soon, gone) = (issue("soon", (80, 29)), issue("gone", (80, 0)));
        let mut revocations = Revocations::empty();
        revocations.add(&revoked.serial, None);
        let [old, new] = renewed;
        let issued = vec![old, new, revoked, late, soon, gone];
        let inventory = Inventory { issued, revocations, now };
        let names = |all: Vec<&CertificateInfo>| {
            all.iter().map(|it| it.names_for_display()).collect::<Vec<_>>()
        };
        let expiring = inventory.issued.iter().filter(|it| inventory.is_expiring(it, DAY * 30));
        assert_eq!(names(expiring.collect()), ["soon", "gone"]);
        assert_eq!(names(inventory.due_for_renewal(DAY * 30)), ["soon"]);
        let kind = CertificateKind::Client;
        let start = |name: &str| {
            newest_start(&inventory.issued, kind, &[SubjectName::parse_client(name).unwrap()])
        };
        assert_eq!(start("renewed"), Some(now - DAY));
        assert_eq!(start("other"), None);
    }
}
