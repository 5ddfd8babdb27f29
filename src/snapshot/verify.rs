//! Checking every block of a snapshot: that it can be read, and where not, why.
//!
//! Threads take batches of blocks from one cursor, which goes through the index page by
//! page; no more than the pages of the batches are in memory. A stored copy that several
//! blocks share is decoded once. Faults are gathered by their cause, each with all ranges of
//! the stream that it touches; when they become many, all threads pause until those so far
//! have been reported.

use std::convert::Infallible;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use quick_cache::sync::Cache;

use super::error::Error;
use super::faults::{Fault, Found};
use super::header::Extent;
use super::index::{Content, Located, Page, PageRef};
use super::pages::PageId;
use super::parents::InParent;
use super::{Block, BlockHash, Snapshot, StreamKind};

/// What a thread takes from the cursor at once, in blocks and in bytes of the stream.
const BATCH_BLOCKS: usize = 256;
const BATCH_BYTES: u64 = 1 << 20;
/// Ranges of faults that are gathered before they are reported; some 400 bytes each.
const MAX_GATHERED: usize = 1 << 16;
/// Stored copies whose verdict is kept for other blocks that share them: of those that were
/// met most or last, some 100 bytes each. Copies beyond that are decoded again.
const MAX_COPIES: u64 = 1 << 19;

const STREAMS: [StreamKind; 2] = [StreamKind::Main, StreamKind::Auxiliary];

/// How far one check has come; to be looked at, and stopped, by other threads.
#[derive(Debug, Default)]
pub struct Progress {
    bytes: AtomicU64,
    unreadable: AtomicU64,
    is_stopped: AtomicBool,
}

impl Progress {
    /// Bytes of the streams that have been checked.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Those among them that can't be read.
    pub fn unreadable(&self) -> u64 {
        self.unreadable.load(Ordering::Relaxed)
    }

    /// Ends the check after the blocks that are being decoded.
    pub fn stop(&self) {
        self.is_stopped.store(true, Ordering::Relaxed);
    }

    /// Whether it was told to end.
    pub fn is_stopped(&self) -> bool {
        self.is_stopped.load(Ordering::Relaxed)
    }
}

/// What was checked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Whether it was all, and the check wasn't stopped before.
    pub is_complete: bool,
    /// Blocks of both streams.
    pub blocks: u64,
    /// Bytes of both streams.
    pub bytes: u64,
    /// Blocks known to be zeros, here or in a parent; nothing is read for them.
    pub zeros: u64,
    /// Blocks that live in a parent.
    pub in_parents: u64,
    /// Blocks that share a stored copy with one that was checked before.
    pub shared: u64,
    /// Faults that were reported.
    pub faults: u64,
    /// Bytes of the streams that can't be read.
    pub unreadable: u64,
}

impl Snapshot {
    /// Reads every block of both streams through the chain, on so many threads: index page,
    /// CRC-32, decryption, decompression, length and BLAKE3, unless the snapshot was opened
    /// without the last. What reading a block comes to is what this says of it.
    ///
    /// `report` gets each fault once, in the order of where in the streams each begins. Where
    /// they are very many, it gets them in lots, and a cause that occurs in several lots once
    /// in each.
    pub fn verify(
        &self,
        threads: NonZeroUsize,
        progress: &Progress,
        mut report: impl FnMut(Fault),
    ) -> Summary {
        let check = Check::new(self, progress);
        loop {
            check.round(threads);
            let is_done = check.lock(&check.cursor).is_done;
            let faults = check.lock(&check.found).take();
            faults.into_iter().for_each(&mut report);
            if is_done || progress.is_stopped() {
                let mut summary = check.lock(&check.found).summary;
                summary.bytes = progress.bytes();
                summary.is_complete = is_done && !progress.is_stopped();
                return summary;
            }
        }
    }
}

/// One check of one snapshot.
struct Check<'a> {
    snapshot: &'a Snapshot,
    progress: &'a Progress,
    cursor: Mutex<Cursor>,
    found: Mutex<Found>,
    copies: Cache<StoredCopy, Result<(), Arc<Error>>>,
}

/// All on which the verdict of a stored block depends, but its number: that matters only
/// where blocks are encrypted, and then none has a copy in common with another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct StoredCopy {
    archive: usize,
    place: Extent,
    checksum: u32,
    length: u32,
    hash: BlockHash,
}

/// Blocks of a page, by their positions.
struct Batch {
    stream: StreamKind,
    page: Arc<Page>,
    positions: Range<usize>,
}

impl<'a> Check<'a> {
    fn new(snapshot: &'a Snapshot, progress: &'a Progress) -> Self {
        let pages = STREAMS.iter().flat_map(|&stream| own_pages(snapshot, stream));
        let blocks: u64 = pages.map(|page| u64::from(page.block_count())).sum();
        // With room to spare, since the shards are never filled evenly.
        let copies = (2 * blocks + 1024).min(MAX_COPIES);
        Self {
            snapshot,
            progress,
            cursor: Mutex::default(),
            found: Mutex::default(),
            copies: Cache::new(usize::try_from(copies).unwrap_or(usize::MAX)),
        }
    }

    /// Checks until all is checked, or so many faults have been found that they have to be
    /// reported.
    fn round(&self, threads: NonZeroUsize) {
        std::thread::scope(|scope| {
            for _ in 1..threads.get() {
                let thread = std::thread::Builder::new().name("verify".to_owned());
                if let Err(error) = thread.spawn_scoped(scope, || self.work()) {
                    tracing::debug!("checking with fewer threads: {error}");
                    break;
                }
            }
            self.work();
        });
    }

    fn work(&self) {
        while let Some(batch) = self.next_batch() {
            let mut seen = Summary::default();
            for position in batch.positions.clone() {
                if self.progress.is_stopped() {
                    break;
                }
                let Some(range) = batch.page.range(position) else { continue };
                let verdict = match batch.page.block(position) {
                    Some(block) => self.block(batch.stream, block, &mut seen),
                    None => Err(Arc::new(self.snapshot.uncovered(batch.stream, range.start))),
                };
                seen.blocks += 1;
                self.note(batch.stream, range, 1, verdict);
            }
            let mut found = self.lock(&self.found);
            found.summary.blocks += seen.blocks;
            found.summary.zeros += seen.zeros;
            found.summary.in_parents += seen.in_parents;
            found.summary.shared += seen.shared;
        }
    }

    /// Whether a block can be read.
    fn block(
        &self,
        stream: StreamKind,
        located: Located,
        seen: &mut Summary,
    ) -> Result<(), Arc<Error>> {
        let (archive, block) = match located.entry.content {
            Content::InParent => {
                seen.in_parents += 1;
                let InParent { archive, block } =
                    self.snapshot.find_in_parents(&Block { stream, located })?;
                (archive, block)
            }
            _ => (0, located),
        };
        let archive_file = self.snapshot.archive(archive)?;
        let read = || archive_file.read_block(&block).map(drop).map_err(Arc::new);
        match block.entry.content {
            // A hash that doesn't fit would have made it something else.
            Content::Zeros => {
                seen.zeros += 1;
                Ok(())
            }
            Content::Stored { place, checksum } if archive_file.header.encryption.is_none() => {
                let (length, hash) = (block.length, block.entry.hash);
                let copy = StoredCopy { archive, place, checksum, length, hash };
                let mut is_first = false;
                let verdict = self.copies.get_or_insert_with(&copy, || {
                    is_first = true;
                    Ok::<_, Infallible>(read())
                });
                seen.shared += u64::from(!is_first);
                verdict.unwrap_or_else(|impossible| match impossible {})
            }
            _ => read(),
        }
    }

    /// The blocks that are next, unless it is time to pause or to end.
    fn next_batch(&self) -> Option<Batch> {
        let mut cursor = self.lock(&self.cursor);
        loop {
            if self.progress.is_stopped() || self.lock(&self.found).ranges >= MAX_GATHERED {
                return None;
            }
            if let Some(batch) = cursor.batch_of_page() {
                return Some(batch);
            }
            let Some(&stream) = STREAMS.get(cursor.stream) else {
                cursor.is_done = true;
                return None;
            };
            self.turn_page(&mut cursor, stream);
        }
    }

    /// Goes to the next page of `stream`, or to the next stream behind the last.
    fn turn_page(&self, cursor: &mut Cursor, stream: StreamKind) {
        let pages = own_pages(self.snapshot, stream);
        if cursor.page == 0 {
            let size = self.snapshot.size(stream);
            let start = pages.first().map_or(size, |page| page.start_logical);
            if start > 0 {
                let uncovered = Err(Arc::new(self.snapshot.uncovered(stream, 0)));
                self.note(stream, 0..start, 0, uncovered);
            }
        }
        let Some(place) = pages.get(cursor.page) else {
            cursor.stream += 1;
            cursor.page = 0;
            return;
        };
        match self.snapshot.page(PageId { archive: 0, stream, page: cursor.page }) {
            Ok(page) => cursor.loaded = Some((stream, page, 0)),
            Err(error) => {
                let next = pages.get(cursor.page + 1).map(|next| next.start_logical);
                let end = next.unwrap_or_else(|| self.snapshot.size(stream));
                let blocks = u64::from(place.block_count());
                self.lock(&self.found).summary.blocks += blocks;
                self.note(stream, place.start_logical..end, blocks, Err(Arc::new(error)));
            }
        }
        cursor.page += 1;
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
            self.lock(&self.found).add(stream, range, blocks, error);
            self.progress.unreadable.fetch_add(length, Ordering::Relaxed);
        }
        self.progress.bytes.fetch_add(length, Ordering::Relaxed);
    }

    fn lock<'m, T>(&self, mutex: &'m Mutex<T>) -> MutexGuard<'m, T> {
        // Nothing panics while one is locked.
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The index pages of the archive itself.
fn own_pages(snapshot: &Snapshot, stream: StreamKind) -> &[PageRef] {
    snapshot.chain.first().map_or(&[], |archive| &archive.stream(stream).pages)
}

/// Where in the streams the check is.
#[derive(Default)]
struct Cursor {
    /// The stream's place among [`STREAMS`].
    stream: usize,
    /// The page that comes next.
    page: usize,
    /// The page that is being given out, and the position that comes next.
    loaded: Option<(StreamKind, Arc<Page>, usize)>,
    is_done: bool,
}

impl Cursor {
    fn batch_of_page(&mut self) -> Option<Batch> {
        let (stream, page, position) = self.loaded.as_mut()?;
        let (start, mut bytes) = (*position, 0);
        while bytes < BATCH_BYTES
            && *position - start < BATCH_BLOCKS
            && let Some(range) = page.range(*position)
        {
            bytes += range.end - range.start;
            *position += 1;
        }
        let batch = Batch { stream: *stream, page: Arc::clone(page), positions: start..*position };
        if batch.positions.is_empty() {
            self.loaded = None;
            return None;
        }
        Some(batch)
    }
}
