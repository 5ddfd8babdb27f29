//! Opens and reads archives that tests have written.

use std::path::Path;
use std::sync::Arc;

use hexz_reader::{Error, ErrorKind, OpenOptions, Password, Snapshot, StreamKind};

use crate::archive_writer::{PASSWORD, Written};

pub(crate) const STREAMS: [StreamKind; 2] = [StreamKind::Main, StreamKind::Auxiliary];

/// With the password of encrypted archives.
pub(crate) fn with_password() -> OpenOptions {
    OpenOptions { password: Some(Password::new(PASSWORD.into()).into()), ..OpenOptions::default() }
}

/// Opens an archive that has no parents.
pub(crate) fn open(archive: &Written) -> Result<Snapshot, Error> {
    open_bytes(&archive.bytes, Path::new("alone.hxz"))
}

/// Opens an archive as if it were the file `path`, beside which its parents are.
pub(crate) fn open_bytes(bytes: &[u8], path: &Path) -> Result<Snapshot, Error> {
    let options = OpenOptions { raw: true, ..with_password() };
    Snapshot::from_storage(path, Arc::new(Arc::<[u8]>::from(bytes)), &options)
}

pub(crate) fn read(
    snapshot: &Snapshot,
    stream: StreamKind,
    at: u64,
    length: usize,
) -> Result<Vec<u8>, Error> {
    let mut buffer = vec![0xa5; length];
    snapshot.read_exact_at(stream, &mut buffer, at)?;
    Ok(buffer)
}

pub(crate) fn read_whole(snapshot: &Snapshot, stream: StreamKind) -> Result<Vec<u8>, Error> {
    read(snapshot, stream, 0, snapshot.size(stream) as usize)
}

pub(crate) fn invalid(kind: &ErrorKind) -> bool {
    matches!(kind, ErrorKind::Invalid(_))
}

pub(crate) fn too_large(kind: &ErrorKind) -> bool {
    matches!(kind, ErrorKind::TooLarge { .. })
}

/// What reading the first byte of the main stream comes to.
#[track_caller]
pub(crate) fn problem_of_first_byte(archive: &Written) -> ErrorKind {
    let snapshot = open(archive).unwrap();
    read(&snapshot, StreamKind::Main, 0, 1).expect_err("the byte is read").kind
}
