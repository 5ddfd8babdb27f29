//! Tests of stores that fail, are slow, or return something else.

use super::*;

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

/// Others may be on their way, and readers prefer to wait.
#[tokio::test(start_paused = true)]
async fn reads_wait_for_credentials_as_for_a_store_that_is_down() {
    let store = store();
    let (fetcher, object) = open_by_chunks(&store).await;
    store.script(|_, _| Action::Fail(StoreErrorKind::CredentialsExpired));
    let begin = Instant::now();
    assert_eq!(label(&read(&object, chunk(9)).await), "credentials_expired");
    assert_eq!(begin.elapsed().as_secs(), 60);
    let requests = store.received().len();
    assert!((12..=60).contains(&requests), "{requests}");
    assert_eq!(fetcher.stats().stores[0].rejection, Some("credentials_expired"));
    assert_eq!(fetcher.stats().stores[0].breaker, BreakerState::Closed);
    // Nobody waits for an object that can't be opened.
    let opened = fetcher.open(Arc::clone(&store) as _, "other").await;
    assert_eq!(label(&opened.map(drop)), "credentials_expired");
    let (result, ()) = tokio::join!(read(&object, chunk(20)), async {
        tokio::time::sleep(10 * SECOND).await;
        store.script(|_, _| Action::Respond);
    });
    result.unwrap();
    assert_eq!(fetcher.stats().stores[0].rejection, None);
}

#[tokio::test(start_paused = true)]
async fn only_the_store_can_tell_that_a_version_is_not_current() {
    use StoreErrorKind as Kind;
    for kind in [
        Kind::Denied,
        Kind::CredentialsExpired,
        Kind::ClockSkew,
        Kind::Unsupported,
        Kind::Unreachable,
        Kind::NotFound,
    ] {
        let store = store();
        let (fetcher, object) = open_by_chunks(&store).await;
        store.script(move |_, _| Action::Fail(kind));
        tokio::time::sleep(31 * SECOND).await;
        let error = object.is_current().await.unwrap_err();
        assert_eq!(error.is_inconclusive(), kind != Kind::NotFound, "{error}");
        assert_eq!(error.is_outage(), kind.is_rejection() || kind.is_transient(), "{error}");
        let rejection = fetcher.stats().stores[0].rejection;
        assert_eq!(rejection, kind.is_rejection().then_some(kind.label()));
        // The store has the object, so what it says counts.
        store.script(|_, _| Action::Respond);
        tokio::time::sleep(2 * SECOND).await;
        assert!(object.is_current().await.unwrap());
        assert_eq!(fetcher.stats().stores[0].rejection, None);
    }
}

/// Access to an object that doesn't exist may be denied.
#[tokio::test(start_paused = true)]
async fn an_object_that_cannot_be_opened_does_not_count_as_a_rejection() {
    let store = store();
    let (fetcher, _object) = open_by_chunks(&store).await;
    store.script(|_, _| Action::Fail(StoreErrorKind::Denied));
    let opened = fetcher.open(Arc::clone(&store) as _, "other").await;
    assert_eq!(label(&opened.map(drop)), "denied");
    assert_eq!(fetcher.stats().stores[0].rejection, None);
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
    store.received();
    for round in 0..2 {
        store.script(|_, request| match request.range {
            // Its neighbors come along.
            ByteRange::Bounded(ref range) if range.contains(&(81 * CHUNK_SIZE)) => Action::Corrupt,
            _ => Action::Respond,
        });
        for _ in 0..100 {
            let error = read(&verified, chunk(81)).await.unwrap_err();
            assert!(
                matches!(error, FetchError::Corrupt { offset, .. } if offset == 81 * CHUNK_SIZE)
            );
            assert!(!verified.try_read(81 * CHUNK_SIZE, &mut [0]));
        }
        // It isn't fetched again for a while, and not along with others either.
        assert_eq!(store.received().len(), 2, "{round}");
        let error = verified.read(chunk(80).start..chunk(82).end, Priority::Demand).await;
        assert_eq!(error.unwrap_err().label(), "corrupt");
        assert_eq!(verified.prefetch(chunk(81)).await.unwrap(), 0);
        assert_eq!(store.received().len(), 0, "{round}");
        tokio::time::sleep(10 * SECOND).await;
    }
    store.script(|_, _| Action::Respond);
    read(&verified, chunk(81)).await.unwrap();
    // Unverified bytes are in another namespace.
    store.script(|_, _| Action::Corrupt);
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

/// A request that waits to be repeated doesn't wait longer than the store is down.
#[tokio::test(start_paused = true)]
async fn a_recovery_ends_backoffs() {
    let store = store();
    let (fetcher, object) = open_by_chunks(&store).await;
    store.script(|_, _| Action::Fail(StoreErrorKind::ServerError));
    let mut readers = Vec::new();
    // One failure after the other, so that each has its own backoff.
    for n in 0..9 {
        let object = object.clone();
        readers.push(tokio::spawn(async move { read(&object, chunk(5 + 20 * n)).await }));
        tokio::time::sleep(400 * MILLI).await;
    }
    tokio::time::sleep(10 * SECOND).await;
    assert_eq!(fetcher.stats().stores[0].breaker, BreakerState::Open);
    store.script(|_, _| Action::Respond);
    let recovered = Instant::now();
    join_all(readers).await.into_iter().for_each(|result| result.unwrap().unwrap());
    assert!(recovered.elapsed() < 1100 * MILLI, "{:?}", recovered.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_recovery_replaces_requests_that_hang() {
    let store = store();
    let (fetcher, object) = open_by_chunks(&store).await;
    store.script(|n, _| match n {
        0..4 => Action::Hang,
        _ => Action::Fail(StoreErrorKind::Unreachable),
    });
    let readers: Vec<_> = (0..12)
        .map(|n| {
            let object = object.clone();
            tokio::spawn(async move { read(&object, chunk(5 + 20 * n)).await })
        })
        .collect();
    tokio::time::sleep(10 * SECOND).await;
    assert_eq!(fetcher.stats().stores[0].breaker, BreakerState::Open);
    store.script(|_, _| Action::Respond);
    let recovered = Instant::now();
    join_all(readers).await.into_iter().for_each(|result| result.unwrap().unwrap());
    assert!(recovered.elapsed() < 1100 * MILLI, "{:?}", recovered.elapsed());
}

#[tokio::test(start_paused = true)]
async fn listings_are_retried_page_by_page() {
    let store = store();
    let (fetcher, _object) = open_by_chunks(&store).await;
    let list = |is_dispensable| {
        let store: Arc<dyn Store> = Arc::clone(&store) as _;
        let fetcher = Arc::clone(&fetcher);
        async move { fetcher.list(&store, "v7/", is_dispensable).await }
    };
    // Every second response is one that asks for patience.
    store.script(|n, _| match n % 2 {
        0 => Action::Throttle(Some(SECOND)),
        _ => Action::Respond,
    });
    let begin = Instant::now();
    let names: Vec<_> = list(false).await.unwrap().into_iter().map(|it| it.name).collect();
    assert_eq!(names, ["v7/0", "v7/1", "v7/2", "v7/3", "v7/4"]);
    assert_eq!(store.received().len(), 10);
    assert!((5..7).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
    let stats = fetcher.stats().stores.remove(0);
    assert_eq!((stats.throttled, stats.retries), (5, 5));

    for (action, is_dispensable, expected, seconds) in [
        (Action::Fail(StoreErrorKind::Denied), false, "denied", 0..1),
        (Action::Throttle(Some(20 * SECOND)), true, "throttled", 10..11),
        (Action::Throttle(Some(20 * SECOND)), false, "throttled", 60..61),
        (Action::Fail(StoreErrorKind::Unreachable), true, "down", 1..11),
        // The breaker is open now.
        (Action::Fail(StoreErrorKind::Unreachable), true, "down", 0..1),
        (Action::Fail(StoreErrorKind::Unreachable), false, "down", 60..61),
    ] {
        store.script(move |_, _| action);
        // A pause that the store has asked for is over.
        tokio::time::sleep(20 * SECOND).await;
        let begin = Instant::now();
        assert_eq!(list(is_dispensable).await.unwrap_err().label(), expected);
        assert!(seconds.contains(&begin.elapsed().as_secs()), "{action:?}: {:?}", begin.elapsed());
    }
}

/// A slow store isn't one that is down: only its readers give up.
#[tokio::test(start_paused = true)]
async fn a_response_may_take_longer_than_readers_wait() {
    let store = store();
    let config =
        FetcherConfig { fetch_size: MIB, store_timeout: 10 * SECOND, ..FetcherConfig::default() };
    let (fetcher, object) = open(&store, config).await;
    store.set_link(20 * MILLI, 64.0 * 1024.0);
    let begin = Instant::now();
    assert_eq!(label(&read(&object, chunk(43)).await), "timed_out");
    assert_eq!(begin.elapsed().as_secs(), 10);
    // What arrives isn't lost.
    read(&object, chunk(43)).await.unwrap();
    assert_eq!(begin.elapsed().as_secs(), 16);
    read(&object, chunk(40)).await.unwrap();
    assert_eq!(store.received().len(), 1);
    let stats = fetcher.stats().stores.remove(0);
    assert_eq!(stats.requests.keys().collect::<Vec<_>>(), [&(Priority::Demand, "ok")]);
    assert_eq!((stats.breaker, stats.retries), (BreakerState::Closed, 0));
}

#[tokio::test(start_paused = true)]
async fn what_has_arrived_is_not_requested_again() {
    let store = store();
    let (fetcher, object) = open(&store, FetcherConfig::default()).await;
    let verified = object.verified_by(Arc::new(Content));
    // Each breaks off within the second chunk.
    store.script(|n, _| match n {
        0..3 => Action::BreakOff(300_000),
        _ => Action::Respond,
    });
    read(&verified, 20 * MIB..21 * MIB).await.unwrap();
    let starts: Vec<_> = ranges(&store).into_iter().map(|range| range.start / CHUNK_SIZE).collect();
    assert_eq!(starts, [80, 81, 82, 83]);
    let stats = fetcher.stats().stores.remove(0);
    assert_eq!((stats.retries, stats.breaker), (3, BreakerState::Closed));
    // One that breaks off earlier is repeated.
    store.script(|n, _| if n < 3 { Action::BreakOff(200_000) } else { Action::Respond });
    read(&verified, 40 * MIB..41 * MIB).await.unwrap();
    assert_eq!(ranges(&store), vec![40 * MIB..41 * MIB; 4]);
}
