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
mod fetcher;
mod metrics;
mod object;
mod store;

pub use dial::{Dial, DirectDialer};
pub use fetcher::{FetchError, Fetcher, FetcherConfig};
pub use metrics::{
    BreakerState, CacheStats, FetcherStats, LATENCY_BUCKETS, LatencyHistogram, StoreStats,
    WaitStats,
};
pub use object::{ChunkVerifier, Object, ObjectId, Priority};
pub use store::{
    ByteRange, GetRequest, ListedObject, Response, Store, StoreError, StoreErrorKind, Version,
};
