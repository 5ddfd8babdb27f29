//! Exports of archives that tests have written, and reads of them.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use hexz_exports::{BlockReader, SnapshotExport};
use hexz_reader::storage::Storage;
use hexz_reader::{OpenOptions, Snapshot, StreamKind};
use nbd_server::{Export, ReadError, Segment, Span};

use crate::archive_writer::Written;

/// Opens an archive that has no parents.
pub(crate) fn open(written: &Written) -> Snapshot {
    open_storage(Arc::new(Arc::<[u8]>::from(written.bytes.as_slice())), &OpenOptions::default())
}

pub(crate) fn open_storage(storage: Arc<dyn Storage>, options: &OpenOptions) -> Snapshot {
    Snapshot::from_storage(Path::new("alone.hxz"), storage, options).unwrap()
}

/// Returns the main stream of a snapshot as an export for a client of its own.
pub(crate) fn export(snapshot: &Arc<Snapshot>, reader: &Arc<BlockReader>) -> SnapshotExport {
    let (snapshot, reader) = (Arc::clone(snapshot), Arc::clone(reader));
    SnapshotExport::new("disk".into(), snapshot, StreamKind::Main, reader)
}

pub(crate) fn span(range: &Range<u64>) -> Span {
    Span { offset: range.start, length: (range.end - range.start) as u32 }
}

pub(crate) fn whole(export: &SnapshotExport) -> Range<u64> {
    0..export.size()
}

/// Reads a range. Checks that the parts cover it exactly once.
pub(crate) async fn read(export: &SnapshotExport, range: Range<u64>) -> Result<Vec<u8>, ReadError> {
    let mut parts = Vec::new();
    export.read(span(&range), |offset, segment| parts.push((offset, segment))).await?;
    parts.sort_by_key(|(offset, _)| *offset);
    let mut bytes = Vec::new();
    for (offset, segment) in parts {
        assert_eq!(offset, range.start + bytes.len() as u64);
        match segment {
            Segment::Data(data) => bytes.extend_from_slice(&data),
            Segment::Zeros(length) => bytes.resize(bytes.len() + length as usize, 0),
        }
    }
    assert_eq!(bytes.len() as u64, range.end - range.start);
    Ok(bytes)
}
