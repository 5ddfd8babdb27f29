//! Tests of the whole fetcher with a scripted store and simulated time.

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

#[tokio::test(start_paused = true)]
async fn opening_takes_one_round_trip_and_keeps_both_ends() {
    let store = ScriptedStore::new(10 * MIB + 1000);
    store.set_link(20 * MILLI, f64::INFINITY);
    let fetcher = Fetcher::new(FetcherConfig::default());
    let begin = Instant::now();
    let object = fetcher.open(Arc::clone(&store) as _, "key").await.unwrap();
    assert!(begin.elapsed() < 22 * MILLI);
    assert_eq!((object.length(), object.name()), (10 * MIB + 1000, "test://store/key"));
    assert_eq!(store.received().len(), 2);
    read(&object, 0..4096).await.unwrap();
    read(&object, 10 * MIB - CHUNK_SIZE..10 * MIB + 1000).await.unwrap();
    assert_eq!(ranges(&store), []);
    let mut buffer = [0; 2000];
    assert!(object.try_read(10 * MIB - 1000, &mut buffer));
    assert_eq!(buffer[..], content(1, 10 * MIB - 1000, 10 * MIB + 1000));
    assert!(!object.try_read(5 * MIB, &mut buffer));
    assert!(!object.try_read(10 * MIB, &mut buffer));
    assert_eq!(label(&read(&object, 0..11 * MIB).await), "out_of_range");
}

#[tokio::test(start_paused = true)]
async fn opening_works_without_suffix_requests_and_for_tiny_objects() {
    for length in [1, 100, CHUNK_SIZE, CHUNK_SIZE + 1, 3 * CHUNK_SIZE] {
        let store = ScriptedStore::new(length);
        store.script(|_, request| match request.range {
            ByteRange::Suffix(_) => Action::Fail(StoreErrorKind::Unsupported),
            ByteRange::Bounded(_) => Action::Respond,
        });
        let (_fetcher, object) = open(&store, FetcherConfig::default()).await;
        read(&object, 0..length).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn random_reads_fetch_the_aligned_block_around_them() {
    let store = store();
    let (_fetcher, object) = open(&store, FetcherConfig::default()).await;
    read(&object, 5 * MIB + 100..5 * MIB + 200).await.unwrap();
    read(&object, 6 * MIB - 1..6 * MIB + 1).await.unwrap();
    assert_eq!(ranges(&store), [5 * MIB..6 * MIB, 6 * MIB..7 * MIB]);
    read(&object, 20 * MIB..30 * MIB).await.unwrap();
    assert_eq!(ranges(&store).len(), 10);
}

#[tokio::test(start_paused = true)]
async fn concurrent_reads_of_a_chunk_share_a_request() {
    let store = store();
    store.set_link(20 * MILLI, f64::INFINITY);
    let (fetcher, object) = open(&store, FetcherConfig::default()).await;
    // Another open of the same version shares it as well.
    let other = fetcher.open(Arc::clone(&store) as _, "key").await.unwrap();
    store.received();
    let mut reads: Vec<_> = (0..50)
        .map(|n| if n % 2 == 0 { object.clone() } else { other.clone() })
        .map(|object| tokio::spawn(async move { read(&object, chunk(40)).await }))
        .collect();
    tokio::time::sleep(MILLI).await;
    // One that leaves doesn't take the request along.
    reads.remove(0).abort();
    for read in reads {
        read.await.unwrap().unwrap();
    }
    assert_eq!(ranges(&store), [10 * MIB..11 * MIB]);
}

#[tokio::test(start_paused = true)]
async fn a_queued_request_is_dropped_with_its_last_reader() {
    let store = store();
    store.set_link(20 * MILLI, f64::INFINITY);
    let (fetcher, object) = open_by_chunks(&store).await;
    let reads = join_all((0..16).map(|n| read(&object, chunk(20 + 10 * n))));
    tokio::pin!(reads);
    assert!(tokio::time::timeout(MILLI, &mut reads).await.is_err());
    for is_shared in [false, true] {
        let first = tokio::time::timeout(MILLI, read(&object, chunk(5)));
        if is_shared {
            let second = read(&object, chunk(5));
            let (first, second, _) = tokio::join!(first, second, &mut reads);
            assert!(first.is_err() && second.is_ok());
        } else {
            assert!(first.await.is_err());
            tokio::task::yield_now().await;
            assert_eq!(fetcher.stats().stores[0].queued, 0);
        }
    }
    assert_eq!(ranges(&store).iter().filter(|range| **range == chunk(5)).count(), 1);
}

#[tokio::test(start_paused = true)]
async fn demand_passes_and_raises_queued_requests() {
    let store = store();
    store.set_link(20 * MILLI, f64::INFINITY);
    let (_fetcher, object) = open_by_chunks(&store).await;
    let mut all: Vec<_> = (0..20)
        .map(|n| {
            tokio::spawn({
                let object = object.clone();
                async move { object.read(chunk(10 + 7 * n), Priority::Background).await.map(drop) }
            })
        })
        .collect();
    tokio::time::sleep(MILLI).await;
    // A quarter of the 16 slots is free for demand.
    assert_eq!(store.received().len(), 12);
    let demand: Vec<_> = [3, 10 + 7 * 19]
        .into_iter()
        .map(|number| {
            let object = object.clone();
            tokio::spawn(async move { read(&object, chunk(number)).await })
        })
        .collect();
    tokio::time::sleep(MILLI).await;
    assert_eq!(ranges(&store), [chunk(3), chunk(10 + 7 * 19)]);
    all.extend(demand);
    for read in all {
        read.await.unwrap().unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn transient_failures_are_retried_and_others_are_not() {
    use StoreErrorKind as Kind;
    for kind in [Kind::Unreachable, Kind::Interrupted, Kind::TimedOut, Kind::ServerError] {
        let store = store();
        let (fetcher, object) = open_by_chunks(&store).await;
        store.script(move |n, _| if n < 3 { Action::Fail(kind) } else { Action::Respond });
        let begin = Instant::now();
        read(&object, chunk(9)).await.unwrap();
        assert!(begin.elapsed() <= (50 + 100 + 200 + 3) * MILLI);
        assert_eq!(store.received().len(), 4);
        let stats = fetcher.stats().stores.remove(0);
        assert_eq!(stats.retries, 3);
        assert_eq!(stats.requests[&(Priority::Demand, kind.label())], 3);
        assert_eq!(stats.bytes[&Priority::Demand], 4 * CHUNK_SIZE);
    }
    for (kind, expected) in [
        (Kind::Changed, "changed"),
        (Kind::NotFound, "gone"),
        (Kind::Denied, "denied"),
        (Kind::CredentialsExpired, "credentials_expired"),
        (Kind::ClockSkew, "clock_skew"),
        (Kind::Unsupported, "unsupported"),
    ] {
        let store = store();
        let (_fetcher, object) = open_by_chunks(&store).await;
        store.script(move |_, _| Action::Fail(kind));
        assert_eq!(label(&read(&object, chunk(9)).await), expected);
        assert_eq!(store.received().len(), 1);
        // What is in memory remains readable.
        read(&object, chunk(0)).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn reads_fail_after_the_store_timeout_with_the_last_error() {
    for (action, expected) in [
        (Action::Fail(StoreErrorKind::Unreachable), "down"),
        (Action::Throttle(Some(5 * SECOND)), "throttled"),
        (Action::Hang, "timed_out"),
    ] {
        let store = store();
        let (_fetcher, object) = open_by_chunks(&store).await;
        store.script(move |_, _| action);
        let begin = Instant::now();
        // The second one joins the request of the first.
        let results = join_all([0, 30].map(async |delay| {
            tokio::time::sleep(delay * SECOND).await;
            let result = read(&object, chunk(9)).await;
            (label(&result), begin.elapsed().as_secs() - u64::from(delay))
        }));
        assert_eq!(results.await, [(expected, 60), (expected, 60)]);
    }
}

#[tokio::test(start_paused = true)]
async fn throttled_stores_get_the_requests_that_cannot_be_avoided() {
    let store = store();
    store.set_link(20 * MILLI, f64::INFINITY);
    let (fetcher, object) = open_by_chunks(&store).await;
    // 3 in 10 responses are 503, evenly spread over the chunks.
    store.script(|n, _| match n * 7 % 10 {
        0..3 => Action::Throttle(Some(SECOND)),
        _ => Action::Respond,
    });
    let reads = (1..200).map(|number| read(&object, chunk(number)));
    join_all(reads).await.into_iter().for_each(|result| result.unwrap());
    let received = store.received();
    let unavoidable = 199 * 10 / 7;
    assert!(received.len() <= unavoidable * 11 / 10, "{} requests", received.len());
    // After a 503, nothing is sent for a second.
    let mut times: Vec<_> = received.iter().map(|received| received.time).collect();
    times.dedup();
    assert!(times.windows(2).any(|pair| pair[1] - pair[0] >= SECOND));
    let stats = fetcher.stats();
    assert!(stats.waits.throttled > stats.waits.fetch);
    assert_eq!(stats.stores[0].hedges_sent, 0);
    assert_eq!(stats.stores[0].limit, 16);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_down_is_probed_once_a_second_and_recovers_at_once() {
    let store = store();
    let (fetcher, object) = open_by_chunks(&store).await;
    store.script(|_, _| Action::Fail(StoreErrorKind::Unreachable));
    let begin = Instant::now();
    let readers: Vec<_> = (0..40)
        .map(|n| {
            let object = object.clone();
            tokio::spawn(async move { read(&object, chunk(5 + 6 * n)).await })
        })
        .collect();
    tokio::time::sleep(10 * SECOND).await;
    assert_eq!(fetcher.stats().stores[0].breaker, BreakerState::Open);
    store.received();
    tokio::time::sleep(10 * SECOND).await;
    assert_eq!(store.received().len(), 10);
    // The check for a new version fails at once, without a request.
    tokio::time::sleep(20 * SECOND).await;
    let check = Instant::now();
    assert_eq!(object.is_current().await.unwrap_err().label(), "down");
    assert!(check.elapsed() < MILLI);
    store.script(|_, _| Action::Respond);
    let recovered = Instant::now();
    for reader in readers {
        reader.await.unwrap().unwrap();
    }
    assert!(recovered.elapsed() < 1100 * MILLI, "{:?}", recovered.elapsed());
    let stats = fetcher.stats();
    assert_eq!(stats.stores[0].breaker, BreakerState::Closed);
    assert!(stats.waits.breaker > begin.elapsed() * 30);
}

#[tokio::test(start_paused = true)]
async fn slow_demand_requests_are_hedged_within_limits() {
    let store = ScriptedStore::new(1 << 30);
    store.set_link(20 * MILLI, f64::INFINITY);
    let (fetcher, object) = open_by_chunks(&store).await;
    // Every 30th response takes 2 seconds.
    store.script(|n, _| match n % 30 {
        29 => Action::Delay(2 * SECOND),
        _ => Action::Respond,
    });
    for n in 1..200 {
        let begin = Instant::now();
        // So far apart that nothing is read ahead.
        read(&object, chunk(n * 20)).await.unwrap();
        assert!(n < 40 || begin.elapsed() < 100 * MILLI, "{n}: {:?}", begin.elapsed());
    }
    let stats = fetcher.stats().stores.remove(0);
    assert!((4..=9).contains(&stats.hedges_sent), "{}", stats.hedges_sent);
    assert_eq!(stats.hedges_won, stats.hedges_sent);
    assert_eq!(stats.requests[&(Priority::Demand, "canceled")], stats.hedges_won);
    // If all are slow, 5 % are sent twice.
    store.script(|_, _| Action::Delay(SECOND));
    store.received();
    let (_fetcher, object) = open_by_chunks(&store).await;
    join_all((1..200).map(|n| read(&object, chunk(n * 20)))).await;
    assert!(store.received().len() <= 200 * 21 / 20);
}

#[tokio::test(start_paused = true)]
async fn versions_are_never_mixed() {
    let store = store();
    let (fetcher, object) = open_by_chunks(&store).await;
    read(&object, chunk(9)).await.unwrap();
    store.replace();
    assert_eq!(label(&read(&object, chunk(10)).await), "changed");
    assert_eq!(store.received().len(), 2);
    assert_eq!(label(&read(&object, chunk(11)).await), "changed");
    assert_eq!(store.received().len(), 0);
    read(&object, chunk(9)).await.unwrap();
    assert!(!object.is_current().await.unwrap());
    assert_eq!(fetcher.stats().stores[0].changed, 1);
    let new = object.latest().await.unwrap();
    assert_ne!(new.id(), object.id());
    let bytes = new.read(chunk(9), Priority::Demand).await.unwrap();
    assert!(bytes == content(2, chunk(9).start, chunk(9).end));
}

#[tokio::test(start_paused = true)]
async fn versions_are_believed_for_a_while_and_checked_once() {
    let store = store();
    store.set_link(20 * MILLI, f64::INFINITY);
    let (_fetcher, object) = open_by_chunks(&store).await;
    assert!(object.is_current().await.unwrap());
    assert_eq!(store.checks(), 0);
    tokio::time::sleep(31 * SECOND).await;
    assert!(
        join_all((0..20).map(|_| object.is_current())).await.iter().all(|r| *r.as_ref().unwrap())
    );
    assert_eq!(store.checks(), 1);
    assert_eq!(object.latest().await.unwrap().id(), object.id());
    store.replace();
    assert!(object.is_current().await.unwrap());
    tokio::time::sleep(31 * SECOND).await;
    assert!(!object.is_current().await.unwrap());
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

#[tokio::test(start_paused = true)]
async fn wrong_chunks_are_fetched_anew_and_never_cached() {
    let store = store();
    let (_fetcher, object) = open(&store, FetcherConfig::default()).await;
    let verified = object.verified_by(Arc::new(Content));
    assert_eq!(verified.id(), object.id());
    // What was fetched before doesn't have to be fetched again.
    read(&verified, chunk(0)).await.unwrap();
    assert_eq!(ranges(&store), []);
    store.script(|_, request| match request.bypass_caches {
        false => Action::Corrupt,
        true => Action::Respond,
    });
    read(&verified, chunk(41)).await.unwrap();
    let received = store.received();
    assert_eq!(received.len(), 2, "{received:?}");
    assert!(received[1..].iter().all(|received| received.request.bypass_caches));
    store.script(|_, _| Action::Corrupt);
    for _ in 0..2 {
        let error = read(&verified, chunk(81)).await.unwrap_err();
        assert!(matches!(error, FetchError::Corrupt { offset, .. } if offset == 81 * CHUNK_SIZE));
        assert!(!verified.try_read(81 * CHUNK_SIZE, &mut [0]));
    }
    // Unverified bytes are in another namespace.
    object.read(chunk(121), Priority::Demand).await.unwrap();
    store.script(|_, _| Action::Respond);
    read(&verified, chunk(121)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_ends_all_waits() {
    let store = store();
    let (fetcher, object) = open_by_chunks(&store).await;
    store.script(|_, _| Action::Hang);
    let reads = join_all((10..50).map(|n| read(&object, chunk(n))));
    let shutdown = async {
        tokio::time::sleep(SECOND).await;
        fetcher.shutdown();
    };
    let begin = Instant::now();
    let opening = async {
        tokio::time::sleep(MILLI).await;
        fetcher.open(Arc::clone(&store) as _, "other").await.map(drop)
    };
    let (reads, opened, ()) = tokio::join!(reads, opening, shutdown);
    assert!(reads.iter().all(|result| label(result) == "shutting_down"));
    assert_eq!(label(&opened), "shutting_down");
    assert!(begin.elapsed() < SECOND + 2 * MILLI);
    assert_eq!(label(&read(&object, chunk(60)).await), "shutting_down");
    read(&object, chunk(0)).await.unwrap();
}

/// Reads an object in parts of 32 KiB, `concurrent` of them at a time, and returns the rate in
/// bytes per second.
async fn sequential_rate(store: &Arc<ScriptedStore>, length: u64, concurrent: usize) -> f64 {
    use futures_util::StreamExt;
    let (fetcher, object) = open(store, FetcherConfig::default()).await;
    let begin = Instant::now();
    let parts = (0..length / (32 << 10)).map(|n| n * (32 << 10)..(n + 1) * (32 << 10));
    let reads = parts.map(|part| read(&object, part));
    let results = futures_util::stream::iter(reads).buffer_unordered(concurrent);
    results.for_each(async |result| result.unwrap()).await;
    let requested: u64 = ranges(store).iter().map(|range| range.end - range.start).sum();
    assert!(requested <= length, "{requested} bytes requested for {length}");
    assert!(fetcher.stats().stores[0].queued == 0);
    length as f64 / begin.elapsed().as_secs_f64()
}

#[tokio::test(start_paused = true)]
async fn sequential_readers_use_the_whole_link() {
    const GIGABIT: f64 = 119.0 * MIB as f64;
    for concurrent in [1, 4, 16] {
        let store = ScriptedStore::new(512 * MIB);
        store.set_link(20 * MILLI, GIGABIT);
        let rate = sequential_rate(&store, 512 * MIB, concurrent).await;
        assert!(rate >= 0.95 * GIGABIT, "{concurrent}: {} MiB/s", rate / MIB as f64);
    }
    let store = ScriptedStore::new(512 * MIB);
    store.set_link(20 * MILLI, f64::INFINITY);
    let rate = sequential_rate(&store, 512 * MIB, 4).await / MIB as f64;
    assert!(rate >= 250.0, "{rate} MiB/s");
}

#[tokio::test(start_paused = true)]
async fn memory_bounds_what_is_in_flight() {
    let store = ScriptedStore::new(64 * MIB);
    store.set_link(20 * MILLI, f64::INFINITY);
    let config = FetcherConfig { memory: 2 * MIB, ..FetcherConfig::default() };
    let (fetcher, object) = open(&store, config).await;
    read(&object, 0..64 * MIB).await.unwrap();
    let mut times: Vec<_> = store.received().iter().map(|r| r.time).collect();
    let count = times.len();
    times.dedup();
    // Four chunks at a time.
    assert!(times.len() >= count / 4, "{} of {count}", times.len());
    assert!(fetcher.stats().cache.bytes <= MIB);
}

/// Many threads, real time, little memory, failures and readers that leave.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_readers_do_not_disturb_each_other() {
    let store = store();
    let config = FetcherConfig { memory: 4 * MIB, ..FetcherConfig::default() };
    let (fetcher, object) = open(&store, config).await;
    store.set_link(MILLI, f64::INFINITY);
    store.script(|n, _| match n % 40 {
        7 => Action::Fail(StoreErrorKind::Interrupted),
        9 => Action::Corrupt,
        _ => Action::Respond,
    });
    let object = object.verified_by(Arc::new(Content));
    let readers = (0..16_u64).map(|reader| {
        let object = object.clone();
        tokio::spawn(async move {
            for n in 0..60_u64 {
                // Half of them are sequential, and pairs read the same.
                let seed = (n + 1) * (reader / 2 + 1);
                let number = if reader < 8 { reader / 2 * 60 + n } else { seed * 7919 % 250 };
                let range = chunk(number).start + 5000..chunk(number + 1).start + 7000;
                let patience = if seed % 9 == 8 { MILLI } else { 60 * SECOND };
                let result = tokio::time::timeout(patience, read(&object, range)).await;
                assert!(result.is_err() || label(&result.unwrap()) == "ok");
            }
        })
    });
    for reader in join_all(readers).await {
        reader.unwrap();
    }
    while fetcher.stats().stores[0].in_flight > 0 || fetcher.stats().stores[0].queued > 0 {
        tokio::time::sleep(MILLI).await;
    }
    assert!(fetcher.stats().cache.bytes <= 3 * MIB);
}

#[derive(Debug, Clone)]
struct RandomRead {
    chunk: u64,
    offset: u64,
    length: u64,
    delay: u64,
    /// Time after which it is dropped.
    patience: Option<u64>,
}

fn random_read() -> impl Strategy<Value = RandomRead> {
    let patience = prop::option::weighted(0.2, 0_u64..200);
    (0_u64..60, 0..CHUNK_SIZE, 1_u64..CHUNK_SIZE * 3, 0_u64..500, patience).prop_map(
        |(chunk, offset, length, delay, patience)| RandomRead {
            chunk,
            offset,
            length,
            delay,
            patience,
        },
    )
}

fn run_paused<T>(test: impl Future<Output = T>) -> T {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.unwrap().block_on(test)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn reads_return_the_right_bytes_or_an_error(
        reads in prop::collection::vec(random_read(), 1..60),
        actions in prop::collection::vec(0_u32..100, 50),
        fetch_size in 1_u64..6,
        memory in prop_oneof![Just(1), Just(8), Just(256)],
        failing in 0_u32..60,
    ) {
        run_paused(async {
            let store = ScriptedStore::new(64 * CHUNK_SIZE - 77);
            store.set_link(10 * MILLI, 100e6);
            let config = FetcherConfig {
                memory: memory * MIB,
                fetch_size: fetch_size * CHUNK_SIZE,
                ..FetcherConfig::default()
            };
            let (fetcher, object) = open(&store, config).await;
            let object = object.verified_by(Arc::new(Content));
            store.script(move |n, _| {
                let roll = actions[n % actions.len()];
                if roll >= failing {
                    return Action::Respond;
                }
                match roll % 6 {
                    0 => Action::Hang,
                    1 => Action::Throttle(Some(SECOND)),
                    2 => Action::Corrupt,
                    3 => Action::Delay(300 * MILLI),
                    _ => Action::Fail(StoreErrorKind::Interrupted),
                }
            });
            let reads = reads.into_iter().map(|wanted| {
                let object = object.clone();
                async move {
                    tokio::time::sleep(Duration::from_millis(wanted.delay)).await;
                    let start = wanted.chunk * CHUNK_SIZE + wanted.offset;
                    let range = start..(start + wanted.length).min(object.length());
                    let reading = read(&object, range);
                    let patience = wanted.patience.map_or(600 * SECOND, Duration::from_millis);
                    tokio::time::timeout(patience, reading).await.ok()
                }
            });
            let begin = Instant::now();
            let results = join_all(reads.map(tokio::spawn)).await;
            prop_assert!(begin.elapsed() <= 61 * SECOND);
            for result in results {
                // A wrong byte is a panic.
                let result = result.unwrap();
                if failing == 0 {
                    prop_assert!(result.is_none_or(|result| result.is_ok()));
                }
            }
            tokio::time::sleep(120 * SECOND).await;
            let stats = fetcher.stats().stores.remove(0);
            prop_assert_eq!((stats.in_flight, stats.queued), (0, 0));
            let capacity = fetcher.stats().cache.capacity;
            prop_assert!(fetcher.stats().cache.bytes <= capacity);
            Ok(())
        })?;
    }

    #[test]
    fn each_chunk_is_requested_once(
        reads in prop::collection::vec(random_read(), 1..60),
        fetch_size in 1_u64..6,
    ) {
        run_paused(async {
            let store = ScriptedStore::new(64 * CHUNK_SIZE);
            // Without hedges: all take the same time.
            store.set_link(10 * MILLI, f64::INFINITY);
            let config =
                FetcherConfig { fetch_size: fetch_size * CHUNK_SIZE, ..FetcherConfig::default() };
            let (_fetcher, object) = open(&store, config).await;
            let mut wanted_chunks = BTreeSet::new();
            let reads: Vec<_> = reads.into_iter().map(|wanted| {
                let start = wanted.chunk * CHUNK_SIZE + wanted.offset;
                let range = start..(start + wanted.length).min(object.length());
                wanted_chunks.extend(chunks_of(&range));
                let object = object.clone();
                async move {
                    tokio::time::sleep(Duration::from_millis(wanted.delay)).await;
                    read(&object, range).await
                }
            }).collect();
            for result in join_all(reads).await {
                result.unwrap();
            }
            let mut requested = BTreeSet::new();
            let all: Vec<_> = ranges(&store).iter().map(chunks_of).collect();
            for chunks in all {
                // Cached chunks in short holes are fetched along.
                let is_new = |chunk| !requested.contains(&chunk);
                prop_assert!(is_new(chunks.start) && is_new(chunks.end - 1));
                requested.extend(chunks);
            }
            let is_opened = |chunk: &u64| [0, 62, 63].contains(chunk);
            let are_requested =
                wanted_chunks.iter().all(|chunk| requested.contains(chunk) || is_opened(chunk));
            prop_assert!(are_requested);
            Ok(())
        })?;
    }
}
