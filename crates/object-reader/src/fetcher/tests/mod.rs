//! Tests of the whole fetcher with a scripted store and simulated time.

mod failures;
mod random;
mod reads;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use proptest::prelude::*;
use tokio::time::Instant;

use super::plan::CHUNK_SIZE;
use super::testing::{Action, ScriptedStore, content};
use super::*;
use crate::metrics::BreakerState;
use crate::store::StoreErrorKind;

const MIB: u64 = 1 << 20;
const SECOND: Duration = Duration::from_secs(1);
const MILLI: Duration = Duration::from_millis(1);

async fn open(store: &Arc<ScriptedStore>, config: FetcherConfig) -> (Arc<Fetcher>, Object) {
    let fetcher = Fetcher::new(config);
    let object = fetcher.open(Arc::clone(store) as _, "key").await.unwrap();
    store.received();
    (fetcher, object)
}

/// Opens an object of 64 MiB whose chunks are requested one by one.
async fn open_by_chunks(store: &Arc<ScriptedStore>) -> (Arc<Fetcher>, Object) {
    open(store, FetcherConfig { fetch_size: CHUNK_SIZE, ..FetcherConfig::default() }).await
}

fn store() -> Arc<ScriptedStore> {
    ScriptedStore::new(64 * MIB)
}

/// Returns the range of a chunk. Distant numbers don't form a stream.
fn chunk(number: u64) -> Range<u64> {
    number * CHUNK_SIZE..(number + 1) * CHUNK_SIZE
}

async fn read(object: &Object, range: Range<u64>) -> Result<(), FetchError> {
    let bytes = object.read(range.clone(), Priority::Demand).await?;
    assert!(bytes == content(1, range.start, range.end), "wrong bytes in {range:?}");
    Ok(())
}

fn label(result: &Result<(), FetchError>) -> &'static str {
    result.as_ref().map_or_else(FetchError::label, |()| "ok")
}

fn ranges(store: &ScriptedStore) -> Vec<Range<u64>> {
    let received = store.received();
    let range = |received: super::testing::Received| match received.request.range {
        ByteRange::Bounded(range) => range,
        ByteRange::Suffix(length) => panic!("suffix of {length}"),
    };
    received.into_iter().map(range).collect()
}

/// Compares chunks with the right ones.
#[derive(Debug)]
struct Content;

impl ChunkVerifier for Content {
    fn matches(&self, chunk: u64, bytes: &[u8]) -> bool {
        let start = chunk * CHUNK_SIZE;
        bytes == content(1, start, start + bytes.len() as u64)
    }

    fn identity(&self) -> Option<[u8; 32]> {
        Some([1; 32])
    }
}
