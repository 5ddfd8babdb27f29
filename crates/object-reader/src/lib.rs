//! Ranged, verified and cached reads of immutable objects in object stores and on HTTP servers.
//!
//! A [`Store`] makes single requests and checks the responses. The fetcher on top of it decides
//! which requests to make: aligned, merged, shared, retried and limited.

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
