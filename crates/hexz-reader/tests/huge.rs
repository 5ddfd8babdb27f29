//! Archives larger than any disk at hand: made up as they are read, with a record of what
//! is read.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};

use hexz_reader::limits::MAX_MASTER_INDEX;
use hexz_reader::storage::{FileId, Storage};
use hexz_reader::{Compression, Error, OpenOptions, Snapshot, StreamKind};

use crate::archive_writer::{ArchiveWriter, HEADER_REGION, entry};
use crate::support::{read, too_large};

fn open(huge: &Arc<Huge>) -> Result<Snapshot, Error> {
    let storage: Arc<Huge> = Arc::clone(huge);
    Snapshot::from_storage(Path::new("huge.hxz"), storage, &OpenOptions::default())
}

#[test]
fn a_master_index_beyond_the_cap_is_not_even_read() {
    let huge = Arc::new(Huge::with_master_index_of(MAX_MASTER_INDEX + 1));
    assert!(too_large(&open(&huge).unwrap_err().kind));
    assert!(huge.bytes_read() <= 4096);
}

/// 2^24 blocks of 64 KiB.
#[test]
fn a_disk_of_a_tebibyte_is_opened_by_its_master_index_alone() {
    let huge = Arc::new(Huge::tebibyte());
    let snapshot = open(&huge).unwrap();
    assert_eq!(snapshot.size(StreamKind::Main), 1 << 40);
    assert!(huge.bytes_read() < 128 * 1024, "{} bytes to open it", huge.bytes_read());

    // A page and a block.
    for number in [0, (1 << 23) + 77, (1 << 24) - 1] {
        let before = huge.reads().len();
        let bytes = read(&snapshot, StreamKind::Main, (number << 16) + 100, 1000).unwrap();
        assert!(bytes == Huge::block(number)[100..1100], "block {number}");
        let reads = &huge.reads()[before..];
        assert_eq!(reads, [Huge::page_of(number), Huge::stored(number)]);
    }
    // The neighbour is on a page that is in memory by now.
    let before = huge.reads().len();
    read(&snapshot, StreamKind::Main, 1 << 16, 1).unwrap();
    assert_eq!(huge.reads()[before..], [Huge::stored(1)]);
}

const BLOCK: usize = 64 * 1024;
const BLOCKS: u64 = 1 << 24;
const BLOCKS_PER_PAGE: u64 = 4096;
const PAGE: u64 = 8 + 52 * BLOCKS_PER_PAGE;
const PAGES: u64 = BLOCKS / BLOCKS_PER_PAGE;
/// Stored blocks are this far apart, in bytes.
const STRIDE: u64 = 1024;
const BLOCKS_AT: u64 = HEADER_REGION as u64;
const PAGES_AT: u64 = BLOCKS_AT + BLOCKS * STRIDE;
const INDEX_AT: u64 = PAGES_AT + PAGES * PAGE;

#[derive(Debug)]
struct Huge {
    header: Vec<u8>,
    index: Vec<u8>,
    length: u64,
    reads: Mutex<Vec<Range<u64>>>,
}

impl Huge {
    /// One whose master index has `length` bytes, all of them zero.
    fn with_master_index_of(length: u64) -> Self {
        Self::new(HEADER_REGION as u64, Vec::new(), HEADER_REGION as u64 + length)
    }

    /// One TiB in 2^24 LZ4 blocks.
    fn tebibyte() -> Self {
        let mut index = PAGES.to_le_bytes().to_vec();
        for page in 0..PAGES {
            index.extend((PAGES_AT + page * PAGE).to_le_bytes());
            index.extend((PAGE as u32).to_le_bytes());
            index.extend((page * BLOCKS_PER_PAGE).to_le_bytes());
            index.extend((page * BLOCKS_PER_PAGE * BLOCK as u64).to_le_bytes());
        }
        index.extend(0_u64.to_le_bytes());
        index.extend((BLOCKS * BLOCK as u64).to_le_bytes());
        index.extend(0_u64.to_le_bytes());
        let length = INDEX_AT + index.len() as u64;
        Self::new(INDEX_AT, index, length)
    }

    fn new(index_offset: u64, index: Vec<u8>, length: u64) -> Self {
        let compression = Compression::Lz4;
        let mut header = ArchiveWriter { compression, ..ArchiveWriter::default() }.write();
        header.set("index offset", &index_offset.to_le_bytes());
        header.bytes.truncate(HEADER_REGION);
        Self { header: header.bytes, index, length, reads: Mutex::default() }
    }

    /// The ranges that were read, in order.
    fn reads(&self) -> Vec<Range<u64>> {
        self.reads.lock().unwrap().clone()
    }

    fn bytes_read(&self) -> u64 {
        self.reads().iter().map(|range| range.end - range.start).sum()
    }

    /// What block `number` reads as.
    fn block(number: u64) -> Vec<u8> {
        number.to_le_bytes().repeat(BLOCK / 8)
    }

    /// Where block `number` is stored.
    fn stored(number: u64) -> Range<u64> {
        let start = BLOCKS_AT + number * STRIDE;
        start..start + compressed(number).len() as u64
    }

    /// Where the page of block `number` is.
    fn page_of(number: u64) -> Range<u64> {
        let start = PAGES_AT + number / BLOCKS_PER_PAGE * PAGE;
        start..start + PAGE
    }
}

fn compressed(number: u64) -> Vec<u8> {
    lz4_flex::block::compress_prepend_size(&Huge::block(number))
}

fn page(page: u64) -> Vec<u8> {
    let mut bytes = BLOCKS_PER_PAGE.to_le_bytes().to_vec();
    for number in page * BLOCKS_PER_PAGE..(page + 1) * BLOCKS_PER_PAGE {
        let stored = compressed(number);
        let at = BLOCKS_AT + number * STRIDE;
        let checksum = crc32fast::hash(&stored);
        bytes.extend(entry(at, stored.len() as u32, BLOCK as u32, checksum, [0; 32]));
    }
    bytes
}

impl Storage for Huge {
    fn length(&self) -> u64 {
        self.length
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.reads.lock().unwrap().push(offset..offset + buffer.len() as u64);
        let (part, skipped) = match offset {
            at if at < BLOCKS_AT => (self.header.clone(), at),
            at if at < PAGES_AT => {
                (compressed((at - BLOCKS_AT) / STRIDE), (at - BLOCKS_AT) % STRIDE)
            }
            at if at < INDEX_AT => (page((at - PAGES_AT) / PAGE), (at - PAGES_AT) % PAGE),
            at => (self.index.clone(), at - INDEX_AT),
        };
        let skipped = skipped as usize;
        let wanted = part.get(skipped..skipped + buffer.len());
        buffer.copy_from_slice(wanted.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn file_id(&self) -> Option<FileId> {
        None
    }
}
