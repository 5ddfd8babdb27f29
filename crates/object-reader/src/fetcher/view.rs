//! Reads of an object by chunks: from memory, from requests in flight, and by new requests.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout_at};

use super::call::Call;
use super::chunk_cache::ChunkKey;
use super::corrupt::CorruptChunks;
use super::disk::DISK_TIMEOUT;
use super::error::FetchError;
use super::flights::{ChunkWaiter, Fetch, Flights, FlightsGuard};
use super::object_state::ObjectState;
use super::plan::{CHUNK_SIZE, ChunkState, chunks_of, plan};
use super::streams::{Place, ReadaheadLimits, Streams};
use crate::object::{ChunkVerifier, ObjectId, Priority};

/// Bytes of one read that are requested at a time.
const MAX_PART: u64 = 16 << 20;
/// Maximum size of the requests of [`View::prefetch`], in bytes. They delay others that wait for
/// the same connections.
const MAX_PREFETCH: u64 = 1 << 20;

/// Time without a prefetch after which an object isn't being prefetched any more.
const PREFETCH_PAUSE: Duration = Duration::from_secs(5);
/// Length of a stream that is read ahead of in an object that is being prefetched, in bytes.
const PREFETCHED_STREAM: u64 = 4 << 20;

/// An object whose chunks pass one verifier, or aren't verified.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) object: Arc<ObjectState>,
    /// Namespace of the cached chunks.
    pub(super) namespace: ObjectId,
    pub(super) verifier: Option<Arc<dyn ChunkVerifier>>,
    pub(super) flights: Arc<Flights>,
    pub(super) corrupt: CorruptChunks,
    streams: Mutex<Streams>,
    /// Time of the last prefetch, by somebody who knows what readers will need.
    prefetched: Mutex<Option<Instant>>,
}

/// A chunk that a read needs.
#[derive(Debug)]
enum WantedChunk {
    Cached(Bytes),
    InFlight(ChunkWaiter),
}

impl WantedChunk {
    fn place(&self) -> Place {
        match self {
            Self::Cached(_) => Place::Memory,
            Self::InFlight(waiter) if waiter.is_from_disk() => Place::Disk,
            Self::InFlight(_) => Place::Store,
        }
    }
}

/// Returns the farthest place of the chunks.
fn place_of(wanted: &[WantedChunk]) -> Place {
    wanted.iter().map(WantedChunk::place).max().unwrap_or(Place::Memory)
}

impl View {
    /// Creates a view.
    pub(super) fn new(
        object: Arc<ObjectState>,
        namespace: ObjectId,
        verifier: Option<Arc<dyn ChunkVerifier>>,
    ) -> Arc<Self> {
        let (flights, corrupt, streams, prefetched) = Default::default();
        Arc::new(Self { object, namespace, verifier, flights, corrupt, streams, prefetched })
    }

    /// Returns true while it is being prefetched.
    fn is_prefetched(&self) -> bool {
        self.prefetched.lock().is_some_and(|at| at.elapsed() < PREFETCH_PAUSE)
    }

    /// Returns a view of the same object with another verifier.
    pub(crate) fn verified(&self, verifier: Arc<dyn ChunkVerifier>) -> Arc<Self> {
        let fetcher = &self.object.fetcher;
        let namespace = match verifier.identity() {
            Some(identity) => self.object.id.verified_by(&identity),
            None => self.object.id.verified_by(&fetcher.next_anonymous_verifier()),
        };
        fetcher.view(Arc::clone(&self.object), Some(namespace), Some(verifier))
    }

    /// Reads exactly the bytes of `range`.
    pub(crate) async fn read(
        self: &Arc<Self>,
        range: Range<u64>,
        priority: Priority,
    ) -> Result<Bytes, FetchError> {
        let length = self.object.version.length;
        if range.end > length {
            let object = Arc::clone(&self.object.name);
            return Err(FetchError::OutOfRange { object, end: range.end, length });
        }
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let deadline = Instant::now() + self.object.config().store_timeout;
        if let Some(chunk) = only(chunks_of(&range)) {
            let mut wanted = self.want(&range, priority)?;
            self.read_ahead(&range, place_of(&wanted), priority);
            let wanted = wanted.pop().ok_or_else(|| self.object.shutting_down())?;
            let bytes = self.wait(wanted, deadline).await?;
            return self.slice(&bytes, chunk, &range);
        }
        let mut buffer = BytesMut::with_capacity(to_usize(range.end - range.start));
        let mut start = range.start;
        while start < range.end {
            let part = start..range.end.min((start / MAX_PART + 1) * MAX_PART);
            let wanted = self.want(&part, priority)?;
            self.read_ahead(&part, place_of(&wanted), priority);
            for (chunk, wanted) in chunks_of(&part).zip(wanted) {
                let bytes = self.wait(wanted, deadline).await?;
                buffer.extend_from_slice(&self.slice(&bytes, chunk, &part)?);
            }
            start = part.end;
        }
        Ok(buffer.freeze())
    }

    /// Fetches those chunks of `range` that are neither in memory nor on disk. Returns the number of
    /// bytes fetched.
    pub(crate) async fn prefetch(self: &Arc<Self>, range: Range<u64>) -> Result<u64, FetchError> {
        let range = range.start..range.end.min(self.object.version.length);
        let fetcher = &self.object.fetcher;
        let deadline = Instant::now() + self.object.config().store_timeout;
        if let Some(disk) = &fetcher.config.disk_cache {
            disk.wait_for_writes(DISK_TIMEOUT).await;
        }
        *self.prefetched.lock() = Some(Instant::now());
        let mut fetched = 0;
        let waiters: Vec<ChunkWaiter> = {
            let mut flights = self.flights.lock();
            self.object.check_usable()?;
            let chunks = chunks_of(&range);
            let size = fetcher.memory.max_request().min(MAX_PREFETCH) / CHUNK_SIZE;
            let state = |chunk| self.chunk_state(&flights, chunk);
            for request in plan(&chunks, &chunks, size, state) {
                let bytes = request.start * CHUNK_SIZE..request.end * CHUNK_SIZE;
                fetched += bytes.end.min(self.object.version.length) - bytes.start;
                self.start(&mut flights, request, Priority::Background);
            }
            chunks.filter_map(|chunk| flights.join(chunk)).collect()
        };
        for waiter in waiters {
            self.land(waiter, deadline).await?;
        }
        Ok(fetched)
    }

    /// Returns true if all chunks of `range` are in memory.
    pub(crate) fn is_in_memory(&self, range: &Range<u64>) -> bool {
        let cache = &self.object.fetcher.cache;
        chunks_of(range).all(|chunk| cache.contains(&self.key(chunk)))
    }

    /// Copies bytes from `offset` on, if all of them are in memory.
    pub(crate) fn try_read(self: &Arc<Self>, offset: u64, mut buffer: &mut [u8]) -> bool {
        let range = offset..offset.saturating_add(buffer.len() as u64);
        if range.end > self.object.version.length {
            return false;
        }
        // Misses are counted by the read that follows.
        if !self.is_in_memory(&range) {
            return false;
        }
        let cache = &self.object.fetcher.cache;
        for chunk in chunks_of(&range) {
            let bytes = cache.get(&self.key(chunk));
            let Some(Ok(bytes)) = bytes.map(|bytes| self.slice(&bytes, chunk, &range)) else {
                return false;
            };
            let Some((part, rest)) = buffer.split_at_mut_checked(bytes.len()) else {
                return false;
            };
            part.copy_from_slice(&bytes);
            buffer = rest;
        }
        self.read_ahead(&range, Place::Memory, Priority::Demand);
        true
    }

    /// Returns the part of `range` that lies in a chunk.
    fn slice(&self, bytes: &Bytes, chunk: u64, range: &Range<u64>) -> Result<Bytes, FetchError> {
        let first = chunk * CHUNK_SIZE;
        let start = to_usize(range.start.saturating_sub(first));
        let end = to_usize(range.end - first).min(bytes.len());
        if start > end {
            // The lengths of chunks are checked on arrival.
            let object = Arc::clone(&self.object.name);
            return Err(FetchError::Corrupt { object, offset: first });
        }
        Ok(bytes.slice(start..end))
    }

    /// Returns the chunks of `range`, and requests those that are missing.
    fn want(
        self: &Arc<Self>,
        range: &Range<u64>,
        priority: Priority,
    ) -> Result<Vec<WantedChunk>, FetchError> {
        let chunks = chunks_of(range);
        let mut found: Vec<_> = chunks.clone().map(|chunk| self.cached(chunk)).collect();
        if found.iter().any(Option::is_none) {
            let mut flights = self.flights.lock();
            // They may have landed since the last lookup.
            let cache = &self.object.fetcher.cache;
            for (chunk, found) in chunks.clone().zip(&mut found) {
                if found.is_none() && !flights.contains(chunk) {
                    *found = cache.peek(&self.key(chunk));
                }
            }
            let absent = chunks.clone().zip(&found).filter(|(_, found)| found.is_none());
            self.start_from_disk(&mut flights, absent.map(|(chunk, _)| chunk), priority);
            let missing =
                |(chunk, found): (u64, &Option<Bytes>)| found.is_none() && !flights.contains(chunk);
            if chunks.clone().zip(&found).any(missing) {
                self.object.check_usable()?;
                let absent = chunks.clone().zip(&found).filter(|it| missing(*it));
                let mut absent = absent.map(|(chunk, _)| chunk);
                if let Some(corrupt) = absent.find(|chunk| self.corrupt.contains(*chunk)) {
                    return Err(self.corrupt_error(corrupt));
                }
                // What is around it is prefetched if it is likely to be needed.
                let size = match self.is_prefetched() {
                    true => 1,
                    false => self.object.fetcher.config.fetch_size / CHUNK_SIZE,
                };
                let all = chunks_of(&(0..self.object.version.length));
                // The cache may change at any time, also while the flights are locked.
                let state = |chunk| match place_in(&chunks, chunk).and_then(|n| found.get(n)) {
                    Some(Some(_)) => ChunkState::Cached,
                    Some(None) if !flights.contains(chunk) => ChunkState::Missing,
                    _ => self.chunk_state(&flights, chunk),
                };
                let requests = plan(&chunks, &all, size, state);
                requests.into_iter().for_each(|r| self.start(&mut flights, r, priority));
            }
            let wanted = chunks.zip(found).map(|(chunk, found)| match found {
                Some(bytes) => Some(WantedChunk::Cached(bytes)),
                None => flights.join(chunk).map(WantedChunk::InFlight),
            });
            let wanted: Option<Vec<_>> = wanted.collect();
            drop(flights);
            let wanted = wanted.ok_or_else(|| self.object.shutting_down())?;
            for chunk in &wanted {
                if let WantedChunk::InFlight(waiter) = chunk {
                    self.object.dispatcher.gate.raise(waiter.call(), priority);
                }
            }
            return Ok(wanted);
        }
        Ok(found.into_iter().flatten().map(WantedChunk::Cached).collect())
    }

    /// Returns a chunk from memory. One that was fetched without verification is verified.
    fn cached(&self, chunk: u64) -> Option<Bytes> {
        let cache = &self.object.fetcher.cache;
        let key = self.key(chunk);
        if let Some(bytes) = cache.get(&key) {
            return Some(bytes);
        }
        let verifier = self.verifier.as_ref()?;
        let unverified = ChunkKey { namespace: self.object.id, number: chunk };
        let bytes = cache.peek(&unverified).filter(|bytes| verifier.matches(chunk, bytes))?;
        cache.insert(key, bytes.clone());
        Some(bytes)
    }

    fn chunk_state(&self, flights: &FlightsGuard<'_>, chunk: u64) -> ChunkState {
        if flights.contains(chunk) {
            ChunkState::InFlight
        } else if self.object.fetcher.cache.contains(&self.key(chunk))
            || self.is_on_disk(chunk)
            // Whoever needs it gets an error.
            || self.corrupt.contains(chunk)
        {
            ChunkState::Cached
        } else {
            ChunkState::Missing
        }
    }

    /// Requests chunks.
    fn start(
        self: &Arc<Self>,
        flights: &mut FlightsGuard<'_>,
        chunks: Range<u64>,
        priority: Priority,
    ) {
        let spawn = |fetch: Arc<Fetch>| -> AbortHandle {
            let fetching = Arc::clone(self).fetch(fetch);
            self.object.dispatcher.runtime.spawn(fetching).abort_handle()
        };
        flights.add(chunks, false, Call::new(priority), spawn);
    }

    /// Waits for a chunk.
    async fn wait(&self, wanted: WantedChunk, deadline: Instant) -> Result<Bytes, FetchError> {
        let waiter = match wanted {
            WantedChunk::Cached(bytes) => return Ok(bytes),
            WantedChunk::InFlight(waiter) => waiter,
        };
        let call = Arc::clone(waiter.call());
        let before = call.waits();
        let chunk = self.land(waiter, deadline).await;
        self.object.fetcher.waits.lock().add(&call.waits().since(&before));
        chunk
    }

    /// Waits for a chunk in flight.
    async fn land(&self, mut waiter: ChunkWaiter, deadline: Instant) -> Result<Bytes, FetchError> {
        let object = &self.object;
        let chunk = tokio::select! {
            biased;
            chunk = timeout_at(deadline, &mut waiter.chunk) => chunk,
            () = object.fetcher.shutdown.cancelled() => return Err(object.shutting_down()),
        };
        match chunk {
            Ok(Ok(chunk)) => chunk,
            // The task of the request was ended, along with the runtime.
            Ok(Err(_)) => Err(object.shutting_down()),
            Err(_) => {
                let waited = object.config().store_timeout;
                Err(object.failed(object.dispatcher.timeout_error(waiter.call(), waited)))
            }
        }
    }

    /// Takes note of a read, and requests what will probably be read next.
    fn read_ahead(self: &Arc<Self>, read: &Range<u64>, place: Place, priority: Priority) {
        let fetcher = &self.object.fetcher;
        let limits = ReadaheadLimits {
            length: self.object.version.length,
            latency: self.object.dispatcher.base_latency(),
            total: fetcher.readahead_total(),
            min_length: if self.is_prefetched() { PREFETCHED_STREAM } else { 0 },
            min_request: fetcher.config.fetch_size,
            max_request: fetcher.memory.max_request(),
        };
        let mut streams = self.streams.lock();
        let readahead =
            streams.on_read(read, place, Instant::now(), &limits, &fetcher.active_streams);
        drop(streams);
        let Some(readahead) = readahead else { return };
        let chunks = chunks_of(&readahead.range);
        let size = readahead.request_size / CHUNK_SIZE;
        let priority = priority.max(Priority::Ahead);
        let mut flights = self.flights.lock();
        let absent = chunks.clone().filter(|chunk| !fetcher.cache.contains(&self.key(*chunk)));
        self.start_from_disk(&mut flights, absent, priority);
        if !readahead.from_store || self.object.check_usable().is_err() {
            return;
        }
        let requests = plan(&chunks, &chunks, size, |chunk| self.chunk_state(&flights, chunk));
        requests.into_iter().for_each(|r| self.start(&mut flights, r, priority));
    }

    /// Returns the error of a chunk that didn't match.
    pub(super) fn corrupt_error(&self, number: u64) -> FetchError {
        let object = Arc::clone(&self.object.name);
        FetchError::Corrupt { object, offset: number * CHUNK_SIZE }
    }

    /// Returns the key of a chunk in the cache.
    pub(super) fn key(&self, number: u64) -> ChunkKey {
        ChunkKey { namespace: self.namespace, number }
    }
}

/// Returns the only number of a range that has just one.
fn only(range: Range<u64>) -> Option<u64> {
    (range.start + 1 == range.end).then_some(range.start)
}

/// Returns the place of a number in a range.
fn place_in(chunks: &Range<u64>, chunk: u64) -> Option<usize> {
    usize::try_from(chunk.checked_sub(chunks.start)?).ok()
}

pub(super) fn to_usize(length: u64) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}
