//! Random reads, failures and cancellations.

use super::*;

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
