//! Listing, checking and clearing a folder.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::*;

fn version(number: u64) -> Version {
    Version { length: number, etag: None, version_id: None, last_modified: None }
}

#[test]
fn contents_are_listed_by_object() {
    let folder = temporary_folder();
    let disk = open(folder.path(), 16);
    for name in ["a", "b", "c"] {
        disk.record_version("s3://golden", name, &version(5));
    }
    let id = |name| ObjectId::of("s3://golden", name, &version(5));
    for (name, chunk, length) in [("a", 0, 10), ("b", 0, 30), ("b", 1, 4)] {
        store(&disk, DiskKey { object: id(name), chunk }, length, false);
    }
    store(&disk, key(9, 0), 7, false);
    assert!(DiskCache::inspect(folder.path()).unwrap().is_in_use);
    assert_eq!(DiskCache::clear(folder.path()).unwrap_err().label(), "disk_cache_in_use");
    drop(disk);
    let contents = DiskCache::inspect(folder.path()).unwrap();
    let object = |object: &CachedObject| (object.key.clone(), object.chunks, object.bytes);
    let objects: Vec<_> = contents.objects.iter().map(object).collect();
    assert_eq!(objects, [("b".into(), 2, 34), ("a".into(), 1, 10), ("c".into(), 0, 0)]);
    assert_eq!((contents.other_chunks, contents.other_bytes), (1, 7));
    assert_eq!((contents.is_in_use, contents.slots), (false, 16));
    assert!(contents.objects[0].opened.elapsed().unwrap() < Duration::from_secs(600));
}

#[test]
fn a_check_counts_chunks_that_do_not_match() {
    let folder = temporary_folder();
    let disk = open(folder.path(), 16);
    (0..5).for_each(|chunk| store(&disk, key(1, chunk), 100, false));
    let check = |good, bad| DiskCacheCheck { good, bad, bytes: 500 };
    assert_eq!(DiskCache::check(folder.path()).unwrap(), check(5, 0));
    drop(disk);
    let chunks = File::options().write(true).open(folder.path().join("chunks")).unwrap();
    chunks.write_all_at(b"wrong", 3 * SLOT).unwrap();
    assert_eq!(DiskCache::check(folder.path()).unwrap(), check(4, 1));
}

#[test]
fn clearing_removes_only_the_files_of_a_cache() {
    let folder = temporary_folder();
    assert_eq!(DiskCache::clear(folder.path()).unwrap_err().label(), "disk_cache_io");
    std::fs::write(folder.path().join("other"), "").unwrap();
    for name in ["slots", "chunks", "objects"] {
        std::fs::write(folder.path().join(name), "mine").unwrap();
    }
    assert_eq!(DiskCache::clear(folder.path()).unwrap_err().label(), "disk_cache_unknown");
    open(folder.path(), 8);
    DiskCache::clear(folder.path()).unwrap();
    let files: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(files.len(), 1);
}
