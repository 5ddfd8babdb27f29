//! A client's view of the exports, which checks each lookup against the rules and reports failed
//! ones to the observer.

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use nbd_server::{AccessFilter, ContextQueries, ExportCatalog, Exports, ListEntry};
use parking_lot::Mutex;
use tokio::sync::mpsc::Sender;

use crate::access::{AccessRequest, Reason};
use crate::observer::Observer;
use crate::policy::ActivePolicy;
use crate::registry::RegistryEntry;
use crate::tls::Credentials;

/// A client's view of the exports. Each call is forwarded to the exports that are served at that
/// time. A denial is reported if a client asks for one export, but not while it lists them.
pub(crate) struct AuditedExports<X> {
    exports: Arc<ArcSwap<X>>,
    /// Checks each export against the rules active at that time.
    filter: AccessFilter,
    last_denial: LastDenial,
    observer: Arc<Observer>,
    entry: Arc<RegistryEntry>,
}

/// The export that was denied last during the current lookup, and the reason.
#[derive(Debug, Clone, Default)]
struct LastDenial(Arc<Mutex<Option<(String, Reason)>>>);

impl LastDenial {
    fn set(&self, export: &str, why: Reason) {
        *self.0.lock() = Some((export.to_owned(), why));
    }

    fn take(&self) -> Option<(String, Reason)> {
        self.0.lock().take()
    }
}

impl<X> fmt::Debug for AuditedExports<X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuditedExports")
            .field("last_denial", &self.last_denial)
            .finish_non_exhaustive()
    }
}

impl<X: ExportCatalog> AuditedExports<X> {
    pub(crate) fn new(
        exports: Arc<ArcSwap<X>>,
        policy: Arc<ActivePolicy>,
        observer: Arc<Observer>,
        entry: Arc<RegistryEntry>,
        credentials: Option<Arc<Credentials>>,
    ) -> Self {
        let last_denial = LastDenial::default();
        let noted = observer.wants_denials().then(|| last_denial.clone());
        let peer = entry.route.peer;
        let filter = AccessFilter::new(move |export| {
            let identity = credentials.as_deref().map(Credentials::identity);
            let request = AccessRequest::from_peer(peer).with_identity(identity);
            let decision = policy.authorize(&request.with_export(export));
            if let (Err(why), Some(noted)) = (&decision, &noted) {
                noted.set(export, why.clone());
            }
            decision.is_ok()
        });
        Self { exports, filter, last_denial, observer, entry }
    }

    /// Returns the current exports, and this client's view of them.
    fn current_view(&self) -> (Arc<X>, X::View) {
        self.last_denial.take();
        let exports = self.exports.load_full();
        let view = Arc::clone(&exports).view_for(self.filter.clone());
        (exports, view)
    }

    /// Like [`current_view`](Self::current_view), but the client may open nothing any more once
    /// other exports are served. That may cut a long list short, but the list never names an
    /// export that was checked against rules for other exports.
    fn view_until_replaced(&self) -> (Arc<X>, X::View) {
        self.last_denial.take();
        let exports = self.exports.load_full();
        let (filter, current) = (self.filter.clone(), Arc::clone(&self.exports));
        let checked_for = Arc::clone(&exports);
        let filter = AccessFilter::new(move |export| {
            filter.allows(export) && Arc::ptr_eq(&checked_for, &current.load())
        });
        let view = Arc::clone(&exports).view_for(filter);
        (exports, view)
    }

    /// Returns true if `exports` are still served. If not, permission to open one of them may have
    /// been checked against rules that weren't meant for it.
    fn is_current(&self, exports: &Arc<X>) -> bool {
        Arc::ptr_eq(exports, &self.exports.load())
    }

    /// Reports a failed lookup: the denial, or else the reason why there is no such export.
    fn report_if_missing<T>(&self, name: &[u8], view: &X::View, found: Option<T>) -> Option<T> {
        if found.is_none() {
            if let Some((export, why)) = self.last_denial.take() {
                self.observer.export_denied(&self.entry, &export, &why);
            } else if let Some(reason) = view.not_found_reason() {
                self.observer.export_missing(&self.entry, name, reason);
            }
        }
        found
    }
}

impl<X: ExportCatalog> Exports for AuditedExports<X> {
    type Export = X::Export;

    async fn find(&self, name: &[u8]) -> Option<Arc<X::Export>> {
        loop {
            let (exports, view) = self.current_view();
            let found = view.find(name).await;
            if self.is_current(&exports) {
                return self.report_if_missing(name, &view, found);
            }
        }
    }

    async fn find_with_contexts(
        &self,
        name: &[u8],
        queries: &ContextQueries<'_>,
    ) -> Option<Arc<X::Export>> {
        loop {
            let (exports, view) = self.current_view();
            let found = view.find_with_contexts(name, queries).await;
            if self.is_current(&exports) {
                return self.report_if_missing(name, &view, found);
            }
        }
    }

    async fn list_contexts(
        &self,
        name: &[u8],
        queries: &ContextQueries<'_>,
        contexts: Sender<String>,
    ) -> bool {
        loop {
            let (exports, view) = self.view_until_replaced();
            let is_there = view.list_contexts(name, queries, contexts.clone()).await;
            // If the export exists, names have been sent and can't be taken back.
            if is_there || self.is_current(&exports) {
                return self.report_if_missing(name, &view, is_there.then_some(())).is_some();
            }
        }
    }

    async fn list(&self, listings: Sender<ListEntry>) {
        self.view_until_replaced().1.list(listings).await;
    }
}
