//! Interface between the engine and the exports that it serves.

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc::Sender;

use super::ReadError;
pub use super::wire::meta::ContextQueries;
pub use super::wire::reply::Extent;

/// A range that lies within its export and is no longer than the maximum payload. Both have been
/// validated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First byte, counted from the start of the export.
    pub offset: u64,
    /// Number of bytes; at most [`MAX_PAYLOAD`](super::wire::MAX_PAYLOAD).
    pub length: u32,
}

impl Span {
    /// Returns the offset of the first byte after the range.
    pub fn end(self) -> u64 {
        self.offset + u64::from(self.length)
    }
}

/// Threshold in bytes below which data is copied when its reply is queued. Longer data is
/// referenced until it has been sent. A short slice of a long buffer is therefore better passed as
/// a copy: it would keep the whole buffer in memory.
pub const COPY_THRESHOLD: usize = 16 * 1024;

/// A part of the data of a read. Segments follow one another without gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// A run of zeros of this length in bytes, which did not have to be read.
    Zeros(u32),
    /// Literal data.
    Data(Bytes),
}

impl Segment {
    /// Returns the length in bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Zeros(length) => *length as usize,
            Self::Data(bytes) => bytes.len(),
        }
    }

    /// Returns true if the segment has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Splits the segment into its first `length` bytes and the rest.
    pub(super) fn split_at(self, length: u64) -> (Self, Self) {
        let length = usize::try_from(length).unwrap_or(usize::MAX).min(self.len());
        match self {
            Self::Zeros(all) => {
                let first = u32::try_from(length).unwrap_or(all);
                (Self::Zeros(first), Self::Zeros(all - first))
            }
            Self::Data(mut bytes) => {
                let rest = bytes.split_off(length);
                (Self::Data(bytes), Self::Data(rest))
            }
        }
    }
}

/// A read-only sequence of bytes with a name.
pub trait Export: Send + Sync + 'static {
    /// Returns the canonical name, as LIST reports it.
    fn name(&self) -> &str;

    /// Returns a one-line, human-readable description; empty if there is none.
    fn description(&self) -> &str {
        ""
    }

    /// Returns the size in bytes, which is less than 2^63 and never changes.
    fn size(&self) -> u64;

    /// Returns the preferred block size: reads of multiples of it are efficient. It is a power of
    /// two from 512 to [`MAX_PAYLOAD`](super::wire::MAX_PAYLOAD), in bytes.
    fn preferred_block_size(&self) -> u32 {
        4096
    }

    /// Reads `span` without waiting, if that is possible, for example because all of it is cached.
    /// `span` is at most 256 KiB long. On success, appends consecutive segments that fill `span`
    /// and returns `true`.
    ///
    /// Must not block: it runs on the connection's own task. On `false`, the caller discards the
    /// segments that were appended and falls back to [`read`](Self::read).
    fn read_now(&self, span: Span, segments: &mut Vec<Segment>) -> bool {
        let _ = (span, segments);
        false
    }

    /// Reads `span`. Passes each part, with its offset in the export, to `part` as soon as it is
    /// available, in any order. Together the parts cover each byte of `span` exactly once.
    ///
    /// # Errors
    /// A part could not be read. The parts passed before that are valid nevertheless.
    fn read(
        &self,
        span: Span,
        part: impl FnMut(u64, Segment) + Send,
    ) -> impl Future<Output = Result<(), ReadError>> + Send;

    /// Prefetches `span`, which will probably be read soon, as far as this does not delay other
    /// work. The future is dropped when the prediction turns out to be wrong.
    fn read_ahead(&self, span: Span) -> impl Future<Output = ()> + Send {
        let _ = span;
        std::future::ready(())
    }

    /// Prepares for reads of the range (`NBD_CMD_CACHE`), as far as that is useful.
    ///
    /// # Errors
    /// Part of the range could not be read.
    fn cache(
        &self,
        offset: u64,
        length: u64,
    ) -> impl Future<Output = Result<(), ReadError>> + Send {
        let _ = (offset, length);
        std::future::ready(Ok(()))
    }

    /// Returns the names of the metadata contexts that clients can select, such as
    /// `base:allocation` ("Metadata querying"). They never change.
    fn contexts(&self) -> Vec<&str> {
        Vec::new()
    }

    /// Returns the names of the other exports about which the context at `position` of
    /// [`contexts`](Self::contexts) reveals information. A client that is no longer authorized to
    /// open one of them must not query the context either.
    fn related_exports(&self, position: usize) -> &[String] {
        let _ = position;
        &[]
    }

    /// Returns the extents of the context at `position` of [`contexts`](Self::contexts), from
    /// `offset` on: at least one and at most `max_extents`. They are consecutive and end no later
    /// than `offset + length`; they may end earlier.
    ///
    /// # Errors
    /// The status could not be determined.
    fn extents(
        &self,
        position: usize,
        offset: u64,
        length: u64,
        max_extents: usize,
    ) -> impl Future<Output = Result<Vec<Extent>, ReadError>> + Send {
        let _ = (position, length, max_extents);
        std::future::ready(Err(ReadError::Unreadable(offset)))
    }
}

/// The exports that one client may choose from.
pub trait Exports: Send + Sync {
    /// Type of the exports.
    type Export: Export;

    /// Returns the export of that name. Names are compared whole and as bytes; the empty name
    /// stands for the default export.
    fn find(&self, name: &[u8]) -> impl Future<Output = Option<Arc<Self::Export>>> + Send;

    /// Returns the export for a client that selects metadata contexts, with those of its contexts
    /// that `queries` match. An export returned by [`find`](Self::find) need not have any contexts.
    fn find_with_contexts(
        &self,
        name: &[u8],
        queries: &ContextQueries<'_>,
    ) -> impl Future<Output = Option<Arc<Self::Export>>> + Send {
        let _ = queries;
        self.find(name)
    }

    /// Returns a label of the reason why the last [`find`](Self::find),
    /// [`find_with_contexts`](Self::find_with_contexts) or [`list_contexts`](Self::list_contexts)
    /// found no export that this client may open. It is for the operator only: to clients, every
    /// missing or forbidden export is unknown.
    fn not_found_reason(&self) -> Option<&'static str> {
        None
    }

    /// Sends the names of those contexts of an export that `queries` match to `contexts`, each
    /// once. Returns false, and sends nothing, if there is no such export.
    ///
    /// As with [`list`](Self::list), sending waits for the client.
    fn list_contexts(
        &self,
        name: &[u8],
        queries: &ContextQueries<'_>,
        contexts: Sender<String>,
    ) -> impl Future<Output = bool> + Send {
        async move {
            let Some(export) = self.find_with_contexts(name, queries).await else { return false };
            for context in export.contexts() {
                if queries.matches(context) && contexts.send(context.to_owned()).await.is_err() {
                    break;
                }
            }
            true
        }
    }

    /// Sends the LIST entry of each export to `listings`, in the order in which LIST is to report
    /// them.
    ///
    /// Sending waits until the client has read earlier entries, so an implementation with many
    /// exports should not hold all entries in memory meanwhile. Sending fails once no more entries
    /// are wanted.
    fn list(&self, listings: Sender<ListEntry>) -> impl Future<Output = ()> + Send;
}

/// Predicate on canonical export names: true for those that a client is authorized to open.
#[derive(Clone)]
pub struct AccessFilter(Arc<dyn Fn(&str) -> bool + Send + Sync>);

impl AccessFilter {
    /// Creates a predicate from `predicate`, which is called for every check; nothing is cached.
    pub fn new(predicate: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(predicate))
    }

    /// Returns a predicate that allows all exports.
    pub fn allow_all() -> Self {
        Self::new(|_| true)
    }

    /// Returns true if the client may open the export `name`.
    pub fn allows(&self, name: &str) -> bool {
        (self.0)(name)
    }
}

impl fmt::Debug for AccessFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AccessFilter(…)")
    }
}

/// All exports of a server. Each client gets its own view of them.
pub trait ExportCatalog: Send + Sync + 'static {
    /// Type of the exports.
    type Export: Export;
    /// One client's view of the exports.
    type View: Exports<Export = Self::Export>;

    /// Returns the view of a client that may open the exports allowed by `may_open`. To that
    /// client, the others do not exist.
    fn view_for(self: Arc<Self>, may_open: AccessFilter) -> Self::View;

    /// Returns what is known about the exports without opening or reading anything, for status
    /// pages and monitoring.
    fn summaries(&self) -> Vec<ExportSummary> {
        Vec::new()
    }

    /// Returns the reason why no export can be opened, as far as it is known without opening
    /// anything: a message for the operator, which may start with a label and a colon. Returns
    /// `None` if the server is ready.
    fn unready_reason(&self) -> Option<&'static str> {
        None
    }
}

/// Summary of an export for monitoring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportSummary {
    /// Canonical name.
    pub name: String,
    /// One-line, human-readable description, if the export has been opened.
    pub description: Option<String>,
    /// Size in bytes, if the export has been opened.
    pub size: Option<u64>,
}

impl ExportSummary {
    /// Creates a summary of an export of which only the name is known.
    pub fn name_only(name: &str) -> Self {
        Self { name: name.to_owned(), description: None, size: None }
    }
}

/// Entry of one export in the reply to LIST.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListEntry {
    /// Canonical name.
    pub name: String,
    /// One-line, human-readable description; empty if there is none.
    pub description: String,
}
