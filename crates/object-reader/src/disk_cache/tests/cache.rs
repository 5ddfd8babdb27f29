//! The cache alone: restarts, sizes, eviction, failures of the disk.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use super::super::file::FILE_NAMES;
use super::*;

#[tokio::test]
async fn chunks_survive_a_restart() {
    let folder = temporary_folder();
    let disk = open(folder.path(), 8);
    store(&disk, key(1, 0), SLOT, false);
    store(&disk, key(1, 1), 1000, false);
    store(&disk, key(2, 7), 1, true);
    assert!(read(&disk, key(1, 1), 1000).await);
    assert!(!read(&disk, key(1, 2), SLOT).await);
    drop(disk);
    let disk = open(folder.path(), 8);
    assert!(read(&disk, key(1, 0), SLOT).await);
    assert!(read(&disk, key(1, 1), 1000).await);
    assert!(read(&disk, key(2, 7), 1).await);
    assert!(!disk.contains(&key(2, 0)));
    let stats = disk.stats();
    assert_eq!((stats.slots_used, stats.slots, stats.bytes), (3, 8, SLOT + 1001));
    assert_eq!((stats.hits, stats.bad, stats.is_off), (3, 0, false));
}

#[tokio::test]
async fn a_chunk_is_written_once() {
    let folder = temporary_folder();
    let disk = open(folder.path(), 8);
    for _ in 0..3 {
        store(&disk, key(1, 0), SLOT, false);
    }
    assert_eq!(disk.shared.generation.load(Relaxed), 1);
    disk.insert(key(1, 1), Bytes::new(), false);
    assert!(!disk.contains(&key(1, 1)));
}

#[test]
fn a_folder_is_used_once_at_a_time() {
    let folder = temporary_folder();
    let disk = open(folder.path(), 8);
    let second = DiskCache::open_with(&config(folder.path(), 8), Allocation::Full, 1);
    let error = second.unwrap_err();
    assert_eq!(error.label(), "disk_cache_in_use");
    assert!(error.to_string().contains("in use by another process"));
    close(&disk);
    open(folder.path(), 8);
}

#[test]
fn files_are_private_and_have_their_final_size_from_the_start() {
    let parent = temporary_folder();
    let folder = parent.path().join("cache");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("chunks"), "old").unwrap();
    fs::set_permissions(folder.join("chunks"), fs::Permissions::from_mode(0o644)).unwrap();
    let disk = open(&folder, 8);
    let sizes = || {
        FILE_NAMES.map(|name| {
            let metadata = fs::metadata(folder.join(name)).unwrap();
            assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
            (metadata.len(), metadata.blocks() * 512 >= metadata.len())
        })
    };
    let expected = [4096 + 8 * 64, 8 * SLOT, 4096 * 2048].map(|size| (size, true));
    assert_eq!(sizes(), expected);
    (0..20).for_each(|chunk| store(&disk, key(1, chunk), SLOT, false));
    drop(disk);
    assert_eq!(sizes(), expected);
}

#[test]
fn folders_that_cannot_be_used_are_errors() {
    let folder = temporary_folder();
    let label = |config: DiskCacheConfig| DiskCache::open(&config).unwrap_err().label();
    assert_eq!(label(config(folder.path(), 63)), "disk_cache_too_small");
    assert_eq!(label(config(&folder.path().join("missing/folder"), 64)), "disk_cache_io");
    fs::write(folder.path().join("file"), "").unwrap();
    assert_eq!(label(config(&folder.path().join("file"), 64)), "disk_cache_io");
    // Links aren't followed.
    std::os::unix::fs::symlink(folder.path().join("file"), folder.path().join("slots")).unwrap();
    assert_eq!(label(config(folder.path(), 64)), "disk_cache_io");
}

#[tokio::test]
async fn a_file_system_without_enough_space_gets_a_smaller_cache() {
    let folder = temporary_folder();
    let disk = open(folder.path(), 50);
    (0..50).for_each(|chunk| store(&disk, key(1, chunk), 100, false));
    drop(disk);
    let limited = |slots, minimum| {
        let allocation = Allocation::Limited(slots * SLOT + 5);
        DiskCache::open_with(&config(folder.path(), 100), allocation, minimum)
    };
    let disk = limited(40, 36).unwrap();
    let stats = disk.stats();
    assert!((38..=40).contains(&stats.slots), "{}", stats.slots);
    assert_eq!(stats.slots_used, stats.slots);
    assert_eq!(fs::metadata(folder.path().join("chunks")).unwrap().len(), stats.slots * SLOT);
    drop(disk);
    let error = limited(35, 36).unwrap_err();
    assert_eq!(error.label(), "disk_cache_no_space");
    assert_eq!(fs::metadata(folder.path().join("chunks")).unwrap().len(), 0);
}

#[tokio::test]
async fn another_size_keeps_the_chunks_that_fit() {
    let folder = temporary_folder();
    let count = async |disk: &DiskCache| {
        let mut count = 0;
        for chunk in 0..16 {
            count += u32::from(read(disk, key(1, chunk), SLOT).await);
        }
        assert_eq!(disk.stats().bad, 0);
        count
    };
    let disk = open(folder.path(), 16);
    (0..16).for_each(|chunk| store(&disk, key(1, chunk), SLOT, false));
    drop(disk);
    let disk = open(folder.path(), 6);
    assert_eq!((count(&disk).await, disk.stats().slots), (6, 6));
    drop(disk);
    let disk = open(folder.path(), 10);
    assert_eq!((count(&disk).await, disk.stats().slots), (6, 10));
    (20..24).for_each(|chunk| store(&disk, key(1, chunk), SLOT, false));
    assert_eq!((count(&disk).await, disk.stats().slots_used), (6, 10));
}

#[tokio::test]
async fn foreign_and_damaged_files_are_overwritten() {
    for (name, bytes) in [
        ("slots", &b"#!/bin/sh"[..]),
        ("slots", &[255; 8192][..]),
        ("slots", b""),
        ("objects", &[1; 5000]),
        ("chunks", b"x"),
    ] {
        let folder = temporary_folder();
        let disk = open(folder.path(), 8);
        store(&disk, key(1, 0), SLOT, false);
        drop(disk);
        fs::write(folder.path().join(name), bytes).unwrap();
        let disk = open(folder.path(), 8);
        assert_eq!(read(&disk, key(1, 0), SLOT).await, name == "objects", "{name}");
        store(&disk, key(1, 0), SLOT, false);
        assert!(read(&disk, key(1, 0), SLOT).await);
    }
}

#[tokio::test]
async fn a_full_cache_evicts_what_is_not_used() {
    let folder = temporary_folder();
    let disk = open(folder.path(), 8);
    for chunk in 0..8 {
        store(&disk, key(1, chunk), SLOT, false);
    }
    for chunk in 0..4 {
        assert!(read(&disk, key(1, chunk), SLOT).await);
    }
    for chunk in 8..12 {
        store(&disk, key(1, chunk), SLOT, false);
        assert!(disk.stats().bytes <= 8 * SLOT);
    }
    let cached: Vec<_> = (0..12).filter(|chunk| disk.contains(&key(1, *chunk))).collect();
    assert_eq!(cached, [0, 1, 2, 3, 8, 9, 10, 11]);
    assert_eq!(disk.stats().evicted, 4);
    drop(disk);
    let disk = open(folder.path(), 8);
    for chunk in 0..12 {
        let is_cached = cached.contains(&chunk);
        assert_eq!(read(&disk, key(1, chunk), SLOT).await, is_cached);
    }
}

/// A hot set stays while a sequential reader goes through 20 times the size of the cache, also
/// across a restart.
#[tokio::test]
async fn sequential_readers_do_not_evict_the_hot_set() {
    let folder = temporary_folder();
    let mut disk = open(folder.path(), 50);
    for chunk in 0..50 {
        store(&disk, key(1, chunk), 100, false);
    }
    for chunk in 0..30 {
        assert!(read(&disk, key(1, chunk), 100).await);
    }
    for chunk in 0..1000 {
        store(&disk, key(2, chunk), 100, true);
        if chunk == 500 {
            drop(disk);
            disk = open(folder.path(), 50);
        }
    }
    let hot = (0..30).filter(|chunk| disk.contains(&key(1, *chunk))).count();
    assert!(hot >= 30, "{hot} of 30 hot chunks are left");
}

#[tokio::test]
async fn a_failing_disk_switches_the_cache_off() {
    let folder = temporary_folder();
    for kind in [io::ErrorKind::Other, io::ErrorKind::StorageFull] {
        for is_read in [true, false] {
            let disk = open(folder.path(), 8);
            store(&disk, key(1, 0), SLOT, false);
            *disk.shared.files.fault.lock() = Some(kind);
            match is_read {
                true => assert!(!read(&disk, key(1, 0), SLOT).await),
                false => store(&disk, key(1, 1), SLOT, false),
            }
            assert!(disk.stats().is_off);
            *disk.shared.files.fault.lock() = None;
            assert!(!read(&disk, key(1, 0), SLOT).await);
            store(&disk, key(1, 2), SLOT, false);
            assert!(!disk.contains(&key(1, 2)));
            disk.record_version("store", "key", &version());
            drop(disk);
            // The next start tries again.
            let disk = open(folder.path(), 8);
            assert!(read(&disk, key(1, 0), SLOT).await);
        }
    }
}

#[tokio::test]
async fn bytes_changed_behind_its_back_are_misses() {
    let folder = temporary_folder();
    let disk = open(folder.path(), 8);
    for chunk in 0..3 {
        store(&disk, key(1, chunk), SLOT, false);
    }
    let chunks = File::options().write(true).open(folder.path().join("chunks")).unwrap();
    chunks.write_all_at(&[0xff], SLOT + 5000).unwrap();
    chunks.set_len(2 * SLOT + 10).unwrap();
    assert!(read(&disk, key(1, 0), SLOT).await);
    assert!(!read(&disk, key(1, 1), SLOT).await);
    assert!(!read(&disk, key(1, 2), SLOT).await);
    // Another length than that of the object.
    assert!(!read(&disk, key(1, 0), 500).await);
    let stats = disk.stats();
    assert_eq!((stats.bad, stats.slots_used, stats.is_off), (3, 0, false));
    store(&disk, key(1, 2), SLOT, false);
    assert!(read(&disk, key(1, 2), SLOT).await);
}

#[tokio::test]
async fn concurrent_readers_and_writers_see_right_bytes() {
    let folder = temporary_folder();
    let disk = open(folder.path(), 8);
    let tasks = (0..8_u32).map(|task| {
        let disk = Arc::clone(&disk);
        tokio::spawn(async move {
            let mut hits = 0;
            for step in 0..100 {
                let key = key(1, (task * 31 + step * 7) % 20);
                if read(&disk, key, 5000).await {
                    hits += 1;
                } else {
                    disk.insert(key, bytes(key, 5000), step % 2 == 0);
                }
                tokio::task::yield_now().await;
            }
            hits
        })
    });
    let mut hits = 0;
    for task in tasks.collect::<Vec<_>>() {
        hits += task.await.unwrap();
    }
    settle(&disk);
    let stats = disk.stats();
    assert_eq!((stats.bad, stats.hits, stats.is_off), (0, hits, false));
}

#[test]
fn writes_are_dropped_when_too_many_are_queued() {
    let folder = temporary_folder();
    let disk = open(folder.path(), 500);
    let chunk = bytes(key(1, 0), SLOT);
    let count = 400;
    (0..count).for_each(|n| disk.insert(key(1, n), chunk.clone(), false));
    settle(&disk);
    let stats = disk.stats();
    assert_eq!(stats.slots_used + stats.writes_dropped, u64::from(count));
}

#[test]
fn a_cache_of_100_gib_opens_within_a_second() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path(), 400 << 10);
    let Ok(disk) = DiskCache::open_with(&config, Allocation::Sparse, 1) else {
        return println!("skipped: no sparse files of this size");
    };
    // All slots in use.
    let nonce = disk.shared.files.head.nonce;
    let entries: Vec<u8> = (0..400_u32 << 10)
        .flat_map(|slot| {
            let key = key(u8::try_from(slot % 256).unwrap(), slot);
            let entry = format::Entry {
                key,
                length: 1,
                hash: [0; 16],
                generation: slot.wrapping_mul(7919),
                is_sequential: false,
            };
            entry.encode(&nonce, slot)
        })
        .collect();
    disk.shared.files.slots.write_all_at(&entries, 4096).unwrap();
    drop((disk, entries));
    let begin = Instant::now();
    let disk = DiskCache::open_with(&config, Allocation::Sparse, 1).unwrap();
    let elapsed = begin.elapsed();
    let per_slot = disk.memory() / (400 << 10);
    println!("opened in {elapsed:?}, {} bytes, {per_slot} per slot", disk.memory());
    assert_eq!(disk.stats().slots_used, 400 << 10);
    assert!(disk.memory() <= 48 * (400 << 10));
    // Without optimization, on a busy machine.
    assert!(elapsed < Duration::from_secs(5), "{elapsed:?}");
}

fn version() -> Version {
    Version { length: 5, etag: Some("\"1\"".into()), version_id: None, last_modified: None }
}

#[test]
fn versions_of_objects_survive_a_restart() {
    let folder = temporary_folder();
    let disk = open(folder.path(), 8);
    assert_eq!(disk.known_version("s3://b", "a"), None);
    let newer = Version { version_id: Some("x".into()), ..version() };
    disk.record_version("s3://b", "a", &version());
    disk.record_version("s3://b", "c", &version());
    disk.record_version("s3://b", &"long".repeat(600), &version());
    close(&disk);
    let disk = open(folder.path(), 8);
    disk.record_version("s3://b", "c", &newer);
    close(&disk);
    let disk = open(folder.path(), 8);
    assert_eq!(disk.known_version("s3://b", "a"), Some(version()));
    assert_eq!(disk.known_version("s3://b", "c"), Some(newer));
    assert_eq!(disk.known_version("s3://", "ba"), None);
    assert_eq!(disk.known_version("s3://b", &"long".repeat(600)), None);
}
