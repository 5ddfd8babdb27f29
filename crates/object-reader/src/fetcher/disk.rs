//! Use of the disk cache: chunks that are read from disk instead of the store, and objects that are
//! opened in the version that they had.
//!
//! Chunks are stored under the identity of the object, whoever has fetched them. A reader with a
//! verifier checks them as if they came from the store; those that don't match are removed from the
//! disk and fetched.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::call::Call;
use super::error::FetchError;
use super::fetch::Landing;
use super::flights::{Fetch, FlightsGuard};
use super::object_state::ObjectState;
use super::plan::{CHUNK_SIZE, chunks_of};
use super::view::View;
use super::{Fetcher, OPENED_SUFFIX};
use crate::disk_cache::{DiskCache, DiskKey};
use crate::object::{Object, Priority};
use crate::store::{ListedObject, Store};

/// Time after which a read of the disk is given up in favor of the store.
pub(super) const DISK_TIMEOUT: Duration = Duration::from_secs(5);

impl View {
    /// Returns true if a chunk is on disk.
    pub(super) fn is_on_disk(&self, number: u64) -> bool {
        self.disk(number).is_some_and(|(disk, key)| disk.contains(&key))
    }

    /// Starts reads of those chunks that are on disk and not in flight.
    pub(super) fn start_from_disk(
        self: &Arc<Self>,
        flights: &mut FlightsGuard<'_>,
        chunks: impl Iterator<Item = u64>,
        priority: Priority,
    ) {
        for number in chunks {
            let Some((disk, key)) = self.disk(number) else { return };
            if flights.contains(number) {
                continue;
            }
            if !disk.contains(&key) {
                disk.count_miss();
                continue;
            }
            let spawn = |fetch: Arc<Fetch>| -> AbortHandle {
                let fetching = Arc::clone(self).fetch_from_disk(fetch);
                self.object.dispatcher.runtime.spawn(fetching).abort_handle()
            };
            flights.add(number..number + 1, true, Call::new(priority), spawn);
        }
    }

    /// Stores a chunk on disk.
    pub(super) fn store_on_disk(&self, number: u64, bytes: &Bytes, is_sequential: bool) {
        if let Some((disk, key)) = self.disk(number) {
            disk.insert(key, bytes.clone(), is_sequential);
        }
    }

    /// Reads a chunk from disk, or else from the store, and passes it to its waiters.
    async fn fetch_from_disk(self: Arc<Self>, fetch: Arc<Fetch>) {
        let _landing = Landing { flights: &self.flights, fetch: &fetch };
        let number = fetch.chunks.start;
        let fetch_and_land = async {
            if let Some(bytes) = self.read_from_disk(number, fetch.call.initial_priority).await {
                self.flights.land(&fetch, number, &Ok(bytes));
            } else if let Err(error) = self.object.check_usable() {
                self.flights.land(&fetch, number, &Err(error));
            } else {
                self.fetch_and_land(&fetch).await;
            }
        };
        self.object.fetcher.shutdown.run_until_cancelled(fetch_and_land).await;
    }

    async fn read_from_disk(&self, number: u64, priority: Priority) -> Option<Bytes> {
        let (disk, key) = self.disk(number)?;
        let start = number * CHUNK_SIZE;
        let length = CHUNK_SIZE.min(self.object.version.length.saturating_sub(start));
        let bytes = timeout(DISK_TIMEOUT, disk.read(key, length, priority)).await.ok()??;
        if self.verifier.as_ref().is_some_and(|verifier| !verifier.matches(number, &bytes)) {
            disk.reject(&key);
            return None;
        }
        self.object.fetcher.cache.insert(self.key(number), bytes.clone());
        Some(bytes)
    }

    /// Returns true if those chunks are on disk that are fetched when an object is opened.
    fn has_ends_on_disk(&self) -> bool {
        let length = self.object.version.length;
        let suffix = length.saturating_sub(OPENED_SUFFIX).next_multiple_of(CHUNK_SIZE)..length;
        length > 0 && self.is_on_disk(0) && chunks_of(&suffix).all(|number| self.is_on_disk(number))
    }

    fn disk(&self, number: u64) -> Option<(&DiskCache, DiskKey)> {
        let disk = self.object.fetcher.config.disk_cache.as_deref()?;
        Some((disk, DiskKey::new(self.object.id, number)?))
    }
}

impl Fetcher {
    /// Opens an object in the version that it had when it was last opened, without any request.
    /// `None` if there is no disk cache, or the object is unknown to it.
    ///
    /// The object is readable as far as it is on disk. Other reads are requested from the store,
    /// and fail if the object has been replaced. [`Object::is_current`] checks that.
    ///
    /// Must be called in a tokio runtime; the requests for the object run in it.
    pub fn open_known(self: &Arc<Self>, store: Arc<dyn Store>, key: &str) -> Option<Object> {
        self.known_view(&store, key).map(Object::new)
    }

    /// Opens an object like [`open_known`](Self::open_known), if the parts are on disk that
    /// [`open`](Self::open) fetches.
    pub fn open_cached(self: &Arc<Self>, store: Arc<dyn Store>, key: &str) -> Option<Object> {
        self.known_view(&store, key).filter(|view| view.has_ends_on_disk()).map(Object::new)
    }

    /// Returns true if [`open_known`](Self::open_known) would open the object.
    pub fn is_known(&self, store: &dyn Store, key: &str) -> bool {
        let disk = self.config.disk_cache.as_ref();
        disk.is_some_and(|disk| disk.known_version(store.label(), key).is_some())
    }

    /// Returns the objects that [`open_known`](Self::open_known) would open, of those whose keys
    /// consist of `prefix` and a name without a slash. Reads the disk.
    pub fn known_objects(&self, store: &dyn Store, prefix: &str) -> Vec<ListedObject> {
        let Some(disk) = &self.config.disk_cache else { return Vec::new() };
        let named = disk.known_objects(store.label()).into_iter().filter_map(|(key, version)| {
            let name = key.strip_prefix(prefix)?;
            let is_in_folder = !name.is_empty() && !name.contains('/');
            is_in_folder.then(|| ListedObject { name: name.to_owned(), version: Some(version) })
        });
        named.collect()
    }

    pub(super) fn known_view(
        self: &Arc<Self>,
        store: &Arc<dyn Store>,
        key: &str,
    ) -> Option<Arc<View>> {
        let version = self.config.disk_cache.as_ref()?.known_version(store.label(), key)?;
        let name = format!("{}/{key}", store.label()).into();
        let (dispatcher, store) = (self.dispatcher(store), Arc::clone(store));
        let state = ObjectState::new(self, dispatcher, store, key, name, version);
        Some(self.view(Arc::new(state), None, None))
    }

    /// Asks the store whether the known version is current, if its ends are on disk: then nothing
    /// else is needed to open it. Returns it also if the store can't tell. `None` if it isn't known
    /// or was replaced; `known` is cleared then.
    pub(super) async fn open_from_disk(
        &self,
        known: &mut Option<Arc<View>>,
    ) -> Option<Result<Object, FetchError>> {
        let view = known.as_ref().filter(|view| view.has_ends_on_disk())?;
        match view.object.is_current().await {
            Ok(true) => {
                self.record_version(view);
                Some(Ok(Object::new(Arc::clone(view))))
            }
            Ok(false) => {
                *known = None;
                None
            }
            Err(error @ FetchError::ShuttingDown { .. }) => Some(Err(error)),
            Err(error) if error.is_inconclusive() => Some(Ok(Object::new(Arc::clone(view)))),
            // Opening finds out what is wrong.
            Err(_) => None,
        }
    }

    /// Remembers the version of an object for the next start.
    pub(super) fn record_version(&self, view: &View) {
        if let Some(disk) = &self.config.disk_cache {
            let ObjectState { store, key, version, .. } = &*view.object;
            disk.record_version(store.label(), key, version);
        }
    }
}
