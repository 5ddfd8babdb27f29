//! Tests of the disk cache, alone and below a fetcher.

mod cache;
mod crash;
mod fetching;
mod inspecting;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tempfile::TempDir;

use super::*;
use crate::fetcher::testing::content;
use crate::object::ObjectId;

const SLOT: u64 = CHUNK_SIZE;

/// Returns a folder in memory, if there is such a file system: flushes are fast there.
fn temporary_folder() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn config(folder: &Path, slots: u64) -> DiskCacheConfig {
    DiskCacheConfig { folder: folder.to_owned(), size: slots * SLOT }
}

fn open(folder: &Path, slots: u64) -> Arc<DiskCache> {
    DiskCache::open_with(&config(folder, slots), Allocation::Full, 1).unwrap()
}

fn key(object: u8, chunk: u32) -> DiskKey {
    DiskKey { object: ObjectId::from_bytes([object; 16]), chunk }
}

/// Returns the bytes of a chunk, which differ from those of all others.
fn bytes(key: DiskKey, length: u64) -> Bytes {
    let start = u64::from(key.chunk) * CHUNK_SIZE;
    content(key.object.as_bytes()[0].into(), start, start + length).into()
}

/// Stores a chunk, and waits until it is written.
fn store(disk: &DiskCache, key: DiskKey, length: u64, is_sequential: bool) {
    disk.insert(key, bytes(key, length), is_sequential);
    settle(disk);
}

/// Closes a cache that somebody still refers to.
fn close(disk: &DiskCache) {
    disk.close();
    disk.shared.files.slots.unlock().unwrap();
}

/// Waits until nothing is queued or being written.
fn settle(disk: &DiskCache) {
    let begin = Instant::now();
    while !disk.shared.chunks.lock().pending.is_empty() {
        assert!(begin.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Reads a chunk, and compares it with what it should be. Returns false if it isn't there.
async fn read(disk: &DiskCache, key: DiskKey, length: u64) -> bool {
    let read = disk.read(key, length, Priority::Demand).await;
    read.is_some_and(|read| {
        assert!(read == bytes(key, length), "wrong bytes of {key:?}");
        true
    })
}
