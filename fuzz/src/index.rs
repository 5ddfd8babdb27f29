//! Master index and pages: whatever they say, the reader finds the blocks that a naive one
//! finds, and what it says of zeros and changes is true.

use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use hexz_reader::{Snapshot, StreamKind};

use crate::archive::{About, Entry, Layout, Memory, Page, Writer, open};
use crate::naive::Archive;

pub const STREAMS: [StreamKind; 2] = [StreamKind::Main, StreamKind::Auxiliary];

/// Streams that are read whole, in bytes; of others only a part is looked at.
const READ_WHOLE: u64 = 1 << 20;

#[derive(Debug, Arbitrary)]
enum Piece {
    Data { seed: u8, length: u16, hashed: bool },
    Zeros { length: u16, hashed: bool },
    StoredZeros { length: u16 },
    InParent { seed: u8, length: u16 },
    ZerosInParent { length: u16 },
    Any { offset: u64, stored: u32, length: u32, checksum: u32 },
}

/// Another value for a field of the index.
#[derive(Debug, Arbitrary)]
struct Patch {
    field: u16,
    value: Value,
}

#[derive(Debug, Arbitrary)]
enum Value {
    Add(i8),
    Set(u64),
    Bit(u8),
    /// That of another field.
    Of(u16),
}

#[derive(Debug, Arbitrary)]
struct Input {
    /// Pages of each stream.
    main: Vec<Vec<Piece>>,
    auxiliary: Vec<Vec<Piece>>,
    patches: Vec<Patch>,
    looks: Vec<u64>,
    most: u8,
    layout: Layout,
    zstd: bool,
    /// Streams whose size the master index states as 0, as `hexz pack` does for a pipe.
    unstated: [bool; 2],
}

pub fn check(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let about = About { layout: input.layout, zstd: input.zstd, ..About::default() };
    let mut writer = Writer::new(&[]);
    let index_offset = input.write(about, &mut writer);
    input.patches.iter().for_each(|patch| patch.apply(&mut writer));

    let bytes = writer.bytes;
    let memory = Memory { length: bytes.len() as u64, bytes: bytes.clone() };
    let opened = open(memory, false, false);
    let judge = Archive::open(&bytes, about, index_offset);
    assert_eq!(opened.is_ok(), judge.is_some(), "{:?}", opened.err());
    let (Ok(snapshot), Some(judge)) = (opened, judge) else { return };
    for stream in 0..2 {
        compare(&snapshot, &judge, stream, &input.looks);
        runs(&snapshot, &judge, stream, &input.looks, input.most.into());
    }
}

impl Input {
    fn write(&self, about: About, writer: &mut Writer) -> u64 {
        let (mut pages, mut sizes) = ([Vec::new(), Vec::new()], [0; 2]);
        let mut number = 0;
        for (stream, of) in [&self.main, &self.auxiliary].into_iter().enumerate() {
            for page in of.iter().filter(|page| !page.is_empty()) {
                let entries: Vec<Entry> =
                    page.iter().map(|piece| piece.write(about, writer)).collect();
                let place = writer.page(&entries, about.layout);
                pages[stream].push(Page { place, start_block: number, start: sizes[stream] });
                number += entries.len() as u64;
                sizes[stream] += entries.iter().map(|entry| u64::from(entry.length)).sum::<u64>();
            }
        }
        let unstated = sizes.iter_mut().zip(self.unstated).filter(|(_, unstated)| *unstated);
        unstated.for_each(|(size, _)| *size = 0);
        writer.finish(about, &[], &pages, sizes)
    }
}

impl Piece {
    fn write(&self, about: About, writer: &mut Writer) -> Entry {
        let hash = |bytes: &[u8]| *blake3::hash(bytes).as_bytes();
        let content = |seed: u8, length: u16| {
            (0..=u32::from(length) % 3000).map(|at| seed ^ (at / 7) as u8).collect::<Vec<u8>>()
        };
        let mut store = |bytes: &[u8], hash| {
            let stored = compress(about, bytes);
            let offset = writer.store(&stored);
            let checksum = crc32fast::hash(&stored);
            Entry {
                offset,
                stored: stored.len() as u32,
                length: bytes.len() as u32,
                checksum,
                hash,
            }
        };
        let zeros = |length: u16| vec![0; usize::from(length % 3000) + 1];
        match self {
            Self::Data { seed, length, hashed } => {
                let bytes = content(*seed, *length);
                store(&bytes, if *hashed { hash(&bytes) } else { [0; 32] })
            }
            Self::StoredZeros { length } => store(&zeros(*length), hash(&zeros(*length))),
            Self::Zeros { length, hashed } => {
                let zeros = zeros(*length);
                let hash = if *hashed { hash(&zeros) } else { [0; 32] };
                Entry { length: zeros.len() as u32, hash, ..Entry::default() }
            }
            Self::InParent { seed, length } => {
                let bytes = content(*seed, *length);
                let length = bytes.len() as u32;
                Entry { offset: u64::MAX, length, hash: hash(&bytes), ..Entry::default() }
            }
            Self::ZerosInParent { length } => {
                let zeros = zeros(*length);
                let length = zeros.len() as u32;
                Entry { offset: u64::MAX, length, hash: hash(&zeros), ..Entry::default() }
            }
            Self::Any { offset, stored, length, checksum } => {
                let (stored, length, checksum) = (*stored, *length % 100_000, *checksum);
                Entry { offset: *offset, stored, length, checksum, hash: [0; 32] }
            }
        }
    }
}

/// Compresses a block. Zstandard frames of an even number of bytes don't state it.
fn compress(about: About, bytes: &[u8]) -> Vec<u8> {
    if !about.zstd {
        lz4_flex::block::compress_prepend_size(bytes)
    } else if bytes.len().is_multiple_of(2) {
        zstd::stream::encode_all(bytes, 1).expect("memory to compress to")
    } else {
        zstd::bulk::compress(bytes, 1).expect("memory to compress to")
    }
}

impl Patch {
    fn apply(&self, writer: &mut Writer) {
        let fields = &writer.fields;
        // The last ones are the master index; half of the patches are for the last few.
        let position = usize::from(self.field / 2) % fields.len();
        let from_end = self.field.is_multiple_of(2);
        let place = |position: usize| {
            let position = if from_end { fields.len() - 1 - position } else { position };
            fields[position]
        };
        let read = |(at, length): (usize, usize)| {
            let mut value = [0; 8];
            let length = length.min(8);
            value[..length].copy_from_slice(&writer.bytes[at..at + length]);
            u64::from_le_bytes(value)
        };
        let (at, length) = place(position);
        let now = read((at, length));
        let value = match self.value {
            Value::Add(by) => now.wrapping_add_signed(by.into()),
            Value::Set(value) => value,
            Value::Bit(bit) => now ^ 1 << (bit % 64),
            Value::Of(other) => read(fields[usize::from(other) % fields.len()]),
        };
        let length = length.min(8);
        writer.bytes[at..at + length].copy_from_slice(&value.to_le_bytes()[..length]);
    }
}

/// Compares what the reader finds, block by block and as bytes, with the judge.
pub fn compare(snapshot: &Snapshot, judge: &Archive<'_>, stream: usize, looks: &[u64]) {
    let kind = STREAMS[stream];
    let size = judge.streams[stream].size;
    assert_eq!(snapshot.size(kind), size);
    let ends = [0, size.saturating_sub(1), size, u64::MAX];
    for at in ends.iter().chain(looks.iter().take(8)) {
        block(snapshot, judge, stream, *at);
    }
    // Block by block from the beginning.
    let (mut at, mut whole) = (0, Some(Vec::<u8>::new()));
    while at < size.min(READ_WHOLE) {
        let Some((end, bytes)) = block(snapshot, judge, stream, at) else {
            whole = None;
            break;
        };
        if let (Some(whole), Some(bytes)) = (&mut whole, &bytes) {
            whole.extend(bytes);
        } else {
            whole = None;
        }
        at = end;
    }
    if size > READ_WHOLE {
        return;
    }
    let mut buffer = vec![0xa5; size as usize];
    let read = snapshot.read_exact_at(kind, &mut buffer, 0);
    assert_eq!(read.is_ok(), whole.is_some());
    let Some(whole) = whole else { return };
    assert!(buffer == whole);
    for pair in looks.windows(2) {
        let start = pair[0] % (size + 1);
        let length = pair[1] % (size - start + 2);
        let part = &mut buffer[..length.min(size) as usize];
        let read = snapshot.read_exact_at(kind, part, start);
        assert_eq!(read.is_ok(), start + part.len() as u64 <= size);
        if read.is_ok() {
            assert!(*part == whole[start as usize..][..part.len()]);
        }
    }
}

/// Compares the block that covers `at`: where it ends, and its bytes if they can be had.
fn block(
    snapshot: &Snapshot,
    judge: &Archive<'_>,
    stream: usize,
    at: u64,
) -> Option<(u64, Option<Vec<u8>>)> {
    let found = snapshot.locate(STREAMS[stream], at);
    let right = judge.block_at(stream, at);
    assert_eq!(found.is_ok(), right.is_some(), "byte {at}: {:?}", found.err());
    let (Ok(found), Some(right)) = (found, right) else { return None };
    assert!(found.start() <= at && at < found.end());
    assert_eq!((found.start(), found.length()), (right.start, right.entry.length));
    let hash = Some(right.entry.hash).filter(|hash| *hash != [0; 32]);
    assert_eq!(found.hash().map(|hash| hash.0), hash);
    if let Some(offset) = found.stored_offset() {
        assert_eq!(offset, right.entry.offset);
    }
    let bytes = snapshot.read_block(&found);
    let expected = judge.read(&right);
    // Zeros of a parent are known as such only if there are several; else a parent is needed.
    let needs_parent = right.entry.offset == u64::MAX && !found.is_zeros();
    let expected = if needs_parent { None } else { expected };
    assert_eq!(bytes.is_ok(), expected.is_some(), "{right:?}: {:?}", bytes.err());
    if found.is_zeros() {
        assert!(right.entry.offset != u64::MAX || judge.layout() == Layout::D);
        assert!(expected.as_ref().is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0)));
    }
    let bytes = bytes.ok();
    assert!(bytes == expected, "{right:?}");
    Some((found.end(), bytes))
}

/// What the index alone tells: zeros, and what has changed against the archive itself.
fn runs(snapshot: &Arc<Snapshot>, judge: &Archive<'_>, stream: usize, looks: &[u64], most: usize) {
    let kind = STREAMS[stream];
    let size = judge.streams[stream].size;
    let start = looks.first().map_or(0, |look| look % size.max(1));
    let length = looks.get(1).map_or(size, |look| look % 300_000).min(size - start);
    if length == 0 {
        return;
    }
    let reference = &snapshot.diff_bases()[0];
    let zeros = snapshot.zero_runs(kind, start..start + length, most);
    let changed = snapshot.changed_runs(kind, start..start + length, most, reference);
    for (runs, are_zeros) in [(zeros, true), (changed, false)] {
        let Ok(runs) = runs else {
            // Some block in the range can't be found.
            assert!(has_gap(judge, stream, start, start + length));
            continue;
        };
        assert!(!runs.is_empty() && runs.len() <= most.max(1));
        let mut at = start;
        for run in runs {
            assert!(run.length > 0);
            let end = at + run.length;
            assert!(end <= start + length);
            while are_zeros && run.has_property && at < end {
                let block = judge.block_at(stream, at).expect("the block of a run");
                let bytes = judge.read(&block).expect("the bytes of zeros");
                assert!(bytes.iter().all(|byte| *byte == 0));
                at = block.start + bytes.len() as u64;
            }
            at = end;
        }
    }
}

fn has_gap(judge: &Archive<'_>, stream: usize, start: u64, end: u64) -> bool {
    let mut at = start;
    while at < end {
        let Some(block) = judge.block_at(stream, at) else { return true };
        at = block.start + u64::from(block.entry.length);
    }
    false
}
