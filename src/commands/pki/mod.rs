//! `hexz-nbd pki`: a small CA in a folder, for users who have no other.

pub(crate) mod authority;
pub(crate) mod certificate;
pub(crate) mod folder;
mod inventory;
pub(crate) mod names;
mod renew;
mod report;
mod revocations;
mod show;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use rcgen::{KeyPair, RevocationReason};

use crate::cli::pki::{Init, Issue, KeyOptions, Pki, PkiCommand, Revoke, Show};
use crate::exit_status::{self, ExitStatus};
use authority::{CertificateAuthority, KeyAlgorithm};
use certificate::{CertificateInfo, CertificateKind, Serial};
use folder::{CA_CERTIFICATE, CA_KEY, CaFolder, REVOCATION_LIST};
use inventory::{Inventory, newest_start};
use names::SubjectName;
use revocations::Revocations;

/// Default validity of a server's certificate. It suits a renewal once a year.
const SERVER_DAYS: u32 = 397;
/// Default validity of a client's certificate. Short, so that a forgotten client soon loses access.
const CLIENT_DAYS: u32 = 90;

/// Exit code of `show --expiring` if there are such certificates.
const EXPIRING: u8 = 3;

/// Error of a `pki` command.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PkiError {
    #[error("{0}")]
    Usage(String),
    #[error("can't {what} {path}: {error}", path = nbd_telemetry::escape::name(.path))]
    Io { what: &'static str, path: PathBuf, error: io::Error },
    /// A file that can't be used, and the problem: its label and its description.
    #[error("{path}: {problem}", path = nbd_telemetry::escape::name(.path))]
    File { path: PathBuf, reason: &'static str, problem: String },
    #[error(
        "no CA in {path}: create one with `hexz-nbd pki init`, or give its folder with --dir",
        path = nbd_telemetry::escape::name(.0)
    )]
    NoAuthority(PathBuf),
    #[error("{path} is locked by another hexz-nbd pki", path = nbd_telemetry::escape::name(.0))]
    Busy(PathBuf),
    #[error("the system's random number generator failed")]
    Random,
    #[error("can't encode the certificate: {0}")]
    Encode(#[from] rcgen::Error),
    #[error("can't issue certificates of this CA: use the program that created the CA")]
    UnsupportedCa,
    #[error("no issued certificate has the name or serial number {:?}", nbd_telemetry::escape::name(.0))]
    NotIssued(String),
    #[error(
        "all certificates of {:?} are revoked: remove its folder and issue a new one, if it is to \
         have access again",
        nbd_telemetry::escape::name(.0)
    )]
    Revoked(String),
    #[error(
        "{0}: another program has issued this certificate, with parts that this one can't write: \
         use that program"
    )]
    NotRenewable(String),
    #[error(
        "the CA expires on {date}, before a new certificate would: create a CA in another folder",
        date = show::format_date(*.0)
    )]
    CaExpiresFirst(SystemTime),
    #[error(
        "nothing supersedes the newest certificate of {:?}: renew it first, or give another reason",
        nbd_telemetry::escape::name(.0)
    )]
    NotSuperseded(String),
    #[error("can't write to standard output: {0}")]
    Output(#[from] io::Error),
}

impl ExitStatus for PkiError {
    fn exit_status(&self) -> u8 {
        if matches!(self, Self::Usage(_)) { exit_status::USAGE } else { exit_status::FAILED }
    }

    fn label(&self) -> &'static str {
        match self {
            Self::Usage(_) => "usage",
            Self::Io { .. } => "io_error",
            Self::File { reason, .. } => reason,
            Self::NoAuthority(_) => "no_ca",
            Self::Busy(_) => "locked",
            Self::Random => "no_randomness",
            Self::Encode(_) => "encoding_failed",
            Self::UnsupportedCa => "unsupported_ca",
            Self::NotIssued(_) => "not_issued",
            Self::Revoked(_) => "revoked",
            Self::NotRenewable(_) => "not_renewable",
            Self::CaExpiresFirst(_) => "ca_expires_first",
            Self::NotSuperseded(_) => "not_superseded",
            Self::Output(_) => "output_failed",
        }
    }

    fn is_closed_output(&self) -> bool {
        matches!(self, Self::Output(error) if exit_status::is_closed(error))
    }
}

impl PkiError {
    fn file(path: &Path, reason: &'static str, problem: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), reason, problem: problem.into() }
    }

    fn unusable_key(path: &Path, error: &rcgen::Error) -> Self {
        Self::file(path, "unusable_key", format!("can't use this key: {error}"))
    }

    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Io { what, path: path.to_owned(), error }
    }
}

/// Runs the command given on the command line.
pub(crate) fn run(options: &Pki) -> Result<ExitCode, PkiError> {
    let folder = CaFolder::new(&options.dir);
    let out = &mut io::stdout().lock();
    match &options.command {
        PkiCommand::Init(options) => init(&folder, options, out)?,
        PkiCommand::Server(options) => issue(&folder, CertificateKind::Server, options, out)?,
        PkiCommand::Client(options) => issue(&folder, CertificateKind::Client, options, out)?,
        PkiCommand::Renew(options) => renew::run(&folder, options, out)?,
        PkiCommand::Revoke(options) => revoke(&folder, options, out)?,
        PkiCommand::Show(options) => return show(&folder, options, out),
    }
    Ok(ExitCode::SUCCESS)
}

/// Creates a CA: its key first, then the certificate, then the revocation list. Resumes an earlier
/// run that was interrupted.
fn init(folder: &CaFolder, options: &Init, out: &mut impl Write) -> Result<(), PkiError> {
    folder.create()?;
    let lock = folder.lock()?;
    let found = folder.contents()?;
    let missing = |name: &str| {
        let problem = "missing, although the rest of the CA exists: restore it, or choose another \
                       folder with --dir";
        Err(PkiError::file(&folder.path(name), "missing_file", problem))
    };
    if found.certificate && found.key && found.revocations {
        let problem = "the CA already exists: use it, or choose another folder with --dir";
        return Err(PkiError::file(&folder.path(CA_CERTIFICATE), "already_exists", problem));
    }
    if found.certificate && !found.key {
        return missing(CA_KEY);
    }
    if !found.certificate && (found.revocations || found.issued) {
        return missing(CA_CERTIFICATE);
    }
    // An empty list in place of a lost one would admit revoked clients again.
    if !found.revocations && found.issued {
        return missing(REVOCATION_LIST);
    }
    let authority = if found.certificate {
        folder.authority()?
    } else {
        let key =
            if found.key { existing_key(folder)? } else { key_kind(&options.key).generate()? };
        let authority = CertificateAuthority::create(&ca_name(options)?, options.days, key)?;
        if !found.key {
            folder.write_key(&authority)?;
        }
        folder.write_certificate(&authority)?;
        authority
    };
    folder.write_first_revocations(&authority.sign_revocations(&Revocations::empty())?)?;
    drop(lock);
    report::ca_created(out, folder, &authority.certificate)
}

fn existing_key(folder: &CaFolder) -> Result<KeyPair, PkiError> {
    let key = KeyPair::from_pem(&folder.read_key()?);
    key.map_err(|error| PkiError::unusable_key(&folder.path(CA_KEY), &error))
}

/// Returns the name of a new CA: the given one, or else a random one, because clients can't tell
/// CAs of the same name apart.
fn ca_name(options: &Init) -> Result<String, PkiError> {
    match &options.name {
        Some(name) => Ok(name.clone()),
        None => {
            let number = u32::from_be_bytes(authority::random_bytes()?);
            Ok(format!("hexz-nbd CA {number:08x}"))
        }
    }
}

/// Issues a certificate and its key, in a folder of their own.
fn issue(
    folder: &CaFolder,
    kind: CertificateKind,
    options: &Issue,
    out: &mut impl Write,
) -> Result<(), PkiError> {
    let names = parse_names(&options.names, kind)?;
    let Some(first) = names.first() else {
        return Err(PkiError::Usage("a certificate needs a name".to_owned()));
    };
    folder.authority_certificate()?;
    let lock = folder.lock()?;
    let authority = folder.authority()?;
    let bundle = folder.bundle_path(kind, first);
    if bundle.symlink_metadata().is_ok() {
        let problem = "already exists: use hexz-nbd pki renew for a new certificate with the same \
                       names, or remove it first (the old one stays valid, and can still be \
                       revoked)";
        return Err(PkiError::file(&bundle, "already_exists", problem));
    }
    let days = options.days.unwrap_or(if kind == CertificateKind::Server {
        SERVER_DAYS
    } else {
        CLIENT_DAYS
    });
    let newest = newest_start(&folder.issued()?, kind, &names);
    let issued = authority.issue(kind, &names, days, key_kind(&options.key), newest)?;
    // Recorded first: a certificate that can be used must also be revocable, even if this process
    // ends in between.
    folder.record_issued(&issued)?;
    folder.write_bundle(&bundle, &authority, &issued)?;
    drop(lock);
    match kind {
        CertificateKind::Client => {
            let server =
                folder.issued()?.into_iter().rfind(|it| it.kind == CertificateKind::Server);
            report::client_issued(out, &bundle, &issued.certificate, server.as_ref())
        }
        _ => report::server_issued(out, folder, &bundle, &issued.certificate),
    }
}

fn key_kind(options: &KeyOptions) -> KeyAlgorithm {
    if options.ed25519 { KeyAlgorithm::Ed25519 } else { KeyAlgorithm::P256 }
}

/// Parses the names for a certificate of this kind, and removes duplicates.
fn parse_names(texts: &[String], kind: CertificateKind) -> Result<Vec<SubjectName>, PkiError> {
    let parse = if kind == CertificateKind::Server {
        SubjectName::parse_server
    } else {
        SubjectName::parse_client
    };
    let mut names = Vec::new();
    for text in texts {
        let name = parse(text).map_err(|why| PkiError::Usage(format!("{text:?}: {why}")))?;
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let mut plain = names.iter().filter(|name| matches!(name, SubjectName::CommonName(_)));
    if let (Some(first), Some(second)) = (plain.next(), plain.next()) {
        return Err(PkiError::Usage(format!(
            "a certificate can have one common name only, not both {:?} and {:?}",
            first.to_string(),
            second.to_string()
        )));
    }
    Ok(names)
}

/// Adds certificates to the revocation list.
fn revoke(folder: &CaFolder, options: &Revoke, out: &mut impl Write) -> Result<(), PkiError> {
    folder.authority_certificate()?;
    let lock = folder.lock()?;
    let authority = folder.authority()?;
    let inventory = folder.inventory(&authority.certificate)?;
    let certificates = find_certificates(folder, &authority.certificate, &options.which)?;
    let (old, mut new): (Vec<_>, Vec<_>) =
        certificates.into_iter().partition(|certificate| inventory.is_revoked(certificate));
    let mut kept = Vec::new();
    if options.reason() == Some(RevocationReason::Superseded) {
        (new, kept) = new.into_iter().partition(|certificate| inventory.is_superseded(certificate));
    }
    if new.is_empty() && old.is_empty() {
        return Err(PkiError::NotSuperseded(options.which.clone()));
    }
    let Inventory { mut revocations, .. } = inventory;
    if !new.is_empty() {
        for certificate in &new {
            revocations.add(&certificate.serial, options.reason());
        }
        revocations.number += 1;
        folder.replace_revocations(&authority.sign_revocations(&revocations)?)?;
    }
    drop(lock);
    report::revoked(out, folder, &revocations, &old, &new)?;
    report::kept(out, &kept)
}

/// Finds the certificates meant by a name, a serial number or the path of a certificate file.
fn find_certificates(
    folder: &CaFolder,
    authority: &CertificateInfo,
    which: &str,
) -> Result<Vec<CertificateInfo>, PkiError> {
    let mut issued = folder.issued()?;
    let serial = Serial::parse(which);
    if let Some(at) = issued.iter().position(|it| Some(&it.serial) == serial.as_ref()) {
        return Ok(vec![issued.swap_remove(at)]);
    }
    let called: Vec<_> = issued.into_iter().filter(|it| it.has_name(which)).collect();
    if let Some(first) = called.first() {
        if called.iter().any(|it| it.kind != first.kind) {
            return Err(PkiError::Usage(format!(
                "both a server and a client have the name {which:?}: give the serial number \
                 (hexz-nbd pki show)"
            )));
        }
        return Ok(called);
    }
    let path = Path::new(which);
    if !path.is_file() {
        return Err(PkiError::NotIssued(which.to_owned()));
    }
    let certificate = CertificateInfo::from_pem(&folder::read(path)?, path)?;
    if certificate.kind == CertificateKind::Authority {
        return Err(PkiError::file(
            path,
            "ca_certificate",
            "a CA can't revoke itself: remove it from the servers and clients that trust it",
        ));
    }
    // A forged certificate must not get the serial number of another one revoked.
    if !certificate.is_signed_by(authority) {
        return Err(PkiError::file(path, "other_ca", "not issued by this CA"));
    }
    Ok(vec![certificate])
}

/// Lists all certificates, or those that expire soon. The exit code says if there are any of these.
fn show(folder: &CaFolder, options: &Show, out: &mut impl Write) -> Result<ExitCode, PkiError> {
    let authority = folder.authority_certificate()?;
    let inventory = folder.inventory(&authority)?;
    let all = std::iter::once(&authority).chain(&inventory.issued);
    let shown: Vec<_> = match options.expiring {
        Some(within) => all.filter(|it| inventory.is_expiring(it, within)).collect(),
        None => all.collect(),
    };
    if options.json {
        show::write_json(out, &shown, &inventory)?;
    } else if options.expiring.is_none() || !shown.is_empty() {
        show::write_text(out, &shown, &inventory)?;
    }
    let found = options.expiring.is_some() && !shown.is_empty();
    Ok(if found { ExitCode::from(EXPIRING) } else { ExitCode::SUCCESS })
}
