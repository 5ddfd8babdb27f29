//! Finds the password of encrypted archives: in a file, a credential or an environment variable,
//! and never on the command line, which every user of the machine can read.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use hexz_reader::{Password, PasswordSource};
use nbd_gateway::tls::{TlsFileProblem, check_not_exposed};
use nbd_telemetry::escape;

use crate::exit_status::fixed_exit_status;

/// Name of the credential under systemd's `LoadCredential=`.
const CREDENTIAL: &str = "hexz-nbd.password";
/// Environment variable, which the Hexz tools use as well.
const VARIABLE: &str = "HEXZ_PASSWORD";
/// Length in bytes from which on a password file is rejected.
const LENGTH_LIMIT: usize = 64 * 1024;

/// Reason for which there is no password.
#[derive(Debug, thiserror::Error)]
#[error("can't use the password: {0}")]
pub(crate) struct PasswordError(#[from] PasswordFileError);

fixed_exit_status! { PasswordError => ARCHIVE, "password"; }

/// A password file that can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", escape::path(.path))]
struct PasswordFileError {
    path: PathBuf,
    problem: TlsFileProblem,
}

/// Returns the source of the password, if there is one. A file is read once, so that errors show
/// at startup.
pub(crate) fn password_source(
    file: Option<&Path>,
) -> Result<Option<PasswordSource>, PasswordError> {
    if let Some(path) = self::password_file(file) {
        return Ok(Some(source(&path)?));
    }
    let variable = || std::env::var_os(VARIABLE).map(|value| Password::new(value.into_vec()));
    Ok(variable().map(|_| {
        PasswordSource::new(move || variable().ok_or_else(|| io::ErrorKind::NotFound.into()))
    }))
}

/// Returns the file with the password, if it comes from a file: `given`, or else the credential.
pub(crate) fn password_file(given: Option<&Path>) -> Option<PathBuf> {
    let credential = || {
        let folder = std::env::var_os("CREDENTIALS_DIRECTORY")?;
        // If its existence can't be checked, the error shows when it is read.
        let is_there = |path: &PathBuf| path.try_exists().unwrap_or(true);
        Some(Path::new(&folder).join(CREDENTIAL)).filter(is_there)
    };
    given.map(Path::to_owned).or_else(credential)
}

/// Creates a source that rereads a regular file each time. The content of anything else, such as
/// a pipe, is kept, since it can be read only once.
fn source(path: &Path) -> Result<PasswordSource, PasswordFileError> {
    let password = read(path)?;
    if !path.is_file() {
        return Ok(password.into());
    }
    let path = path.to_owned();
    Ok(PasswordSource::new(move || read(&path).map_err(io::Error::other)))
}

fn read(path: &Path) -> Result<Password, PasswordFileError> {
    let of = |problem| PasswordFileError { path: path.to_owned(), problem };
    // The permissions of a pipe, such as a shell's `<(…)`, mean nothing.
    if path.is_file() {
        check_not_exposed(path).map_err(of)?;
    }
    let file = File::open(path).map_err(|error| of(error.into()))?;
    // Allocated at full size: growing would leave copies of the password in memory.
    let mut content = Vec::with_capacity(LENGTH_LIMIT + 1);
    let length = file
        .take(LENGTH_LIMIT as u64)
        .read_to_end(&mut content)
        .map_err(|error| of(error.into()))?;
    let password = Password::from_file_content(content);
    let invalid = |message| of(io::Error::new(io::ErrorKind::InvalidData, message).into());
    if length == LENGTH_LIMIT {
        return Err(invalid("the password is too long"));
    }
    if password.is_empty() {
        return Err(invalid("the file contains no password"));
    }
    Ok(password)
}
