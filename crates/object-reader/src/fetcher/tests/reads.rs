//! Tests of reads from a store that works.

use super::*;

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
async fn small_objects_take_one_request() {
    for (length, rest) in [(1, 0), (CHUNK_SIZE + 1, 0), (MIB, 0), (3 * MIB, 2)] {
        let store = ScriptedStore::new(length);
        let fetcher = Fetcher::new(FetcherConfig::default());
        assert_eq!(fetcher.small_object(), MIB);
        let opened = fetcher.open_small(Arc::clone(&store) as _, "key", Priority::Background);
        let object = opened.await.unwrap();
        assert_eq!(ranges(&store), [0..MIB]);
        let stats = fetcher.stats().stores.remove(0);
        assert_eq!(
            stats.requests.into_iter().collect::<Vec<_>>(),
            [((Priority::Background, "ok"), 1)]
        );
        assert_eq!(object.length(), length);
        read(&object, 0..length).await.unwrap();
        assert_eq!(ranges(&store).len(), rest);
    }
}

#[tokio::test(start_paused = true)]
async fn chunks_are_readable_while_others_arrive() {
    let store = store();
    let (_fetcher, object) = open(&store, FetcherConfig::default()).await;
    store.set_link(Duration::ZERO, CHUNK_SIZE as f64);
    let verified = object.verified_by(Arc::new(Content));
    for (object, first) in [(object, 80), (verified, 160)] {
        let begin = Instant::now();
        for (number, seconds) in (first..first + 3).zip(1..) {
            read(&object, chunk(number)).await.unwrap();
            assert_eq!(begin.elapsed().as_secs(), seconds);
        }
        assert_eq!(ranges(&store), [chunk(first).start..chunk(first + 3).end]);
        // The last chunk has yet to arrive.
        tokio::time::sleep(SECOND).await;
    }
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

#[tokio::test(start_paused = true)]
async fn prefetched_chunks_are_those_that_are_missing() {
    let store = store();
    store.set_link(20 * MILLI, f64::INFINITY);
    let (_fetcher, object) = open(&store, FetcherConfig::default()).await;
    read(&object, chunk(41)).await.unwrap();
    assert_eq!(ranges(&store), [10 * MIB..11 * MIB]);
    // No more than what was asked for, in requests of at most 1 MiB, and over no cached chunks.
    let begin = Instant::now();
    let range = 38 * CHUNK_SIZE + 1..50 * CHUNK_SIZE - 1;
    assert_eq!(object.prefetch(range.clone()).await.unwrap(), 8 * CHUNK_SIZE);
    assert!(begin.elapsed() < 25 * MILLI);
    let mut fetched = ranges(&store);
    fetched.sort_unstable_by_key(|range| range.start);
    let chunks = |start, end| start * CHUNK_SIZE..end * CHUNK_SIZE;
    assert_eq!(fetched, [chunks(38, 40), chunks(44, 48), chunks(48, 50)]);
    assert_eq!(object.prefetch(range.clone()).await.unwrap(), 0);
    read(&object, range).await.unwrap();
    assert_eq!(ranges(&store), []);
    assert_eq!(object.prefetch(u64::MAX - 1..u64::MAX).await.unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn demand_passes_prefetches_and_shares_their_requests() {
    let store = store();
    store.set_link(20 * MILLI, f64::INFINITY);
    let (_fetcher, object) = open_by_chunks(&store).await;
    let prefetches = (0..20).map(|n| object.prefetch(chunk(10 + 7 * n)));
    let prefetches = join_all(prefetches);
    tokio::pin!(prefetches);
    assert!(tokio::time::timeout(MILLI, &mut prefetches).await.is_err());
    assert_eq!(store.received().len(), 12);
    let (shared, other, fetched) =
        tokio::join!(read(&object, chunk(10)), read(&object, chunk(3)), &mut prefetches);
    shared.unwrap();
    other.unwrap();
    assert!(fetched.into_iter().all(|bytes| bytes.unwrap() == CHUNK_SIZE));
    assert_eq!(store.received()[0].request.range, ByteRange::Bounded(chunk(3)));
}
