//! `hexz-nbd pki show`: lists the issued certificates and their status.

use std::io::Write;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::PkiError;
use super::certificate::{CertificateInfo, CertificateKind};
use super::inventory::Inventory;
use super::revocations::reason_name;
use crate::commands::output::format_time;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Status of a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CertificateStatus {
    Revoked,
    Expired,
    /// Valid for this number of whole days.
    Valid(u64),
}

/// Writes a table with a header and a line for each certificate.
pub(super) fn write_text(
    out: &mut impl Write,
    certificates: &[&CertificateInfo],
    inventory: &Inventory,
) -> Result<(), PkiError> {
    writeln!(
        out,
        "{:6}  {:20}  {:10}  {:32}  {:64}  NAMES",
        "KIND", "STATE", "NOT AFTER", "SERIAL", "SHA-256"
    )?;
    for certificate in certificates {
        let state = match state(certificate, inventory) {
            CertificateStatus::Revoked => "revoked".to_owned(),
            CertificateStatus::Expired => "expired".to_owned(),
            CertificateStatus::Valid(0) => "expires within 1 day".to_owned(),
            CertificateStatus::Valid(1) => "expires in 1 day".to_owned(),
            CertificateStatus::Valid(days) => format!("expires in {days} days"),
        };
        writeln!(
            out,
            "{:6}  {state:20}  {:10}  {:32}  {}  {}",
            certificate.kind,
            format_date(certificate.not_after),
            certificate.serial.to_string(),
            certificate.fingerprint(),
            certificate.names_for_display(),
        )?;
    }
    Ok(())
}

/// Writes a JSON array with an object for each certificate.
pub(super) fn write_json(
    out: &mut impl Write,
    certificates: &[&CertificateInfo],
    inventory: &Inventory,
) -> Result<(), PkiError> {
    let list: Value = certificates
        .iter()
        .map(|certificate| {
            let (state, days) = match state(certificate, inventory) {
                CertificateStatus::Revoked => ("revoked", None),
                CertificateStatus::Expired => ("expired", None),
                CertificateStatus::Valid(days) => ("valid", Some(days)),
            };
            let revoked = inventory.revocations.find(&certificate.serial).map(|entry| {
                json!({
                    "at": format_time(entry.revocation_time.into()),
                    "reason": entry.reason_code.map(reason_name),
                })
            });
            let names: Value = certificate
                .names
                .iter()
                .map(|name| json!({ "kind": name.kind(), "name": name.to_string() }))
                .collect();
            json!({
                "kind": certificate.kind.to_string(),
                "names": names,
                "serial": certificate.serial.to_string(),
                "not_before": format_time(certificate.not_before),
                "not_after": format_time(certificate.not_after),
                "state": state,
                "expires_in_days": days,
                "superseded": inventory.is_superseded(certificate),
                "revoked": revoked,
                "sha256": certificate.fingerprint(),
            })
        })
        .collect();
    writeln!(out, "{list:#}")?;
    Ok(())
}

/// Formats the date of a time, in UTC.
pub(super) fn format_date(time: SystemTime) -> String {
    format_time(time).split('T').next().unwrap_or_default().to_owned()
}

fn state(certificate: &CertificateInfo, inventory: &Inventory) -> CertificateStatus {
    if certificate.kind != CertificateKind::Authority && inventory.is_revoked(certificate) {
        return CertificateStatus::Revoked;
    }
    match certificate.not_after.duration_since(inventory.now) {
        Ok(left) if !left.is_zero() => CertificateStatus::Valid(left.as_secs() / DAY.as_secs()),
        _ => CertificateStatus::Expired,
    }
}
