//! An archive of more blocks than are remembered, made up as it is read.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hexz_reader::OpenOptions;
use hexz_reader::storage::{FileId, Storage};
use hexz_reader::summary::ArchiveSummary;

use crate::archive_writer::{ArchiveWriter, HEADER_REGION, entry};

const BLOCK: u64 = 64 * 1024;
const PER_PAGE: u64 = 4096;
const PAGE: u64 = 8 + 52 * PER_PAGE;
/// 2.4 million blocks. Every fifth shares a copy with the one before it, so there are 1.9 million
/// copies, more than are remembered.
const PAGES: u64 = 580;
const BLOCKS: u64 = PAGES * PER_PAGE;
const COPIES: u64 = BLOCKS / 5 * 4;
const STORED: u64 = 1000;
const PAGES_AT: u64 = HEADER_REGION as u64 + BLOCKS * STORED;
const INDEX_AT: u64 = PAGES_AT + PAGES * PAGE;

#[derive(Debug)]
struct Huge {
    header: Vec<u8>,
    index: Vec<u8>,
    bytes_read: AtomicU64,
}

impl Huge {
    fn new() -> Self {
        let mut index = PAGES.to_le_bytes().to_vec();
        for page in 0..PAGES {
            index.extend((PAGES_AT + page * PAGE).to_le_bytes());
            index.extend((PAGE as u32).to_le_bytes());
            index.extend((page * PER_PAGE).to_le_bytes());
            index.extend((page * PER_PAGE * BLOCK).to_le_bytes());
        }
        for number in [0, BLOCKS * BLOCK, 0] {
            index.extend(u64::to_le_bytes(number));
        }
        let mut header = ArchiveWriter::default().write();
        header.set("index offset", &INDEX_AT.to_le_bytes());
        header.bytes.truncate(HEADER_REGION);
        Self { header: header.bytes, index, bytes_read: AtomicU64::new(0) }
    }
}

fn page(page: u64) -> Vec<u8> {
    let mut bytes = PER_PAGE.to_le_bytes().to_vec();
    for number in page * PER_PAGE..(page + 1) * PER_PAGE {
        let copy = number - u64::from(number % 5 == 4);
        let at = HEADER_REGION as u64 + copy * STORED;
        let mut hash = [0; 32];
        hash[..8].copy_from_slice(&(copy + 1).to_le_bytes());
        bytes.extend(entry(at, STORED as u32 - 1, BLOCK as u32, 7, hash));
    }
    bytes
}

impl Storage for Huge {
    fn length(&self) -> u64 {
        INDEX_AT + self.index.len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.bytes_read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        let (part, start) = match offset {
            0..PAGES_AT => (self.header.clone(), 0),
            PAGES_AT..INDEX_AT => {
                let number = (offset - PAGES_AT) / PAGE;
                (page(number), PAGES_AT + number * PAGE)
            }
            _ => (self.index.clone(), INDEX_AT),
        };
        let skipped = (offset - start) as usize;
        let wanted = part.get(skipped..skipped + buffer.len());
        buffer.copy_from_slice(wanted.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn file_id(&self) -> Option<FileId> {
        None
    }
}

/// Beyond what is remembered the copies are an estimate, whose error is as small as it says;
/// and nothing but header, index and the first block is read; all pages but the first once.
#[test]
fn more_blocks_than_are_remembered() {
    let huge = Arc::new(Huge::new());
    let storage: Arc<Huge> = Arc::clone(&huge);
    let options = OpenOptions::default();
    let facts =
        ArchiveSummary::of_storage(Path::new("huge.hxz"), storage, &options, |_| ()).unwrap();
    assert!(facts.is_sound(), "{:?}", facts.faults);
    assert_eq!(facts.main.size, BLOCKS * BLOCK);
    assert_eq!((facts.main.stored.blocks, facts.stored.blocks), (BLOCKS, BLOCKS));
    assert_eq!(facts.stored.undeduplicated_bytes, BLOCKS * (STORED - 1));
    assert!(facts.stored.is_estimate);
    let copies = facts.stored.copies;
    assert!(copies.abs_diff(COPIES) * 1000 < COPIES * 3, "{copies} instead of {COPIES}");
    assert_eq!(facts.stored.copy_bytes, copies * (STORED - 1));
    let index = HEADER_REGION as u64 + PAGES * PAGE + huge.index.len() as u64;
    // The first page tells the form of entries, and where the first block is, whose content
    // tells the format of the image.
    let first = 8 + PAGE + STORED - 1;
    let expected = index + first;
    assert_eq!(huge.bytes_read.load(Ordering::Relaxed), expected);
}
