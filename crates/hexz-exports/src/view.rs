//! Presents the catalog to one client: exports that it may not open don't exist for it.

use std::sync::Arc;

use parking_lot::Mutex;

use tokio::sync::mpsc::Sender;

use super::snapshot::comparison_contexts;
use super::source::NotFoundReason;
use super::{Catalog, SnapshotExport};
use nbd_server::{
    AccessFilter, ContextQueries, Export, ExportCatalog, ExportSummary, Exports, ListEntry,
};

/// View of a catalog that is restricted to what one client may open.
#[derive(Debug, Clone)]
pub struct CatalogView {
    catalog: Arc<Catalog>,
    may_open: AccessFilter,
    /// Reason for which the last lookup found nothing.
    missing: Arc<Mutex<Option<NotFoundReason>>>,
}

impl ExportCatalog for Catalog {
    type Export = SnapshotExport;
    type View = CatalogView;

    fn view_for(self: Arc<Self>, may_open: AccessFilter) -> CatalogView {
        CatalogView { catalog: self, may_open, missing: Arc::default() }
    }

    fn summaries(&self) -> Vec<ExportSummary> {
        let offered = |export: &SnapshotExport| ExportSummary {
            name: export.name().to_owned(),
            description: Some(export.description().to_owned()),
            size: Some(export.size()),
        };
        self.open_exports().iter().map(offered).collect()
    }

    fn unready_reason(&self) -> Option<&'static str> {
        Catalog::unready(self)
    }
}

impl CatalogView {
    /// Returns the export of this name, if the client may open it. Authorization comes before any
    /// lookup, so timing doesn't reveal whether the export exists.
    async fn export(&self, name: &[u8]) -> Option<SnapshotExport> {
        self.note(None);
        let found = match self.catalog.resolve(name) {
            Ok(name) if !self.may_open.allows(name) => return None,
            Ok(name) => self.catalog.find_named(name).await,
            Err(missing) => Err(missing),
        };
        found.inspect_err(|missing| self.note(Some(*missing))).ok()
    }

    fn note(&self, missing: Option<NotFoundReason>) {
        *self.missing.lock() = missing;
    }
}

impl Exports for CatalogView {
    type Export = SnapshotExport;

    async fn find(&self, name: &[u8]) -> Option<Arc<SnapshotExport>> {
        self.export(name).await.map(Arc::new)
    }

    async fn find_with_contexts(
        &self,
        name: &[u8],
        queries: &ContextQueries<'_>,
    ) -> Option<Arc<SnapshotExport>> {
        let export = self.export(name).await?;
        let mut comparable = export.clone();
        let mut comparisons = self.catalog.comparisons(&export, queries, &self.may_open);
        while let Some(page) = comparisons.page().await {
            comparable.add_comparisons(page, queries);
        }
        Some(Arc::new(comparable))
    }

    fn not_found_reason(&self) -> Option<&'static str> {
        self.missing.lock().map(NotFoundReason::label)
    }

    async fn list_contexts(
        &self,
        name: &[u8],
        queries: &ContextQueries<'_>,
        contexts: Sender<String>,
    ) -> bool {
        let Some(export) = self.export(name).await else { return false };
        let own = export.contexts().into_iter().map(str::to_owned).collect();
        let mut comparisons = self.catalog.comparisons(&export, queries, &self.may_open);
        let mut next: Option<Vec<String>> = Some(own);
        while let Some(names) = next {
            for context in names.into_iter().filter(|context| queries.matches(context)) {
                if contexts.send(context).await.is_err() {
                    return true;
                }
            }
            let page = comparisons.page().await;
            next =
                page.map(|page| page.iter().flat_map(|it| comparison_contexts(&it.name)).collect());
        }
        true
    }

    async fn list(&self, listings: Sender<ListEntry>) {
        self.catalog.list(&self.may_open, listings).await;
    }
}
