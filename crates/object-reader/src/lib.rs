//! Ranged, verified and cached reads of immutable objects in object stores and on HTTP servers.
//!
//! A [`Store`] makes single requests and checks the responses. The [`Fetcher`] on top of it decides
//! which requests to make: aligned, merged, shared, retried and limited. An [`Object`] is one version
//! of an object: reads return its bytes, or fail.
//!
//! ```no_run
//! # use object_reader::{Fetcher, FetcherConfig, ObjectUrl, Priority, StoreConfig};
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let url: ObjectUrl = "s3://golden/web.hxz".parse()?;
//! let store = StoreConfig::default().open(url.store())?;
//! let fetcher = Fetcher::new(FetcherConfig::default());
//! let object = fetcher.open(store, url.key()).await?;
//! let header = object.read(0..4096, Priority::Demand).await?;
//! # Ok(())
//! # }
//! ```
//!
//! [`FetchError`] distinguishes what a caller can do: wait, open the object again, or change the
//! configuration. A [`ChunkVerifier`] makes trust in the store unnecessary. [`StoreConfig`] describes
//! how a store is reached: endpoint, credentials, CAs, proxy, and who opens connections ([`Dial`]).

mod dial;
mod disk_cache;
mod fetcher;
mod http;
mod listing;
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
pub use fetcher::{CHUNK_SIZE, FetchError, Fetcher, FetcherConfig};
pub use http::{ProxyChoice, ResponseHead, Timeouts, TlsFailure, TlsHandshake, TlsParameters};
pub use listing::ListingPage;
pub use metrics::{
    BreakerState, CacheStats, DiskCacheStats, FetcherStats, LATENCY_BUCKETS, LatencyHistogram,
    StoreStats, WaitStats,
};
pub use object::{ChunkVerifier, Object, ObjectId, Priority};
#[doc(hidden)]
pub use response::{ContentRange, judge_response, parse_content_range};
pub use store::{
    ByteRange, GetRequest, ListedObject, ReceiveBytes, Response, Store, StoreError, StoreErrorKind,
    Version,
};
pub use stores::{
    CredentialSource, CredentialsSummary, Environment, ObservedStore, S3Style, Secret, StoreConfig,
    StoreConfigError, StoreProbe,
};
#[doc(hidden)]
pub use stores::{parse_html_index, parse_json_index, parse_xml_listing};
pub use url::{ObjectUrl, Scheme, StoreUrl, UrlError};

/// Compiles the examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
