//! Decides which requests to make for the reads of objects: aligned, merged, shared, ahead of
//! sequential readers, retried and limited.
//!
//! A read looks for its chunks in the [`chunk_cache`], joins the [`flights`] of those on their way,
//! and makes a [`plan`] for the others. Each planned request is a task, which asks the store's
//! [`gate`] for a permit; the gate keeps the queue, and [`flow_control`] decides. The
//! [`dispatcher`] sends the request, hedges it and tries again.

mod active_streams;
mod call;
mod chunk_cache;
mod corrupt;
mod disk;
mod dispatcher;
mod error;
mod fetch;
mod flights;
mod flow_control;
mod gate;
mod latency;
mod memory;
mod object_state;
mod plan;
mod streams;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "these are lists of ranges")]
mod tests;
mod view;

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use nbd_telemetry::RateLimit;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

pub use error::FetchError;
pub(crate) use object_state::ObjectState;
pub(crate) use view::View;

use self::active_streams::ActiveStreams;
use self::call::Call;
use self::chunk_cache::ChunkCache;
use self::dispatcher::{Dispatcher, Target};
use self::fetch::chunk_of;
use self::memory::MemoryBudget;
use self::object_state::CHECK_TIMEOUT;
pub use self::plan::CHUNK_SIZE;
use self::plan::chunks_of;
use crate::disk_cache::DiskCache;
use crate::listing::ListedPages;
use crate::metrics::{FetcherStats, WaitStats};
use crate::object::{ChunkVerifier, Object, ObjectId, Priority};
use crate::store::{ByteRange, GetRequest, ListedObject, Response, Store, StoreError};

/// Bytes at the end of an object that are fetched when it is opened.
const OPENED_SUFFIX: u64 = 2 * CHUNK_SIZE;
/// Maximum length of small objects, in bytes.
const MAX_SMALL: u64 = 1 << 20;
/// Attempts to open an object that is being replaced.
const OPENING_ATTEMPTS: u32 = 3;
/// Maximum of the bytes to be read ahead by all streams together.
const MAX_READAHEAD: u64 = 64 << 20;

/// Parts of an object that are fetched when it is opened.
#[derive(Debug, Clone, Copy)]
enum Opening {
    /// The first chunk and the last ones.
    Ends,
    /// The beginning, which is all of a small object.
    Beginning(Priority),
}

/// Settings of a [`Fetcher`].
#[derive(Debug, Clone)]
pub struct FetcherConfig {
    /// Memory for chunks, in bytes. Up to a quarter of it, at most 64 MiB and at least 1 MiB, is
    /// for responses in flight; the rest, at least 1 MiB, for cached chunks.
    pub memory: u64,
    /// Size of the requests for random reads, in bytes. Rounded to a multiple of 256 KiB.
    pub fetch_size: u64,
    /// Longest time that a read waits. An attempt to fetch something goes on as long as the store
    /// sends data.
    pub store_timeout: Duration,
    /// Maximum number of requests in flight per store.
    pub connections: usize,
    /// Time for which a version is believed to be current after it has been checked.
    pub fresh_for: Duration,
    /// Chunks on disk, if any. No other fetcher may use it.
    pub disk_cache: Option<Arc<DiskCache>>,
}

impl Default for FetcherConfig {
    fn default() -> Self {
        Self {
            memory: 256 << 20,
            fetch_size: 1 << 20,
            store_timeout: Duration::from_secs(60),
            connections: 64,
            fresh_for: Duration::from_secs(30),
            disk_cache: None,
        }
    }
}

/// Fetches objects. A process has one, which all stores and objects share.
#[derive(Debug)]
pub struct Fetcher {
    config: FetcherConfig,
    cache: ChunkCache,
    memory: Arc<MemoryBudget>,
    active_streams: ActiveStreams,
    /// Dispatchers by label of the store.
    dispatchers: Mutex<BTreeMap<String, Arc<Dispatcher>>>,
    /// Views in use, by namespace: all readers of the same chunks share one.
    views: Mutex<HashMap<ObjectId, Weak<View>>>,
    /// Number of verifiers without identity.
    anonymous_verifiers: AtomicU64,
    waits: Mutex<WaitStats>,
    /// Rate limit for log lines about wrong bytes.
    wrong_bytes_log: RateLimit,
    shutdown: CancellationToken,
}

impl Fetcher {
    /// Creates a fetcher.
    pub fn new(mut config: FetcherConfig) -> Arc<Self> {
        let memory = MemoryBudget::new(config.memory);
        let fetch_size = config.fetch_size.div_ceil(CHUNK_SIZE) * CHUNK_SIZE;
        config.fetch_size = fetch_size.clamp(CHUNK_SIZE, memory.max_request());
        let cached = config.memory.saturating_sub(memory.bytes()).max(4 * CHUNK_SIZE);
        Arc::new(Self {
            config,
            cache: ChunkCache::new(cached),
            memory: Arc::new(memory),
            active_streams: ActiveStreams::new(),
            dispatchers: Mutex::default(),
            views: Mutex::default(),
            anonymous_verifiers: AtomicU64::new(0),
            waits: Mutex::default(),
            wrong_bytes_log: RateLimit::new(5, Duration::from_secs(10)),
            shutdown: CancellationToken::new(),
        })
    }

    /// Opens the current version of an object.
    ///
    /// Its first and last chunks, which formats keep their headers and indexes in, are fetched at
    /// the same time as its length and version, and kept in memory. Must be called in a tokio
    /// runtime; the requests for the object run in it.
    ///
    /// If the version that it had when it was last opened and those chunks are in the disk cache,
    /// the store is only asked whether that version is current. If the store is down or rejects
    /// requests, the object is opened in that version; see [`Object::is_confirmed`].
    ///
    /// # Errors
    /// Transient failures of the store are retried until [`FetcherConfig::store_timeout`]; others
    /// are returned at once.
    pub async fn open(
        self: &Arc<Self>,
        store: Arc<dyn Store>,
        key: &str,
    ) -> Result<Object, FetchError> {
        self.open_with(store, key, Opening::Ends).await
    }

    /// Opens the current version of an object that is probably small, like [`open`](Self::open), with
    /// one request for its beginning: up to [`small_object`](Self::small_object) bytes.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub async fn open_small(
        self: &Arc<Self>,
        store: Arc<dyn Store>,
        key: &str,
        priority: Priority,
    ) -> Result<Object, FetchError> {
        self.open_with(store, key, Opening::Beginning(priority)).await
    }

    /// Returns the maximum length of objects that [`open_small`](Self::open_small) fetches as a
    /// whole, in bytes.
    pub fn small_object(&self) -> u64 {
        self.config.fetch_size.min(MAX_SMALL)
    }

    async fn open_with(
        self: &Arc<Self>,
        store: Arc<dyn Store>,
        key: &str,
        opening: Opening,
    ) -> Result<Object, FetchError> {
        let mut known = self.known_view(&store, key);
        if let Some(result) = self.open_from_disk(&mut known).await {
            return result;
        }
        let timeout = match known {
            // There is something else to open.
            Some(_) => self.config.store_timeout.min(CHECK_TIMEOUT),
            None => self.config.store_timeout,
        };
        match (self.open_current(store, key, opening, timeout).await, known) {
            (Err(error @ FetchError::ShuttingDown { .. }), _) => Err(error),
            (Err(error), Some(view)) if error.is_inconclusive() => {
                view.object.note_unconfirmed(&error);
                Ok(Object::new(view))
            }
            (result, _) => result,
        }
    }

    async fn open_current(
        self: &Arc<Self>,
        store: Arc<dyn Store>,
        key: &str,
        opening: Opening,
        timeout: Duration,
    ) -> Result<Object, FetchError> {
        let name: Arc<str> = format!("{}/{key}", store.label()).into();
        let dispatcher = self.dispatcher(&store);
        let priority = match opening {
            Opening::Ends => Priority::Demand,
            Opening::Beginning(priority) => priority,
        };
        let call = Arc::new(Call::new(priority));
        let parts = async {
            match opening {
                Opening::Ends => get_ends(&dispatcher, &*store, key, &call).await,
                Opening::Beginning(_) => {
                    let length = self.small_object();
                    let range = ByteRange::Bounded(0..length);
                    let request = GetRequest { range, version: None, bypass_caches: false };
                    let target = Target {
                        store: &*store,
                        key,
                        request: &request,
                        size: length,
                        receiver: None,
                    };
                    let (head, _memory) = dispatcher.get(target, &call, || true).await?;
                    Ok((head, None))
                }
            }
        };
        let parts = tokio::time::timeout(timeout, parts);
        let (head, tail) = match self.shutdown.run_until_cancelled(parts).await {
            Some(Ok(ends)) => ends,
            Some(Err(_)) => Err(dispatcher.timeout_error(&call, timeout)),
            None => return Err(FetchError::ShuttingDown { object: name }),
        }
        .map_err(|error| FetchError::from_store(&name, error, timeout))?;
        let version = head.version.clone();
        let state = ObjectState::new(self, dispatcher, store, key, name, version);
        let view = self.view(Arc::new(state), None, None);
        view.object.confirm();
        self.keep(&view, &head);
        tail.inspect(|tail| self.keep(&view, tail));
        self.record_version(&view);
        Ok(Object::new(view))
    }

    /// Lists the objects whose keys consist of `prefix` (empty, or ending in a slash) and a name
    /// without a slash. Must be called in a tokio runtime.
    ///
    /// A caller that can do without a current listing sets `is_dispensable`, and isn't kept waiting
    /// by a store that is down.
    ///
    /// # Errors
    /// Transient failures are retried until [`FetcherConfig::store_timeout`], for each page; if it
    /// is dispensable, at most for 10 s, and not while the store is known to be down. Others are
    /// returned at once.
    pub async fn list(
        &self,
        store: &Arc<dyn Store>,
        prefix: &str,
        is_dispensable: bool,
    ) -> Result<Vec<ListedObject>, FetchError> {
        let name: Arc<str> = format!("{}/{prefix}", store.label()).into();
        let dispatcher = self.dispatcher(store);
        let timeout = match is_dispensable {
            true => self.config.store_timeout.min(CHECK_TIMEOUT),
            false => self.config.store_timeout,
        };
        let list = async {
            let mut pages = ListedPages::default();
            let mut next = None;
            loop {
                let page = (prefix, next.as_deref());
                let page = dispatcher.list_page(&**store, page, timeout, !is_dispensable);
                next = pages.add(page.await?)?;
                if next.is_none() {
                    return Ok(pages.into_objects());
                }
            }
        };
        match self.shutdown.run_until_cancelled(list).await {
            Some(listed) => listed.map_err(|e| FetchError::from_store(&name, e, timeout)),
            None => Err(FetchError::ShuttingDown { object: name }),
        }
    }

    /// Ends all waits with [`FetchError::ShuttingDown`]. Chunks in memory remain readable. The disk
    /// cache begins to close; see [`DiskCache::close`].
    pub fn shutdown(&self) {
        self.shutdown.cancel();
        if let Some(disk) = &self.config.disk_cache {
            disk.start_closing();
        }
    }

    /// Returns the counters and the present state.
    pub fn stats(&self) -> FetcherStats {
        let dispatchers: Vec<_> = self.dispatchers.lock().values().cloned().collect();
        FetcherStats {
            stores: dispatchers.iter().map(|dispatcher| dispatcher.stats()).collect(),
            cache: self.cache.stats(),
            disk_cache: self.config.disk_cache.as_ref().map(|disk| disk.stats()),
            waits: *self.waits.lock(),
        }
    }

    fn dispatcher(&self, store: &Arc<dyn Store>) -> Arc<Dispatcher> {
        let mut dispatchers = self.dispatchers.lock();
        let dispatcher = dispatchers.entry(store.label().to_owned()).or_insert_with(|| {
            let memory = Arc::clone(&self.memory);
            let FetcherConfig { connections, store_timeout, .. } = self.config;
            Arc::new(Dispatcher::new(store, memory, connections, store_timeout))
        });
        dispatcher.set_store(store);
        Arc::clone(dispatcher)
    }

    /// Returns the view of an object with a verifier: the one in use, or else a new one.
    fn view(
        &self,
        object: Arc<ObjectState>,
        namespace: Option<ObjectId>,
        verifier: Option<Arc<dyn ChunkVerifier>>,
    ) -> Arc<View> {
        let namespace = namespace.unwrap_or(object.id);
        let mut views = self.views.lock();
        if let Some(view) = views.get(&namespace).and_then(Weak::upgrade)
            // A store of the same name may have other credentials.
            && Arc::ptr_eq(&view.object.store, &object.store)
        {
            return view;
        }
        views.retain(|_, view| view.strong_count() > 0);
        let view = View::new(object, namespace, verifier);
        views.insert(namespace, Arc::downgrade(&view));
        view
    }

    /// Caches the whole chunks of a response.
    fn keep(&self, view: &View, response: &Response) {
        let Response { version, offset, bytes } = response;
        let end = offset + bytes.len() as u64;
        for number in chunks_of(&(*offset..end)) {
            let (start, chunk) = (number * CHUNK_SIZE, chunk_of(response, number));
            let length = CHUNK_SIZE.min(version.length.saturating_sub(start));
            if start >= *offset && chunk.len() as u64 == length {
                let bytes = Bytes::copy_from_slice(&chunk);
                view.store_on_disk(number, &bytes, false);
                self.cache.insert(view.key(number), bytes);
            }
        }
    }

    /// Returns the identity of a verifier that has none.
    fn next_anonymous_verifier(&self) -> [u8; 8] {
        self.anonymous_verifiers.fetch_add(1, Relaxed).to_le_bytes()
    }

    /// Returns the bytes to be read ahead by all streams: they must remain in memory until they are
    /// read.
    fn readahead_total(&self) -> u64 {
        (self.cache.capacity() / 3).min(MAX_READAHEAD)
    }
}

/// Fetches the first chunk of an object and, at the same time, its last ones. If only the first one
/// can be had, that is enough.
async fn get_ends(
    dispatcher: &Dispatcher,
    store: &dyn Store,
    key: &str,
    call: &Arc<Call>,
) -> Result<(Response, Option<Response>), StoreError> {
    let request = |range| GetRequest { range, version: None, bypass_caches: false };
    let first = request(ByteRange::Bounded(0..CHUNK_SIZE));
    let last = request(ByteRange::Suffix(OPENED_SUFFIX));
    let mut attempts = 1;
    loop {
        let size = CHUNK_SIZE;
        let target = Target { store, key, request: &first, size, receiver: None };
        let head = dispatcher.get(target, call, || true);
        let tail_call = Arc::new(Call::new(Priority::Demand));
        let size = OPENED_SUFFIX;
        let target = Target { store, key, request: &last, size, receiver: None };
        let tail = dispatcher.get(target, &tail_call, || false);
        let (head, tail) = tokio::join!(head, tail);
        let (head, _memory) = head?;
        match tail {
            // The object was replaced between the two.
            Ok((tail, _)) if tail.version != head.version && attempts < OPENING_ATTEMPTS => {}
            Ok((tail, _memory)) => {
                let is_same = tail.version == head.version;
                return Ok((head, is_same.then_some(tail)));
            }
            Err(_) => return Ok((head, None)),
        }
        attempts += 1;
    }
}

/// Returns a random number from 0 to 1.
fn jitter() -> f64 {
    // Each state has other keys.
    let random = RandomState::new().hash_one(0) >> 32;
    f64::from(u32::try_from(random).unwrap_or(0)) / f64::from(u32::MAX)
}
