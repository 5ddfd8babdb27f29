//! References to parents: chains of two or three archives of any layouts, whose blocks refer to
//! one another by hash, by offset, or by hashes that mean nothing. The reader may refuse what is
//! ambiguous; a wrong byte is a fault, and so is a wrong word about zeros or changes.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{Seek, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use hexz_reader::{OpenOptions, Run, Snapshot};

use crate::archive::{About, Entry, Layout, Memory, Page, Writer};
use crate::chain::{Answer, Answers, Archive, Block, Content, bytes_of, judge};
use crate::index::STREAMS;

/// Most blocks of a page, pages of a stream.
const MAX_BLOCKS: usize = 8;
const MAX_PAGES: usize = 3;
/// Lengths of blocks, in bytes: many are equal, and some end where no others do.
const LENGTHS: [usize; 8] = [512, 512, 512, 1024, 1536, 100, 924, 1];
/// Contents of blocks. With few of them, the same ones are in several places.
const CONTENTS: u8 = 4;

#[derive(Debug, Arbitrary)]
enum Piece {
    Data { content: u8, length: u8, is_hashed: bool },
    Zeros { length: u8, is_stored: bool, is_hashed: bool },
    Reference { length: u8, hash: Hash },
}

/// Hash of a reference.
#[derive(Debug, Arbitrary)]
enum Hash {
    None,
    /// That of a block that ought to exist.
    Content {
        content: u8,
        length: u8,
    },
    Zeros,
    /// That of a block of the parent, or grandparent, that covers the start, as
    /// `hexz commit --thin` writes it.
    Covering {
        ancestor: u8,
    },
    /// That of any block of the parent, or grandparent.
    Other {
        ancestor: u8,
        block: u8,
    },
    Unknown(u8),
}

#[derive(Debug, Arbitrary)]
struct Layer {
    layout: Layout,
    streams: [Vec<Vec<Piece>>; 2],
}

/// A chain, the archive without parents first.
#[derive(Debug, Arbitrary)]
struct Input {
    root: Layer,
    middle: Option<Layer>,
    top: Layer,
    /// If true, the last archive names its grandparent as well.
    has_two_parents: bool,
    looks: Vec<u16>,
    most: u8,
}

/// An archive that was written.
struct Written {
    archive: Archive,
    bytes: Vec<u8>,
}

pub fn check(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    thread_local! {
        static FILES: RefCell<[NamelessFile; 2]> = RefCell::new(std::array::from_fn(NamelessFile::new));
    }
    FILES.with_borrow_mut(|files| input.check(files));
}

impl Input {
    fn check(&self, files: &mut [NamelessFile; 2]) {
        // From here on, the archive that is opened comes first.
        let layers: Vec<&Layer> = [Some(&self.top), self.middle.as_ref(), Some(&self.root)]
            .into_iter()
            .flatten()
            .collect();
        let parents = |archive: usize| match layers.len() - 1 - archive {
            0 => vec![],
            2 if self.has_two_parents && layers[0].layout.has_parent_list() => vec![1, 2],
            _ => vec![archive + 1],
        };
        let names: Vec<String> = files.iter().map(NamelessFile::name).collect();
        let mut chain: Vec<Archive> = Vec::new();
        let mut top = Vec::new();
        for (position, layer) in layers.iter().enumerate().rev() {
            let parents = parents(position);
            let named: Vec<&str> =
                parents.iter().map(|parent| names[parent - 1].as_str()).collect();
            let Written { archive, bytes } = layer.write(&chain, parents, &named);
            chain.insert(0, archive);
            match position {
                0 => top = bytes,
                _ => files[position - 1].replace(&bytes),
            }
        }

        let memory = Memory { length: top.len() as u64, bytes: top };
        let path = Path::new(NamelessFile::FOLDER).join("top");
        let snapshot = Snapshot::from_storage(&path, Arc::new(memory), &OpenOptions::default());
        let snapshot = Arc::new(snapshot.expect("a sound chain"));
        let judged = judge(&chain);
        let looks: Vec<usize> = self.looks.iter().map(|look| usize::from(*look)).collect();
        for stream in 0..2 {
            let streams = Streams { snapshot: &snapshot, chain: &chain, judged: &judged, stream };
            streams.compare_blocks();
            streams.compare_ranges(&looks);
            streams.compare_runs(&looks, self.most.into());
        }
    }
}

impl Layer {
    /// Writes an archive on top of its ancestors, of which the nearest comes first.
    fn write(&self, ancestors: &[Archive], parents: Vec<usize>, names: &[&str]) -> Written {
        let about = About { layout: self.layout, ..About::default() };
        let mut writer = Writer::new(&[]);
        let (mut pages, mut sizes) = ([vec![], vec![]], [0; 2]);
        let mut streams = [vec![], vec![]];
        let mut number = 0;
        for (stream, of) in self.streams.iter().enumerate() {
            for page in of.iter().filter(|page| !page.is_empty()).take(MAX_PAGES) {
                let mut start = sizes[stream];
                let mut blocks = Vec::new();
                let mut entries = Vec::new();
                for piece in page.iter().take(MAX_BLOCKS) {
                    let (entry, block) =
                        piece.write(start, stream, ancestors, self.layout, &mut writer);
                    start += block.length;
                    blocks.push(block);
                    entries.push(entry);
                }
                if self.layout == Layout::D {
                    find_zeros(&mut blocks);
                }
                let place = writer.page(&entries, self.layout);
                let page_start = sizes[stream] as u64;
                pages[stream].push(Page { place, start_block: number, start: page_start });
                number += entries.len() as u64;
                sizes[stream] = start;
                streams[stream].extend(blocks);
            }
        }
        writer.finish(about, names, &pages, sizes.map(|size| size as u64));
        let archive = Archive { layout: self.layout, parents, streams };
        Written { archive, bytes: writer.bytes }
    }
}

/// Marks references that are known to be zeros by their hash: the reader looks at lengths that
/// several references of a page have.
fn find_zeros(page: &mut [Block]) {
    let is_reference = |block: &Block| matches!(block.content, Content::Reference);
    let lengths: Vec<usize> =
        page.iter().filter(|block| is_reference(block)).map(|block| block.length).collect();
    for block in page.iter_mut().filter(|block| is_reference(block)) {
        let count = lengths.iter().filter(|length| **length == block.length).count();
        let zeros = vec![0; block.length];
        if count > 1 && hash(&zeros) == block.hash {
            block.content = Content::Bytes(zeros);
        }
    }
}

impl Piece {
    /// The entry of a block that starts at `start` of its stream, and how the judge sees it.
    fn write(
        &self,
        start: usize,
        stream: usize,
        ancestors: &[Archive],
        layout: Layout,
        writer: &mut Writer,
    ) -> (Entry, Block) {
        let none = [0; 32];
        let mut entry = Entry::default();
        let content = match self {
            Self::Data { content, length, is_hashed } => {
                let bytes = content_of(*content, length_of(*length));
                entry = store(writer, &bytes);
                entry.hash = if *is_hashed { hash(&bytes) } else { none };
                Content::Bytes(bytes)
            }
            Self::Zeros { length, is_stored, is_hashed } => {
                let zeros = vec![0; length_of(*length)];
                if *is_stored {
                    entry = store(writer, &zeros);
                }
                entry.length = zeros.len() as u32;
                entry.hash = if *is_hashed { hash(&zeros) } else { none };
                Content::Bytes(zeros)
            }
            Self::Reference { length, hash } => {
                let length = length_of(*length);
                entry.offset = u64::MAX;
                entry.length = length as u32;
                entry.hash = hash.value(start, length, stream, ancestors);
                Content::Reference
            }
        };
        if !layout.has_hashes() {
            entry.hash = none;
        }
        let block = Block { start, length: entry.length as usize, hash: entry.hash, content };
        (entry, block)
    }
}

impl Hash {
    fn value(&self, start: usize, length: usize, stream: usize, ancestors: &[Archive]) -> [u8; 32] {
        let blocks = |ancestor: u8| {
            let count = ancestors.len().max(1);
            let ancestor = ancestors.get(usize::from(ancestor) % count);
            ancestor.map_or(&[][..], |ancestor| ancestor.streams[stream].as_slice())
        };
        let hash_of = |block: Option<&Block>| block.map_or([0; 32], |block| block.hash);
        match *self {
            Self::None => [0; 32],
            Self::Content { content, length } => hash(&content_of(content, length_of(length))),
            Self::Zeros => hash(&vec![0; length]),
            Self::Covering { ancestor } => {
                let is_covering =
                    |block: &&Block| (block.start..block.start + block.length).contains(&start);
                hash_of(blocks(ancestor).iter().find(is_covering))
            }
            Self::Other { ancestor, block } => {
                let blocks = blocks(ancestor);
                hash_of(blocks.get(usize::from(block) % blocks.len().max(1)))
            }
            Self::Unknown(seed) => [seed | 1; 32],
        }
    }
}

fn length_of(choice: u8) -> usize {
    LENGTHS[usize::from(choice) % LENGTHS.len()]
}

/// Bytes of which the longer ones of a kind begin like the shorter ones. They repeat themselves,
/// so that blocks with other borders can have the same bytes.
fn content_of(content: u8, length: usize) -> Vec<u8> {
    let content = content % CONTENTS;
    (0..length).map(|at| (at % 512 / 64 * usize::from(content)) as u8 + content + 1).collect()
}

fn hash(bytes: &[u8]) -> [u8; 32] {
    *blake3::hash(bytes).as_bytes()
}

fn store(writer: &mut Writer, bytes: &[u8]) -> Entry {
    let stored = lz4_flex::block::compress_prepend_size(bytes);
    Entry {
        offset: writer.store(&stored),
        stored: stored.len() as u32,
        length: bytes.len() as u32,
        checksum: crc32fast::hash(&stored),
        hash: [0; 32],
    }
}

/// A file that has no name of its own any more, and vanishes with the process. The reader finds
/// parents only as files.
struct NamelessFile(File);

impl NamelessFile {
    const FOLDER: &str = "/proc/self/fd";

    fn new(number: usize) -> Self {
        let name = format!("hexz-nbd-fuzz-references-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let file = File::create_new(&path).expect("a temporary file");
        fs::remove_file(&path).expect("no more name");
        Self(file)
    }

    fn name(&self) -> String {
        self.0.as_raw_fd().to_string()
    }

    fn replace(&mut self, bytes: &[u8]) {
        self.0.set_len(0).and_then(|()| self.0.rewind()).expect("a file to begin again");
        self.0.write_all(bytes).expect("a file to write to");
    }
}

/// A stream of all archives of a chain.
struct Streams<'a> {
    snapshot: &'a Arc<Snapshot>,
    chain: &'a [Archive],
    judged: &'a [Answers],
    stream: usize,
}

impl Streams<'_> {
    /// The answers for the archive that is opened, or an ancestor.
    fn answers(&self, archive: usize) -> &[Answer] {
        &self.judged[archive][self.stream]
    }

    fn compare_blocks(&self) {
        let kind = STREAMS[self.stream];
        let answers = self.answers(0);
        assert_eq!(self.snapshot.size(kind), answers.len() as u64);
        assert!(self.snapshot.locate(kind, answers.len() as u64).is_err());
        let mut at = 0;
        while at < answers.len() {
            let found = match self.snapshot.locate(kind, at as u64) {
                Ok(found) => found,
                Err(error) => {
                    assert_failure(&answers[at..=at], error.kind.label());
                    at = self.next_border(at);
                    continue;
                }
            };
            let now = self.snapshot.try_locate(kind, at as u64);
            assert!(now.is_none_or(|now| now.is_ok_and(|now| now == found)));
            assert_eq!(found.start(), at as u64);
            let end = found.end() as usize;
            let part = answers.get(at..end).expect("a block within its stream");
            match self.snapshot.read_block(&found) {
                Ok(bytes) => {
                    assert_eq!(bytes.len(), found.decoded_length() as usize);
                    let hash = found.hash().map(|hash| hash.0);
                    assert!(hash.is_none_or(|hash| hash == self::hash(&bytes)));
                    assert!(!found.is_zeros() || bytes.iter().all(|byte| *byte == 0));
                    let skipped = found.offset_in_decoded() as usize;
                    let right = bytes_of(part).expect("bytes where no others are right");
                    assert!(bytes[skipped..][..part.len()] == right, "{at} to {end}");
                }
                Err(error) => assert_failure(part, error.kind.label()),
            }
            at = end;
        }
    }

    /// Where a block of any archive ends next.
    fn next_border(&self, at: usize) -> usize {
        let blocks = self.chain.iter().flat_map(|archive| &archive.streams[self.stream]);
        let borders = blocks.map(|block| block.start + block.length);
        borders.filter(|border| *border > at).min().expect("a block that covers it")
    }

    fn compare_ranges(&self, looks: &[usize]) {
        let answers = self.answers(0);
        let part = |pair: &[usize]| {
            let start = pair[0] % (answers.len() + 1);
            (start, pair[1] % (answers.len() - start + 1))
        };
        let parts = looks.windows(2).take(8).map(part);
        for (start, length) in parts.chain([(0, answers.len())]) {
            let mut buffer = vec![0xa5; length];
            let read = self.snapshot.read_exact_at(STREAMS[self.stream], &mut buffer, start as u64);
            let part = &answers[start..][..length];
            match read {
                Ok(()) => assert!(bytes_of(part) == Some(buffer), "{length} bytes from {start}"),
                Err(error) => assert_failure(part, error.kind.label()),
            }
        }
    }

    /// Compares what is said of zeros, and of changes against each archive of the chain.
    fn compare_runs(&self, looks: &[usize], most: usize) {
        let kind = STREAMS[self.stream];
        let own = self.answers(0);
        let start = looks.first().map_or(0, |look| look % own.len().max(1));
        let length = looks.get(1).map_or(usize::MAX, |look| look % 8192).min(own.len() - start);
        if length == 0 {
            return;
        }
        let range = start as u64..(start + length) as u64;
        let own_may_fail = own[start..][..length].iter().any(|answer| answer.may_fail);
        match self.snapshot.zero_runs(kind, range.clone(), most) {
            Ok(runs) => {
                for_each(start, &runs, |at, is_zeros| {
                    assert!(!is_zeros || own[at].byte == Some(0), "{at}");
                });
            }
            Err(error) => assert!(own_may_fail, "{error}"),
        }
        for (archive, reference) in self.snapshot.diff_bases().iter().enumerate() {
            let other = self.answers(archive);
            let their = |at: usize| other.get(at).and_then(|answer| answer.byte);
            match self.snapshot.changed_runs(kind, range.clone(), most, reference) {
                Ok(runs) => for_each(start, &runs, |at, is_changed| {
                    // Nothing is wrong about bytes that can't be read.
                    let is_same = own[at].byte.is_none() || own[at].byte == their(at);
                    let is_unknown = other.get(at).is_some_and(|answer| answer.byte.is_none());
                    assert!(is_changed || is_same || is_unknown, "{at} against {archive}");
                }),
                Err(error) => {
                    let may_fail = |at: usize| other.get(at).is_some_and(|answer| answer.may_fail);
                    assert!(own_may_fail || (start..start + length).any(may_fail), "{error}");
                }
            }
        }
    }
}

/// Calls `each` with the place of each byte of the runs, and whether it is so there.
fn for_each(start: usize, runs: &[Run], mut each: impl FnMut(usize, bool)) {
    let mut at = start;
    for run in runs {
        let end = at + run.length as usize;
        (at..end).for_each(|at| each(at, run.has_property));
        at = end;
    }
}

/// Checks that the reader may fail with that label in a range with these answers.
fn assert_failure(answers: &[Answer], label: &str) {
    let is_ambiguous = label == "ambiguous";
    let is_expected = |answer: &Answer| match is_ambiguous {
        true => answer.may_be_ambiguous,
        false => answer.may_fail,
    };
    assert!(answers.iter().any(is_expected), "{label}: {:?}", answers.first());
}
