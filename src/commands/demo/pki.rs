//! Creates the CA and the server certificate of the demonstration.

use std::path::Path;

use rustls::pki_types::CertificateDer;

use crate::commands::pki::PkiError;
use crate::commands::pki::authority::{CertificateAuthority, KeyAlgorithm};
use crate::commands::pki::certificate::CertificateKind;
use crate::commands::pki::folder::write_files;
use crate::commands::pki::names::SubjectName;

/// Validity of the certificates: longer than any demonstration.
const DAYS: u32 = 30;

/// Writes the files that a server and its clients need into `folder`, and returns the CA's
/// certificate. The CA's key is discarded at once.
pub(crate) fn create(folder: &Path) -> Result<CertificateDer<'static>, PkiError> {
    let authority =
        CertificateAuthority::create("hexz-nbd demo CA", DAYS, KeyAlgorithm::P256.generate()?)?;
    let names = ["localhost", "127.0.0.1", "::1"].map(SubjectName::parse_server);
    let names = names.into_iter().collect::<Result<Vec<_>, _>>().map_err(PkiError::Usage)?;
    let issued =
        authority.issue(CertificateKind::Server, &names, DAYS, KeyAlgorithm::P256, None)?;
    write_files(folder, &authority, &issued)?;
    Ok(authority.certificate.der)
}
