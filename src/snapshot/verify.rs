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

/// All on which the verdict of a stored block depends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct StoredCopy {
    archive: usize,
    place: Extent,
    checksum: u32,
    length: u32,
    hash: BlockHash,
    /// The block's number, if it is encrypted.
    number: Option<u64>,
}

/// Blocks of a page, by their positions.
struct Batch {
    id: PageId,
    page: Arc<Page>,
    positions: Range<usize>,
}

impl<'a> Check<'a> {
    fn new(snapshot: &'a Snapshot, progress: &'a Progress) -> Self {
        let own = snapshot.chain.first();
        let blocks: u64 =
            own.map_or(0, |own| STREAMS.iter().map(|&stream| own.block_count(stream)).sum());
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
                seen.blocks += 1;
                match batch.page.block(position) {
                    Some(block) => self.block(batch.id, block, &mut seen),
                    // Its number is beyond all numbers.
                    None => self.note_unnumbered(&batch, position),
                }
            }
            let mut found = self.lock(&self.found);
            found.summary.blocks += seen.blocks;
            found.summary.zeros += seen.zeros;
            found.summary.in_parents += seen.in_parents;
            found.summary.shared += seen.shared;
        }
    }

    fn note_unnumbered(&self, batch: &Batch, position: usize) {
        if let Some(range) = batch.page.range(position)
            && let Some(own) = self.snapshot.chain.first()
        {
            let stream = batch.id.stream;
            let error = own.uncovered(stream, range.start);
            self.note(stream, range, 1, Err(Arc::new(error)));
        }
    }

    /// Checks a block on the page `id`. One that is referred to by offset is checked in
    /// parts: those of the ancestors' blocks that cover its range.
    fn block(&self, id: PageId, located: Located, seen: &mut Summary) {
        if located.entry.content == Content::InParent {
            seen.in_parents += 1;
        }
        let mut part = Summary { zeros: 1, ..Summary::default() };
        let mut at = located.start;
        while at < located.end() {
            let (end, verdict) = match self.snapshot.follow_or_end(id, located, at) {
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
    /// `seen.shared` if it shares a stored copy with one that was checked before.
    fn part(&self, block: &Block, seen: &mut Summary) -> Result<(), Arc<Error>> {
        let (archive, block) = match block.located.entry.content {
            Content::InParent if block.is_undecided => {
                seen.zeros = 0;
                return Ok(self.snapshot.read_block(block).map(drop)?);
            }
            Content::InParent => {
                let InParent { archive, block } = self.snapshot.find_in_parents(block, true)?;
                (archive, block)
            }
            _ => (block.archive, block.located),
        };
        let Content::Stored { place, checksum } = block.entry.content else {
            // A hash that doesn't fit would have made zeros something else.
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
            self.gap(stream, 0..start);
        }
        let Some(place) = pages.get(cursor.page) else {
            if let Some(own) = self.snapshot.chain.first()
                && !pages.is_empty()
            {
                let index = own.stream(stream);
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
                let own = self.snapshot.chain.first();
                let end = own.map_or(0, |own| own.stream(stream).page_end(cursor.page));
                let blocks = own.map_or(0, |own| place.block_count(own.entry_form()).into());
                self.lock(&self.found).summary.blocks += blocks;
                self.note(stream, place.start_logical..end, blocks, Err(Arc::new(error)));
            }
        }
        cursor.page += 1;
    }

    /// Notes a range that no block covers.
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
    loaded: Option<(PageId, Arc<Page>, usize)>,
    is_done: bool,
}

impl Cursor {
    fn batch_of_page(&mut self) -> Option<Batch> {
        let (id, page, position) = self.loaded.as_mut()?;
        let (start, mut bytes) = (*position, 0);
        while bytes < BATCH_BYTES
            && *position - start < BATCH_BLOCKS
            && let Some(range) = page.range(*position)
        {
            bytes += range.end - range.start;
            *position += 1;
        }
        let batch = Batch { id: *id, page: Arc::clone(page), positions: start..*position };
        if batch.positions.is_empty() {
            self.loaded = None;
            return None;
        }
        Some(batch)
    }
}
