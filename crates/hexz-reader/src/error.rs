//! Errors about archives: the file, the location in it and a remedy.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;

use super::{BlockHash, Digest};
use crate::storage::{Mismatch, RemoteError};
use nbd_telemetry::escape;

/// An error about an archive, with the file and, if applicable, the offset in it.
#[derive(Debug)]
pub struct Error {
    /// Path of the archive's file.
    pub path: Arc<Path>,
    /// Offset in the file, in bytes.
    pub offset: Option<u64>,
    /// Description of the error.
    pub kind: ErrorKind,
}

impl Error {
    /// Returns the stable label of the [kind](ErrorKind::label).
    pub fn label(&self) -> &'static str {
        self.kind.label()
    }

    /// Returns true if the error says nothing about the file: the system had no descriptor or
    /// memory left, or nobody waited any more.
    pub fn is_transient(&self) -> bool {
        let error = match &self.kind {
            ErrorKind::Abandoned => return true,
            ErrorKind::Io(_, error) => error,
            _ => return false,
        };
        let errno = Errno::from_io_error(error);
        matches!(errno, Some(Errno::NOMEM | Errno::NFILE | Errno::MFILE))
    }

    /// Returns true if the same file fails in the same way until it or the options change. Returns
    /// false if a parent may appear, or the system may recover.
    pub fn is_permanent(&self) -> bool {
        !matches!(
            self.kind,
            ErrorKind::Io(..)
                | ErrorKind::Store(..)
                | ErrorKind::ParentMissing { .. }
                | ErrorKind::ContentChanged
                | ErrorKind::IndexNotBuilt
                | ErrorKind::Abandoned
        )
    }

    /// Returns true if a store failed in a way that may be over at any time.
    pub fn is_store_down(&self) -> bool {
        matches!(&self.kind, ErrorKind::Store(_, error) if error.is_transient)
    }

    /// Returns true if a store failed, or rejected requests because of the credentials or the clock.
    /// That says nothing about the archive.
    pub fn is_outage(&self) -> bool {
        matches!(&self.kind, ErrorKind::Store(_, error) if error.is_outage)
    }

    /// Returns true if there is no such file or object.
    pub fn is_missing(&self) -> bool {
        match &self.kind {
            ErrorKind::Io(_, error) => error.kind() == io::ErrorKind::NotFound,
            ErrorKind::Store(_, error) => error.label == "store_not_found",
            _ => false,
        }
    }

    /// Returns true if header and index alone don't reveal the error.
    pub fn is_hidden_from_index(&self) -> bool {
        matches!(
            self.kind,
            ErrorKind::WrongPassword
                | ErrorKind::KeyIterations { .. }
                | ErrorKind::DigestMismatch { .. }
        )
    }

    /// Returns true if a reference leads to no block: none of the parents has it, or there is no
    /// parent to read from.
    pub(super) fn is_unresolvable(&self) -> bool {
        matches!(self.kind, ErrorKind::Unresolvable { .. } | ErrorKind::NoParentToRead { .. })
    }

    /// Returns true if no block covers the requested byte.
    pub(super) fn is_uncovered(&self) -> bool {
        matches!(self.kind, ErrorKind::Uncovered { .. } | ErrorKind::EndsEarly { .. })
    }

    /// Creates an error for an archive's file that can't be opened.
    pub fn open_failed(path: &Path, error: io::Error) -> Self {
        ErrorKind::from_read_error("open the archive", error).of(&Arc::from(path))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", printable(&self.path))?;
        if let Some(offset) = self.offset {
            write!(f, ", byte {offset}")?;
        }
        write!(f, ": {}", self.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.kind.source()
    }
}

/// Kind of an error about an archive, with its details.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system reported an error.
    #[error("can't {0}: {1}")]
    Io(&'static str, #[source] io::Error),
    /// An object's store failed.
    #[error("can't {0}: {1}")]
    Store(&'static str, #[source] RemoteError),
    /// The file isn't a Hexz archive.
    #[error("not a Hexz archive: it doesn't start with \"HEXZ\"")]
    NotHexz,
    /// The format version is unknown.
    #[error("the format version is {0}, expected 1")]
    UnknownVersion(u32),
    /// The file is shorter than its header or index requires.
    #[error("the file ends within {0}: it was truncated, or not copied completely")]
    Truncated(&'static str),
    /// A field has an invalid value.
    #[error("{0} is invalid: the file is damaged or malformed")]
    Invalid(&'static str),
    /// A length exceeds the limit for memory allocation.
    #[error("{what} is {got}, the limit is {limit}")]
    TooLarge {
        /// Name of the length.
        what: &'static str,
        /// Value in the file.
        got: u64,
        /// Greatest allowed value.
        limit: u64,
    },
    /// A password is needed.
    #[error("the archive is encrypted, and no password was given")]
    PasswordNeeded,
    /// The password doesn't decrypt the archive.
    #[error("the password doesn't decrypt the archive")]
    WrongPassword,
    /// The archive holds a packed directory, not a disk.
    #[error("the archive contains a packed directory, not a disk image")]
    DirectoryArchive,
    /// A parent wasn't found in any directory that may be searched.
    #[error(
        "the parent {:?} was not found (searched for {}){}",
        escape::name(.name),
        list(.tried),
        outside(*.is_outside)
    )]
    ParentMissing {
        /// Name of the parent, as recorded in the archive.
        name: String,
        /// Paths that were tried.
        tried: Vec<PathBuf>,
        /// True if the name points to a directory that may not be searched.
        is_outside: bool,
    },
    /// The archive is its own ancestor.
    #[error("the parents form a cycle through {:?}", escape::name(.0))]
    ParentCycle(String),
    /// The backing chain has too many archives.
    #[error("the backing chain has more than {0} archives")]
    ChainTooDeep(usize),
    /// A signature is required, but the archive has none.
    #[error("the archive isn't signed, and a signature is required")]
    NotSigned,
    /// The signature isn't valid for the content by any of the given keys.
    #[error(
        "the signature isn't valid for any of the required keys: the archive was changed, or signed \
         with another key"
    )]
    InvalidSignature,
    /// Digests are required, but there is none for this archive.
    #[error(
        "no digest is given for a file of this name, and one is required of each archive and parent"
    )]
    NoDigest,
    /// The file doesn't match its digest.
    #[error(
        "the BLAKE3 digest is {got}, expected {expected}: the file was replaced, changed or damaged"
    )]
    DigestMismatch {
        /// Digest of the file.
        got: Digest,
        /// Digest in the list.
        expected: Digest,
    },
    /// A part of the file has changed since the file was compared with its digest.
    #[error(
        "the content differs from that verified by digest: the file was changed, or its disk \
         returns other bytes"
    )]
    ContentChanged,
    /// The stored bytes don't match their CRC-32.
    #[error("the stored block is damaged: its CRC-32 is {got:#010x}, expected {expected:#010x}")]
    ChecksumMismatch {
        /// CRC-32 of the bytes in the file.
        got: u32,
        /// CRC-32 in the index.
        expected: u32,
    },
    /// The authentication tag of AES-GCM doesn't match.
    #[error("can't decrypt the stored block: its authentication tag is wrong")]
    AuthenticationTag,
    /// The stored bytes can't be decompressed.
    #[error("can't decompress the stored block: {0}")]
    Decompress(String),
    /// The length of the decompressed block differs from the index.
    #[error("the block has {got} bytes, expected {expected}")]
    LengthMismatch {
        /// Number of decompressed bytes.
        got: usize,
        /// Length in the index, in bytes.
        expected: u32,
    },
    /// The decompressed block doesn't match its hash.
    #[error("the block's BLAKE3 is {got}, expected {expected}")]
    HashMismatch {
        /// Hash of the decompressed bytes.
        got: BlockHash,
        /// Hash in the index.
        expected: BlockHash,
    },
    /// No block covers a range of the stream.
    #[error("no block covers byte {at} of the {stream} stream")]
    Uncovered {
        /// Affected stream.
        stream: super::StreamKind,
        /// Offset in the stream, in bytes.
        at: u64,
    },
    /// The blocks end before the stated length.
    #[error(
        "the blocks of the {stream} stream end at byte {end}, before its stated length of {size} \
         bytes (\"hexz convert tar\" writes such archives): the content in between is unknown"
    )]
    EndsEarly {
        /// Affected stream.
        stream: super::StreamKind,
        /// End offset of the blocks, in bytes.
        end: u64,
        /// Stated length, in bytes.
        size: u64,
    },
    /// A reference by offset has no unique parent to read from.
    #[error(
        "the block at byte {at} of the {stream} stream refers to the same offset of a parent, \
         which takes exactly one readable parent; the archive names {parents}"
    )]
    NoParentToRead {
        /// Affected stream.
        stream: super::StreamKind,
        /// Offset in the stream, in bytes.
        at: u64,
        /// Number of parents that the archive names.
        parents: usize,
    },
    /// A reference can be read by offset or by hash, with different bytes.
    #[error("{0}")]
    Ambiguous(Box<Ambiguity>),
    /// The index of the parents' hashes is needed, but the caller didn't allow building it.
    #[error("the index of the parents' blocks hasn't been built")]
    IndexNotBuilt,
    /// The caller was gone before its turn to derive a key.
    #[error("canceled: the caller no longer waits")]
    Abandoned,
    /// The key derivation requests more iterations than allowed.
    #[error(
        "the key derivation takes {got} iterations of PBKDF2, the limit is {limit}; the Hexz tools \
         use 600000"
    )]
    KeyIterations {
        /// Number of iterations in the header.
        got: u32,
        /// Greatest number allowed.
        limit: u32,
    },
    /// No parent has the block.
    #[error(
        "no parent has the block at byte {at} of the {stream} stream (BLAKE3 {hash}); one of them \
         may differ from the file that the archive was packed against"
    )]
    Unresolvable {
        /// Affected stream.
        stream: super::StreamKind,
        /// Offset in the stream, in bytes.
        at: u64,
        /// Hash of the missing block.
        hash: BlockHash,
    },
}

/// Both interpretations of an ambiguous reference to a parent.
#[derive(Debug)]
pub struct Ambiguity {
    /// Stream that has the reference.
    pub stream: super::StreamKind,
    /// Offset in the stream, in bytes.
    pub at: u64,
    /// Length of the block, in bytes.
    pub length: u32,
    /// Hash of the index entry.
    pub hash: BlockHash,
    /// Path of the archive to which the reference points by offset.
    pub parent: PathBuf,
    /// Hash of the bytes at that offset.
    pub by_offset: BlockHash,
    /// Path of the archive that has the block with the entry's hash.
    pub holder: PathBuf,
    /// Start offset of that block in its stream, in bytes.
    pub holder_at: u64,
}

impl fmt::Display for Ambiguity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { stream, at, length, hash, parent, by_offset, holder, holder_at } = self;
        write!(
            f,
            "the reference at byte {at} of the {stream} stream is ambiguous: by offset it means \
             {length} bytes at the same offset of {} (BLAKE3 {by_offset}), by hash the block at \
             byte {holder_at} of {} (BLAKE3 {hash})",
            printable(parent),
            printable(holder),
        )
    }
}

impl ErrorKind {
    /// Returns a stable label for metrics, logs and programs.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Io(..) => "io",
            Self::Store(_, error) => error.label,
            Self::NotHexz => "not_hexz",
            Self::UnknownVersion(_) => "unknown_version",
            Self::Truncated(_) => "truncated",
            Self::Invalid(_) => "invalid",
            Self::TooLarge { .. } => "too_large",
            Self::PasswordNeeded => "password_needed",
            Self::WrongPassword => "wrong_password",
            Self::DirectoryArchive => "directory_archive",
            Self::ParentMissing { .. } => "parent_missing",
            Self::ParentCycle(_) => "parent_cycle",
            Self::ChainTooDeep(_) => "chain_too_deep",
            Self::NotSigned => "not_signed",
            Self::InvalidSignature => "signature",
            Self::NoDigest => "no_digest",
            Self::DigestMismatch { .. } => "digest",
            Self::ContentChanged => "changed",
            Self::ChecksumMismatch { .. } => "crc",
            Self::AuthenticationTag => "tag",
            Self::Decompress(_) => "decompress",
            Self::LengthMismatch { .. } => "length",
            Self::HashMismatch { .. } => "hash",
            Self::Uncovered { .. } | Self::EndsEarly { .. } => "uncovered",
            Self::NoParentToRead { .. } | Self::Unresolvable { .. } => "unresolvable",
            Self::Ambiguous(_) => "ambiguous",
            Self::IndexNotBuilt => "index_not_built",
            Self::Abandoned => "abandoned",
            Self::KeyIterations { .. } => "too_large",
        }
    }

    /// Creates a problem for a failed read of an archive's file; `purpose` completes "can't …".
    pub(super) fn from_read_error(purpose: &'static str, error: io::Error) -> Self {
        if Mismatch::of(&error).is_some() {
            return Self::ContentChanged;
        }
        match RemoteError::of(&error) {
            Some(error) => Self::Store(purpose, error),
            None => Self::Io(purpose, error),
        }
    }

    /// Attributes the problem to the file `path`.
    pub(super) fn of(self, path: &Arc<Path>) -> Error {
        Error { path: Arc::clone(path), offset: None, kind: self }
    }
}

/// Escapes a path for log lines and messages: the names of parents come from untrusted archives.
pub(super) fn printable(path: &Path) -> String {
    escape::path(path).to_string()
}

fn list(paths: &[PathBuf]) -> String {
    match paths {
        [] => "nowhere".to_owned(),
        paths => {
            let shown: Vec<_> = paths.iter().map(|path| printable(path)).collect();
            shown.join(", ")
        }
    }
}

fn outside(is_outside: bool) -> &'static str {
    if is_outside { "; its name leads outside the directories that are searched" } else { "" }
}
