//! What the engine serves.

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;

use super::ReadError;

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

    /// Reads `span` if that needs no waiting at all, as when everything is cached.
    ///
    /// It is called on the connection's own task, so it may not block. `None` means
    /// that [`read`](Self::read) has to be asked.
    fn read_now(&self, span: Span) -> Option<Vec<Segment>> {
        let _ = span;
        None
    }

    /// Reads `span`: segments of exactly its length, or an error and no bytes.
    fn read(&self, span: Span) -> impl Future<Output = Result<Vec<Segment>, ReadError>> + Send;
}

/// The exports that a client may choose from.
pub trait Exports: Send + Sync {
    /// What they are.
    type Export: Export;

    /// The export of that name, compared whole and as bytes; the empty name is the
    /// default export's.
    fn find(&self, name: &[u8]) -> impl Future<Output = Option<Arc<Self::Export>>> + Send;

    /// All of them, in the order in which LIST shall name them.
    fn list(&self) -> impl Future<Output = Vec<Arc<Self::Export>>> + Send;
}
