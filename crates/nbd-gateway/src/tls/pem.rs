//! Reads PEM files: certificates, keys and revocation lists. No other module uses rustls-pemfile.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use zeroize::Zeroizing;

use super::diagnosis;
use super::exposure::check_not_exposed;
use super::problem::TlsFileProblem;

/// Maximum size of a PEM file, in bytes. Revocation lists of large CAs are long.
const MAX_PEM: u64 = 16 * 1024 * 1024;

pub(super) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsFileProblem> {
    let mut pem = open(path)?;
    let chain: Vec<_> = rustls_pemfile::certs(&mut pem).collect::<Result<_, _>>()?;
    if chain.is_empty() { Err(TlsFileProblem::NoCertificate) } else { Ok(chain) }
}

pub(super) fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsFileProblem> {
    check_not_exposed(path)?;
    let mut pem = Zeroizing::new(Vec::new());
    open(path)?.read_to_end(&mut pem)?;
    // PKCS#8 states encryption in the block's label, the older formats in a header that PEM readers
    // reject.
    let encrypted =
        contains(&pem, b"BEGIN ENCRYPTED PRIVATE KEY") || contains(&pem, b"Proc-Type: 4,ENCRYPTED");
    match rustls_pemfile::private_key(&mut pem.as_slice()) {
        Ok(Some(key)) => Ok(key),
        _ if encrypted => Err(TlsFileProblem::EncryptedKey),
        Ok(None) => Err(TlsFileProblem::NoKey),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn revocation_lists(
    path: &Path,
) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsFileProblem> {
    let mut pem = open(path)?;
    let lists: Vec<_> = rustls_pemfile::crls(&mut pem).collect::<Result<_, _>>()?;
    if lists.is_empty() { Err(TlsFileProblem::NoRevocationList) } else { Ok(lists) }
}

fn open(path: &Path) -> Result<BufReader<File>, TlsFileProblem> {
    let file = File::open(path)?;
    if file.metadata()?.len() > MAX_PEM {
        return Err(TlsFileProblem::TooLarge);
    }
    let mut reader = BufReader::new(file);
    match diagnosis::file_fault(reader.fill_buf()?) {
        Some(fault) => Err(TlsFileProblem::NotPem(fault)),
        None => Ok(reader),
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}
