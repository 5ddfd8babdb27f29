//! The exports of a single snapshot.

use std::path::Path;
use std::sync::Arc;

use hexz_reader::{Error, OpenOptions, Snapshot};
use nbd_server::{AccessFilter, ContextQueries, ExportCatalog, Exports, ListEntry};
use tokio::sync::mpsc::Sender;

use super::source::file_name;
use super::{BlockReader, Catalog, CatalogView, MemoryPlan, SnapshotExport};

/// The exports of one snapshot: its main stream, which is the default export, under the name of the
/// archive's file, and the auxiliary stream, if there is one, under the same name with `/aux`.
///
/// Clones share the open archive and the cache of decoded blocks. If the archive's file is
/// replaced, it is reopened for the next client.
#[derive(Debug, Clone)]
pub struct SnapshotExports(Arc<Catalog>);

impl SnapshotExports {
    /// Memory for decoded blocks and index pages, in bytes.
    const MEMORY: u64 = 256 << 20;

    /// Opens the archive at `path` and its parents, with the default options. Blocks while it reads
    /// header and index.
    ///
    /// # Errors
    /// The archive or one of its parents can't be opened; see [`Snapshot::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        Self::open_with(path, OpenOptions::default())
    }

    /// Opens the archive at `path` with `options`, such as a password or required digests.
    ///
    /// # Errors
    /// As for [`SnapshotExports::open`].
    pub fn open_with(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self, Error> {
        let path = path.as_ref();
        let reader = BlockReader::new(MemoryPlan::distribute(Self::MEMORY, 0).blocks);
        let options = OpenOptions { read_counters: Arc::clone(reader.reads()), ..options };
        let snapshot = Snapshot::open(path, &options)?;
        snapshot.log_remarks(|_| None);
        let catalog = Catalog::with_snapshot(&file_name(path), snapshot, options, reader);
        Ok(Self(Arc::new(catalog)))
    }

    fn view(&self) -> CatalogView {
        Arc::clone(&self.0).view_for(AccessFilter::allow_all())
    }
}

impl Exports for SnapshotExports {
    type Export = SnapshotExport;

    async fn find(&self, name: &[u8]) -> Option<Arc<SnapshotExport>> {
        self.view().find(name).await
    }

    async fn find_with_contexts(
        &self,
        name: &[u8],
        queries: &ContextQueries<'_>,
    ) -> Option<Arc<SnapshotExport>> {
        self.view().find_with_contexts(name, queries).await
    }

    async fn list_contexts(
        &self,
        name: &[u8],
        queries: &ContextQueries<'_>,
        contexts: Sender<String>,
    ) -> bool {
        self.view().list_contexts(name, queries, contexts).await
    }

    async fn list(&self, listings: Sender<ListEntry>) {
        self.view().list(listings).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nbd_server::{Export, Segment, Span};

    const ARCHIVES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/archives");

    #[tokio::test]
    async fn a_snapshot_is_served_under_its_name_and_as_the_default() {
        let path = Path::new(ARCHIVES).join("fixed-4k-zstd.hxz");
        let exports = SnapshotExports::open(&path).unwrap();
        let (sender, mut listed) = tokio::sync::mpsc::channel(9);
        exports.list(sender).await;
        assert_eq!(listed.recv().await.unwrap().name, "fixed-4k-zstd.hxz");
        assert!(listed.recv().await.is_none());
        assert!(exports.find(b"else").await.is_none());

        let mut expected = vec![0; 10_000];
        let snapshot = Snapshot::open(&path, &OpenOptions::default()).unwrap();
        snapshot.read_exact_at(hexz_reader::StreamKind::Main, &mut expected, 5000).unwrap();
        for name in ["", "fixed-4k-zstd.hxz"] {
            let export = exports.find(name.as_bytes()).await.unwrap();
            let mut read = vec![0; 10_000];
            let span = Span { offset: 5000, length: 10_000 };
            let part = |offset: u64, segment| {
                if let Segment::Data(bytes) = segment {
                    let start = usize::try_from(offset - 5000).unwrap();
                    read[start..start + bytes.len()].copy_from_slice(&bytes);
                }
            };
            export.read(span, part).await.unwrap();
            assert!(read == expected);
        }
    }

    #[tokio::test]
    async fn an_auxiliary_stream_is_an_export_of_its_own() {
        let path = Path::new(ARCHIVES).join("aux-lz4.hxz");
        let options = OpenOptions { raw: true, ..OpenOptions::default() };
        let exports = SnapshotExports::open_with(path, options).unwrap();
        assert!(exports.find(b"aux-lz4.hxz/aux").await.is_some());
    }

    #[test]
    fn a_missing_archive_is_an_error() {
        assert_eq!(SnapshotExports::open("/none.hxz").unwrap_err().label(), "io");
    }
}
