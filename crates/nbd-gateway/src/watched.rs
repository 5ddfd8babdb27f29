//! A client's view of the exports, which reports its failed lookups to the audit.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc::Sender;

use super::Shared;
use super::access::Reason;
use nbd_server::{AccessFilter, ContextQueries, ExportCatalog, Exports, ListEntry};

/// The export that was denied last during the current lookup, and the reason.
#[derive(Debug, Clone, Default)]
pub(super) struct Denials(Arc<Mutex<Option<(String, Reason)>>>);

impl Denials {
    pub(super) fn note(&self, export: &str, why: Reason) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((export.to_owned(), why));
    }

    fn take(&self) -> Option<(String, Reason)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Callback that takes the name of a denied export, and the reason.
pub(super) type Tell = Box<dyn Fn(&str, &Reason) + Send + Sync>;

/// Callback that takes the name of a missing export, and the label of the reason.
pub(super) type TellMissing = Box<dyn Fn(&[u8], &'static str) + Send + Sync>;

/// A client's view of the exports. Each call is forwarded to the exports that are served at that
/// time. A denial is reported if a client asks for one export, but not while it lists them.
pub(super) struct Watched<X> {
    pub(super) shared: Arc<Shared<X>>,
    pub(super) may_open: AccessFilter,
    pub(super) denials: Denials,
    pub(super) tell: Tell,
    pub(super) tell_missing: TellMissing,
}

impl<X> fmt::Debug for Watched<X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("denials", &self.denials).finish_non_exhaustive()
    }
}

impl<X: ExportCatalog> Watched<X> {
    /// Returns the current exports, and this client's view of them.
    fn see(&self) -> (Arc<X>, X::View) {
        self.denials.take();
        let exports = self.shared.exports.load_full();
        let seen = Arc::clone(&exports).view_for(self.may_open.clone());
        (exports, seen)
    }

    /// Like [`see`](Self::see), but the client may open nothing any more once other exports are
    /// served. That may cut a long list short, but the list never names an export that was checked
    /// against rules for other exports.
    fn see_while_served(&self) -> (Arc<X>, X::View) {
        self.denials.take();
        let exports = self.shared.exports.load_full();
        let (may_open, shared) = (self.may_open.clone(), Arc::clone(&self.shared));
        let judged_for = Arc::clone(&exports);
        let may_open = AccessFilter::new(move |export| {
            may_open.allows(export) && Arc::ptr_eq(&judged_for, &shared.exports.load())
        });
        let seen = Arc::clone(&exports).view_for(may_open);
        (exports, seen)
    }

    /// Returns true if `exports` are still served. If not, permission to open one of them may have
    /// been checked against rules that weren't meant for it.
    fn is_served(&self, exports: &Arc<X>) -> bool {
        Arc::ptr_eq(exports, &self.shared.exports.load())
    }

    /// Reports a failed lookup: the denial, or else the reason why there is no such export.
    fn told<T>(&self, name: &[u8], seen: &X::View, found: Option<T>) -> Option<T> {
        if found.is_none() {
            if let Some((export, why)) = self.denials.take() {
                (self.tell)(&export, &why);
            } else if let Some(reason) = seen.not_found_reason() {
                (self.tell_missing)(name, reason);
            }
        }
        found
    }
}

impl<X: ExportCatalog> Exports for Watched<X> {
    type Export = X::Export;

    async fn find(&self, name: &[u8]) -> Option<Arc<X::Export>> {
        loop {
            let (exports, seen) = self.see();
            let found = seen.find(name).await;
            if self.is_served(&exports) {
                return self.told(name, &seen, found);
            }
        }
    }

    async fn find_with_contexts(
        &self,
        name: &[u8],
        queries: &ContextQueries<'_>,
    ) -> Option<Arc<X::Export>> {
        loop {
            let (exports, seen) = self.see();
            let found = seen.find_with_contexts(name, queries).await;
            if self.is_served(&exports) {
                return self.told(name, &seen, found);
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
            let (exports, seen) = self.see_while_served();
            let is_there = seen.list_contexts(name, queries, contexts.clone()).await;
            // If the export exists, names have been sent and can't be taken back.
            if is_there || self.is_served(&exports) {
                return self.told(name, &seen, is_there.then_some(())).is_some();
            }
        }
    }

    async fn list(&self, listings: Sender<ListEntry>) {
        self.see_while_served().1.list(listings).await;
    }
}
