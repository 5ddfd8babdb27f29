//! Archives in object stores and on HTTP servers.

use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nbd_telemetry::RateLimit;
use object_reader::{
    ChunkVerifier, FetchError, Fetcher, ListedObject, Object, ObjectId, ObjectUrl, Priority, Store,
    StoreConfig, StoreConfigError, StoreUrl,
};
use parking_lot::Mutex;
use tokio::runtime::{Builder, Handle};

use crate::storage::{
    Fetch, FetchPriority, FileId, GROUP_LEN, GroupHashes, Mismatch, ObjectStamp, Prefetch,
    RemoteError, RemoteSource, Stamp, Storage,
};

/// Maximum number of objects that are remembered although no archive uses them.
const MAX_REMEMBERED: usize = 1024;

/// Time for which a transient failure to list a folder isn't repeated.
const FAILED_LISTING: Duration = Duration::from_secs(1);

/// Opens archives in stores. All snapshots share its [`Fetcher`].
///
/// Requests are made in the runtime from which the first archive is opened, or else on a thread of
/// their own.
///
/// ```no_run
/// use std::sync::Arc;
/// use std::time::Duration;
///
/// use hexz_reader::{OpenOptions, RemoteArchives, Snapshot, StoreConfigs};
/// use object_reader::{Fetcher, FetcherConfig};
///
/// let fetcher = Fetcher::new(FetcherConfig::default());
/// let stores = RemoteArchives::new(fetcher, StoreConfigs::default(), Duration::from_secs(30));
/// let options = OpenOptions { remote: Some(Arc::new(stores)), ..OpenOptions::default() };
/// let snapshot = Snapshot::open("s3://golden/web.hxz".as_ref(), &options)?;
/// # Ok::<(), hexz_reader::Error>(())
/// ```
#[derive(Debug)]
pub struct RemoteArchives {
    fetcher: Arc<Fetcher>,
    fresh_for: Duration,
    configs: StoreConfigs,
    /// URLs with a query, by their paths without it.
    queries: Mutex<HashMap<PathBuf, ObjectUrl>>,
    stores: Mutex<HashMap<StoreUrl, Arc<dyn Store>>>,
    objects: Mutex<HashMap<PathBuf, Object>>,
    /// Locks of the objects that are being opened: many archives may have the same parent.
    opening: Mutex<HashMap<PathBuf, Arc<tokio::sync::Mutex<()>>>>,
    listings: Mutex<HashMap<PathBuf, Listing>>,
    /// Rate limit for log lines about folders that can't be listed.
    listing_log: RateLimit,
    /// Labels of stores about which there was a warning that they identify objects by dates.
    warned: Mutex<HashSet<String>>,
    runtime: OnceLock<Handle>,
}

/// Configurations of stores.
#[derive(Debug, Clone, Default)]
pub struct StoreConfigs {
    /// Configuration of stores that aren't in `by_url`.
    pub default: StoreConfig,
    /// Configurations by URL of the store, such as `s3://golden`.
    pub by_url: HashMap<String, StoreConfig>,
}

impl StoreConfigs {
    /// Returns the configuration for the store of `url`.
    pub fn of(&self, url: &ObjectUrl) -> &StoreConfig {
        self.by_url.get(&url.store().to_string()).unwrap_or(&self.default)
    }
}

/// Names and stamps of the objects in a folder, ordered by name.
type FolderObjects = Vec<(String, Stamp)>;

/// Result of listing a folder at one point in time.
#[derive(Debug, Clone)]
struct Listing {
    at: Instant,
    objects: Result<FolderObjects, FetchError>,
    /// Names of the objects that are known to be small.
    small: HashSet<String>,
    /// True if the store has sent it.
    is_complete: bool,
}

impl Listing {
    /// Returns true if the folder isn't listed again yet.
    fn is_fresh(&self, fresh_for: Duration) -> bool {
        let is_transient = self.objects.as_ref().is_err_and(FetchError::is_transient);
        self.at.elapsed() < if is_transient { FAILED_LISTING.min(fresh_for) } else { fresh_for }
    }
}

impl RemoteArchives {
    /// Creates a source without connecting to any store. Listings are used for `fresh_for`.
    pub fn new(fetcher: Arc<Fetcher>, configs: StoreConfigs, fresh_for: Duration) -> Self {
        Self {
            fetcher,
            fresh_for,
            configs,
            queries: Mutex::default(),
            stores: Mutex::default(),
            objects: Mutex::default(),
            opening: Mutex::default(),
            listings: Mutex::default(),
            listing_log: RateLimit::new(3, Duration::from_secs(60)),
            warned: Mutex::default(),
            runtime: OnceLock::new(),
        }
    }

    /// Remembers the query of a URL, such as a signature, for requests to its object and to objects
    /// beside it. `path` is the URL without its query, by which the archive is opened and logged.
    ///
    /// The query replaces an earlier one of the same path, also for archives that are open.
    pub fn set_query(&self, path: PathBuf, url: ObjectUrl) {
        let mut queries = self.queries.lock();
        // The first query identifies the store.
        let known = queries.entry(path).or_insert_with(|| url.clone());
        if let (Some(query), Some(store)) =
            (url.store().query(), self.stores.lock().get(known.store()))
        {
            store.replace_query(query);
        }
    }

    /// Opens the store of a URL. Sends no requests, but reads files with credentials and CAs, which
    /// a sandbox may not permit later.
    ///
    /// # Errors
    /// The configuration can't be used.
    pub fn open_store(&self, url: &ObjectUrl) -> Result<Arc<dyn Store>, StoreConfigError> {
        let mut stores = self.stores.lock();
        if let Some(store) = stores.get(url.store()) {
            return Ok(Arc::clone(store));
        }
        let store = self.configs.of(url).open(url.store())?;
        stores.insert(url.store().clone(), Arc::clone(&store));
        Ok(store)
    }

    /// Ends all waits for stores. Reads fail from now on, except of what is in memory.
    pub fn shut_down(&self) {
        self.fetcher.shutdown();
    }

    /// Returns the fetcher, for its statistics.
    pub fn fetcher(&self) -> &Arc<Fetcher> {
        &self.fetcher
    }

    /// Returns the URL of a path, with the query of the archive or folder beside which it is.
    fn url(&self, path: &Path) -> io::Result<ObjectUrl> {
        let queries = self.queries.lock();
        if let Some(url) = queries.get(path) {
            return Ok(url.clone());
        }
        let folder = |(known, url): &(&PathBuf, &ObjectUrl)| match url.is_folder() {
            true => Some(known.as_path()) == path.parent(),
            false => known.parent() == path.parent(),
        };
        // The query of a folder is meant for all objects in it.
        let beside = queries.iter().filter(folder).max_by_key(|(_, url)| url.is_folder());
        if let (Some((_, url)), Some(name)) = (beside, path.file_name().and_then(|it| it.to_str()))
        {
            return url.with_name(name).map_err(invalid);
        }
        parse(path.to_str().unwrap_or_default())
    }

    fn runtime(&self) -> io::Result<&Handle> {
        if let Some(runtime) = self.runtime.get() {
            return Ok(runtime);
        }
        let runtime = Handle::try_current().or_else(|_| start_runtime())?;
        Ok(self.runtime.get_or_init(|| runtime))
    }

    fn remember(&self, path: &Path, object: &Object) {
        let mut objects = self.objects.lock();
        if objects.len() >= MAX_REMEMBERED {
            objects.clear();
        }
        objects.insert(path.to_owned(), object.clone());
    }

    /// Opens an object once for all who want it at the same time.
    async fn open_shared(
        &self,
        path: &Path,
        url: &ObjectUrl,
        small: Option<Priority>,
    ) -> io::Result<Object> {
        let lock = Arc::clone(self.opening.lock().entry(path.to_owned()).or_default());
        let held = lock.lock().await;
        let opened = self.open_object(path, url, small).await;
        if let Ok(object) = &opened {
            self.remember(path, object);
        }
        drop(held);
        let mut opening = self.opening.lock();
        // Nobody else waits: they would have a clone.
        if Arc::strong_count(&lock) <= 2 {
            opening.remove(path);
        }
        opened
    }

    /// Returns the current version of an object, as far as the store can tell. One that is probably
    /// small is requested with the given priority.
    async fn open_object(
        &self,
        path: &Path,
        url: &ObjectUrl,
        small: Option<Priority>,
    ) -> io::Result<Object> {
        let known = self.objects.lock().get(path).cloned();
        if let Some(object) = known {
            match object.is_current().await {
                Ok(true) => return Ok(object),
                // The known version is readable as far as it is cached.
                Err(error) if error.is_inconclusive() => return Ok(object),
                Ok(false) | Err(_) => {}
            }
        }
        let store = self.open_store(url).map_err(invalid)?;
        let label = store.label().to_owned();
        let opened = match small {
            Some(priority) => self.fetcher.open_small(store, url.key(), priority).await,
            None => self.fetcher.open(store, url.key()).await,
        };
        let object = opened.map_err(read_error)?;
        self.warn_of_dates(label, &object);
        Ok(object)
    }

    fn open_storage(&self, path: &Path, small: Option<Priority>) -> io::Result<Arc<dyn Storage>> {
        let (url, runtime) = (self.url(path)?, self.runtime()?);
        let object = runtime.block_on(self.open_shared(path, &url, small))?;
        Ok(ObjectStorage::of(object, path, runtime))
    }

    /// Returns what the last listing of the object's folder says about it: whether it is small, or
    /// `None` if it didn't exist. `Some(false)` without a listing that is believed.
    fn listed(&self, path: &Path) -> Option<bool> {
        let listings = self.listings.lock();
        let listing = path.parent().and_then(|folder| listings.get(folder));
        let Some(listing) = listing.filter(|it| it.is_complete && it.is_fresh(self.fresh_for))
        else {
            return Some(false);
        };
        let (Ok(objects), Some(name)) = (&listing.objects, path.file_name()) else {
            return Some(false);
        };
        let is_listed = objects.iter().any(|(listed, _)| name == listed.as_str());
        is_listed.then(|| name.to_str().is_some_and(|name| listing.small.contains(name)))
    }

    /// Warns once for each store whose objects have no entity tags.
    fn warn_of_dates(&self, store: String, object: &Object) {
        let version = object.version();
        if version.etag.is_some() || version.version_id.is_some() {
            return;
        }
        if self.warned.lock().insert(store.clone()) {
            tracing::warn!(
                reason = "store_identity",
                store,
                "{store} identifies objects by date and length only: a replacement within the same \
                 second isn't noticed; let it send strong ETags, or give replaced archives new names"
            );
        }
    }
}

impl RemoteSource for RemoteArchives {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn Storage>> {
        let is_small = self.listed(path) == Some(true);
        self.open_storage(path, is_small.then_some(Priority::Demand))
    }

    fn open_known(&self, path: &Path) -> Option<Arc<dyn Storage>> {
        if self.objects.lock().contains_key(path) {
            return None;
        }
        let (url, runtime) = (self.url(path).ok()?, self.runtime().ok()?);
        let store = self.open_store(&url).ok()?;
        let object = runtime.block_on(async { self.fetcher.open_cached(store, url.key()) })?;
        self.remember(path, &object);
        Some(ObjectStorage::of(object, path, runtime))
    }

    fn open_side_file(&self, path: &Path, priority: FetchPriority) -> io::Result<Arc<dyn Storage>> {
        // If the listing leaves it out, there is less to read ahead. Nothing else may depend on that.
        if priority == FetchPriority::Ahead && self.listed(path).is_none() {
            return Err(io::ErrorKind::NotFound.into());
        }
        let priority = match priority {
            FetchPriority::Demand => Priority::Demand,
            FetchPriority::Ahead => Priority::Background,
        };
        self.open_storage(path, Some(priority))
    }

    fn stamp(&self, path: &Path) -> Option<Stamp> {
        let version = self.objects.lock().get(path).map(|object| *object.id().as_bytes());
        Some(Stamp::Object(ObjectStamp { url: hash_of(path), version }))
    }

    fn is_known(&self, path: &Path) -> bool {
        if self.objects.lock().contains_key(path) {
            return true;
        }
        let Ok(url) = self.url(path) else { return false };
        let store = self.open_store(&url);
        store.is_ok_and(|store| self.fetcher.is_known(&*store, url.key()))
    }

    fn list(&self, folder: &Path) -> io::Result<FolderObjects> {
        let before = self.listings.lock().get(folder).cloned();
        if let Some(listing) = before.as_ref().filter(|it| it.is_fresh(self.fresh_for)) {
            return listing.objects.clone().map_err(read_error);
        }
        let mut text = folder.to_str().unwrap_or_default().to_owned();
        if !text.ends_with('/') {
            text.push('/');
        }
        let url = self.queries.lock().get(folder).cloned().map_or_else(|| parse(&text), Ok)?;
        let store = self.open_store(&url).map_err(invalid)?;
        let at = Instant::now();
        // Only the first caller waits for a store that is down.
        let listed = self.fetcher.list(&store, url.key(), before.is_some());
        let listing = match self.runtime()?.block_on(listed) {
            Ok(listed) => {
                let is_small = |it: &&ListedObject| {
                    it.version.as_ref().is_some_and(|it| it.length <= self.fetcher.small_object())
                };
                let small = listed.iter().filter(is_small).map(|it| it.name.clone()).collect();
                let objects = Ok(stamped(&*store, folder, listed));
                Listing { at, objects, small, is_complete: true }
            }
            Err(error) => {
                let earlier = self.earlier_listing(&*store, (folder, url.key()), before, &error);
                let objects = earlier.ok_or(error);
                Listing { at, objects, small: HashSet::new(), is_complete: false }
            }
        };
        self.listings.lock().insert(folder.to_owned(), listing.clone());
        listing.objects.map_err(read_error)
    }

    fn is_listed(&self, path: &Path) -> Option<bool> {
        let (folder, name) = (path.parent()?, path.file_name()?.to_str()?);
        let listings = self.listings.lock();
        let listing = listings.get(folder)?;
        let objects = listing.objects.as_ref().ok()?;
        let is_believed = listing.is_complete && listing.is_fresh(self.fresh_for);
        is_believed.then(|| objects.binary_search_by(|(it, _)| it.as_str().cmp(name)).is_ok())
    }
}

impl RemoteArchives {
    /// Returns what is known of a folder that can't be listed: the previous listing, or else the
    /// objects in the disk cache. `None` if that is nothing.
    fn earlier_listing(
        &self,
        store: &dyn Store,
        (folder, prefix): (&Path, &str),
        before: Option<Listing>,
        error: &FetchError,
    ) -> Option<FolderObjects> {
        if !error.is_inconclusive() {
            return None;
        }
        let (earlier, source) = match before.map(|listing| listing.objects) {
            Some(Ok(objects)) => (objects, "the previous listing"),
            _ => {
                let known = self.fetcher.known_objects(store, prefix);
                (stamped(store, folder, known), "what is in the disk cache")
            }
        };
        if earlier.is_empty() {
            return None;
        }
        if let Some(held_back) = self.listing_log.allow() {
            tracing::warn!(
                reason = "folder_unconfirmed",
                cause = error.label(),
                held_back = held_back.field(),
                "{error}; using {source} until the folder can be listed"
            );
        }
        Some(earlier)
    }
}

/// Returns the names and stamps of the objects in a folder.
fn stamped(store: &dyn Store, folder: &Path, objects: Vec<ListedObject>) -> FolderObjects {
    let stamp = |ListedObject { name, version }: ListedObject| {
        let version = version.map(|it| *ObjectId::new(store, &name, &it).as_bytes());
        let url = hash_of(&folder.join(&name));
        (name, Stamp::Object(ObjectStamp { url, version }))
    };
    let mut objects: FolderObjects = objects.into_iter().map(stamp).collect();
    objects.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
    objects
}

/// An archive in a store.
#[derive(Debug)]
struct ObjectStorage {
    object: Object,
    url_hash: [u8; 16],
    runtime: Handle,
    hashes: Option<Arc<dyn GroupHashes>>,
}

impl ObjectStorage {
    fn of(object: Object, path: &Path, runtime: &Handle) -> Arc<dyn Storage> {
        let (url_hash, runtime) = (hash_of(path), runtime.clone());
        Arc::new(Self { object, url_hash, runtime, hashes: None })
    }
}

impl Storage for ObjectStorage {
    fn length(&self) -> u64 {
        self.object.length()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if self.object.try_read(offset, buffer) {
            return Ok(());
        }
        let end = offset.saturating_add(buffer.len() as u64);
        if end > self.length() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let read = self.object.read(offset..end, Priority::Demand);
        let bytes = self.runtime.block_on(read).map_err(read_error)?;
        buffer.copy_from_slice(&bytes);
        Ok(())
    }

    fn try_read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<bool> {
        Ok(self.object.try_read(offset, buffer))
    }

    /// While the store can't tell, the version that is open counts as current.
    fn is_current(&self) -> bool {
        let current = self.runtime.block_on(self.object.is_current());
        current.unwrap_or_else(|error| error.is_inconclusive())
    }

    fn stamp(&self) -> Option<Stamp> {
        let version = Some(*self.object.id().as_bytes());
        Some(Stamp::Object(ObjectStamp { url: self.url_hash, version }))
    }

    fn verified_blake3(&self) -> Option<[u8; 32]> {
        self.hashes.as_ref().map(|hashes| hashes.root())
    }

    fn file_id(&self) -> Option<FileId> {
        Some(FileId::Object(self.url_hash))
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn fetch(&self, range: Range<u64>, priority: FetchPriority) -> Option<Fetch> {
        let object = self.object.clone();
        let priority = match priority {
            FetchPriority::Demand => Priority::Demand,
            FetchPriority::Ahead => Priority::Ahead,
        };
        Some(Box::pin(async move { object.read(range, priority).await.map_err(read_error) }))
    }

    fn is_in_memory(&self, range: Range<u64>) -> bool {
        self.object.is_in_memory(range)
    }

    fn prefetch(&self, range: Range<u64>) -> Option<Prefetch> {
        let object = self.object.clone();
        Some(Box::pin(async move { object.prefetch(range).await.map_err(read_error) }))
    }

    fn verified_by(&self, hashes: Arc<dyn GroupHashes>) -> Option<Arc<dyn Storage>> {
        let verifier = Arc::new(GroupVerifier(Arc::clone(&hashes)));
        Some(Arc::new(Self {
            object: self.object.verified_by(verifier),
            url_hash: self.url_hash,
            runtime: self.runtime.clone(),
            hashes: Some(hashes),
        }))
    }
}

/// Verifies chunks, which are as long as groups.
#[derive(Debug)]
struct GroupVerifier(Arc<dyn GroupHashes>);

impl ChunkVerifier for GroupVerifier {
    fn matches(&self, chunk: u64, bytes: &[u8]) -> bool {
        self.0.matches(chunk, bytes)
    }

    fn identity(&self) -> Option<[u8; 32]> {
        Some(self.0.root())
    }
}

/// Starts a thread that makes the requests, for programs without a runtime.
fn start_runtime() -> io::Result<Handle> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    let run = move || runtime.block_on(std::future::pending::<()>());
    std::thread::Builder::new().name("fetch".to_owned()).spawn(run)?;
    Ok(handle)
}

fn parse(url: &str) -> io::Result<ObjectUrl> {
    url.parse().map_err(invalid)
}

fn invalid(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

/// Returns the identity of an object's URL.
fn hash_of(path: &Path) -> [u8; 16] {
    let hash = blake3::hash(path.as_os_str().as_encoded_bytes());
    hash.as_bytes().first_chunk().copied().unwrap_or_default()
}

fn read_error(error: FetchError) -> io::Error {
    if let FetchError::Corrupt { offset, .. } = error {
        return Mismatch { start: offset, length: GROUP_LEN }.into();
    }
    let (kind, label) = match &error {
        FetchError::Gone { .. } => (io::ErrorKind::NotFound, "store_not_found"),
        FetchError::Denied { .. } => (io::ErrorKind::PermissionDenied, "store_denied"),
        FetchError::TimedOut { .. } => (io::ErrorKind::TimedOut, "store_timed_out"),
        FetchError::Down { .. } => (io::ErrorKind::NotConnected, "store_down"),
        FetchError::Throttled { .. } => (io::ErrorKind::Other, "store_throttled"),
        FetchError::Changed { .. } => (io::ErrorKind::Other, "store_changed"),
        FetchError::CredentialsExpired { .. } => (io::ErrorKind::Other, "store_credentials"),
        FetchError::ClockSkew { .. } => (io::ErrorKind::Other, "store_clock_skew"),
        FetchError::OutOfRange { .. } => (io::ErrorKind::UnexpectedEof, "store_unsupported"),
        FetchError::ShuttingDown { .. } => (io::ErrorKind::Other, "shutting_down"),
        _ => (io::ErrorKind::Other, "store_unsupported"),
    };
    // Errors about an archive name it already.
    let text = error.to_string();
    let message = text.strip_prefix(error.object()).and_then(|rest| rest.strip_prefix(": "));
    let message = message.unwrap_or(&text).to_owned();
    let (is_transient, is_outage) = (error.is_transient(), error.is_outage());
    io::Error::new(kind, RemoteError { label, message, is_transient, is_outage })
}
