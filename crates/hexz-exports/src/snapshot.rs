//! Implements [`Export`] for a stream of a snapshot.

use std::sync::Arc;

use bytesize::ByteSize;

use super::blocks::{BlockReadFailure, Blocks, INDEX_PAGE_WORK};
use super::comparisons::Comparison;
use super::reader::{BlockError, BlockReader};
use super::source::file_name;
use super::trace::TraceSource;
use hexz_reader::{DiffBase, Run, Snapshot, StreamKind};
use nbd_server::wire::MAX_PAYLOAD;
use nbd_server::wire::reply::{STATE_HOLE, STATE_ZERO};
use nbd_server::{ContextQueries, Export, Extent, ReadError, Segment, Span};

/// Information that a metadata context reports about an export.
#[derive(Debug, Clone)]
enum ContextKind {
    /// Extents that are zeros.
    Allocation,
    /// Extents that differ from another archive.
    Changed {
        reference: DiffBase,
        /// Names of the exports that a client must be allowed to open for that.
        exports: Arc<[String]>,
    },
}

/// Namespaces of the contexts that compare an export with another archive.
pub(super) const COMPARISON_NAMESPACES: [&str; 2] = ["hexz:changed", "qemu:dirty-bitmap"];

/// Returns the contexts that compare an export with the archive that the client calls `name`.
pub(super) fn comparison_contexts(name: &str) -> impl Iterator<Item = String> {
    COMPARISON_NAMESPACES.iter().map(move |namespace| format!("{namespace}:{name}"))
}

/// Status flag of extents for which `hexz:changed:NAME` and `qemu:dirty-bitmap:NAME` can't rule
/// out that the bytes differ from those of NAME.
pub const STATE_CHANGED: u32 = 1;

/// Estimated time to answer a block status request, in nanoseconds.
const STATUS_WORK: u64 = 4 * INDEX_PAGE_WORK;

/// One stream of a snapshot, as an export for one client.
#[derive(Debug, Clone)]
pub struct SnapshotExport {
    name: String,
    description: String,
    blocks: Blocks,
    contexts: Vec<(String, ContextKind)>,
}

impl SnapshotExport {
    /// Creates an export of `stream` of `snapshot` with this name.
    pub fn new(
        name: String,
        snapshot: Arc<Snapshot>,
        stream: StreamKind,
        reader: Arc<BlockReader>,
    ) -> Self {
        let description = describe(&snapshot, stream);
        let contexts = vec![("base:allocation".to_owned(), ContextKind::Allocation)];
        let blocks = Blocks { stream, snapshot, reader, client: Arc::default() };
        Self { name, description, blocks, contexts }
    }

    pub(super) fn snapshot(&self) -> &Arc<Snapshot> {
        &self.blocks.snapshot
    }

    /// Returns what a trace of this export is a trace of.
    pub(super) fn trace_source(&self) -> TraceSource {
        TraceSource { export: self.name.clone(), stream: self.blocks.stream, size: self.size() }
    }

    #[cfg(test)]
    pub(super) fn reader(&self) -> &Arc<BlockReader> {
        &self.blocks.reader
    }

    /// Returns the snapshot's stream that is exported.
    pub(super) fn stream(&self) -> StreamKind {
        self.blocks.stream
    }

    /// Adds contexts that compare the export with `reference`, under `name`. If the name is
    /// already in use, the first reference is kept.
    #[must_use]
    pub fn with_comparison(mut self, name: &str, reference: &DiffBase) -> Self {
        for context in comparison_contexts(name) {
            if !self.contexts.iter().any(|(known, _)| *known == context) {
                let (reference, exports) = (reference.clone(), Arc::default());
                self.contexts.push((context, ContextKind::Changed { reference, exports }));
            }
        }
        self
    }

    /// Adds the contexts of those comparisons that `queries` match. Their names must be new.
    pub(super) fn add_comparisons(
        &mut self,
        comparisons: Vec<Comparison>,
        queries: &ContextQueries<'_>,
    ) {
        for Comparison { name, reference, exports } in comparisons {
            let wanted = comparison_contexts(&name).filter(|context| queries.matches(context));
            self.contexts.extend(wanted.map(|context| {
                let (reference, exports) = (reference.clone(), Arc::clone(&exports));
                (context, ContextKind::Changed { reference, exports })
            }));
        }
    }

    /// Returns the runs of the context at `position`, computed on a decoder thread since index
    /// pages may have to be read.
    async fn runs(
        &self,
        position: usize,
        offset: u64,
        length: u64,
        most: usize,
    ) -> Result<(u32, Vec<Run>), BlockError> {
        let Some((_, meaning)) = self.contexts.get(position).cloned() else {
            return Ok((0, Vec::new()));
        };
        let (snapshot, stream) = (Arc::clone(&self.blocks.snapshot), self.blocks.stream);
        let range = offset..offset.saturating_add(length);
        let Blocks { reader, client, .. } = &self.blocks;
        let is_remote = snapshot.is_remote()
            || matches!(&meaning, ContextKind::Changed { reference, .. } if reference.is_remote());
        let work = move || match meaning {
            ContextKind::Allocation => {
                snapshot.zero_runs(stream, range, most).map(|runs| (STATE_HOLE | STATE_ZERO, runs))
            }
            ContextKind::Changed { reference, .. } => snapshot
                .changed_runs(stream, range, most, &reference)
                .map(|runs| (STATE_CHANGED, runs)),
        };
        match is_remote {
            true => reader.run_waiting(work).await,
            false => reader.run_on_decoder(client, STATUS_WORK, work).await,
        }
    }

    fn read_error(&self, at: u64, cause: &BlockError) -> ReadError {
        self.blocks.reader.counters.read_failures.count(cause.label());
        self.log_failure(at, cause);
        ReadError::Unreadable(at)
    }

    fn log_failure(&self, at: u64, cause: &BlockError) {
        if let Some(held_back) = self.blocks.reader.failures.allow() {
            tracing::error!(
                reason = cause.label(),
                hint = self.blocks.reader.hint(cause),
                export = self.name,
                offset = at,
                held_back = held_back.field(),
                "read failed, the client gets an I/O error: {cause}",
            );
        }
    }
}

impl Export for SnapshotExport {
    fn name(&self) -> &str {
        &self.name
    }

    fn description(&self) -> &str {
        &self.description
    }

    fn size(&self) -> u64 {
        self.blocks.snapshot.size(self.blocks.stream)
    }

    fn preferred_block_size(&self) -> u32 {
        const SMALLEST: u32 = 4096;
        const LARGEST: u32 = 256 * 1024;
        self.blocks.snapshot.block_size().clamp(SMALLEST, LARGEST).next_power_of_two()
    }

    fn read_now(&self, span: Span, segments: &mut Vec<Segment>) -> bool {
        self.blocks.reader.recordings.note(self, span);
        self.blocks.read_now(span, segments).is_some()
    }

    async fn read(
        &self,
        span: Span,
        part: impl FnMut(u64, Segment) + Send,
    ) -> Result<(), ReadError> {
        self.blocks.reader.recordings.note(self, span);
        let read = self.blocks.read(span, part).await;
        read.map_err(|BlockReadFailure { at, cause }| self.read_error(at, &cause))
    }

    async fn read_ahead(&self, span: Span) {
        self.blocks.read_ahead(span).await;
    }

    async fn cache(&self, offset: u64, length: u64) -> Result<(), ReadError> {
        // Limited to the size of one read, so that a single request can't evict the whole cache.
        let length = u32::try_from(length).unwrap_or(MAX_PAYLOAD).min(MAX_PAYLOAD);
        self.read(Span { offset, length }, |_, _| ()).await
    }

    fn contexts(&self) -> Vec<&str> {
        self.contexts.iter().map(|(name, _)| name.as_str()).collect()
    }

    fn related_exports(&self, position: usize) -> &[String] {
        match self.contexts.get(position) {
            Some((_, ContextKind::Changed { exports, .. })) => exports,
            _ => &[],
        }
    }

    async fn extents(
        &self,
        position: usize,
        offset: u64,
        length: u64,
        most: usize,
    ) -> Result<Vec<Extent>, ReadError> {
        match self.runs(position, offset, length, most).await {
            Ok((flags, runs)) => Ok(runs
                .into_iter()
                .map(|run| Extent {
                    length: run.length,
                    flags: if run.has_property { flags } else { 0 },
                })
                .collect()),
            Err(cause) => Err(self.read_error(offset, &cause)),
        }
    }
}

/// Returns a human-readable description of a stream.
pub(super) fn describe(snapshot: &Snapshot, stream: StreamKind) -> String {
    let size = ByteSize::b(snapshot.size(stream)).display().iec();
    let encrypted = if snapshot.is_encrypted() { ", encrypted" } else { "" };
    let mut parents = snapshot.parents().map(file_name);
    let thin = match (parents.next(), parents.count()) {
        (None, _) => String::new(),
        (Some(parent), 0) => format!(", thin over {parent}"),
        (Some(parent), more) => format!(", thin over {parent} and {more} more"),
    };
    format!("{stream} stream, {size}, {}{encrypted}{thin}", snapshot.compression())
}
