//! Creates the source of archives in object stores from the options.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use hexz_reader::storage::{RemoteSource, is_url};
use hexz_reader::{RemoteArchives, StoreConfigs};
use nbd_gateway::tls::{TlsFileProblem, check_not_exposed};
use nbd_sandbox::SandboxPlan;
use nbd_telemetry::escape;
use object_reader::{
    CredentialSource, Dial, DirectDialer, DiskCache, DiskCacheConfig, DiskCacheError, Fetcher,
    FetcherConfig, ObjectUrl, ProxyChoice, S3Style, Secret, StoreConfig, StoreConfigError,
    StoreUrl, UrlError,
};

use super::dialer::{self, ProcessDialer};
use crate::cli::{
    DiskCacheOptions, SecretUrls, ServeOptions, StoreOptions, StoreSettings, StoreStyle,
};
use crate::exit_status::{self, ExitStatus, Failure};

/// Memory of an offline command for parts of remote archives, in bytes.
pub(crate) const OFFLINE_MEMORY: u64 = 128 << 20;

/// Time that an offline command tries to make the first connection to a store.
const CONNECT_PATIENCE: Duration = Duration::from_secs(3);

/// Time for writing what is queued for the disk cache at the end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Reason for which a store can't be used as configured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RemoteError {
    /// The URL is without its query.
    #[error("invalid URL {url}: {error}")]
    Url { url: String, error: UrlError },
    #[error("can't use the store {store}: {}", escape::without_secrets(&.error.to_string()))]
    Store { store: String, error: StoreConfigError },
    #[error("can't use the credentials: {}: {problem}", escape::path(.path))]
    Secret { path: PathBuf, problem: TlsFileProblem },
    #[error("can't start the dialer, which connects to stores: {0}")]
    DialerStart(io::Error),
    #[error("can't use the disk cache: {0}")]
    DiskCache(DiskCacheError),
}

impl ExitStatus for RemoteError {
    fn exit_status(&self) -> u8 {
        match self {
            Self::Url { .. } | Self::Store { .. } | Self::Secret { .. } => exit_status::USAGE,
            Self::DiskCache(_) => exit_status::FAILED,
            Self::DialerStart(_) => exit_status::SANDBOX,
        }
    }

    fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Store { .. } => Some("the options --store-* configure stores"),
            Self::Url { .. } | Self::Secret { .. } | Self::DialerStart(_) | Self::DiskCache(_) => {
                None
            }
        }
    }

    fn label(&self) -> &'static str {
        match self {
            Self::Url { .. } => "invalid_url",
            Self::Store { .. } => "invalid_store",
            Self::Secret { problem, .. } => problem.label(),
            Self::DialerStart(_) => "dialer_start",
            Self::DiskCache(error) => error.label(),
        }
    }
}

/// Stores to which connections can be made through a dialer.
#[derive(Debug)]
pub(super) struct ConnectedStores {
    archives: Arc<RemoteArchives>,
    dialer: Arc<ProcessDialer>,
    /// Files with credentials, which are read again.
    files: Vec<PathBuf>,
    disk_cache: Option<Arc<DiskCache>>,
}

impl ConnectedStores {
    /// Returns the disk cache, which has to be closed at the end.
    pub(super) fn disk_cache(&self) -> Option<Arc<DiskCache>> {
        self.disk_cache.clone()
    }

    /// Ends all waits for stores when the result is dropped, so that no thread waits in a runtime
    /// that ends.
    pub(super) fn shut_down_on_drop(&self) -> impl Drop + use<> {
        ShutDownOnDrop(Arc::clone(&self.archives))
    }

    /// Returns the source of the archives.
    pub(super) fn archives(&self) -> Arc<RemoteArchives> {
        Arc::clone(&self.archives)
    }

    /// Returns a function that returns what prevents connections until a restart, if something does.
    pub(super) fn fault(&self) -> impl Fn() -> Option<&'static str> + use<> {
        let dialer = Arc::clone(&self.dialer);
        move || {
            let fault = "dialer_gone: the process that connects to stores has ended";
            dialer.has_ended().then_some(fault)
        }
    }

    /// Returns the plan of the sandbox with what the stores need.
    pub(super) fn permit(&self, mut plan: SandboxPlan) -> SandboxPlan {
        plan.receives_descriptors_on = Some(self.dialer.as_raw_fd());
        plan.writes_open_files = self.disk_cache.is_some();
        plan.reloaded.extend(self.files.iter().filter(|path| path.is_file()).cloned());
        plan
    }
}

struct ShutDownOnDrop(Arc<RemoteArchives>);

impl Drop for ShutDownOnDrop {
    fn drop(&mut self) {
        self.0.shut_down();
    }
}

/// Starts a dialer for the stores of the archives to serve, and opens the stores. Returns `None` if
/// no path is a URL.
pub(super) fn connect(serve: &ServeOptions) -> Result<Option<ConnectedStores>, Failure> {
    let traces = serve.traces.folder();
    let urls = serve.changeable.snapshots.urls();
    // Without a remote archive, there is nothing to prefetch.
    let traces = urls.clone().next().and(traces.as_deref()).filter(|path| is_url(path));
    let urls = urls.chain(traces);
    let Some(mut stores) = Stores::new(&serve.stores, urls, serve.memory().fetched)? else {
        return Ok(None);
    };
    let disk_cache = open_disk_cache(&serve.disk_cache)?;
    if let Some(cache) = &disk_cache {
        stores.use_disk_cache(cache);
    }
    let (mode, user) = (serve.sandbox.mode(), serve.sandbox.user.as_ref());
    let dialer =
        dialer::start(&stores.addresses()?, mode, user).map_err(RemoteError::DialerStart)?;
    let files = stores.credential_files()?;
    let archives = Arc::new(stores.open(&(Arc::clone(&dialer) as Arc<dyn Dial>))?);
    Ok(Some(ConnectedStores { archives, dialer, files, disk_cache }))
}

fn open_disk_cache(options: &DiskCacheOptions) -> Result<Option<Arc<DiskCache>>, RemoteError> {
    let Some(folder) = options.disk_cache.clone() else { return Ok(None) };
    let config = DiskCacheConfig { folder, size: options.disk_cache_size.as_u64() };
    DiskCache::open(&config).map(Some).map_err(RemoteError::DiskCache)
}

/// Writes what is queued for the disk cache. A disk that hangs must not keep the process alive.
pub(super) fn close_disk_cache(cache: Arc<DiskCache>) {
    let (done, closed) = mpsc::channel::<()>();
    let close = move || {
        cache.close();
        drop(done);
    };
    let started = thread::Builder::new().name("disk-cache".to_owned()).spawn(close).is_ok();
    if started && closed.recv_timeout(CLOSE_TIMEOUT) == Err(RecvTimeoutError::Timeout) {
        tracing::warn!(reason = "disk_cache_slow", "the disk cache couldn't be written in time");
    }
}

/// Returns the source of archives for a process that connects to stores itself. `None` if there are
/// no URLs. `memory` is for parts of archives, in bytes.
pub(crate) fn connect_directly<'a>(
    options: &'a StoreOptions,
    urls: impl IntoIterator<Item = &'a Path>,
    memory: u64,
) -> Result<Option<Arc<dyn RemoteSource>>, RemoteError> {
    let Some(mut stores) = Stores::new(options, urls, memory)? else { return Ok(None) };
    stores.expect_to_connect();
    let dialer: Arc<dyn Dial> = Arc::new(DirectDialer);
    Ok(Some(Arc::new(stores.open(&dialer)?)))
}

/// A source of archives, and the disk cache in which it keeps what it fetches.
pub(crate) type CachedArchives = (Arc<dyn RemoteSource>, Arc<DiskCache>);

/// Returns the source of archives for a process that connects to stores itself, to fill a disk
/// cache. `None` if there are no URLs, or no disk cache.
pub(crate) fn connect_for_warming<'a>(
    options: &'a StoreOptions,
    urls: impl IntoIterator<Item = &'a PathBuf>,
    disk_cache: &DiskCacheOptions,
) -> Result<Option<CachedArchives>, RemoteError> {
    let urls = urls.into_iter().map(PathBuf::as_path);
    let Some(mut stores) = Stores::new(options, urls, OFFLINE_MEMORY)? else { return Ok(None) };
    let Some(cache) = open_disk_cache(disk_cache)? else { return Ok(None) };
    stores.use_disk_cache(&cache);
    stores.expect_to_connect();
    let dialer: Arc<dyn Dial> = Arc::new(DirectDialer);
    Ok(Some((Arc::new(stores.open(&dialer)?), cache)))
}

/// The stores that the options name, with their configurations.
#[derive(Debug)]
struct Stores {
    urls: Vec<ObjectUrl>,
    /// URLs with a query.
    secret: SecretUrls,
    fetcher: FetcherConfig,
    configs: StoreConfigs,
}

impl Stores {
    /// Checks the URLs. Returns `None` if there are none. `memory` is for parts of archives, in
    /// bytes.
    fn new<'a>(
        options: &'a StoreOptions,
        urls: impl IntoIterator<Item = &'a Path>,
        memory: u64,
    ) -> Result<Option<Self>, RemoteError> {
        let StoreOptions { tables, secret_urls, .. } = options;
        let texts = urls.into_iter().filter_map(Path::to_str).chain(secret_urls.iter());
        let urls: Vec<ObjectUrl> = texts.map(parse).collect::<Result<_, _>>()?;
        if urls.is_empty() {
            return Ok(None);
        }
        let by_url = tables.iter().map(|(url, settings)| {
            // The store of a folder's URL is the bucket.
            let store = parse(&format!("{}/", url.trim_end_matches('/')))?.store().to_string();
            Ok((store, config(settings)))
        });
        let configs = StoreConfigs {
            default: config(&options.store),
            by_url: by_url.collect::<Result<HashMap<_, _>, RemoteError>>()?,
        };
        let fetcher = FetcherConfig {
            memory,
            fetch_size: options.fetch_size.as_u64(),
            store_timeout: options.store_timeout,
            connections: options.store_connections,
            fresh_for: options.fresh_for,
            disk_cache: None,
        };
        Ok(Some(Self { urls, secret: secret_urls.clone(), fetcher, configs }))
    }

    /// Adds a disk cache, whose memory is a part of that for parts of archives.
    fn use_disk_cache(&mut self, cache: &Arc<DiskCache>) {
        let overhead = cache.memory() + DiskCache::MAX_QUEUED_BYTES;
        let memory = self.fetcher.memory;
        self.fetcher.memory = memory.saturating_sub(overhead).max(memory / 2);
        self.fetcher.disk_cache = Some(Arc::clone(cache));
    }

    /// Gives up if no connection is made soon: somebody waits, and the URL is probably wrong.
    fn expect_to_connect(&mut self) {
        self.each_config(|config| config.connect_patience = Some(CONNECT_PATIENCE));
    }

    fn each_config(&mut self, mut change: impl FnMut(&mut StoreConfig)) {
        self.configs.by_url.values_mut().for_each(&mut change);
        change(&mut self.configs.default);
    }

    /// Returns the hosts and ports to which connections are made.
    fn addresses(&self) -> Result<Vec<(String, u16)>, RemoteError> {
        self.of_all(StoreConfig::addresses)
    }

    /// Returns the files with credentials that are read again while the stores are in use.
    fn credential_files(&self) -> Result<Vec<PathBuf>, RemoteError> {
        self.of_all(StoreConfig::credential_files)
    }

    /// Returns the results of `list` for all stores, each once.
    fn of_all<T: Ord>(
        &self,
        list: impl Fn(&StoreConfig, &StoreUrl) -> Result<Vec<T>, StoreConfigError>,
    ) -> Result<Vec<T>, RemoteError> {
        let mut all = Vec::new();
        for url in &self.urls {
            let listed = list(self.configs.of(url), url.store());
            let store = url.store().to_string();
            all.extend(listed.map_err(|error| RemoteError::Store { store, error })?);
        }
        all.sort_unstable();
        all.dedup();
        Ok(all)
    }

    /// Opens all stores, which reads credentials and CAs, and returns the source of their archives.
    fn open(mut self, dialer: &Arc<dyn Dial>) -> Result<RemoteArchives, RemoteError> {
        for path in self.of_all(StoreConfig::secret_files)? {
            check_not_exposed(&path).map_err(|problem| RemoteError::Secret { path, problem })?;
        }
        self.each_config(|config| config.dialer = Arc::clone(dialer));
        let fresh_for = self.fetcher.fresh_for;
        let archives = RemoteArchives::new(Fetcher::new(self.fetcher), self.configs, fresh_for);
        set_queries(&archives, &self.secret)?;
        for url in &self.urls {
            let store = || url.store().to_string();
            archives
                .open_store(url)
                .map_err(|error| RemoteError::Store { store: store(), error })?;
        }
        Ok(archives)
    }
}

/// Passes the queries of URLs on.
pub(super) fn set_queries(archives: &RemoteArchives, urls: &SecretUrls) -> Result<(), RemoteError> {
    for url in urls.iter() {
        archives.set_query(without_query(url).into(), parse(url)?);
    }
    Ok(())
}

fn parse(text: &str) -> Result<ObjectUrl, RemoteError> {
    let url = || escape::path(text).to_string();
    text.parse().map_err(|error| RemoteError::Url { url: url(), error })
}

fn without_query(url: &str) -> &str {
    url.split('?').next().unwrap_or(url)
}

/// Returns the configuration of a store, with connections from this process.
pub(crate) fn config(settings: &StoreSettings) -> StoreConfig {
    StoreConfig {
        endpoint: settings.store_endpoint.clone(),
        region: settings.store_region.clone(),
        style: match settings.store_style {
            StoreStyle::Auto => S3Style::Auto,
            StoreStyle::Path => S3Style::Path,
            StoreStyle::Virtual => S3Style::VirtualHost,
        },
        account: settings.store_account.clone(),
        ca_file: settings.store_ca.clone(),
        proxy: match settings.store_proxy.as_deref() {
            None => ProxyChoice::Environment,
            Some("none") => ProxyChoice::Direct,
            Some(url) => ProxyChoice::Url(Secret::new(url)),
        },
        credentials: match settings.store_credentials.as_deref() {
            None | Some("auto") => CredentialSource::Auto,
            Some("env") => CredentialSource::Environment,
            Some("instance") => CredentialSource::Instance,
            Some("web-identity") => CredentialSource::WebIdentity,
            Some("anonymous") => CredentialSource::Anonymous,
            Some(file) => CredentialSource::File(file.into()),
        },
        allow_insecure: settings.store_insecure,
        user_agent: concat!("hexz-nbd/", env!("CARGO_PKG_VERSION")).to_owned(),
        ..StoreConfig::default()
    }
}
