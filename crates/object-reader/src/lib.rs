//! Ranged, verified and cached reads of immutable objects in object stores and on HTTP servers.
//!
//! A [`Store`] makes single requests and checks the responses. The fetcher on top of it decides
//! which requests to make: aligned, merged, shared, retried and limited.
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use object_reader::{Fetcher, FetcherConfig, FetchError, Priority, Store};
//! # async fn example(store: Arc<dyn Store>) -> Result<(), FetchError> {
//! let fetcher = Fetcher::new(FetcherConfig::default());
//! let object = fetcher.open(store, "golden/web.hxz").await?;
//! let header = object.read(0..4096, Priority::Demand).await?;
//! # Ok(())
//! # }
//! ```

mod dial;
mod disk_cache;
mod fetcher;
mod http;
mod metrics;
mod object;
mod response;
mod store;
mod stores;
mod url;

pub use dial::{Dial, DirectDialer};
pub use disk_cache::{
    CachedObject, DiskCache, DiskCacheCheck, DiskCacheConfig, DiskCacheContents, DiskCacheError,
};
pub use fetcher::{FetchError, Fetcher, FetcherConfig};
pub use http::{ProxyChoice, Timeouts};
pub use metrics::{
    BreakerState, CacheStats, DiskCacheStats, FetcherStats, LATENCY_BUCKETS, LatencyHistogram,
    StoreStats, WaitStats,
};
pub use object::{ChunkVerifier, Object, ObjectId, Priority};
#[doc(hidden)]
pub use response::{ContentRange, parse_content_range};
pub use store::{
    ByteRange, GetRequest, ListedObject, Response, Store, StoreError, StoreErrorKind, Version,
};
pub use stores::{CredentialSource, Environment, S3Style, Secret, StoreConfig, StoreConfigError};
#[doc(hidden)]
pub use stores::{parse_html_index, parse_json_index};
pub use url::{ObjectUrl, Scheme, StoreUrl, UrlError};
