//! `hexz-nbd pki renew`: issues new certificates with the names of existing ones.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use x509_cert::Certificate;
use x509_cert::der::oid::db::rfc8410::ID_ED_25519;
use x509_cert::der::{Decode, Error};
use x509_cert::ext::pkix::{ExtendedKeyUsage, SubjectAltName};
use x509_cert::spki::SubjectPublicKeyInfoRef;

use super::authority::{CLOCK_SKEW, CertificateAuthority, IssuedCertificate, KeyAlgorithm};
use super::certificate::{CertificateInfo, CertificateKind};
use super::folder::CaFolder;
use super::inventory::{Inventory, newest_start};
use super::names::SubjectName;
use super::{PkiError, find_certificates, report};
use crate::cli::pki::Renew;
use crate::cli::values::MAX_VALIDITY_DAYS;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Renews the certificates that are named, or those that expire soon.
pub(super) fn run(
    folder: &CaFolder,
    options: &Renew,
    out: &mut impl Write,
) -> Result<(), PkiError> {
    folder.authority_certificate()?;
    let lock = folder.lock()?;
    let authority = folder.authority()?;
    let inventory = folder.inventory(&authority.certificate)?;
    let mut renewals = Vec::new();
    for (certificate, name) in select(folder, &authority, &inventory, options)? {
        renewals.push(Renewal::plan(folder, &authority, &inventory, certificate, name, options)?);
    }
    // Everything has been checked, so that none is renewed if another one can't be.
    for renewal in &renewals {
        let issued = renewal.carry_out(folder, &authority, &inventory)?;
        report::renewed(out, folder, &renewal.bundle, &renewal.former, &issued)?;
    }
    drop(lock);
    if renewals.is_empty() { report::nothing_to_renew(out) } else { Ok(()) }
}

/// Returns the certificates to renew, each with the name that was given for it.
fn select(
    folder: &CaFolder,
    authority: &CertificateAuthority,
    inventory: &Inventory,
    options: &Renew,
) -> Result<Vec<(CertificateInfo, Option<String>)>, PkiError> {
    let Some(within) = options.expiring else {
        return options
            .which
            .iter()
            .map(|name| named(folder, authority, inventory, name))
            .collect();
    };
    if options.which.is_empty() {
        let due = inventory.due_for_renewal(within).into_iter();
        return Ok(due.map(|certificate| (certificate.clone(), None)).collect());
    }
    let named = options.which.iter().map(|name| named(folder, authority, inventory, name));
    let mut due = named.collect::<Result<Vec<_>, _>>()?;
    due.retain(|(certificate, _)| certificate.not_after <= inventory.now + within);
    Ok(due)
}

/// Returns the newest certificate with this name that isn't revoked, or the one with this serial
/// number or in this file.
fn named(
    folder: &CaFolder,
    authority: &CertificateAuthority,
    inventory: &Inventory,
    which: &str,
) -> Result<(CertificateInfo, Option<String>), PkiError> {
    let all = find_certificates(folder, &authority.certificate, which)?;
    let valid = all.into_iter().filter(|certificate| !inventory.is_revoked(certificate));
    match valid.max_by_key(|certificate| certificate.not_before) {
        Some(newest) => Ok((newest, Some(which.to_owned()))),
        None => Err(PkiError::Revoked(which.to_owned())),
    }
}

/// A certificate to be renewed, after all checks.
struct Renewal {
    former: CertificateInfo,
    /// Folder with the certificate and its key.
    bundle: PathBuf,
    days: u32,
    key: KeyAlgorithm,
}

impl Renewal {
    fn plan(
        folder: &CaFolder,
        authority: &CertificateAuthority,
        inventory: &Inventory,
        former: CertificateInfo,
        name: Option<String>,
        options: &Renew,
    ) -> Result<Self, PkiError> {
        let unsupported = || PkiError::NotRenewable(former.names_for_display());
        if !matches!(former.kind, CertificateKind::Server | CertificateKind::Client) {
            return Err(unsupported());
        }
        if authority.certificate.not_after <= former.not_after.max(inventory.now) {
            return Err(PkiError::CaExpiresFirst(authority.certificate.not_after));
        }
        let days = options.days.unwrap_or_else(|| validity_days(&former));
        let key = key_algorithm(&former);
        // A certificate that another program issued may have parts that would be lost.
        let trial = authority.issue(former.kind, &former.names, days, key, None)?;
        if !has_same_names(&former, &trial.certificate).unwrap_or(false) {
            return Err(unsupported());
        }
        let bundle = find_bundle(folder, &former, name.as_deref()).ok_or_else(unsupported)?;
        Ok(Self { former, bundle, days, key })
    }

    /// Issues the certificate and replaces the files.
    fn carry_out(
        &self,
        folder: &CaFolder,
        authority: &CertificateAuthority,
        inventory: &Inventory,
    ) -> Result<IssuedCertificate, PkiError> {
        let CertificateInfo { kind, ref names, .. } = self.former;
        let newest = newest_start(&inventory.issued, kind, names);
        let issued = authority.issue(kind, names, self.days, self.key, newest)?;
        folder.record_issued(&issued)?;
        if self.bundle.symlink_metadata().is_ok() {
            folder.replace_bundle(&self.bundle, authority, &issued)?;
        } else {
            folder.write_bundle(&self.bundle, authority, &issued)?;
        }
        Ok(issued)
    }
}

/// Returns the folder with the certificate: that of one of its names which contains a certificate
/// with the same names, or else that of the name that was given, or of the first one.
fn find_bundle(
    folder: &CaFolder,
    certificate: &CertificateInfo,
    name: Option<&str>,
) -> Option<PathBuf> {
    let names = &certificate.names;
    let path = |name: &SubjectName| folder.bundle_path(certificate.kind, name);
    let existing = names.iter().map(path).find(|path| {
        let own = folder.bundle_certificate(path, certificate.kind);
        own.is_some_and(|own| own.names == *names)
    });
    let given = names.iter().find(|own| Some(&*own.to_string()) == name);
    existing.or_else(|| given.or(names.first()).map(path))
}

/// Returns the validity of a certificate in days, without the allowance for slow clocks.
fn validity_days(certificate: &CertificateInfo) -> u32 {
    let validity = certificate.not_after.duration_since(certificate.not_before);
    let validity = validity.unwrap_or_default().saturating_sub(CLOCK_SKEW);
    let days = (validity + DAY / 2).as_secs() / DAY.as_secs();
    u32::try_from(days).unwrap_or(MAX_VALIDITY_DAYS).clamp(1, MAX_VALIDITY_DAYS)
}

/// Returns the kind of key that the certificate has; P-256 if it isn't one that this program
/// generates.
fn key_algorithm(certificate: &CertificateInfo) -> KeyAlgorithm {
    match SubjectPublicKeyInfoRef::from_der(&certificate.public_key) {
        Ok(key) if key.algorithm.oid == ID_ED_25519 => KeyAlgorithm::Ed25519,
        _ => KeyAlgorithm::P256,
    }
}

/// Returns true if both certificates have the same subject, alternative names and purposes.
fn has_same_names(one: &CertificateInfo, other: &CertificateInfo) -> Result<bool, Error> {
    let parse = |info: &CertificateInfo| Certificate::from_der(&info.der);
    let (one, other) = (parse(one)?.tbs_certificate, parse(other)?.tbs_certificate);
    let names = |it: &x509_cert::TbsCertificate| it.get::<SubjectAltName>();
    let purposes = |it: &x509_cert::TbsCertificate| it.get::<ExtendedKeyUsage>();
    Ok(one.subject == other.subject
        && names(&one)?.map(|(_, names)| names) == names(&other)?.map(|(_, names)| names)
        && purposes(&one)?.map(|(_, usages)| usages) == purposes(&other)?.map(|(_, usages)| usages))
}
