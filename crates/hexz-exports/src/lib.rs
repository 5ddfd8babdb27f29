//! Hexz snapshots as exports of [`nbd_server`]: a block cache that is shared by all clients,
//! decoder threads that are fair to each of them, and readahead.
//!
//! One snapshot is served in a few lines:
//!
//! ```no_run
//! use hexz_exports::SnapshotExports;
//! use nbd_server::handle_client;
//! use tokio::net::TcpListener;
//!
//! # async fn serve() -> Result<(), Box<dyn std::error::Error>> {
//! let exports = SnapshotExports::open("disk.hxz")?;
//! let listener = TcpListener::bind("127.0.0.1:10809").await?;
//! loop {
//!     let (stream, _) = listener.accept().await?;
//!     let exports = exports.clone();
//!     tokio::spawn(async move { handle_client(stream, &exports).await });
//! }
//! # }
//! ```
//!
//! - [`SnapshotExports`] are the exports of one snapshot.
//! - [`Catalog`] has any number of them: archives with names ([`NamedArchive`]), and a folder whose
//!   archives are opened when a client asks for them ([`ExportFolder`]). It is an
//!   [`ExportCatalog`](nbd_server::ExportCatalog), of which each client gets a [`CatalogView`]. An
//!   archive that has been replaced on disk is reopened for the next client; sessions that read the
//!   old file keep reading it.
//! - [`SnapshotExport`] is one stream of a snapshot. Besides `base:allocation` it answers which
//!   ranges differ from another archive (`hexz:changed:NAME` and `qemu:dirty-bitmap:NAME`).
//! - [`BlockReader`] is the cache and the decoders behind all exports, with their
//!   [statistics](ReaderStats). [`MemoryPlan`] divides a memory budget.
//!
//! All of it needs a Tokio runtime. Archives are read on dedicated threads, so a file system that
//! hangs delays only the clients that read from it.
//!
//! # The path of a read
//!
//! 1. Negotiation: [`CatalogView`] (`view.rs`) checks that the client may open the export, and
//!    [`Catalog`] (`catalog.rs`) finds the archive: by name (`named.rs`) or in the folder
//!    (`folder_slots.rs`). Its slot (`slot.rs`) opens it, unless it is open and unchanged.
//! 2. [`SnapshotExport`] (`snapshot.rs`) implements [`nbd_server::Export`]. `blocks.rs` divides a
//!    read into blocks: immediately if index pages and blocks are in memory (`read_now`), otherwise
//!    concurrently (`read`).
//! 3. `block_decoding.rs` looks up each block in the cache ([`cache`]) of the [`BlockReader`]
//!    (`reader.rs`). On a miss, it has [`hexz_reader`] read and verify the block, once for all
//!    clients that wait for it: on the task of the read, if the block is small, its stored bytes are
//!    in memory and no other client reads (`inline_gate.rs`), otherwise together with its neighbors
//!    on a decoder thread (`decoders.rs`).

#![deny(missing_docs)]

mod block_decoding;
mod block_key;
mod blocks;
pub mod cache;
mod catalog;
mod comparisons;
mod decoders;
mod files;
mod folder_access;
mod folder_slots;
mod hints;
mod inline_gate;
mod inspection;
mod listing;
mod memory;
mod named;
mod prefetch;
mod reader;
mod reader_stats;
mod recording;
mod remote_blocks;
mod sharded_counter;
mod slot;
mod snapshot;
mod snapshot_exports;
mod source;
mod status;
mod trace;
mod view;

pub use catalog::{Catalog, CatalogError, FolderTrial};
pub use folder_access::{FolderError, FolderFault};
pub use hints::Hints;
pub use memory::MemoryPlan;
pub use prefetch::{PrefetchError, PrefetchOptions, PrefetchSummary, TracePlace, prefetch};
pub use reader::BlockReader;
pub use reader_stats::{READ_FAILURE_LABELS, ReaderStats};
pub use recording::Recording;
pub use snapshot::{STATE_CHANGED, SnapshotExport};
pub use snapshot_exports::SnapshotExports;
pub use source::{ExportFolder, ExportSelection, NamedArchive, NamedArchiveError};
pub use status::{ArchiveState, CatalogStatus, FolderArchive, FolderStatus, UnavailableArchive};
pub use trace::{MAX_TRACE_LENGTH, Trace, TraceError, TraceSource, TracedRange};
pub use view::CatalogView;

/// Compiles the examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
