//! What a client sees, where the audit is told when it asks for what it may not open.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::access::Reason;
use crate::nbd::{Exports, Listing};

/// What was kept from a client last, and why.
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

/// Is told the name of an export that was kept from a client, and why.
pub(super) type Tell = Box<dyn Fn(&str, &Reason) + Send + Sync>;

/// Passes everything on. While a client asks for one export, what is noted is what it asked for;
/// while it lists them, nobody wants to know.
pub(super) struct Watched<E> {
    pub(super) seen: E,
    pub(super) denials: Denials,
    pub(super) tell: Tell,
}

impl<E> fmt::Debug for Watched<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("denials", &self.denials).finish_non_exhaustive()
    }
}

impl<E> Watched<E> {
    async fn watch<T>(&self, asked: impl Future<Output = Option<T>>) -> Option<T> {
        self.denials.take();
        let found = asked.await;
        if found.is_none()
            && let Some((export, why)) = self.denials.take()
        {
            (self.tell)(&export, &why);
        }
        found
    }
}

impl<E: Exports> Exports for Watched<E> {
    type Export = E::Export;

    async fn find(&self, name: &[u8]) -> Option<Arc<Self::Export>> {
        self.watch(self.seen.find(name)).await
    }

    async fn find_with_contexts(&self, name: &[u8]) -> Option<Arc<Self::Export>> {
        self.watch(self.seen.find_with_contexts(name)).await
    }

    async fn list(&self) -> Vec<Listing> {
        self.seen.list().await
    }
}
