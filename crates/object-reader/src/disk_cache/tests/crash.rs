//! Simulated crashes: no wrong byte, no failed read, whatever became of the files.

use std::fs;

use proptest::prelude::*;

use super::*;
use crate::fetcher::testing::ScriptedStore;
use crate::fetcher::{Fetcher, FetcherConfig};

const SLOTS: u64 = 12;
const LENGTH: u64 = 8 * SLOT + 1000;
const CHUNKS: u64 = 9;

/// Damage to one of the three files. Places are in millionths of its
/// length.
#[derive(Debug, Clone)]
enum Damage {
    /// One bit is wrong.
    Flip { place: usize, bit: u8 },
    /// The end is missing.
    Truncate { place: usize },
    /// These blocks of 512 bytes haven't been written since the last flush.
    Stale { place: usize, blocks: usize },
    /// These blocks have been allocated and not written.
    Zero { place: usize, blocks: usize },
}

fn damages() -> impl Strategy<Value = Vec<(usize, Damage)>> {
    let place = 0_usize..1_000_000;
    let damage = prop_oneof![
        4 => (place.clone(), 0_u8..8).prop_map(|(place, bit)| Damage::Flip { place, bit }),
        1 => place.clone().prop_map(|place| Damage::Truncate { place }),
        4 => (place.clone(), 1_usize..2000)
            .prop_map(|(place, blocks)| Damage::Stale { place, blocks }),
        2 => (place, 1_usize..2000).prop_map(|(place, blocks)| Damage::Zero { place, blocks }),
    ];
    // The entries are small and matter most.
    let file = prop_oneof![3 => Just(0_usize), 3 => Just(1), 1 => Just(2)];
    prop::collection::vec((file, damage), 1..8)
}

type Snapshot = [Vec<u8>; 3];

fn snapshot(folder: &Path) -> Snapshot {
    file::FILE_NAMES.map(|name| fs::read(folder.join(name)).unwrap())
}

fn apply(damage: &Damage, file: &mut Vec<u8>, old: &[u8]) {
    let length = file.len();
    let at = |place: usize| place * length / 1_000_000;
    let blocks = |place: usize, blocks: usize| {
        let start = at(place) / 512 * 512;
        start..(start + blocks * 512).min(length)
    };
    match *damage {
        Damage::Flip { place, bit } => {
            if let Some(byte) = file.get_mut(at(place)) {
                *byte ^= 1 << bit;
            }
        }
        Damage::Truncate { place } => file.truncate(at(place)),
        Damage::Stale { place, blocks: count } => {
            let range = blocks(place, count);
            let old = &old[range.start.min(old.len())..range.end.min(old.len())];
            file[range.start..range.start + old.len()].copy_from_slice(old);
        }
        Damage::Zero { place, blocks: count } => file[blocks(place, count)].fill(0),
    }
}

/// Reads the whole object through a cache in `folder`. Returns the counters.
fn read_all(folder: &Path, store: &Arc<ScriptedStore>, revision: u64) -> DiskCacheStats {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let disk = open(folder, SLOTS);
        let config = FetcherConfig {
            fetch_size: SLOT,
            disk_cache: Some(Arc::clone(&disk)),
            ..FetcherConfig::default()
        };
        let fetcher = Fetcher::new(config);
        let object = fetcher.open(Arc::clone(store) as _, "key").await.unwrap();
        for chunk in [3, 1, 5, 0, 7, 2, 4, 8, 6] {
            let range = chunk * SLOT..LENGTH.min((chunk + 1) * SLOT);
            let bytes = object.read(range.clone(), Priority::Demand).await.unwrap();
            assert!(bytes == content(revision, range.start, range.end), "wrong bytes in {range:?}");
        }
        settle(&disk);
        fetcher.shutdown();
        close(&disk);
        disk.stats()
    })
}

/// Returns the files after a first run, and after a second one in which the object was replaced.
fn snapshots(store: &Arc<ScriptedStore>) -> (Snapshot, Snapshot) {
    let folder = temporary_folder();
    read_all(folder.path(), store, 1);
    let old = snapshot(folder.path());
    store.replace();
    let stats = read_all(folder.path(), store, 2);
    assert_eq!((stats.hits, stats.evicted), (0, 6));
    let new = snapshot(folder.path());
    let stats = read_all(folder.path(), store, 2);
    assert_eq!((stats.hits, stats.misses, stats.bad), (CHUNKS, 0, 0));
    (old, new)
}

#[test]
fn after_a_thousand_crashes_no_byte_is_wrong_and_no_read_fails() {
    let store = ScriptedStore::new(LENGTH);
    let (old, new) = snapshots(&store);
    let [damaged, missed, bad] = [0_u64; 3].map(std::cell::Cell::new);
    let add = |counter: &std::cell::Cell<u64>, n| counter.set(counter.get() + n);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1000) };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let result = runner.run(&(damages(), any::<[bool; 3]>()), |(damages, is_old)| {
        let mut files = new.clone();
        for ((file, old), is_old) in files.iter_mut().zip(&old).zip(is_old) {
            if is_old && damages.len() < 3 {
                file.clone_from(old);
            }
        }
        for (file, damage) in &damages {
            apply(damage, &mut files[*file], &old[*file]);
        }
        let folder = temporary_folder();
        for (name, bytes) in file::FILE_NAMES.iter().zip(files) {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        let stats = read_all(folder.path(), &store, 2);
        prop_assert!(stats.misses >= stats.bad);
        prop_assert!(stats.hits <= CHUNKS);
        add(&damaged, 1);
        add(&missed, u64::from(stats.misses > 0 || stats.hits < CHUNKS));
        add(&bad, stats.bad);
        // What is opened from the store is compared only in the next run. Then all is right again.
        if damaged.get() % 20 == 0 {
            read_all(folder.path(), &store, 2);
            let stats = read_all(folder.path(), &store, 2);
            prop_assert_eq!((stats.hits, stats.misses, stats.bad), (CHUNKS, 0, 0));
        }
        Ok(())
    });
    result.unwrap();
    let (damaged, missed, bad) = (damaged.get(), missed.get(), bad.get());
    println!("{damaged} crashes, {missed} with misses, {bad} bad chunks");
    assert!(missed > 300 && bad > 300);
}
