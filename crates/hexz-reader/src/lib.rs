//! Reader for snapshots in the Hexz archive format, version 1: every published layout, thin
//! archives with their parents, encryption, signatures and digests.
//!
//! ```no_run
//! use hexz_reader::{OpenOptions, Snapshot, StreamKind};
//!
//! # fn main() -> Result<(), hexz_reader::Error> {
//! let snapshot = Snapshot::open("disk.hxz".as_ref(), &OpenOptions::default())?;
//! let mut sector = [0; 512];
//! snapshot.read_exact_at(StreamKind::Main, &mut sector, 0)?;
//! # Ok(())
//! # }
//! ```
//!
//! - [`Snapshot`] opens an archive and its parents. [`Snapshot::read_exact_at`] reads bytes;
//!   [`Snapshot::locate`] and [`Snapshot::read_block`] are the two steps behind it, for callers
//!   with a cache of their own. [`Snapshot::stored_block`] and [`Snapshot::decode`] are for callers
//!   that also fetch the stored bytes on their own.
//! - [`OpenOptions`] says where parents are searched, how the archive is decrypted, and which
//!   signatures or digests it must have.
//! - [`Snapshot::verify`] reads every block; [`ArchiveSummary`](summary::ArchiveSummary) describes
//!   the content without reading blocks.
//! - [`Snapshot::zero_runs`] and [`Snapshot::changed_runs`] answer from the index alone which
//!   ranges are zeros, and which differ from another archive.
//! - [`storage::Storage`] is the source of an archive's bytes, for archives that aren't files.
//! - [`Error`] names the file and the offset in it; [`ErrorKind`] is the reason, with a stable
//!   label for metrics.
//!
//! All functions block while they read, unless documented otherwise. Lengths and offsets are in
//! bytes. Nothing is shared between snapshots except what their [`OpenOptions`] share: index pages,
//! counters, and the limit of log lines.
//!
//! # The format
//!
//! ```text
//! 0             header, in a region of 4096 bytes            header.rs
//! 4096          dictionary, if any                           codec.rs
//!   …           compressed blocks and index pages, mixed     index_page.rs
//! index_offset  master index                                 master_index.rs
//!   …           metadata and signature, if any
//! ```
//!
//! Every published version of Hexz calls its format version 1, although there are several layouts
//! of it (`layout.rs`).
//!
//! A stream (main or auxiliary) is divided into blocks, and an index page lists up to 4096 of them.
//! A block is stored in the archive, is all zeros, or lives in a parent archive (`chain.rs`). A
//! block in a parent is found by its BLAKE3 hash (`parent_index.rs`), or is the parent's data at
//! the same offset (`references.rs`).
//!
//! # Trust
//!
//! Archives are untrusted. Each length in them is compared with a limit (`limits.rs`) before memory
//! is allocated for it. Reading a stored block checks its CRC-32, decrypts and decompresses it, and
//! checks its length and hash (`archive.rs`). Any mismatch is an error; it never reads as zeros.
//! Before anything in an archive is used, its signature (`signature.rs`) or its digest
//! (`digest.rs`) can be verified.

#![deny(missing_docs)]

mod archive;
mod archive_file;
mod background;
mod block;
mod block_read;
pub mod cache;
mod chain;
mod codec;
mod crypto;
mod digest;
mod digest_list;
mod error;
mod extents;
mod faults;
mod fields;
mod header;
mod image;
mod index_page;
mod known;
mod layout;
pub mod limits;
mod log_limit;
mod master_index;
mod metadata;
mod open_checks;
mod options;
mod page_cache;
mod parent_index;
mod parent_lookup;
mod password;
mod reference_choice;
mod references;
mod remark;
#[cfg(feature = "remote")]
mod remote;
mod signature;
mod snapshot;
pub mod storage;
pub mod summary;
mod verify;
mod zeros;

pub use background::BackgroundExecutor;
pub use block::{Block, BlockHash, StreamKind};
pub use block_read::{ArchiveFetch, ArchivePrefetch, Lookup, Missing, StoredBlock};
pub use digest::{DigestMemory, Digests, tree_path};
pub use digest_list::{Digest, DigestTree, DigestsError, format_line};
pub use error::{Ambiguity, Error, ErrorKind};
pub use extents::{DiffBase, Run};
pub use faults::Fault;
pub use header::{Chunking, Compression, parent_names};
pub use image::ImageFormat;
pub use layout::Layout;
pub use log_limit::LogLimit;
pub use options::OpenOptions;
pub use page_cache::{IndexPageCache, PageId};
pub use password::{Password, PasswordSource};
pub use reference_choice::{ReferenceChoice, ReferenceChoiceError, ReferenceMode};
pub use remark::Remark;
#[cfg(feature = "remote")]
pub use remote::{RemoteArchives, StoreConfigs};
pub use signature::{VerifyKey, VerifyKeyError};
pub use snapshot::Snapshot;
pub use verify::{VerifyProgress, VerifyStats};

/// Compiles the examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
