//! Where the password of an encrypted archive comes from: never the command line, which
//! every user of the machine can read.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use hexz_nbd::gateway::tls::{TlsProblem, check_secrecy};
use hexz_nbd::snapshot::{Password, PasswordSource};

/// The credential's name under systemd's LoadCredential=.
const CREDENTIAL: &str = "hexz-nbd.password";
/// The variable that the Hexz tools use as well.
const VARIABLE: &str = "HEXZ_PASSWORD";
/// The longest password file, in bytes.
const MAX_LENGTH: usize = 64 * 1024;

#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", hexz_nbd::escape::name(.path))]
pub(crate) struct PasswordError {
    path: PathBuf,
    problem: TlsProblem,
}

/// Where the password comes from, if one was given in any way. It has been read once, so
/// that what is wrong with it is said at the start.
pub(crate) fn find(file: Option<&Path>) -> Result<Option<PasswordSource>, PasswordError> {
    if let Some(path) = self::file(file) {
        return source(&path).map(Some);
    }
    let variable = || std::env::var_os(VARIABLE).map(|value| Password::new(value.into_vec()));
    Ok(variable().map(|_| {
        PasswordSource::new(move || variable().ok_or_else(|| io::ErrorKind::NotFound.into()))
    }))
}

/// The file that it comes from, if it is one: `given`, or the credential.
pub(crate) fn file(given: Option<&Path>) -> Option<PathBuf> {
    let credential = || {
        let folder = std::env::var_os("CREDENTIALS_DIRECTORY")?;
        // Where nobody may look, reading it says why.
        let is_there = |path: &PathBuf| path.try_exists().unwrap_or(true);
        Some(Path::new(&folder).join(CREDENTIAL)).filter(is_there)
    };
    given.map(Path::to_owned).or_else(credential)
}

/// Reads a file again each time; what can be read only once, such as a pipe, is kept.
fn source(path: &Path) -> Result<PasswordSource, PasswordError> {
    let password = read(path)?;
    if !path.is_file() {
        return Ok(password.into());
    }
    let path = path.to_owned();
    Ok(PasswordSource::new(move || read(&path).map_err(io::Error::other)))
}

fn read(path: &Path) -> Result<Password, PasswordError> {
    let of = |problem| PasswordError { path: path.to_owned(), problem };
    // A pipe, as of a shell's <(…), has no permissions worth judging.
    if path.is_file() {
        check_secrecy(path).map_err(of)?;
    }
    let file = File::open(path).map_err(|error| of(error.into()))?;
    // Room for all of it at once: growing would leave copies behind.
    let mut content = Vec::with_capacity(MAX_LENGTH + 1);
    let length =
        file.take(MAX_LENGTH as u64).read_to_end(&mut content).map_err(|error| of(error.into()))?;
    let password = Password::from_file_content(content);
    let invalid = |message| of(io::Error::new(io::ErrorKind::InvalidData, message).into());
    if length == MAX_LENGTH {
        return Err(invalid("it is too long for a password"));
    }
    if password.is_empty() {
        return Err(invalid("there is no password in it"));
    }
    Ok(password)
}
