//! What the engine serves.

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc::Sender;

use super::ReadError;
pub use super::wire::meta::ContextQueries;
pub use super::wire::reply::Extent;

/// A range of an export that is known to lie within it and to be of a sane length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first byte, from the start of the export.
    pub offset: u64,
    /// How many bytes; at most [`MAX_PAYLOAD`](super::wire::MAX_PAYLOAD).
    pub length: u32,
}

impl Span {
    /// The first byte behind it.
    pub fn end(self) -> u64 {
        self.offset + u64::from(self.length)
    }
}

/// Data shorter than this is copied when its reply is queued, in bytes. Longer data is kept
/// until it is sent, so a short part of something long is better handed over as a copy.
pub const COPIED: usize = 16 * 1024;

/// A part of a read's answer. The parts follow one another without a gap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// So many zero bytes, which nobody had to read.
    Zeros(u32),
    /// These bytes.
    Data(Bytes),
}

impl Segment {
    /// Its length in bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Zeros(length) => *length as usize,
            Self::Data(bytes) => bytes.len(),
        }
    }

    /// Whether it has no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its first `length` bytes, and the rest.
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
    /// The canonical name, as LIST gives it.
    fn name(&self) -> &str;

    /// A line for people.
    fn description(&self) -> &str;

    /// The size in bytes, less than 2^63. It never changes.
    fn size(&self) -> u64;

    /// At which multiple of bytes reads are efficient: a power of two from 512 to
    /// [`MAX_PAYLOAD`](super::wire::MAX_PAYLOAD).
    fn preferred_block_size(&self) -> u32 {
        4096
    }

    /// Reads `span`, which is at most 256 KiB long, if that needs no waiting at all, as when
    /// everything is cached: adds segments that follow one another and fill it, and returns
    /// `true`.
    ///
    /// It is called on the connection's own task, so it may not block. `false` means that
    /// [`read`](Self::read) has to be asked; what was added by then doesn't count.
    fn read_now(&self, span: Span, segments: &mut Vec<Segment>) -> bool {
        let _ = (span, segments);
        false
    }

    /// Reads `span`. Each part of it is handed over with its offset in the export as soon
    /// as it is there, in any order; together they fill `span`, each byte once.
    ///
    /// # Errors
    /// A part can't be had. What has been handed over is right all the same.
    fn read(
        &self,
        span: Span,
        part: impl FnMut(u64, Segment) + Send,
    ) -> impl Future<Output = Result<(), ReadError>> + Send;

    /// Prepares for reads of `span`, which will probably come, as far as that is in nobody's
    /// way. It is dropped when they turn out not to come.
    fn read_ahead(&self, span: Span) -> impl Future<Output = ()> + Send {
        let _ = span;
        std::future::ready(())
    }

    /// Prepares for reads of that range, as far as that makes sense (`NBD_CMD_CACHE`).
    ///
    /// # Errors
    /// Part of it can't be had.
    fn cache(
        &self,
        offset: u64,
        length: u64,
    ) -> impl Future<Output = Result<(), ReadError>> + Send {
        let _ = (offset, length);
        std::future::ready(Ok(()))
    }

    /// The names of the metadata contexts that clients can select, such as
    /// `base:allocation` ("Metadata querying"). They never change.
    fn contexts(&self) -> Vec<&str> {
        Vec::new()
    }

    /// Names of the other exports that the context at `position` of
    /// [`contexts`](Self::contexts) tells about. Who may not open one of them any more may not
    /// go on asking for it either.
    fn compared_with(&self, position: usize) -> &[String] {
        let _ = position;
        &[]
    }

    /// What the context at `position` of [`contexts`](Self::contexts) says of the
    /// export from `offset` on: at least one extent, at most `most`, that follow one
    /// another and don't reach beyond `offset + length`. They may end sooner.
    ///
    /// # Errors
    /// It can't be found out.
    fn extents(
        &self,
        position: usize,
        offset: u64,
        length: u64,
        most: usize,
    ) -> impl Future<Output = Result<Vec<Extent>, ReadError>> + Send {
        let _ = (position, length, most);
        std::future::ready(Err(ReadError::Unreadable(offset)))
    }
}

/// The exports that a client may choose from.
pub trait Exports: Send + Sync {
    /// What they are.
    type Export: Export;

    /// The export of that name, compared whole and as bytes; the empty name is the
    /// default export's.
    fn find(&self, name: &[u8]) -> impl Future<Output = Option<Arc<Self::Export>>> + Send;

    /// Finds an export for a client that selects metadata contexts: those of its contexts that
    /// `queries` match. An export that [`find`](Self::find) returns need not have any.
    fn find_with_contexts(
        &self,
        name: &[u8],
        queries: &ContextQueries<'_>,
    ) -> impl Future<Output = Option<Arc<Self::Export>>> + Send {
        let _ = queries;
        self.find(name)
    }

    /// Label of the reason for which the last [`find`](Self::find),
    /// [`find_with_contexts`](Self::find_with_contexts) or
    /// [`list_contexts`](Self::list_contexts) found nothing that this client may open. It is for
    /// the operator alone: to clients, all that isn't there is unknown.
    fn missing(&self) -> Option<&'static str> {
        None
    }

    /// Sends the names of an export's contexts that `queries` match to `contexts`, each once.
    /// Returns false, and sends nothing, if there is no such export.
    ///
    /// As for [`list`](Self::list), sending waits for the client.
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

    /// Sends what LIST says of each export to `listings`, in the order in which LIST shall
    /// name them.
    ///
    /// Sending waits until the client has read what was sent before, so whoever has many exports
    /// had better not hold listings of all of them meanwhile. It fails if no more are wanted.
    fn list(&self, listings: Sender<Listing>) -> impl Future<Output = ()> + Send;
}

/// Which exports a client may open, by their canonical names.
#[derive(Clone)]
pub struct MayOpen(Arc<dyn Fn(&str) -> bool + Send + Sync>);

impl MayOpen {
    /// Those that `judge` says yes to. It is asked anew each time.
    pub fn new(judge: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(judge))
    }

    /// All of them.
    pub fn everything() -> Self {
        Self::new(|_| true)
    }

    /// Whether that is one of them.
    pub fn allows(&self, name: &str) -> bool {
        (self.0)(name)
    }
}

impl fmt::Debug for MayOpen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MayOpen(…)")
    }
}

/// What is served, of which each client sees its own part.
pub trait Offer: Send + Sync + 'static {
    /// What is served.
    type Export: Export;
    /// What one client sees of it.
    type Seen: Exports<Export = Self::Export>;

    /// What a client sees that may open these: the others are to it as if they weren't
    /// there.
    fn seen_by(self: Arc<Self>, may_open: MayOpen) -> Self::Seen;

    /// What is known of the exports at once, without opening or reading anything: for people
    /// who watch.
    fn offered(&self) -> Vec<Offered> {
        Vec::new()
    }

    /// Reason for which none of them can be opened, as far as is known at once: a label, and
    /// words.
    fn unready(&self) -> Option<&'static str> {
        None
    }
}

/// What is known of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offered {
    /// Its canonical name.
    pub name: String,
    /// A line for people, if it has been opened.
    pub description: Option<String>,
    /// Its size in bytes, if it has been opened.
    pub size: Option<u64>,
}

impl Offered {
    /// Of which nothing but the name is known.
    pub fn named(name: &str) -> Self {
        Self { name: name.to_owned(), description: None, size: None }
    }
}

/// What LIST says of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// Its canonical name.
    pub name: String,
    /// A line for people; empty if there is none.
    pub description: String,
}
