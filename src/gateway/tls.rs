//! TLS: PEM files to a server configuration, and failed handshakes in words.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::{AlertDescription, ServerConfig, SupportedProtocolVersion, version};
use zeroize::Zeroizing;

/// Whose certificate runs out within this time is told so at the start.
const SOON: Duration = Duration::from_secs(14 * 24 * 3600);

/// The largest PEM file that is read, in bytes.
const MAX_PEM: u64 = 1024 * 1024;

/// The oldest TLS version that is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TlsVersion {
    /// TLS 1.2, of which only forward-secret AEAD suites are on.
    #[default]
    V1_2,
    /// TLS 1.3.
    V1_3,
}

/// Where the server's certificate and key are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// PEM: the server's certificate first, then those that lead to the root.
    pub certificate: PathBuf,
    /// PEM: PKCS#8, PKCS#1 or SEC1.
    pub key: PathBuf,
}

/// What is wrong with a TLS file, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {problem}", path = .path.display())]
pub struct TlsError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: TlsProblem,
}

/// What can be wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsProblem {
    /// The system refused.
    #[error("can't read it: {0}")]
    Io(#[from] io::Error),
    /// Not what a certificate or key is.
    #[error("the file is larger than 1 MiB, which no certificate or key is")]
    TooLarge,
    /// No certificate in it.
    #[error("there is no certificate in it; it should have a \"BEGIN CERTIFICATE\" block")]
    NoCertificate,
    /// No key in it.
    #[error("there is no private key in it; it should have a \"BEGIN PRIVATE KEY\" block")]
    NoKey,
    /// A key behind a pass phrase.
    #[error(
        "the private key is encrypted, and nobody is here to type its pass phrase; write it \
         without one: openssl pkey -in KEY -out PLAIN-KEY && chmod 600 PLAIN-KEY"
    )]
    EncryptedKey,
    /// Everybody on this machine can read the secret.
    #[error(
        "every user of this machine can read this secret (mode {mode:04o}): chmod 600 {path}",
        path = .path.display()
    )]
    Exposed {
        /// The file's permission bits.
        mode: u32,
        /// The file.
        path: PathBuf,
    },
    /// Key and certificate are not a pair.
    #[error("this key doesn't belong to the certificate in {}", .0.display())]
    WrongKey(PathBuf),
    /// Past its end.
    #[error("the certificate expired {0} ago; clients would refuse it, so get a new one")]
    Expired(humantime::FormattedDuration),
    /// Before its beginning.
    #[error("the certificate is not valid yet, for another {0}; is this machine's clock right?")]
    NotYetValid(humantime::FormattedDuration),
    /// Something else that rustls doesn't like.
    #[error("it can't be used: {0}")]
    Unusable(rustls::Error),
}

/// Something that will go wrong later, or for some clients only.
pub type Warning = String;

/// Makes the TLS configuration, and checks all that can be checked before a client comes.
///
/// # Errors
/// A file can't be read or used, is exposed, is out of its time, or the two don't fit.
pub fn load(
    files: &TlsFiles,
    oldest: TlsVersion,
) -> Result<(Arc<ServerConfig>, Vec<Warning>), TlsError> {
    let of = |path: &Path| {
        let path = path.to_owned();
        move |problem| TlsError { path, problem }
    };
    let chain = certificates(&files.certificate).map_err(of(&files.certificate))?;
    let key = private_key(&files.key).map_err(of(&files.key))?;
    aws_lc_rs::sign::any_supported_type(&key)
        .map_err(|error| of(&files.key)(TlsProblem::Unusable(error)))?;
    let warnings = chain
        .first()
        .map_or(Ok(Vec::new()), |certificate| check_validity(certificate, UnixTime::now()))
        .map_err(of(&files.certificate))?;

    let config = configure(chain, key, oldest).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => {
            of(&files.key)(TlsProblem::WrongKey(files.certificate.clone()))
        }
        other => of(&files.certificate)(TlsProblem::Unusable(other)),
    })?;
    Ok((Arc::new(config), warnings))
}

/// A configuration from certificate and key in memory.
///
/// # Errors
/// The two don't fit, or can't be used.
pub fn configure(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    oldest: TlsVersion,
) -> Result<ServerConfig, rustls::Error> {
    let versions: &[&SupportedProtocolVersion] = match oldest {
        TlsVersion::V1_2 => &[&version::TLS13, &version::TLS12],
        TlsVersion::V1_3 => &[&version::TLS13],
    };
    // The provider has forward-secret AEAD suites and nothing else, in TLS 1.2 too.
    ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(versions)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsProblem> {
    let mut pem = open(path)?;
    let chain: Vec<_> = rustls_pemfile::certs(&mut pem).collect::<Result<_, _>>()?;
    if chain.is_empty() { Err(TlsProblem::NoCertificate) } else { Ok(chain) }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsProblem> {
    check_secrecy(path)?;
    let mut pem = Zeroizing::new(Vec::new());
    open(path)?.read_to_end(&mut pem)?;
    // PKCS#8 says so in its label, the older formats in a header that no PEM reader takes.
    let encrypted =
        contains(&pem, b"BEGIN ENCRYPTED PRIVATE KEY") || contains(&pem, b"Proc-Type: 4,ENCRYPTED");
    match rustls_pemfile::private_key(&mut pem.as_slice()) {
        Ok(Some(key)) => Ok(key),
        _ if encrypted => Err(TlsProblem::EncryptedKey),
        Ok(None) => Err(TlsProblem::NoKey),
        Err(error) => Err(error.into()),
    }
}

fn open(path: &Path) -> Result<BufReader<File>, TlsProblem> {
    let file = File::open(path)?;
    if file.metadata()?.len() > MAX_PEM {
        return Err(TlsProblem::TooLarge);
    }
    Ok(BufReader::new(file))
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

/// Refuses a secret that everybody on this machine can read.
///
/// # Errors
/// It can be read by others, or can't be looked at.
pub fn check_secrecy(path: &Path) -> Result<(), TlsProblem> {
    const READ_BY_OTHERS: u32 = 0o004;
    let mode = std::fs::metadata(path)?.permissions().mode() & 0o7777;
    if mode & READ_BY_OTHERS == 0 {
        Ok(())
    } else {
        Err(TlsProblem::Exposed { mode, path: path.to_owned() })
    }
}

/// Checks a certificate as a client would, as far as that needs no trusted root.
fn check_validity(
    certificate: &CertificateDer<'_>,
    now: UnixTime,
) -> Result<Vec<Warning>, TlsProblem> {
    match judge_as_client(certificate, now) {
        webpki::Error::CertExpired { not_after, .. } => {
            Err(TlsProblem::Expired(between(not_after, now)))
        }
        webpki::Error::CertNotValidYet { not_before, .. } => {
            Err(TlsProblem::NotYetValid(between(now, not_before)))
        }
        // What a client makes of it without knowing its issuer: it is as it should be.
        webpki::Error::UnknownIssuer => {
            let later =
                UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs()).saturating_add(SOON));
            match judge_as_client(certificate, later) {
                webpki::Error::CertExpired { not_after, .. } => {
                    Ok(vec![format!("the certificate expires in {}", between(now, not_after))])
                }
                _ => Ok(Vec::new()),
            }
        }
        webpki::Error::CaUsedAsEndEntity => Ok(vec![
            "the certificate is a CA's own; strict clients want a server certificate \
             that the CA has signed"
                .to_owned(),
        ]),
        other => Ok(vec![format!("clients may refuse the certificate: {other}")]),
    }
}

fn judge_as_client(certificate: &CertificateDer<'_>, now: UnixTime) -> webpki::Error {
    let verified = webpki::EndEntityCert::try_from(certificate).and_then(|certificate| {
        certificate
            .verify_for_usage(
                webpki::ALL_VERIFICATION_ALGS,
                &[],
                &[],
                now,
                webpki::KeyUsage::server_auth(),
                None,
                None,
            )
            .map(|_| ())
    });
    // Without a trusted root the best verdict is that the issuer is unknown.
    verified.err().unwrap_or(webpki::Error::UnknownIssuer)
}

fn between(earlier: UnixTime, later: UnixTime) -> humantime::FormattedDuration {
    const MINUTE: u64 = 60;
    let seconds = later.as_secs().saturating_sub(earlier.as_secs());
    // Seconds of a certificate's life matter to nobody, unless they are all there is.
    let shown = if seconds > MINUTE { seconds - seconds % MINUTE } else { seconds };
    humantime::format_duration(Duration::from_secs(shown))
}

/// Says why a handshake failed, as far as this end can know, and who should do what.
pub fn explain(error: &io::Error) -> String {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
    match cause {
        Some(rustls::Error::AlertReceived(alert)) => explain_alert(*alert),
        Some(rustls::Error::InvalidMessage(_)) => {
            "the client sent something else than a TLS handshake".to_owned()
        }
        Some(rustls::Error::PeerIncompatible(reason)) => format!(
            "the client offers no TLS version or cipher that is spoken here ({reason:?}); \
             --tls-min may be too strict for it"
        ),
        Some(other) => other.to_string(),
        None if error.kind() == io::ErrorKind::UnexpectedEof => {
            "the client closed the connection; it may not trust this server's certificate"
                .to_owned()
        }
        None => error.to_string(),
    }
}

fn explain_alert(alert: AlertDescription) -> String {
    let reason = match alert {
        AlertDescription::UnknownCA => {
            "it doesn't trust the CA of this server's certificate: give it the CA's certificate"
        }
        AlertDescription::BadCertificate | AlertDescription::CertificateUnknown => {
            "it doesn't accept this server's certificate; is the name that it connects to in it?"
        }
        AlertDescription::DecryptError => {
            "a signature is wrong for it; does it trust another CA of the same name?"
        }
        AlertDescription::CertificateExpired => "for it, this server's certificate has expired",
        _ => return format!("the client gave up: {alert:?}"),
    };
    format!("the client gave up: {reason} ({alert:?})")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(days: std::ops::Range<i64>) -> CertificateDer<'static> {
        let mut parameters = rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap();
        let day = |days: i64| {
            let seconds = UnixTime::now().as_secs().cast_signed() + days * 86_400;
            rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(seconds.cast_unsigned())
        };
        parameters.not_before = day(days.start);
        parameters.not_after = day(days.end);
        let key = rcgen::KeyPair::generate().unwrap();
        parameters.self_signed(&key).unwrap().der().clone()
    }

    #[test]
    fn a_certificate_has_its_time() {
        let check = |days| check_validity(&certificate(days), UnixTime::now());
        assert!(check(-1..365).unwrap().is_empty());
        assert!(check(-1..7).unwrap()[0].starts_with("the certificate expires in 7days"));
        assert!(matches!(check(-9..-2), Err(TlsProblem::Expired(_))));
        assert!(matches!(check(2..9), Err(TlsProblem::NotYetValid(_))));
    }

    #[test]
    fn a_handshake_that_fails_is_explained() {
        let alert = rustls::Error::AlertReceived(AlertDescription::UnknownCA);
        let error = io::Error::new(io::ErrorKind::InvalidData, alert);
        assert!(explain(&error).contains("give it the CA's certificate"));
        let eof = io::Error::from(io::ErrorKind::UnexpectedEof);
        assert!(explain(&eof).contains("closed"));
    }
}
