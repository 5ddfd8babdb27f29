//! Errors about archives: the file, the location in it and a remedy.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;

use super::{BlockHash, Digest};
use crate::storage::Mismatch;
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
                | ErrorKind::ParentMissing { .. }
                | ErrorKind::ContentChanged
                | ErrorKind::IndexNotBuilt
                | ErrorKind::Abandoned
        )
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
        ErrorKind::Io("open it", error).of(&Arc::from(path))
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
    /// The file isn't a Hexz archive.
    #[error(
        "this is no Hexz archive: it doesn't begin with \"HEXZ\". To make one of a disk image: \
         hexz pack disk.img disk.hxz"
    )]
    NotHexz,
    /// The format version is unknown.
    #[error("this archive has format version {0}; only version 1 is known")]
    UnknownVersion(u32),
    /// The file is shorter than its header or index requires.
    #[error("the file ends within {0}; it was truncated, or its copying did not finish")]
    Truncated(&'static str),
    /// A field has an invalid value.
    #[error("{0} is not valid; the file is damaged, or not what it claims to be")]
    Invalid(&'static str),
    /// A length exceeds the limit for memory allocation.
    #[error("{what} is {got}, more than the limit of {limit}")]
    TooLarge {
        /// Name of the length.
        what: &'static str,
        /// Value in the file.
        got: u64,
        /// Greatest allowed value.
        limit: u64,
    },
    /// A password is needed.
    #[error(
        "this archive is encrypted: give its password by --password-file, the systemd \
         credential \"hexz-nbd.password\" or the environment variable HEXZ_PASSWORD"
    )]
    PasswordNeeded,
    /// The password doesn't decrypt the archive.
    #[error("the password is wrong for this archive")]
    WrongPassword,
    /// The archive holds a packed directory, not a disk.
    #[error(
        "this archive holds a packed directory, not a disk image: its stream is the files' \
         contents one after another. Extract it with the Hexz tools, or give --raw to use \
         the bare stream"
    )]
    DirectoryArchive,
    /// A parent wasn't found in any directory that may be searched.
    #[error("its parent {:?} was not found (looked for {}){}", escape::name(.name), list(.tried), hint(.name, *.is_outside))]
    ParentMissing {
        /// Name of the parent, as recorded in the archive.
        name: String,
        /// Paths that were tried.
        tried: Vec<PathBuf>,
        /// True if the name points to a directory that may not be searched.
        is_outside: bool,
    },
    /// The archive is its own ancestor.
    #[error("this archive is its own ancestor: parents go in a circle through {:?}", escape::name(.0))]
    ParentCycle(String),
    /// The backing chain has too many archives.
    #[error("its chain of parents has more than {0} archives")]
    ChainTooDeep(usize),
    /// A signature is required, but the archive has none.
    #[error(
        "this archive isn't signed, and --verify-key asks for a signature: sign it with the \
         Hexz tools (hexz sign). The parents of a signed archive have to be signed, too"
    )]
    NotSigned,
    /// The signature isn't valid for the content by any of the given keys.
    #[error(
        "its signature is not valid by any key of --verify-key: somebody else has signed it, or \
         its master index is not what was signed. Get the archive again from where it comes \
         from; if it is signed with another key that you trust, give that key, too"
    )]
    InvalidSignature,
    /// Digests are required, but there is none for this archive.
    #[error(
        "--digest has no BLAKE3 for a file of this name. Each archive and each of its parents \
         needs one; if you trust the file, add what \"hexz-nbd digest\" prints for it"
    )]
    NoDigest,
    /// The file doesn't match its digest.
    #[error(
        "its BLAKE3 is {got}, --digest says {expected}: it is not the file that the digest was \
         made of, or it was damaged. Get it again from where it comes from"
    )]
    DigestMismatch {
        /// Digest of the file.
        got: Digest,
        /// Digest in the list.
        expected: Digest,
    },
    /// A part of the file has changed since the file was compared with its digest.
    #[error(
        "these bytes are not those that were compared with --digest: the file has been written to \
         since, or its disk returns other bytes. Put the file that the digest is of in its place"
    )]
    ContentChanged,
    /// The stored bytes don't match their CRC-32.
    #[error(
        "the stored block is damaged: its CRC-32 is {got:#010x}, the index says {expected:#010x}"
    )]
    ChecksumMismatch {
        /// CRC-32 of the bytes in the file.
        got: u32,
        /// CRC-32 in the index.
        expected: u32,
    },
    /// The authentication tag of AES-GCM doesn't match.
    #[error("the stored block can't be decrypted: its authentication tag is wrong")]
    AuthenticationTag,
    /// The stored bytes can't be decompressed.
    #[error("the stored block can't be decompressed: {0}")]
    Decompress(String),
    /// The length of the decompressed block differs from the index.
    #[error("the block has {got} bytes, the index says {expected}")]
    LengthMismatch {
        /// Number of decompressed bytes.
        got: usize,
        /// Length in the index, in bytes.
        expected: u32,
    },
    /// The decompressed block doesn't match its hash.
    #[error("the block's BLAKE3 is {got}, the index says {expected}")]
    HashMismatch {
        /// Hash of the decompressed bytes.
        got: BlockHash,
        /// Hash in the index.
        expected: BlockHash,
    },
    /// No block covers a range of the stream.
    #[error("no block covers the {stream} stream at byte {at}")]
    Uncovered {
        /// Affected stream.
        stream: super::StreamKind,
        /// Offset in the stream, in bytes.
        at: u64,
    },
    /// The blocks end before the stated length.
    #[error(
        "the blocks of the {stream} stream end at byte {end}, before its stated length of {size} \
         bytes, as \"hexz convert tar\" writes it: nothing is known of the bytes in between. \
         --zero-uncovered reads them as zeros, as Hexz does"
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
        "the block at byte {at} of the {stream} stream is left to the parent's bytes at the same \
         offset, but the archive names {parents} parents, or its parent can't be opened"
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
    #[error("the index of its parents' blocks hasn't been built")]
    IndexNotBuilt,
    /// The caller was gone before its turn to derive a key.
    #[error("nobody waits for it any more")]
    Abandoned,
    /// The key derivation requests more iterations than allowed.
    #[error(
        "its key takes {got} iterations of PBKDF2, more than the limit of {limit}: the Hexz tools \
         use 600000. If you trust the archive, allow more with --max-key-iterations"
    )]
    KeyIterations {
        /// Number of iterations in the header.
        got: u32,
        /// Greatest number allowed.
        limit: u32,
    },
    /// No parent has the block.
    #[error(
        "the block at byte {at} of the {stream} stream (BLAKE3 {hash}) is in none of its \
         parents; is one of them not the file that it was packed against?"
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
             byte {holder_at} of {} (BLAKE3 {hash}). Decide with --resolve-references FILE=offset \
             if \"hexz commit --thin\" or merge_overlay made the archive, or FILE=hash if it was \
             packed against its parent",
            printable(parent),
            printable(holder),
        )
    }
}

impl ErrorKind {
    /// Returns a stable label for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Io(..) => "io",
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
        if Mismatch::of(&error).is_some() { Self::ContentChanged } else { Self::Io(purpose, error) }
    }

    /// Attributes the problem to the file `path`.
    pub(super) fn of(self, path: &Arc<Path>) -> Error {
        Error { path: Arc::clone(path), offset: None, kind: self }
    }

    /// Attributes the problem to the file `path`, at `offset`.
    pub(super) fn at(self, path: &Arc<Path>, offset: u64) -> Error {
        Error { path: Arc::clone(path), offset: Some(offset), kind: self }
    }
}

/// Escapes a path for log lines and messages: the names of parents come from untrusted archives.
pub(super) fn printable(path: &Path) -> String {
    escape::name(path).to_string()
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

fn hint(name: &str, is_outside: bool) -> String {
    if is_outside {
        format!(
            ". Put it beside the archive or give its folder as --parent-dir; if the archive is \
             trusted to name any file of this machine, --allow-parent-anywhere looks at {:?} too",
            escape::name(name)
        )
    } else {
        ". Put it beside the archive or give its folder as --parent-dir".to_owned()
    }
}
