//! Ready-made exports: bytes in memory, a file, and a set of exports by name.

use std::fmt;
#[cfg(unix)]
use std::io;
#[cfg(unix)]
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc::Sender;

use super::ReadError;
use super::export::{
    AccessFilter, Export, ExportCatalog, ExportSummary, Exports, ListEntry, Segment, Span,
};

/// An export of bytes in memory. Replies refer to them; only short ones are copied.
#[derive(Debug, Clone)]
pub struct BytesExport {
    name: String,
    bytes: Bytes,
}

impl BytesExport {
    /// Creates an export of `bytes`.
    pub fn new(name: impl Into<String>, bytes: impl Into<Bytes>) -> Self {
        Self { name: name.into(), bytes: bytes.into() }
    }

    fn slice(&self, span: Span) -> Option<Segment> {
        let range = usize::try_from(span.offset).ok()?..usize::try_from(span.end()).ok()?;
        (range.end <= self.bytes.len()).then(|| Segment::Data(self.bytes.slice(range)))
    }
}

impl Export for BytesExport {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_now(&self, span: Span, segments: &mut Vec<Segment>) -> bool {
        let segment = self.slice(span);
        let is_within = segment.is_some();
        segments.extend(segment);
        is_within
    }

    async fn read(
        &self,
        span: Span,
        mut part: impl FnMut(u64, Segment) + Send,
    ) -> Result<(), ReadError> {
        part(span.offset, self.slice(span).ok_or(ReadError::OutOfRange)?);
        Ok(())
    }
}

/// An export of a file or block device.
///
/// Its size is the one at the time of opening. The file must not be modified while it is served:
/// clients are promised that all connections see the same, unchanging bytes. A read that fails, for
/// example because the file has been truncated, is answered with an I/O error.
///
/// Reads run on Tokio's threads for blocking operations.
#[cfg(unix)]
#[derive(Debug)]
pub struct FileExport {
    name: String,
    file: Arc<std::fs::File>,
    size: u64,
}

#[cfg(unix)]
impl FileExport {
    /// Opens the file at `path` for reading. Blocks.
    ///
    /// # Errors
    /// The file cannot be opened, or its size cannot be determined.
    pub fn open(name: impl Into<String>, path: impl AsRef<Path>) -> io::Result<Self> {
        use std::io::{Seek, SeekFrom};
        let mut file = std::fs::File::open(path)?;
        // The metadata of a block device has no size.
        let size = file.seek(SeekFrom::End(0))?;
        Ok(Self { name: name.into(), file: Arc::new(file), size })
    }
}

#[cfg(unix)]
impl Export for FileExport {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    async fn read(
        &self,
        span: Span,
        mut part: impl FnMut(u64, Segment) + Send,
    ) -> Result<(), ReadError> {
        use std::os::unix::fs::FileExt;
        let file = Arc::clone(&self.file);
        let reading = tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; span.length as usize];
            file.read_exact_at(&mut bytes, span.offset).map(|()| bytes)
        });
        match reading.await {
            Ok(Ok(bytes)) => {
                part(span.offset, Segment::Data(bytes.into()));
                Ok(())
            }
            // The file cannot be read, or the runtime is shutting down.
            _ => Err(ReadError::Unreadable(span.offset)),
        }
    }
}

/// A fixed set of exports of one type. The first one is the default export.
///
/// Clones share the exports. As an [`ExportCatalog`], a set shows each client the exports that the
/// client's [`AccessFilter`] allows.
pub struct ExportSet<E> {
    exports: Arc<[Arc<E>]>,
    filter: AccessFilter,
}

impl<E: Export> ExportSet<E> {
    /// Creates a set of one export.
    pub fn single(export: E) -> Self {
        Self::new([export])
    }

    /// Creates a set of exports, whose names should differ: of two with the same name, the first
    /// is served.
    pub fn new(exports: impl IntoIterator<Item = E>) -> Self {
        let exports = exports.into_iter().map(Arc::new).collect();
        Self { exports, filter: AccessFilter::allow_all() }
    }

    fn named(&self, name: &[u8]) -> Option<&Arc<E>> {
        let export = match name {
            [] => self.exports.first(),
            name => self.exports.iter().find(|export| export.name().as_bytes() == name),
        };
        export.filter(|export| self.filter.allows(export.name()))
    }
}

impl<E> Clone for ExportSet<E> {
    fn clone(&self) -> Self {
        Self { exports: Arc::clone(&self.exports), filter: self.filter.clone() }
    }
}

impl<E: Export> fmt::Debug for ExportSet<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.exports.iter().map(|export| export.name());
        f.debug_set().entries(names).finish()
    }
}

impl<E: Export> Exports for ExportSet<E> {
    type Export = E;

    async fn find(&self, name: &[u8]) -> Option<Arc<E>> {
        self.named(name).cloned()
    }

    async fn list(&self, listings: Sender<ListEntry>) {
        for export in self.exports.iter().filter(|export| self.filter.allows(export.name())) {
            let entry = ListEntry {
                name: export.name().to_owned(),
                description: export.description().to_owned(),
            };
            if listings.send(entry).await.is_err() {
                break;
            }
        }
    }
}

impl<E: Export> ExportCatalog for ExportSet<E> {
    type Export = E;
    type View = Self;

    fn view_for(self: Arc<Self>, filter: AccessFilter) -> Self {
        Self { exports: Arc::clone(&self.exports), filter }
    }

    fn summaries(&self) -> Vec<ExportSummary> {
        let summary = |export: &Arc<E>| ExportSummary {
            name: export.name().to_owned(),
            description: Some(export.description().to_owned()),
            size: Some(export.size()),
        };
        self.exports.iter().map(summary).collect()
    }
}
