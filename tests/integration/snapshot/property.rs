//! The reader against a plain vector of bytes, over random archives in all layouts and chains
//! of them.

use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use hexz_exports::{BlockReader, SnapshotExport};
use hexz_reader::summary::ArchiveSummary;
use hexz_reader::{
    Compression, ErrorKind, Layout, OpenOptions, ReferenceChoice, Snapshot, StreamKind,
};
use nbd_server::{Export, Extent, Segment, Span};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::{STREAMS, read, read_whole, with_password};
use crate::archive_writer::{ArchiveWriter, PASSWORD, Piece, image, noise, text};
use crate::verify::ranges::compare;

/// Lengths of blocks where all are of one length, in bytes.
const UNIFORM: [usize; 5] = [512, 700, 1000, 2048, 4096];

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

/// How the blocks of an archive are cut.
#[derive(Debug, Clone)]
enum Cut {
    /// As the recipes have them.
    ByRecipe,
    /// Blocks of one length behind a shorter one, which may be empty. Nothing is left to
    /// parents.
    Uniform { lead: usize, block: usize },
    /// As `merge_overlay` writes a thin archive: blocks of one length over the parent's
    /// stream. Some are replaced; the others are references by offset. Without a parent,
    /// or where the layout has no such references, it is as `ByRecipe`.
    Overlay { block: usize, replaced: Vec<bool> },
}

fn cut() -> impl Strategy<Value = Cut> {
    let block = || select(UNIFORM.as_slice());
    prop_oneof![
        3 => Just(Cut::ByRecipe),
        2 => (0..600_usize, block()).prop_map(|(lead, block)| Cut::Uniform { lead, block }),
        2 => block().prop_map(|block| Cut::Uniform { lead: 0, block }),
        5 => (block(), vec(prop::bool::weighted(0.2), 1..20))
            .prop_map(|(block, replaced)| Cut::Overlay { block, replaced }),
    ]
}

/// An archive to be written.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    layout: Layout,
    zstd: bool,
    dictionary: bool,
    encrypted: bool,
    hashed: bool,
    deduplicated: bool,
    metadata: bool,
    signed: bool,
    is_size_unstated: bool,
    /// Whether its parent's parent is named as a parent too.
    names_grandparent: bool,
    blocks_per_page: usize,
    cut: Cut,
    main: Vec<Recipe>,
    auxiliary: Vec<Recipe>,
}

fn layout() -> impl Strategy<Value = Layout> {
    prop_oneof![
        3 => Just(Layout::A),
        3 => Just(Layout::B),
        4 => Just(Layout::C),
        4 => Just(Layout::D),
        1 => Just(Layout::X),
    ]
}

pub(crate) fn plan() -> impl Strategy<Value = Plan> {
    let flags = (
        any::<bool>(),
        prop::bool::weighted(0.3),
        prop::bool::weighted(0.25),
        prop::bool::weighted(0.9),
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.1),
    );
    let pages = prop_oneof![1..6_usize, Just(4096)];
    let recipes = (vec(recipe(), 0..24), vec(recipe(), 0..6));
    (layout(), flags, pages, cut(), recipes).prop_map(
        |(layout, flags, blocks_per_page, cut, (main, auxiliary))| {
            let (zstd, dictionary, encrypted, hashed, deduplicated, metadata, signed, ..) = flags;
            let (.., names_grandparent, is_size_unstated) = flags;
            // Only archives with LZ4 come to have that layout.
            let zstd = zstd && layout != Layout::X;
            Plan {
                layout,
                zstd,
                dictionary: dictionary && zstd,
                encrypted,
                hashed,
                deduplicated,
                metadata,
                signed,
                is_size_unstated,
                names_grandparent,
                blocks_per_page,
                cut,
                main,
                auxiliary,
            }
        },
    )
}

impl Plan {
    /// Whether it refers to the parent at `number - 1` by offset.
    fn refers_by_offset(&self, number: usize) -> bool {
        let is_overlay = matches!(self.cut, Cut::Overlay { .. });
        match self.layout {
            Layout::A => number > 0,
            Layout::B | Layout::C => number > 0 && is_overlay,
            _ => false,
        }
    }

    fn parents(&self, number: usize) -> Vec<String> {
        let has_many = self.layout == Layout::C || self.layout == Layout::D;
        let most = match self.layout {
            Layout::X => 0,
            _ if has_many && self.names_grandparent && !self.refers_by_offset(number) => 2,
            _ => 1,
        };
        (0..number).rev().take(most).map(file_name).collect()
    }

    /// The pieces of a stream whose parent has `base`, by these recipes.
    fn pieces(
        &self,
        recipes: &[Recipe],
        known: &[Vec<u8>],
        base: Option<(&ArchiveWriter, &[Piece])>,
    ) -> Vec<Piece> {
        let made = pieces(recipes, known);
        match (&self.cut, base) {
            (Cut::Overlay { block, replaced }, Some((parent, base))) => {
                overlay(parent.referred_by_offset(base, *block), replaced, recipes)
            }
            // Layout A has no other references.
            (_, Some((parent, base))) => {
                overlay(parent.referred_by_offset(base, 777), &[], recipes)
            }
            (Cut::Uniform { lead, block }, None) => {
                let whole = image(&made);
                let (lead, rest) = whole.split_at(whole.len().min(*lead));
                let lead = Some(lead).filter(|lead| !lead.is_empty());
                lead.into_iter()
                    .chain(rest.chunks(*block))
                    .map(|chunk| Piece::Data(chunk.to_vec()))
                    .collect()
            }
            _ => made,
        }
    }
}

/// References by offset, some of them replaced, and something behind the parent's end.
fn overlay(mut pieces: Vec<Piece>, replaced: &[bool], recipes: &[Recipe]) -> Vec<Piece> {
    for (number, piece) in pieces.iter_mut().enumerate() {
        if replaced.get(number % replaced.len().max(1)) == Some(&true) {
            *piece = match number % 3 {
                0 => Piece::Zeros(piece.length()),
                _ => Piece::Data(text(number as u64, piece.length() as usize)),
            };
        }
    }
    pieces.extend(self::pieces(recipes.get(..1).unwrap_or_default(), &[]));
    pieces
}

/// An archive of a chain.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) writer: ArchiveWriter,
    /// Numbers of all its ancestors.
    pub(crate) ancestors: HashSet<usize>,
    /// How it refers to its parents, as an option of the operator.
    choice: String,
    /// Blocks that a child may leave to it or its ancestors, since they have a hash.
    known: Vec<Vec<u8>>,
}

impl Member {
    pub(crate) fn pieces(&self, stream: StreamKind) -> &[Piece] {
        match stream {
            StreamKind::Main => &self.writer.main,
            StreamKind::Auxiliary => &self.writer.auxiliary,
        }
    }

    /// Returns true if it has references that may be by offset or by hash.
    fn has_both_references(&self) -> bool {
        let is_reference =
            |piece: &Piece| matches!(piece, Piece::InParent(_) | Piece::ByOffset { .. });
        matches!(self.writer.layout, Layout::B | Layout::C)
            && self.writer.main.iter().chain(&self.writer.auxiliary).any(is_reference)
    }
}

/// Returns true if some reference in an archive or its ancestors may be ambiguous.
pub(crate) fn may_be_ambiguous(chain: &[Member], number: usize) -> bool {
    let ancestors = chain[number].ancestors.iter().copied();
    ancestors.chain([number]).any(|archive| chain[archive].has_both_references())
}

/// For each archive of a chain, how it refers to its parents.
pub(crate) fn choices(chain: &[Member]) -> impl Iterator<Item = &str> {
    chain.iter().map(|member| member.choice.as_str())
}

/// All that an operator can decide is decided.
pub(crate) fn decided(chain: &[Member]) -> OpenOptions {
    let choices: Vec<ReferenceChoice> =
        choices(chain).map(|choice| choice.parse().unwrap()).collect();
    OpenOptions { raw: true, reference_choices: choices.into(), ..with_password() }
}

/// Writes the archives of a chain, oldest first, each thin over the one before it.
pub(crate) fn write_chain(plans: &[Plan], folder: &Path) -> Vec<Member> {
    let mut chain: Vec<Member> = Vec::new();
    for (number, plan) in plans.iter().enumerate() {
        let parents = plan.parents(number);
        let first = number - parents.len();
        let named = chain.get(first..number).unwrap_or_default();
        let known: Vec<Vec<u8>> = named.iter().flat_map(|parent| parent.known.clone()).collect();
        let ancestors: HashSet<usize> =
            named.iter().flat_map(|parent| parent.ancestors.clone()).chain(first..number).collect();
        let by_offset = plan.refers_by_offset(number);
        let of_stream = |recipes: &[Recipe], stream: StreamKind| {
            let parent = chain.last().filter(|_| by_offset);
            let base = parent.map(|parent| (&parent.writer, parent.pieces(stream)));
            plan.pieces(recipes, &known, base)
        };
        let main = of_stream(&plan.main, StreamKind::Main);
        let is_unstated = plan.is_size_unstated && !main.is_empty();
        let writer = ArchiveWriter {
            layout: plan.layout,
            compression: if plan.zstd { Compression::Zstd } else { Compression::Lz4 },
            dictionary: if plan.dictionary { text(1, 2000) } else { Vec::new() },
            password: plan.encrypted.then_some(PASSWORD),
            hashed: plan.hashed,
            deduplicated: plan.deduplicated && !plan.encrypted,
            blocks_per_page: plan.blocks_per_page,
            parents,
            metadata: plan.metadata.then(|| br#"{"files":[]}"#.to_vec()),
            signature: plan.signed.then_some([7; 64]),
            stated_main_size: is_unstated.then_some(0),
            main,
            auxiliary: of_stream(&plan.auxiliary, StreamKind::Auxiliary),
            ..ArchiveWriter::default()
        };
        writer.write().save(&folder.join(file_name(number)));
        let own =
            writer.main.iter().chain(&writer.auxiliary).filter(|piece| {
                matches!(piece, Piece::Data(_)) && writer.entry_hash(piece) != [0; 32]
            });
        let known = known.into_iter().chain(own.map(Piece::bytes)).collect();
        let mode = if by_offset { "offset" } else { "hash" };
        let choice = format!("{}={mode}", file_name(number));
        chain.push(Member { writer, ancestors, choice, known });
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

/// Checks that an error is one that the operator could have decided, where there may be such.
#[track_caller]
fn assert_undecided(error: &hexz_reader::Error, may_be_ambiguous: bool) {
    let is_ambiguous = matches!(error.kind, ErrorKind::Ambiguous(_));
    assert!(may_be_ambiguous && is_ambiguous, "{error}");
}

/// Reads ranges and each block. Where `may_be_ambiguous`, a read may fail for that alone.
fn check_snapshot(
    snapshot: &Snapshot,
    stream: StreamKind,
    expected: &[u8],
    ranges: &[(Index, u16)],
    may_be_ambiguous: bool,
) {
    assert_eq!(snapshot.size(stream), expected.len() as u64);
    for (at, length) in ranges {
        let (at, length) = range(*at, *length, expected.len());
        match read(snapshot, stream, at as u64, length) {
            Ok(bytes) => {
                assert!(bytes == expected[at..at + length], "{stream}: {length} bytes at {at}");
            }
            Err(error) => assert_undecided(&error, may_be_ambiguous),
        }
    }
    match read_whole(snapshot, stream) {
        Ok(whole) => assert!(whole == expected, "{stream}: the whole"),
        Err(error) => assert_undecided(&error, may_be_ambiguous),
    }
    assert!(read(snapshot, stream, expected.len() as u64, 1).is_err());

    let mut at = 0;
    while at < expected.len() as u64 {
        let block = snapshot.locate(stream, at).unwrap();
        assert_eq!(block.start(), at);
        let bytes = &expected[at as usize..block.end() as usize];
        assert!(!block.is_zeros() || bytes.iter().all(|&byte| byte == 0), "zeros at {at}");
        match snapshot.read_block(&block) {
            Ok(whole) => {
                assert_eq!(whole.len(), block.decoded_length() as usize);
                let skipped = block.offset_in_decoded() as usize;
                assert!(&whole[skipped..skipped + bytes.len()] == bytes, "{stream}: {block:?}");
                if let Some(hash) = block.hash() {
                    assert_eq!(hash.0, *blake3::hash(&whole).as_bytes(), "the hash at {at}");
                }
            }
            Err(error) => assert_undecided(&error, may_be_ambiguous),
        }
        at = block.end();
    }
}

/// Number of blocks, or parts of blocks, in a range.
fn count_blocks(snapshot: &Snapshot, stream: StreamKind, mut at: u64, end: u64) -> usize {
    let mut blocks = 0;
    while at < end {
        at = snapshot.locate(stream, at).unwrap().end();
        blocks += 1;
    }
    blocks
}

async fn check_export(
    snapshot: Arc<Snapshot>,
    stream: StreamKind,
    expected: &[u8],
    ranges: &[(Index, u16)],
    reader: &Arc<BlockReader>,
) {
    let by_snapshot = Arc::clone(&snapshot);
    let export = SnapshotExport::new("disk".into(), snapshot, stream, Arc::clone(reader));
    assert_eq!(export.size(), expected.len() as u64);
    for (at, length) in ranges {
        let (at, length) = range(*at, *length, expected.len());
        let blocks = count_blocks(&by_snapshot, stream, at as u64, (at + length) as u64);
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
        // Now everything is in memory, but a read over very many blocks isn't answered at once.
        let mut segments = Vec::new();
        let is_answered = export.read_now(span, &mut segments);
        assert!(is_answered || blocks > 64, "it was read a moment ago");
        assert!(!is_answered || joined(&segments) == expected, "{stream}: {length} at {at}, again");
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
    for (path, reference) in snapshot.parents().zip(snapshot.diff_bases().iter().skip(1)) {
        export = export.with_comparison(path.file_name().unwrap().to_str().unwrap(), reference);
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
                let older = older.map(Vec::as_slice);
                let mut end = check_extents(context, older, expected, at, &extents);
                assert!(end <= at + length, "beyond the request");
                // An answer visits so many index pages and no more; asked on, all is told.
                while most == 1 << 20 && end < at + length {
                    let rest = (at + length - end) as u64;
                    let extents = export.extents(position, end as u64, rest, most).await.unwrap();
                    let next = check_extents(context, older, expected, end, &extents);
                    assert!(end < next && next <= at + length, "{end} to {next}");
                    end = next;
                }
            }
        }
    }
}

/// Checks the extents of an answer from byte `at` on: where they end.
fn check_extents(
    context: &str,
    older: Option<&[u8]>,
    expected: &[u8],
    at: usize,
    extents: &[Extent],
) -> usize {
    let mut from = at;
    for extent in extents {
        let to = from + extent.length as usize;
        let bytes = &expected[from..to];
        match (context, older) {
            ("base:allocation", _) if extent.flags == 3 => {
                assert!(bytes.iter().all(|&byte| byte == 0), "{from} to {to}");
            }
            ("base:allocation", _) => assert_eq!(extent.flags, 0),
            (_, Some(older)) if extent.flags == 0 => {
                assert!(older.get(from..to) == Some(bytes), "{context}: {from} to {to}");
            }
            _ => assert_eq!(extent.flags, 1, "{context}"),
        }
        from = to;
    }
    assert!(extents.windows(2).all(|pair| pair[0].flags != pair[1].flags));
    from
}

/// What reading through an export comes to is what the snapshot says of the range.
async fn check_undecided_export(
    snapshot: Arc<Snapshot>,
    stream: StreamKind,
    expected: &[u8],
    ranges: &[(Index, u16)],
    reader: &Arc<BlockReader>,
) {
    let by_snapshot = Arc::clone(&snapshot);
    let export = SnapshotExport::new("disk".into(), snapshot, stream, Arc::clone(reader));
    for (at, length) in ranges {
        let (at, length) = range(*at, *length, expected.len());
        let span = Span { offset: at as u64, length: length as u32 };
        let mut parts = Vec::new();
        let result = export.read(span, |offset, segment| parts.push((offset, segment))).await;
        let is_readable = read(&by_snapshot, stream, at as u64, length).is_ok();
        assert_eq!(result.is_ok(), is_readable, "{stream}: {length} bytes at {at}");
        for (offset, segment) in parts {
            let bytes = joined(&[segment]);
            let at = offset as usize;
            assert!(bytes == expected[at..at + bytes.len()], "{stream}: at {at}");
        }
    }
}

/// Checks everything about one archive of a chain, opened with these options.
fn check_member(
    chain: &[Member],
    number: usize,
    folder: &Path,
    options: &OpenOptions,
    ranges: &[(Index, u16)],
    reader: &Arc<BlockReader>,
) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let path = folder.join(file_name(number));
    let snapshot = Arc::new(Snapshot::open(&path, options).unwrap());
    assert_eq!(snapshot.parents().count(), chain[number].ancestors.len());
    let is_decided = !options.reference_choices.is_empty();
    let may_be_ambiguous = !is_decided && may_be_ambiguous(chain, number);
    let facts = ArchiveSummary::of_file(&path, options, |_| ()).unwrap();
    assert!(facts.is_sound(), "{:?}", facts.faults);
    for (stream, facts) in facts.streams() {
        let parts = [facts.stored, facts.zeros, facts.in_parents, facts.ambiguous];
        let bytes: u64 = parts.iter().map(|part| part.bytes).sum();
        assert_eq!(bytes, image(chain[number].pieces(stream)).len() as u64, "{facts:?}");
        assert!(may_be_ambiguous || facts.ambiguous.blocks == 0, "{facts:?}");
    }
    for stream in STREAMS {
        let expected = image(chain[number].pieces(stream));
        let ranges = if expected.is_empty() { &[][..] } else { ranges };
        check_snapshot(&snapshot, stream, &expected, ranges, may_be_ambiguous);
        let ancestors: Vec<_> = chain[number]
            .ancestors
            .iter()
            .map(|&ancestor| (file_name(ancestor), image(chain[ancestor].pieces(stream))))
            .collect();
        if !expected.is_empty() {
            let check = check_contexts(&snapshot, stream, &expected, &ancestors, ranges, reader);
            runtime.block_on(check);
        }
        let snapshot = Arc::clone(&snapshot);
        if may_be_ambiguous {
            let check = check_undecided_export(snapshot, stream, &expected, ranges, reader);
            runtime.block_on(check);
        } else {
            runtime.block_on(check_export(snapshot, stream, &expected, ranges, reader));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 96,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_chain_reads_as_the_bytes_that_were_packed(
        plans in vec(plan(), 1..=5),
        ranges in vec((any::<Index>(), any::<u16>()), 1..12),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let chain = write_chain(&plans, folder.path());
        // One cache for all of them: what they share is shared.
        let reader = BlockReader::new(64 << 20);
        let undecided = OpenOptions { raw: true, ..with_password() };
        for number in 0..chain.len() {
            for options in [&undecided, &decided(&chain)] {
                check_member(&chain, number, folder.path(), options, &ranges, &reader);
            }
        }
    }

    #[test]
    fn a_check_of_any_chain_says_what_reading_says(plans in vec(plan(), 1..=4)) {
        let folder = tempfile::tempdir().unwrap();
        let chain = write_chain(&plans, folder.path());
        let undecided = OpenOptions { raw: true, ..with_password() };
        for number in 0..chain.len() {
            let path = folder.path().join(file_name(number));
            let name = file_name(number);
            compare(|| Snapshot::open(&path, &undecided).unwrap(), &name);
            let decided = Snapshot::open(&path, &decided(&chain)).unwrap();
            let threads = NonZeroUsize::MIN;
            let summary = decided.verify(threads, &Default::default(), |fault| {
                panic!("{name}: {}", fault.error);
            });
            assert!(summary.is_complete);
        }
    }
}
