//! The reader against a plain vector of bytes, over random layouts and chains.

use std::sync::Arc;

use hexz_nbd::exports::{BlockReader, SnapshotExport};
use hexz_nbd::nbd::{Export, Segment, Span};
use hexz_nbd::snapshot::{Compression, Snapshot, StreamKind};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use super::{STREAMS, read, read_whole, with_password};
use crate::archive_writer::{ArchiveWriter, PASSWORD, Piece, image, noise, text};

/// How a block comes to be.
#[derive(Debug, Clone)]
pub(crate) enum Recipe {
    /// Fresh bytes, or those of an earlier block if the seed occurs again.
    Noise(u8, u16),
    Text(u8, u16),
    /// Zeros that are compressed and stored like anything else.
    StoredZeros(u8),
    Zeros(u16),
    /// A block of any ancestor; fresh bytes where there is none.
    OfAncestor(Index),
    /// Many blocks of an ancestor in a row, as where little has changed.
    RunOfAncestor(Index),
}

fn recipe() -> impl Strategy<Value = Recipe> {
    prop_oneof![
        (0..12_u8, 1..3000_u16).prop_map(|(seed, length)| Recipe::Noise(seed, length)),
        (0..12_u8, 1..9000_u16).prop_map(|(seed, length)| Recipe::Text(seed, length)),
        // The same few lengths, as packers have them.
        (0..12_u8).prop_map(|seed| Recipe::Text(seed, 4096)),
        (0..4_u8).prop_map(Recipe::StoredZeros),
        (1..5000_u16).prop_map(Recipe::Zeros),
        any::<Index>().prop_map(Recipe::OfAncestor),
        any::<Index>().prop_map(Recipe::OfAncestor),
        any::<Index>().prop_map(Recipe::RunOfAncestor),
    ]
}

#[derive(Debug, Clone)]
pub(crate) struct Layout {
    zstd: bool,
    dictionary: bool,
    encrypted: bool,
    hashed: bool,
    deduplicated: bool,
    metadata: bool,
    signed: bool,
    /// Whether its parent's parent is named as a parent too.
    names_grandparent: bool,
    blocks_per_page: usize,
    main: Vec<Recipe>,
    auxiliary: Vec<Recipe>,
}

pub(crate) fn layout() -> impl Strategy<Value = Layout> {
    let flags = (
        any::<bool>(),
        prop::bool::weighted(0.3),
        prop::bool::weighted(0.25),
        prop::bool::weighted(0.9),
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        prop::bool::weighted(0.2),
    );
    let pages = prop_oneof![1..6_usize, Just(4096)];
    (flags, pages, vec(recipe(), 0..24), vec(recipe(), 0..6)).prop_map(
        |(flags, blocks_per_page, main, auxiliary)| {
            let (zstd, dictionary, encrypted, hashed, deduplicated, metadata, signed, grandparent) =
                flags;
            Layout {
                zstd,
                dictionary: dictionary && zstd,
                encrypted,
                hashed,
                deduplicated,
                metadata,
                signed,
                names_grandparent: grandparent,
                blocks_per_page,
                main,
                auxiliary,
            }
        },
    )
}

/// Writes the archives of a chain, oldest first, each thin over the one before it.
pub(crate) fn write_chain(layouts: &[Layout], folder: &std::path::Path) -> Vec<ArchiveWriter> {
    let mut chain: Vec<ArchiveWriter> = Vec::new();
    // What a child may leave to its ancestors: blocks of theirs that have a hash.
    let mut known: Vec<Vec<u8>> = Vec::new();
    for (number, layout) in layouts.iter().enumerate() {
        let named = 1 + usize::from(layout.names_grandparent);
        let archive = ArchiveWriter {
            compression: if layout.zstd { Compression::Zstd } else { Compression::Lz4 },
            dictionary: if layout.dictionary { text(1, 2000) } else { Vec::new() },
            password: layout.encrypted.then_some(PASSWORD),
            hashed: layout.hashed,
            deduplicated: layout.deduplicated && !layout.encrypted,
            blocks_per_page: layout.blocks_per_page,
            parents: (0..number).rev().take(named).map(file_name).collect(),
            metadata: layout.metadata.then(|| br#"{"files":[]}"#.to_vec()),
            signature: layout.signed.then_some([7; 64]),
            main: pieces(&layout.main, &known),
            auxiliary: pieces(&layout.auxiliary, &known),
            ..ArchiveWriter::default()
        };
        archive.write().save(&folder.join(file_name(number)));
        if layout.hashed && !layout.encrypted {
            let stored = archive.main.iter().chain(&archive.auxiliary);
            known.extend(stored.filter(|piece| matches!(piece, Piece::Data(_))).map(Piece::bytes));
        }
        chain.push(archive);
    }
    chain
}

pub(crate) fn file_name(number: usize) -> String {
    format!("{number}.hxz")
}

fn pieces(recipes: &[Recipe], known: &[Vec<u8>]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for recipe in recipes {
        match recipe {
            Recipe::Noise(seed, length) => {
                pieces.push(Piece::Data(noise((*seed).into(), (*length).into())));
            }
            Recipe::Text(seed, length) => {
                pieces.push(Piece::Data(text((*seed).into(), (*length).into())));
            }
            Recipe::StoredZeros(length) => {
                pieces.push(Piece::Data(vec![0; 1 + usize::from(*length) * 4096]));
            }
            Recipe::Zeros(length) => pieces.push(Piece::Zeros((*length).into())),
            Recipe::OfAncestor(_) | Recipe::RunOfAncestor(_) if known.is_empty() => {
                pieces.push(Piece::Data(text(99, 777)));
            }
            Recipe::OfAncestor(index) => pieces.push(Piece::InParent(index.get(known).clone())),
            Recipe::RunOfAncestor(index) => {
                let from = index.index(known.len());
                pieces.extend(known[from..].iter().take(7).cloned().map(Piece::InParent));
            }
        }
    }
    pieces
}

/// A range of a stream by fractions of it, so that it fits whatever the size is.
pub(crate) fn range(at: Index, length: u16, size: usize) -> (usize, usize) {
    let at = at.index(size);
    (at, usize::from(length).clamp(1, size - at))
}

/// Segments put together; they have to be of the length that was asked for.
fn joined(segments: &[Segment]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for segment in segments {
        match segment {
            Segment::Zeros(length) => bytes.resize(bytes.len() + *length as usize, 0),
            Segment::Data(data) => bytes.extend_from_slice(data),
        }
    }
    bytes
}

fn check_snapshot(
    snapshot: &Snapshot,
    stream: StreamKind,
    expected: &[u8],
    ranges: &[(Index, u16)],
) {
    assert_eq!(snapshot.size(stream), expected.len() as u64);
    for (at, length) in ranges {
        let (at, length) = range(*at, *length, expected.len());
        let bytes = read(snapshot, stream, at as u64, length).unwrap();
        assert!(bytes == expected[at..at + length], "{stream}: {length} bytes at {at}");
    }
    assert!(read_whole(snapshot, stream).unwrap() == expected, "{stream}: the whole");
    assert!(read(snapshot, stream, expected.len() as u64, 1).is_err());

    let mut at = 0;
    while at < expected.len() as u64 {
        let block = snapshot.locate(stream, at).unwrap();
        assert_eq!(block.start(), at);
        let bytes = &expected[at as usize..block.end() as usize];
        assert!(!block.is_zeros() || bytes.iter().all(|&byte| byte == 0), "zeros at {at}");
        if let Some(hash) = block.hash() {
            assert_eq!(hash.0, *blake3::hash(bytes).as_bytes(), "the hash at {at}");
        }
        at = block.end();
    }
}

async fn check_export(
    snapshot: Arc<Snapshot>,
    stream: StreamKind,
    expected: &[u8],
    ranges: &[(Index, u16)],
    reader: &Arc<BlockReader>,
) {
    let export = SnapshotExport::new("disk".into(), snapshot, stream, Arc::clone(reader));
    assert_eq!(export.size(), expected.len() as u64);
    for (at, length) in ranges {
        let (at, length) = range(*at, *length, expected.len());
        let span = Span { offset: at as u64, length: length as u32 };
        let expected = &expected[at..at + length];
        let mut segments = Vec::new();
        if export.read_now(span, &mut segments) {
            assert!(joined(&segments) == expected, "{stream}: {length} bytes at {at}, at once");
        }
        let mut parts = Vec::new();
        export.read(span, |offset, segment| parts.push((offset, segment))).await.unwrap();
        // They come in any order, and each tells where it belongs.
        parts.sort_by_key(|(offset, _)| *offset);
        for ((offset, segment), (next, _)) in parts.iter().zip(parts.iter().skip(1)) {
            assert_eq!(offset + segment.len() as u64, *next);
        }
        let segments: Vec<_> = parts.into_iter().map(|(_, segment)| segment).collect();
        assert!(joined(&segments) == expected, "{stream}: {length} bytes at {at}");
        // Now everything is in memory.
        let mut segments = Vec::new();
        assert!(export.read_now(span, &mut segments), "it was read a moment ago");
        assert!(joined(&segments) == expected, "{stream}: {length} bytes at {at}, again");
    }
}

/// What metadata contexts say has to be true of the bytes.
async fn check_contexts(
    snapshot: &Arc<Snapshot>,
    stream: StreamKind,
    expected: &[u8],
    ancestors: &[(String, Vec<u8>)],
    ranges: &[(Index, u16)],
    reader: &Arc<BlockReader>,
) {
    let reader = Arc::clone(reader);
    let mut export = SnapshotExport::new("disk".into(), Arc::clone(snapshot), stream, reader);
    for (path, reference) in snapshot.parents().zip(snapshot.references().iter().skip(1)) {
        export = export.comparable_with(path.file_name().unwrap().to_str().unwrap(), reference);
    }
    for (position, context) in export.contexts().into_iter().enumerate() {
        let reference = ["hexz:changed:", "qemu:dirty-bitmap:"]
            .iter()
            .find_map(|namespace| context.strip_prefix(namespace));
        let older = reference
            .map(|name| &ancestors.iter().find(|(other, _)| other == name).expect("an ancestor").1);
        let whole = (0, expected.len());
        let parts = ranges.iter().map(|(at, length)| range(*at, *length, expected.len()));
        for (at, length) in parts.chain([whole]) {
            for most in [1, 3, 1 << 20] {
                let extents =
                    export.extents(position, at as u64, length as u64, most).await.unwrap();
                assert!((1..=most).contains(&extents.len()), "{context}: {extents:?}");
                let mut from = at;
                for extent in &extents {
                    let to = from + extent.length as usize;
                    let bytes = &expected[from..to];
                    match (context, older) {
                        ("base:allocation", _) if extent.flags == 3 => {
                            assert!(bytes.iter().all(|&byte| byte == 0), "{from} to {to}");
                        }
                        ("base:allocation", _) => assert_eq!(extent.flags, 0),
                        (_, Some(older)) if extent.flags == 0 => {
                            assert!(
                                older.get(from..to) == Some(bytes),
                                "{context}: {from} to {to}"
                            );
                        }
                        _ => assert_eq!(extent.flags, 1, "{context}"),
                    }
                    from = to;
                }
                assert!(from <= at + length, "beyond the request");
                assert!(most < 1 << 20 || from == at + length, "short of the request");
                assert!(extents.windows(2).all(|pair| pair[0].flags != pair[1].flags));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 64,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_layout_reads_as_the_bytes_that_were_packed(
        layouts in vec(layout(), 1..=5),
        ranges in vec((any::<Index>(), any::<u16>()), 1..12),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let chain = write_chain(&layouts, folder.path());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        // One cache for all of them: what they share is shared.
        let reader = BlockReader::new(64 << 20);
        for (number, archive) in chain.iter().enumerate() {
            let options = hexz_nbd::snapshot::OpenOptions { raw: true, ..with_password() };
            let path = folder.path().join(file_name(number));
            let snapshot = Arc::new(Snapshot::open(&path, &options).unwrap());
            assert_eq!(snapshot.parents().count(), number);
            for (stream, pieces) in STREAMS.into_iter().zip([&archive.main, &archive.auxiliary]) {
                let expected = image(pieces);
                let ranges = if expected.is_empty() { &[][..] } else { &ranges };
                check_snapshot(&snapshot, stream, &expected, ranges);
                let ancestors: Vec<_> = chain[..number]
                    .iter()
                    .enumerate()
                    .map(|(number, archive)| {
                        let pieces = match stream {
                            StreamKind::Main => &archive.main,
                            StreamKind::Auxiliary => &archive.auxiliary,
                        };
                        (file_name(number), image(pieces))
                    })
                    .collect();
                if !expected.is_empty() {
                    runtime.block_on(check_contexts(
                        &snapshot, stream, &expected, &ancestors, ranges, &reader,
                    ));
                }
                let snapshot = Arc::clone(&snapshot);
                runtime.block_on(check_export(snapshot, stream, &expected, ranges, &reader));
            }
        }
    }
}
