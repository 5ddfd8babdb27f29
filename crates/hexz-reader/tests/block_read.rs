//! The steps of reading a block: where its stored bytes are, which needs no reads, and decoding,
//! which only computes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use hexz_reader::storage::{FileId, Storage};
use hexz_reader::{Error, ErrorKind, Lookup, Missing, OpenOptions, Password, Snapshot};

use crate::archive_writer::{ArchiveWriter, PASSWORD, Piece, Written, image, noise};
use crate::support::{STREAMS, read_whole, with_password};

/// Archives that the Hexz tools wrote, and the password of the encrypted ones.
const ARCHIVES: [(&str, Option<&str>); 9] = [
    ("aux-lz4", None),
    ("base-zstd", None),
    ("child-zstd", None),
    ("grandchild-zstd", None),
    ("encrypted-lz4", Some("correct horse battery staple")),
    ("encrypted-zstd", Some("correct horse battery staple")),
    ("sparse-zstd", None),
    ("fixed-4k-zstd", None),
    ("text-dict-zstd", None),
];

fn path_of(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../tests/archives/{name}.hxz"))
}

/// Reads a block by its steps, and its stored bytes from the file of the archive that has them.
fn read_by_steps(snapshot: &Snapshot, block: &hexz_reader::Block) -> Result<Vec<u8>, Error> {
    let Lookup::Found(stored) = snapshot.stored_block(block)? else {
        panic!("its pages are in memory")
    };
    let paths: Vec<&Path> = [snapshot.path()].into_iter().chain(snapshot.parents()).collect();
    let file = fs::read(paths[stored.chain_index()]).unwrap();
    let mut bytes = file[stored.offset() as usize..][..stored.length() as usize].to_vec();
    snapshot.decode(&stored, &mut bytes)
}

#[test]
fn stored_bytes_from_elsewhere_decode_to_the_same_block() {
    let mut blocks = 0;
    for (name, password) in ARCHIVES {
        let password = password.map(|password| Password::new(password.into()).into());
        let options = OpenOptions { password, raw: true, ..OpenOptions::default() };
        let snapshot = Snapshot::open(&path_of(name), &options).unwrap();
        for stream in STREAMS {
            let mut at = 0;
            while at < snapshot.size(stream) {
                let block = snapshot.locate(stream, at).unwrap();
                let expected = snapshot.read_block(&block).unwrap();
                assert!(read_by_steps(&snapshot, &block).unwrap() == expected, "{name} {at}");
                let immediate = snapshot.read_block_in_memory(&block).unwrap();
                // A file system may not tell whether bytes are in memory.
                assert!(immediate.is_none_or(|bytes| bytes == expected), "{name} {at}");
                at = block.end();
                blocks += 1;
            }
        }
    }
    assert!(blocks > 100, "{blocks}");
}

/// Storage in memory that counts all reads.
#[derive(Debug)]
struct CountingStorage {
    bytes: Arc<[u8]>,
    reads: AtomicU64,
}

impl Storage for CountingStorage {
    fn length(&self) -> u64 {
        self.bytes.length()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.reads.fetch_add(1, Relaxed);
        self.bytes.read_exact_at(buffer, offset)
    }

    fn try_read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<bool> {
        self.read_exact_at(buffer, offset).map(|()| true)
    }

    fn file_id(&self) -> Option<FileId> {
        None
    }
}

fn open(archive: &Written, path: &Path) -> (Snapshot, Arc<CountingStorage>) {
    let bytes = Arc::from(archive.bytes.as_slice());
    let storage = Arc::new(CountingStorage { bytes, reads: 0.into() });
    let source = Arc::<CountingStorage>::clone(&storage);
    (Snapshot::from_storage(path, source, &with_password()).unwrap(), storage)
}

#[test]
fn lookup_and_decoding_read_nothing() {
    let main: Vec<Piece> = (0..20).map(|number| Piece::Data(noise(number, 3000))).collect();
    let writer = ArchiveWriter {
        main: [main, vec![Piece::Zeros(3000)]].concat(),
        password: Some(PASSWORD),
        ..ArchiveWriter::default()
    };
    let archive = writer.write();
    let (snapshot, storage) = open(&archive, Path::new("alone.hxz"));
    let expected = read_whole(&snapshot, STREAMS[0]).unwrap();
    let before = storage.reads.load(Relaxed);
    for (number, expected) in expected.chunks(3000).enumerate() {
        let block = snapshot.try_locate(STREAMS[0], number as u64 * 3000).unwrap().unwrap();
        let Ok(Lookup::Found(stored)) = snapshot.stored_block(&block) else { panic!("{number}") };
        let range = stored.offset() as usize..;
        let mut bytes = archive.bytes[range][..stored.length() as usize].to_vec();
        assert_eq!(stored.length() == 0, block.is_zeros());
        assert!(snapshot.decode(&stored, &mut bytes).unwrap() == expected, "{number}");
        // The bytes of another block are an error.
        if !block.is_zeros() {
            bytes[0] ^= 1;
            let error = snapshot.decode(&stored, &mut bytes).unwrap_err();
            assert!(matches!(error.kind, ErrorKind::ChecksumMismatch { .. }), "{error}");
        }
    }
    assert_eq!(storage.reads.load(Relaxed), before);
}

/// A child whose blocks are elsewhere in its parent, in the reverse order.
#[test]
fn lookup_tells_what_is_not_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let blocks: Vec<Vec<u8>> = (0..40).map(|number| noise(number, 3000)).collect();
    let parent = ArchiveWriter {
        main: blocks.iter().cloned().map(Piece::Data).collect(),
        blocks_per_page: 10,
        ..ArchiveWriter::default()
    };
    parent.write().save(&folder.path().join("parent.hxz"));
    let main: Vec<Piece> = blocks.iter().rev().cloned().map(Piece::InParent).collect();
    let child = ArchiveWriter {
        parents: vec!["parent.hxz".to_owned()],
        main: main.clone(),
        ..ArchiveWriter::default()
    };
    let (snapshot, _) = open(&child.write(), &folder.path().join("child.hxz"));
    let block = snapshot.locate(STREAMS[0], 0).unwrap();
    let lookup = || snapshot.stored_block(&block).unwrap();
    assert!(matches!(lookup(), Lookup::NotInMemory(Missing::Page(_))), "{:?}", lookup());
    assert_eq!(snapshot.read_block_in_memory(&block).unwrap(), None);
    // Reads the parent's page at the same offset, but doesn't build the index.
    assert_eq!(snapshot.try_read_block(&block).unwrap(), None);
    assert_eq!(lookup(), Lookup::NotInMemory(Missing::ParentIndex));
    assert_eq!(snapshot.read_block_in_memory(&block).unwrap(), None);
    snapshot.build_parent_index().unwrap();
    assert!(matches!(lookup(), Lookup::NotInMemory(Missing::Page(_))), "{:?}", lookup());
    assert!(snapshot.read_block(&block).unwrap() == image(&main)[..3000]);
    let Lookup::Found(stored) = lookup() else { panic!("{:?}", lookup()) };
    assert_eq!(stored.chain_index(), 1);
    let immediate = snapshot.read_block_in_memory(&block).unwrap();
    assert!(immediate.is_none_or(|bytes| bytes == image(&main)[..3000]));
}

#[test]
fn block_that_no_parent_has_is_an_error_of_the_lookup() {
    let folder = tempfile::tempdir().unwrap();
    let parent = ArchiveWriter::of_image(&noise(1, 3000), 3000);
    parent.write().save(&folder.path().join("parent.hxz"));
    let child = ArchiveWriter {
        parents: vec!["parent.hxz".to_owned()],
        main: vec![Piece::InParent(noise(2, 3000))],
        ..ArchiveWriter::default()
    };
    let (snapshot, _) = open(&child.write(), &folder.path().join("child.hxz"));
    let block = snapshot.locate(STREAMS[0], 0).unwrap();
    snapshot.build_parent_index().unwrap();
    assert!(snapshot.read_block(&block).is_err());
    let error = snapshot.stored_block(&block).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Unresolvable { .. }), "{error}");
    let error = snapshot.read_block_in_memory(&block).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::Unresolvable { .. }), "{error}");
}
