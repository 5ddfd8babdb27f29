//! Verification of every block of a snapshot, with the reasons why blocks can't be read.
//!
//! Threads take batches of blocks from a shared cursor that traverses the index page by page, so
//! only the pages of current batches are in memory. A stored copy that several blocks share is
//! decoded once. Faults are grouped by cause, each with all affected ranges of the stream. When
//! there are many ranges, all threads pause until the faults found so far have been reported.

use std::convert::Infallible;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use quick_cache::sync::Cache;

use super::block_read::ReadContext;
use super::error::Error;
use super::faults::{Fault, FaultCollector};
use super::header::Extent;
use super::index_page::{Content, IndexPage, LocatedBlock};
use super::page_cache::PageId;
use super::parent_index::ParentBlock;
use super::{Block, BlockHash, Snapshot, StreamKind};

/// Maximum number of blocks that a thread takes from the cursor at a time.
const BATCH_BLOCKS: usize = 256;
/// Number of stream bytes after which a batch ends.
const BATCH_BYTES: u64 = 1 << 20;
/// Number of ranges of faults at which the faults are reported; some 400 bytes each.
const MAX_PENDING_RANGES: usize = 1 << 16;
/// Maximum number of stored copies whose result is cached for other blocks that share them, some
/// 100 bytes each. Copies that were evicted are decoded again.
const MAX_CACHED_COPIES: u64 = 1 << 19;

/// Progress of one verification, for other threads to observe and stop.
#[derive(Debug, Default)]
pub struct VerifyProgress {
    bytes: AtomicU64,
    unreadable: AtomicU64,
    is_stopped: AtomicBool,
}

impl VerifyProgress {
    /// Returns the number of stream bytes that have been checked.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Returns the number of checked bytes that can't be read.
    pub fn unreadable(&self) -> u64 {
        self.unreadable.load(Ordering::Relaxed)
    }

    /// Stops the verification after the blocks that are being decoded.
    pub fn stop(&self) {
        self.is_stopped.store(true, Ordering::Relaxed);
    }

    /// Returns true if the verification has been stopped.
    pub fn is_stopped(&self) -> bool {
        self.is_stopped.load(Ordering::Relaxed)
    }
}

/// Totals of a verification.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VerifyStats {
    /// True if everything was checked; false if the verification was stopped.
    pub is_complete: bool,
    /// Number of blocks in both streams.
    pub blocks: u64,
    /// Number of bytes in both streams.
    pub bytes: u64,
    /// Number of blocks known to be zeros, here or in a parent, for which nothing is read.
    pub zeros: u64,
    /// Number of blocks that live in a parent.
    pub in_parents: u64,
    /// Number of blocks that share a stored copy with a block that was checked before.
    pub shared: u64,
    /// Number of faults that were reported.
    pub faults: u64,
    /// Number of stream bytes that can't be read.
    pub unreadable: u64,
}

impl Snapshot {
    /// Reads every block of both streams through the chain, on `threads` threads. Checks the index
    /// pages, CRC-32, decryption, decompression, length and BLAKE3 (unless the snapshot was opened
    /// without the latter). The result for a block is the same as that of reading it.
    ///
    /// Calls `report` once for each fault, in ascending order of stream and start offset. If there
    /// are very many, faults are reported in several lots, and a cause that occurs in several lots
    /// is reported once in each.
    ///
    /// ```no_run
    /// use std::num::NonZeroUsize;
    ///
    /// use hexz_reader::{OpenOptions, Snapshot, VerifyProgress};
    ///
    /// # fn main() -> Result<(), hexz_reader::Error> {
    /// let snapshot = Snapshot::open("disk.hxz".as_ref(), &OpenOptions::default())?;
    /// let progress = VerifyProgress::default();
    /// let stats = snapshot.verify(NonZeroUsize::MIN, &progress, |fault| {
    ///     eprintln!("{} bytes can't be read: {}", fault.bytes(), fault.error);
    /// });
    /// assert!(stats.is_complete);
    /// # Ok(())
    /// # }
    /// ```
    pub fn verify(
        &self,
        threads: NonZeroUsize,
        progress: &VerifyProgress,
        mut report: impl FnMut(Fault),
    ) -> VerifyStats {
        let check = Verification::new(self, progress);
        loop {
            check.round(threads);
            let is_done = check.cursor.lock().is_done;
            let faults = check.found.lock().take();
            faults.into_iter().for_each(&mut report);
            if is_done || progress.is_stopped() {
                let mut summary = check.found.lock().summary;
                summary.bytes = progress.bytes();
                summary.is_complete = is_done && !progress.is_stopped();
                return summary;
            }
        }
    }
}

/// State of one verification of one snapshot.
struct Verification<'a> {
    snapshot: &'a Snapshot,
    progress: &'a VerifyProgress,
    cursor: Mutex<Cursor>,
    found: Mutex<FaultCollector>,
    copies: Cache<StoredCopy, Result<(), Arc<Error>>>,
}

/// Everything that the result for a stored block depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct StoredCopy {
    archive: usize,
    place: Extent,
    checksum: u32,
    length: u32,
    hash: BlockHash,
    /// Number of the block, if it is encrypted.
    number: Option<u64>,
}

/// Positions of consecutive blocks on a page.
struct BlockBatch {
    id: PageId,
    page: Arc<IndexPage>,
    positions: Range<usize>,
}

impl<'a> Verification<'a> {
    fn new(snapshot: &'a Snapshot, progress: &'a VerifyProgress) -> Self {
        let blocks: u64 =
            StreamKind::ALL.map(|stream| snapshot.own().block_count(stream)).iter().sum();
        // Twice the number of blocks, since the cache's shards don't fill evenly.
        let copies = (2 * blocks + 1024).min(MAX_CACHED_COPIES);
        Self {
            snapshot,
            progress,
            cursor: Mutex::default(),
            found: Mutex::default(),
            copies: Cache::new(usize::try_from(copies).unwrap_or(usize::MAX)),
        }
    }

    /// Checks blocks until all are checked, or the faults have to be reported.
    fn round(&self, threads: NonZeroUsize) {
        std::thread::scope(|scope| {
            for _ in 1..threads.get() {
                let thread = std::thread::Builder::new().name("verify".to_owned());
                if let Err(error) = thread.spawn_scoped(scope, || self.work()) {
                    tracing::debug!("verifying with fewer threads: {error}");
                    break;
                }
            }
            self.work();
        });
    }

    fn work(&self) {
        while let Some(batch) = self.next_batch() {
            let mut seen = VerifyStats::default();
            for position in batch.positions.clone() {
                if self.progress.is_stopped() {
                    break;
                }
                seen.blocks += 1;
                match batch.page.block(position) {
                    Some(block) => self.block(batch.id, block, &mut seen),
                    // The block number exceeds 64 bits.
                    None => self.note_unnumbered(&batch, position),
                }
            }
            let mut found = self.found.lock();
            found.summary.blocks += seen.blocks;
            found.summary.zeros += seen.zeros;
            found.summary.in_parents += seen.in_parents;
            found.summary.shared += seen.shared;
        }
    }

    fn note_unnumbered(&self, batch: &BlockBatch, position: usize) {
        if let Some(range) = batch.page.range(position) {
            let stream = batch.id.stream;
            let error = self.snapshot.own().uncovered_error(stream, range.start);
            self.note(stream, range, 1, Err(Arc::new(error)));
        }
    }

    /// Checks a block on the page `id`. A block that is referenced by offset is checked in parts:
    /// the ancestors' blocks that cover its range.
    fn block(&self, id: PageId, located: LocatedBlock, seen: &mut VerifyStats) {
        if located.entry.content == Content::InParent {
            seen.in_parents += 1;
        }
        let mut part = VerifyStats { zeros: 1, ..VerifyStats::default() };
        let mut at = located.start;
        while at < located.end() {
            let (end, verdict) = match self.snapshot.follow_with_end(id, located, at) {
                Ok(block) => (block.end(), self.part(&block, &mut part)),
                Err((error, end)) => (end, Err(Arc::new(error))),
            };
            if verdict.is_err() {
                part.zeros = 0;
            }
            self.note(id.stream, at..end, 1, verdict);
            at = end;
        }
        seen.zeros += part.zeros;
        seen.shared += part.shared;
    }

    /// Checks a block or a part of one. Clears `seen.zeros` if it isn't zeros, and sets
    /// `seen.shared` if it shares a stored copy with a block that was checked before.
    fn part(&self, block: &Block, seen: &mut VerifyStats) -> Result<(), Arc<Error>> {
        let (archive, block) = match block.located.entry.content {
            Content::InParent if block.is_ambiguous => {
                seen.zeros = 0;
                return Ok(self.snapshot.read_block(block).map(drop)?);
            }
            Content::InParent => {
                let ParentBlock { archive, block } =
                    self.snapshot.load_from_parents(block, ReadContext::UNLIMITED)?;
                (archive, block)
            }
            _ => (block.archive, block.located),
        };
        let Content::Stored { place, checksum } = block.entry.content else {
            // Zeros with another hash are `Content::Contradiction` and fail below.
            if block.entry.content == Content::Zeros {
                return Ok(());
            }
            return Ok(self.snapshot.archive(archive)?.read_block(&block).map(drop)?);
        };
        seen.zeros = 0;
        let file = self.snapshot.archive(archive)?;
        let (length, hash) = (block.length, block.entry.hash);
        let number = file.header.encryption.map(|_| block.number);
        let copy = StoredCopy { archive, place, checksum, length, hash, number };
        let mut is_first = false;
        let verdict = self.copies.get_or_insert_with(&copy, || {
            is_first = true;
            Ok::<_, Infallible>(file.read_block(&block).map(drop).map_err(Arc::new))
        });
        if !is_first {
            seen.shared = 1;
        }
        verdict.unwrap_or_else(|impossible| match impossible {})
    }

    /// Returns the next blocks, or `None` if it is time to pause or all blocks are taken.
    fn next_batch(&self) -> Option<BlockBatch> {
        let mut cursor = self.cursor.lock();
        loop {
            if self.progress.is_stopped() || self.found.lock().ranges >= MAX_PENDING_RANGES {
                return None;
            }
            if let Some(batch) = cursor.batch_of_page() {
                return Some(batch);
            }
            let Some(&stream) = StreamKind::ALL.get(cursor.stream) else {
                cursor.is_done = true;
                return None;
            };
            self.turn_page(&mut cursor, stream);
        }
    }

    /// Advances to the next page of `stream`, or to the next stream behind the last page.
    fn turn_page(&self, cursor: &mut Cursor, stream: StreamKind) {
        let own = self.snapshot.own();
        let index = own.stream(stream);
        let pages = index.pages.as_slice();
        if cursor.page == 0 {
            let start = pages.first().map_or(index.size, |page| page.start_logical);
            self.gap(stream, 0..start);
        }
        let Some(place) = pages.get(cursor.page) else {
            if !pages.is_empty() {
                self.gap(stream, index.end..index.size);
            }
            cursor.stream += 1;
            cursor.page = 0;
            return;
        };
        let id = PageId { archive: 0, stream, page: cursor.page };
        match self.snapshot.page(id) {
            Ok(page) => cursor.loaded = Some((id, page, 0)),
            Err(error) => {
                let end = index.page_end(cursor.page);
                let blocks = place.block_count(own.entry_form()).into();
                self.found.lock().summary.blocks += blocks;
                self.note(stream, place.start_logical..end, blocks, Err(Arc::new(error)));
            }
        }
        cursor.page += 1;
    }

    /// Records a range that no block covers.
    fn gap(&self, stream: StreamKind, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let verdict = self.snapshot.uncovered_block(0, stream, range.start);
        self.note(stream, range, 0, verdict.map(drop).map_err(Arc::new));
    }

    fn note(
        &self,
        stream: StreamKind,
        range: Range<u64>,
        blocks: u64,
        verdict: Result<(), Arc<Error>>,
    ) {
        let length = range.end - range.start;
        if let Err(error) = verdict {
            self.found.lock().add(stream, range, blocks, error);
            self.progress.unreadable.fetch_add(length, Ordering::Relaxed);
        }
        self.progress.bytes.fetch_add(length, Ordering::Relaxed);
    }
}

/// Position of the verification in the streams.
#[derive(Default)]
struct Cursor {
    /// Index into [`StreamKind::ALL`].
    stream: usize,
    /// Number of the next page.
    page: usize,
    /// Page that is being divided into batches, and the next position on it.
    loaded: Option<(PageId, Arc<IndexPage>, usize)>,
    is_done: bool,
}

impl Cursor {
    fn batch_of_page(&mut self) -> Option<BlockBatch> {
        let (id, page, position) = self.loaded.as_mut()?;
        let (start, mut bytes) = (*position, 0);
        while bytes < BATCH_BYTES
            && *position - start < BATCH_BLOCKS
            && let Some(range) = page.range(*position)
        {
            bytes += range.end - range.start;
            *position += 1;
        }
        let batch = BlockBatch { id: *id, page: Arc::clone(page), positions: start..*position };
        if batch.positions.is_empty() {
            self.loaded = None;
            return None;
        }
        Some(batch)
    }
}
