//! `hexz-nbd inspect`: what an archive holds, by its header and index.

mod command;
mod huge;
mod naive;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hexz_reader::summary::{ArchiveSummary, BlockTotals, SignatureStatus, StreamSummary};
use hexz_reader::{OpenOptions, Snapshot, StreamKind};

use crate::archive_writer::{ArchiveWriter, Piece, block_entry, noise, text};
use crate::snapshot::{STREAMS, with_password};
use crate::support::archive;

const ARCHIVES: [&str; 13] = [
    "aux-lz4.hxz",
    "base-lz4.hxz",
    "base-zstd.hxz",
    "child-zstd.hxz",
    "encrypted-lz4.hxz",
    "encrypted-zstd.hxz",
    "fixed-4k-zstd.hxz",
    "fixed-64k-zstd.hxz",
    "grandchild-zstd.hxz",
    "signed-zstd.hxz",
    "sparse-zstd.hxz",
    "text-dict-zstd.hxz",
    "tree.hxz",
];

fn facts(path: &Path) -> ArchiveSummary {
    ArchiveSummary::of_file(path, &OpenOptions::default(), |_| ()).unwrap()
}

fn of_bytes(bytes: &[u8]) -> ArchiveSummary {
    let storage = Arc::new(Arc::<[u8]>::from(bytes));
    ArchiveSummary::of_storage(Path::new("alone.hxz"), storage, &OpenOptions::default(), |_| ())
        .unwrap()
}

/// All blocks whose page can be read, in exactly one place each.
fn parts(stream: &StreamSummary) -> BlockTotals {
    [stream.stored, stream.zeros, stream.in_parents, stream.unresolvable, stream.contradictory]
        .into_iter()
        .fold(BlockTotals::default(), |sum, part| BlockTotals {
            blocks: sum.blocks + part.blocks,
            bytes: sum.bytes + part.bytes,
        })
}

/// The bytes of the index, counted by something that knows nothing of the reader.
#[test]
fn each_archive_as_its_raw_index_has_it() {
    for name in ARCHIVES {
        let facts = facts(&archive(name));
        let naive = naive::count(&std::fs::read(archive(name)).unwrap());
        assert!(facts.is_sound(), "{name}: {:?}", facts.faults);
        for ((_, stream), naive) in facts.streams().into_iter().zip(&naive.streams) {
            assert_eq!(stream.size, naive.size, "{name}");
            assert_eq!(stream.pages, naive.pages, "{name}");
            let lengths = &stream.lengths;
            assert_eq!(lengths.blocks() as usize, naive.lengths.len(), "{name}");
            assert_eq!(lengths.bytes(), naive.size, "{name}");
            assert_eq!(lengths.smallest(), naive.lengths.first().copied(), "{name}");
            assert_eq!(lengths.largest(), naive.lengths.last().copied(), "{name}");
            let middle = naive.lengths.len().saturating_sub(1) / 2;
            assert_eq!(lengths.median(), naive.lengths.get(middle).copied(), "{name}");
            let counted: u64 = lengths.histogram().iter().map(|(_, blocks)| blocks).sum();
            assert_eq!(counted, lengths.blocks(), "{name}");
            assert_eq!(parts(stream).blocks, lengths.blocks(), "{name}");
            assert_eq!(parts(stream).bytes, stream.size, "{name}");
        }
        let stored = &facts.stored;
        assert_eq!(stored.blocks, naive.stored_blocks, "{name}");
        assert_eq!(stored.undeduplicated_bytes, naive.unshared, "{name}");
        assert_eq!(stored.copies, naive.copies, "{name}");
        assert_eq!(stored.copy_bytes, naive.copy_bytes, "{name}");
        assert!(!stored.is_estimate);
    }
}

/// What is said to be zeros is, and what isn't said to be could have been something else only
/// where the archive is encrypted.
#[test]
fn zeros_as_the_blocks_have_them() {
    for name in ARCHIVES {
        let options = OpenOptions { raw: true, ..with_password() };
        let snapshot = Snapshot::open(&archive(name), &options).unwrap();
        let facts = facts(&archive(name));
        for (kind, stream) in facts.streams() {
            let (mut at, mut zeros) = (0, 0);
            while at < snapshot.size(kind) {
                let block = snapshot.locate(kind, at).unwrap();
                let bytes = snapshot.read_block(&block).unwrap();
                zeros += u64::from(bytes.iter().all(|&byte| byte == 0)) * bytes.len() as u64;
                at = block.end();
            }
            assert!(stream.zeros.bytes <= zeros, "{name}: {} of {zeros}", stream.zeros.bytes);
            assert_eq!(stream.zeros.bytes, zeros, "{name}");
        }
    }
}

#[test]
fn headers() {
    let base = facts(&archive("base-zstd.hxz"));
    assert_eq!(base.file_length, 164_658);
    assert_eq!((base.main.size, base.auxiliary.size), (8_388_608, 0));
    let chunking = base.chunking.unwrap();
    assert_eq!(
        (chunking.average_bits, chunking.smallest, chunking.largest),
        (16, 16 << 10, 256 << 10)
    );
    assert_eq!((base.key_iterations, base.signature, base.dictionary_length), (None, None, None));
    assert!(base.has_variable_blocks && base.manifest.is_none() && base.parents.is_empty());

    let fixed = facts(&archive("fixed-4k-zstd.hxz"));
    assert!(fixed.chunking.is_none() && !fixed.has_variable_blocks);
    assert_eq!(
        (fixed.main.lengths.smallest(), fixed.main.lengths.largest()),
        (Some(4096), Some(4096))
    );
    assert_eq!(facts(&archive("encrypted-lz4.hxz")).key_iterations, Some(600_000));
    assert_eq!(facts(&archive("text-dict-zstd.hxz")).dictionary_length, Some(112_640));
    assert_eq!(facts(&archive("aux-lz4.hxz")).auxiliary.size, 70_000);
    assert_eq!(facts(&archive("signed-zstd.hxz")).signature, Some(SignatureStatus::NotVerified));
    let manifest = facts(&archive("tree.hxz")).manifest.unwrap();
    assert_eq!((manifest.files, manifest.bytes), (17, 288_662));
}

#[test]
fn blocks_per_parent() {
    let facts = facts(&archive("grandchild-zstd.hxz"));
    let depths: Vec<u32> = facts.chain.iter().map(|holder| holder.depth).collect();
    assert_eq!(depths, [0, 1, 2]);
    // By the offsets that the reader finds, each block that isn't zeros is in one archive.
    let snapshot =
        Snapshot::open(&archive("grandchild-zstd.hxz"), &OpenOptions::default()).unwrap();
    let (mut at, mut own, mut others) = (0, 0, 0);
    while at < snapshot.size(StreamKind::Main) {
        let block = snapshot.locate(StreamKind::Main, at).unwrap();
        match block.stored_offset() {
            Some(_) => own += 1,
            None => others += u64::from(!block.is_zeros()),
        }
        at = block.end();
    }
    assert_eq!(facts.chain[0].blocks, own);
    assert_eq!(facts.main.stored.blocks, own);
    let inherited: u64 = facts.chain[1..].iter().map(|holder| holder.blocks).sum();
    assert_eq!(inherited, facts.main.in_parents.blocks);
    // Single blocks of zeros in a parent are found out when they are found.
    assert!(inherited <= others && facts.chain[1].blocks > 0 && facts.chain[2].blocks > 0);
}

#[test]
fn duplicates_and_zeros_that_were_made() {
    let data: Vec<Piece> = (0..10).map(|seed| Piece::Data(noise(seed % 4, 3000))).collect();
    let zeros = [Piece::Zeros(4096), Piece::Data(vec![0; 8192])];
    let main: Vec<Piece> = data.into_iter().chain(zeros).collect();
    let written = ArchiveWriter { main, blocks_per_page: 3, ..ArchiveWriter::default() }.write();
    let facts = of_bytes(&written.bytes);
    assert!(facts.is_sound(), "{:?}", facts.faults);
    assert_eq!((facts.main.pages, facts.main.lengths.blocks()), (4, 12));
    assert_eq!(facts.main.stored, BlockTotals { blocks: 10, bytes: 30_000 });
    assert_eq!(facts.main.zeros, BlockTotals { blocks: 2, bytes: 12_288 });
    assert_eq!(facts.main.stored_zeros, BlockTotals { blocks: 1, bytes: 8192 });
    assert_eq!((facts.stored.blocks, facts.stored.copies, facts.stored.duplicates()), (11, 5, 6));
    let lengths = written.main.iter().flat_map(|page| &page.blocks).map(|block| block.stored.len());
    let unshared: usize = lengths.sum();
    assert_eq!(facts.stored.undeduplicated_bytes, unshared as u64);
    assert!(facts.stored.saved() > 6 * 2900);
}

#[test]
fn missing_parents_leave_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let alone = folder.path().join("grandchild.hxz");
    std::fs::copy(archive("grandchild-zstd.hxz"), &alone).unwrap();
    let (whole, facts) = (facts(&archive("grandchild-zstd.hxz")), facts(&alone));
    assert!(!facts.is_sound());
    assert_eq!((facts.parents.len(), facts.parents[0].archive), (1, None));
    assert_eq!(facts.parents[0].name, "child-zstd.hxz");
    assert_eq!(facts.main.stored, whole.main.stored);
    assert_eq!(facts.stored, whole.stored);
    assert_eq!(parts(&facts.main), parts(&whole.main));
    assert!(facts.main.unresolvable.blocks >= whole.main.in_parents.blocks);
    // One for the parent, one for all blocks in it.
    assert_eq!(facts.faults.len(), 2, "{:?}", facts.faults);

    // With the parent, but without its own.
    std::fs::copy(archive("child-zstd.hxz"), folder.path().join("child-zstd.hxz")).unwrap();
    let facts = self::facts(&alone);
    let found: Vec<Option<usize>> = facts.parents.iter().map(|parent| parent.archive).collect();
    assert_eq!(found, [Some(1), None]);
    assert_eq!(facts.parents[1].child, 1);
    assert_eq!(facts.chain[1].blocks, whole.chain[1].blocks);

    // A folder of parents, given.
    let parents = vec![archive("")];
    let options = OpenOptions { parent_dirs: parents, ..OpenOptions::default() };
    let facts = ArchiveSummary::of_file(&alone, &options, |_| ()).unwrap();
    assert!(facts.is_sound(), "{:?}", facts.faults);
    assert_eq!(facts.main, whole.main);
}

#[test]
fn parents_in_a_circle() {
    let folder = tempfile::tempdir().unwrap();
    for (name, parent) in [("a.hxz", "b.hxz"), ("b.hxz", "a.hxz")] {
        let main = vec![Piece::Data(text(1, 5000))];
        let writer =
            ArchiveWriter { main, parents: vec![parent.to_owned()], ..ArchiveWriter::default() };
        writer.write().save(&folder.path().join(name));
    }
    let facts = facts(&folder.path().join("a.hxz"));
    assert!(!facts.is_sound());
    assert_eq!(facts.chain.len(), 2);
    assert_eq!(facts.faults[0].kind.label(), "parent_cycle");
}

/// What a damaged page was about is unknown, and nothing else is.
#[test]
fn damaged_pages() {
    let main: Vec<Piece> = (0..30).map(|seed| Piece::Data(noise(seed, 1000))).collect();
    let mut written =
        ArchiveWriter { main, blocks_per_page: 5, ..ArchiveWriter::default() }.write();
    let entry = written.main[2].blocks[1].entry;
    written.put(entry + block_entry::LENGTH, &999_u32.to_le_bytes());
    let facts = of_bytes(&written.bytes);
    assert!(!facts.is_sound());
    assert_eq!(facts.main.unreadable, BlockTotals { blocks: 5, bytes: 5000 });
    assert_eq!(facts.main.stored, BlockTotals { blocks: 25, bytes: 25_000 });
    assert_eq!(facts.faults.len(), 1);
    assert_eq!(facts.faults[0].offset, Some(written.main[2].place.start as u64));
}

/// However many faults there are, they take no more memory than some.
#[test]
fn many_faults_are_counted() {
    let main: Vec<Piece> = (0..150).map(|seed| Piece::Data(noise(seed, 100))).collect();
    let mut written =
        ArchiveWriter { main, blocks_per_page: 1, ..ArchiveWriter::default() }.write();
    for page in written.main.clone() {
        written.put(page.blocks[0].entry + block_entry::LENGTH, &99_u32.to_le_bytes());
    }
    let facts = of_bytes(&written.bytes);
    assert_eq!((facts.faults.len(), facts.omitted_faults), (100, 50));
    assert_eq!(facts.main.unreadable, BlockTotals { blocks: 150, bytes: 15_000 });
}

/// No byte of a damaged header or index makes it panic, loop or take a wrong turn in its sums.
#[test]
fn each_damaged_byte_is_survived() {
    let main = vec![Piece::Data(text(1, 2000)), Piece::Zeros(512), Piece::Data(text(1, 2000))];
    let auxiliary = vec![Piece::Data(text(2, 700))];
    let metadata = Some(br#"{"files":[{"path":"a","size":4512}]}"#.to_vec());
    let writer = ArchiveWriter { main, auxiliary, metadata, ..ArchiveWriter::default() };
    let bytes = writer.write().bytes;
    let interesting = (0..160).chain(4096..bytes.len());
    for at in interesting {
        for value in [0, 1, 0x7f, 0xff] {
            let mut bytes = bytes.clone();
            bytes[at] = value;
            let storage = Arc::new(Arc::<[u8]>::from(bytes));
            let options = OpenOptions::default();
            let name = Path::new("damaged.hxz");
            if let Ok(facts) = ArchiveSummary::of_storage(name, storage, &options, |_| ()) {
                for (_, stream) in facts.streams() {
                    assert_eq!(
                        parts(stream).bytes + stream.unreadable.bytes,
                        stream.size,
                        "byte {at}"
                    );
                }
            }
        }
    }
}

#[test]
fn metadata_that_are_no_manifest() {
    let of = |metadata: &str| {
        let metadata = Some(metadata.as_bytes().to_vec());
        let main = vec![Piece::Data(text(1, 100))];
        of_bytes(&ArchiveWriter { main, metadata, ..ArchiveWriter::default() }.write().bytes)
    };
    let good =
        of(r#"{"made":"x","files":[{"path":"a","size":70,"mode":420},{"size":30,"path":"b"}]}"#);
    assert!(good.is_sound(), "{:?}", good.faults);
    let manifest = good.manifest.unwrap();
    assert_eq!((manifest.files, manifest.bytes), (2, 100));
    assert_eq!(good.metadata, None);
    // Not even one file: these accompany a disk, and are shown.
    let deep = format!("{{\"x\":{}", "[".repeat(100_000));
    for other in [
        "",
        "{}",
        "[]",
        "{\"files\":7}",
        "{\"files\":[{}]}",
        "{\"files\":[]} x",
        "{\"files\":[",
        &deep,
    ] {
        let facts = of(other);
        assert!(facts.is_sound() && facts.manifest.is_none(), "{other}: {:?}", facts.faults);
        let shown = facts.metadata.unwrap();
        assert_eq!(shown.length as usize, other.len());
        assert_eq!(shown.text, other[..other.len().min(4096)]);
    }
    // Damaged behind the first file, it is a manifest all the same.
    let file = r#"{"path":"a","size":70}"#;
    for bad in [
        format!(r#"{{"files":[{file},"#),
        format!(r#"{{"files":[{file}]}} x"#),
        format!(r#"{{"files":[{file},{{}}]}}"#),
    ] {
        let facts = of(&bad);
        assert_eq!((facts.faults.len(), facts.metadata.is_none()), (1, true), "{bad}");
        assert_eq!(facts.manifest.unwrap().files, 1, "{bad}");
    }
}

#[test]
fn nothing_is_asked_of_the_blocks() {
    // Garbage in every stored byte.
    let path: PathBuf = archive("base-zstd.hxz");
    let mut bytes = std::fs::read(&path).unwrap();
    let index = u64::from_le_bytes(bytes[12..20].try_into().unwrap()) as usize;
    let page = u64::from_le_bytes(bytes[index + 8..index + 16].try_into().unwrap()) as usize;
    bytes[4096..page].fill(0xa5);
    let facts = of_bytes(&bytes);
    assert!(facts.is_sound(), "{:?}", facts.faults);
    assert_eq!(facts.main, self::facts(&path).main);
    assert_eq!(STREAMS.len(), facts.streams().len());
}
