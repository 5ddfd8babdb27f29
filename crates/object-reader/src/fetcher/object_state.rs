//! What all views of an object share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;

use super::dispatcher::Dispatcher;
use super::error::FetchError;
use super::{Fetcher, FetcherConfig};
use crate::object::ObjectId;
use crate::store::{Store, StoreError, StoreErrorKind, Version};

/// Longest time that a check for a new version takes.
pub(super) const CHECK_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for which a failed check isn't repeated.
const FAILED_CHECK: Duration = Duration::from_secs(1);

/// One version of an object.
#[derive(Debug)]
pub(crate) struct ObjectState {
    pub(crate) fetcher: Arc<Fetcher>,
    pub(crate) dispatcher: Arc<Dispatcher>,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) key: String,
    pub(crate) version: Version,
    pub(crate) id: ObjectId,
    pub(crate) name: Arc<str>,
    /// True if the store has this version no longer.
    is_replaced: AtomicBool,
    /// True if the store has returned or confirmed this version.
    is_confirmed: AtomicBool,
    /// True if the log says that the store hasn't done that.
    is_noted: AtomicBool,
    /// Time and result of the last check for a new version, if there was one. Who checks holds the
    /// lock.
    checked: tokio::sync::Mutex<Option<(Instant, Result<bool, FetchError>)>>,
}

impl ObjectState {
    /// Describes a version that the store hasn't confirmed.
    pub(crate) fn new(
        fetcher: &Arc<Fetcher>,
        dispatcher: Arc<Dispatcher>,
        store: Arc<dyn Store>,
        key: &str,
        name: Arc<str>,
        version: Version,
    ) -> Self {
        Self {
            fetcher: Arc::clone(fetcher),
            dispatcher,
            key: key.to_owned(),
            id: ObjectId::new(&*store, key, &version),
            store,
            version,
            name,
            is_replaced: AtomicBool::new(false),
            is_confirmed: AtomicBool::new(false),
            is_noted: AtomicBool::new(false),
            checked: tokio::sync::Mutex::default(),
        }
    }

    /// Returns the configuration of the fetcher.
    pub(crate) fn config(&self) -> &FetcherConfig {
        &self.fetcher.config
    }

    /// Returns an error if bytes of this version can't be requested any more.
    pub(crate) fn check_usable(&self) -> Result<(), FetchError> {
        if self.fetcher.shutdown.is_cancelled() {
            return Err(self.shutting_down());
        }
        if self.is_replaced.load(Relaxed) {
            return Err(FetchError::Changed { object: Arc::clone(&self.name) });
        }
        Ok(())
    }

    /// Returns the error of a read that was ended by a shutdown.
    pub(crate) fn shutting_down(&self) -> FetchError {
        FetchError::ShuttingDown { object: Arc::clone(&self.name) }
    }

    /// Takes note of a failed request for this version.
    pub(crate) fn failed(&self, error: StoreError) -> FetchError {
        if error.kind == StoreErrorKind::Changed && !self.is_replaced.swap(true, Relaxed) {
            tracing::warn!(reason = "object_changed", "{}: replaced in the store", self.name);
        }
        FetchError::from_store(&self.name, error, self.config().store_timeout)
    }

    /// Takes note that the store has returned this version.
    pub(crate) fn confirm(&self) {
        self.is_replaced.store(false, Relaxed);
        self.is_confirmed.store(true, Relaxed);
        // A check in progress has a result of its own.
        if let Ok(mut checked) = self.checked.try_lock() {
            *checked = Some((Instant::now(), Ok(true)));
        }
    }

    /// Returns true if the store has returned or confirmed this version.
    pub(crate) fn is_confirmed(&self) -> bool {
        self.is_confirmed.load(Relaxed)
    }

    /// Logs, once, that this version was opened although the store can't confirm it.
    pub(crate) fn note_unconfirmed(&self, error: &FetchError) {
        let is_in_doubt = error.is_inconclusive() && !self.is_confirmed();
        if is_in_doubt && !self.is_noted.swap(true, Relaxed) {
            tracing::warn!(
                reason = "object_unconfirmed",
                cause = error.label(),
                "{error}; using the version in the disk cache until the store answers"
            );
        }
    }

    /// Returns true if this is the current version, as far as known.
    pub(crate) async fn is_current(&self) -> Result<bool, FetchError> {
        let mut checked = self.checked.lock().await;
        if self.is_replaced.load(Relaxed) {
            return Ok(false);
        }
        if let Some((time, result)) = &*checked {
            let validity = match result {
                Ok(_) => self.config().fresh_for,
                Err(_) => FAILED_CHECK,
            };
            if time.elapsed() < validity {
                return result.clone();
            }
        }
        let timeout = self.config().store_timeout.min(CHECK_TIMEOUT);
        let check = self.dispatcher.is_current(&*self.store, &self.key, &self.version, timeout);
        let Some(result) = self.fetcher.shutdown.run_until_cancelled(check).await else {
            return Err(self.shutting_down());
        };
        let result = result.map_err(|e| FetchError::from_store(&self.name, e, timeout));
        match &result {
            Ok(true) => self.is_confirmed.store(true, Relaxed),
            Ok(false) => {}
            Err(error) => self.note_unconfirmed(error),
        }
        *checked = Some((Instant::now(), result.clone()));
        result
    }
}
