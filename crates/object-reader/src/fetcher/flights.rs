//! Single flight: all readers of a chunk wait for the same request.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use super::call::Call;
use super::error::FetchError;

/// Chunks of an object in flight, by number.
#[derive(Debug, Default)]
pub(crate) struct Flights {
    chunks: Mutex<HashMap<u64, ChunkInFlight>>,
}

/// Locked [`Flights`]. While it is held, no chunk takes off or lands.
pub(crate) struct FlightsGuard<'a> {
    flights: &'a Arc<Flights>,
    chunks: parking_lot::MutexGuard<'a, HashMap<u64, ChunkInFlight>>,
}

#[derive(Debug)]
struct ChunkInFlight {
    fetch: Arc<Fetch>,
    waiters: Vec<oneshot::Sender<Result<Bytes, FetchError>>>,
}

/// A request for some chunks, which is queued or has been sent.
#[derive(Debug)]
pub(crate) struct Fetch {
    /// Numbers of the chunks.
    pub(crate) chunks: Range<u64>,
    pub(crate) call: Arc<Call>,
    /// True if the chunks are read from disk.
    is_from_disk: bool,
    /// Number of readers that wait for one of the chunks. Changed only by who holds the lock.
    waiters: Mutex<usize>,
    /// Ends the task of the request.
    task: OnceLock<AbortHandle>,
}

/// A reader's share of a chunk in flight.
///
/// Dropped, it cancels the request if that hasn't been sent and nobody else waits for it.
#[derive(Debug)]
pub(crate) struct ChunkWaiter {
    flights: Arc<Flights>,
    fetch: Arc<Fetch>,
    /// Receives the chunk. An error means that the request was given up.
    pub(crate) chunk: oneshot::Receiver<Result<Bytes, FetchError>>,
}

impl Flights {
    /// Locks all chunks.
    pub(crate) fn lock(self: &Arc<Self>) -> FlightsGuard<'_> {
        FlightsGuard { flights: self, chunks: self.chunks.lock() }
    }

    /// Passes a chunk, or the failure to fetch it, to its waiters.
    pub(crate) fn land(&self, fetch: &Arc<Fetch>, number: u64, chunk: &Result<Bytes, FetchError>) {
        for waiter in remove(&mut self.chunks.lock(), fetch, number) {
            // The waiter may be gone.
            waiter.send(chunk.clone()).unwrap_or_else(drop);
        }
    }

    /// Returns true if somebody waits for a chunk of the request. If not, the request has to end:
    /// its chunks are no longer in flight.
    pub(crate) fn is_wanted(&self, fetch: &Arc<Fetch>) -> bool {
        let mut chunks = self.chunks.lock();
        let is_wanted = *fetch.waiters.lock() > 0;
        if !is_wanted {
            remove_all(&mut chunks, fetch);
        }
        is_wanted
    }

    /// Ends a request: the waiters of chunks that haven't landed receive an error.
    pub(crate) fn end(&self, fetch: &Arc<Fetch>) {
        remove_all(&mut self.chunks.lock(), fetch);
    }
}

impl FlightsGuard<'_> {
    /// Returns true if a request for the chunk is queued or has been sent.
    pub(crate) fn contains(&self, number: u64) -> bool {
        self.chunks.contains_key(&number)
    }

    /// Waits for a chunk in flight.
    pub(crate) fn join(&mut self, number: u64) -> Option<ChunkWaiter> {
        let chunk_in_flight = self.chunks.get_mut(&number)?;
        let (sender, chunk) = oneshot::channel();
        chunk_in_flight.waiters.push(sender);
        let fetch = Arc::clone(&chunk_in_flight.fetch);
        *fetch.waiters.lock() += 1;
        Some(ChunkWaiter { flights: Arc::clone(self.flights), fetch, chunk })
    }

    /// Adds a request to the store for `chunks`, or a read from disk, which `spawn` starts. Those that are in flight already stay
    /// with their request.
    pub(crate) fn add(
        &mut self,
        chunks: Range<u64>,
        is_from_disk: bool,
        call: Call,
        spawn: impl FnOnce(Arc<Fetch>) -> AbortHandle,
    ) {
        let fetch = Arc::new(Fetch {
            chunks: chunks.clone(),
            call: Arc::new(call),
            is_from_disk,
            waiters: Mutex::default(),
            task: OnceLock::new(),
        });
        for number in chunks {
            let fetch = Arc::clone(&fetch);
            self.chunks.entry(number).or_insert(ChunkInFlight { fetch, waiters: Vec::new() });
        }
        let task = spawn(Arc::clone(&fetch));
        fetch.task.get_or_init(|| task);
    }
}

impl ChunkWaiter {
    /// Returns true if the chunk is read from disk.
    pub(crate) fn is_from_disk(&self) -> bool {
        self.fetch.is_from_disk
    }

    /// Returns the state of the request.
    pub(crate) fn call(&self) -> &Arc<Call> {
        &self.fetch.call
    }
}

impl Drop for ChunkWaiter {
    fn drop(&mut self) {
        let mut chunks = self.flights.chunks.lock();
        let fetch = &self.fetch;
        let is_last = {
            let mut waiters = fetch.waiters.lock();
            *waiters -= 1;
            *waiters == 0
        };
        if is_last && !fetch.call.is_sent() {
            remove_all(&mut chunks, fetch);
            if let Some(task) = fetch.task.get() {
                task.abort();
            }
        }
    }
}

/// Removes all chunks that are in flight with this request. Their waiters receive an error.
fn remove_all(chunks: &mut HashMap<u64, ChunkInFlight>, fetch: &Arc<Fetch>) {
    for number in fetch.chunks.clone() {
        remove(chunks, fetch, number);
    }
}

/// Removes a chunk that is in flight with this request, and returns its waiters.
fn remove(
    chunks: &mut HashMap<u64, ChunkInFlight>,
    fetch: &Arc<Fetch>,
    number: u64,
) -> Vec<oneshot::Sender<Result<Bytes, FetchError>>> {
    let is_of_fetch = chunks.get(&number).is_some_and(|chunk| Arc::ptr_eq(&chunk.fetch, fetch));
    let removed = is_of_fetch.then(|| chunks.remove(&number)).flatten();
    removed.map(|chunk| chunk.waiters).unwrap_or_default()
}
