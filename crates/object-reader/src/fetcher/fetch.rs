//! Fetching of chunks: a request, and the check of its response.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use super::dispatcher::Target;
use super::error::FetchError;
use super::flights::{Fetch, Flights};
use super::memory::MemoryShare;
use super::plan::CHUNK_SIZE;
use super::view::{View, to_usize};
use crate::object::Priority;
use crate::store::{ByteRange, GetRequest, ReceiveBytes, Response, StoreError, StoreErrorKind};

impl View {
    /// Makes the request, and passes the chunks to their waiters and to the cache.
    pub(super) async fn fetch(self: Arc<Self>, fetch: Arc<Fetch>) {
        let _landing = Landing { flights: &self.flights, fetch: &fetch };
        let shutdown = &self.object.fetcher.shutdown;
        shutdown.run_until_cancelled(self.fetch_and_land(&fetch)).await;
    }

    pub(super) async fn fetch_and_land(self: &Arc<Self>, fetch: &Arc<Fetch>) {
        let arriving = Arc::new(ArrivingChunks::new(self, fetch));
        loop {
            let rest = arriving.rest();
            if rest.is_empty() {
                break;
            }
            match self.request(fetch, &rest, Some(&arriving)).await {
                Ok((response, _memory)) => arriving.complete(&response).await,
                // What has arrived isn't requested again.
                Err(error)
                    if error.kind.is_transient()
                        && arriving.rest() != rest
                        && self.flights.is_wanted(fetch) =>
                {
                    self.object.dispatcher.count_retry();
                }
                Err(error) => {
                    let error = Err(self.object.failed(error));
                    fetch.chunks.clone().for_each(|n| self.flights.land(fetch, n, &error));
                    return;
                }
            }
        }
        let wrong = arriving.take_wrong();
        let is_sequential = is_sequential(fetch);
        if let (Some(first), Some(last)) = (wrong.first(), wrong.last()) {
            let anew = self.fetch_anew(fetch, &(*first..*last + 1)).await;
            for number in wrong {
                let corrupt = || {
                    self.corrupt.insert(number);
                    self.corrupt_error(number)
                };
                let chunk = match &anew {
                    Ok((response, _memory)) => self
                        .accept(number, &chunk_of(response, number), is_sequential)
                        .ok_or_else(corrupt),
                    Err(error) => Err(error.clone()),
                };
                self.flights.land(fetch, number, &chunk);
            }
        }
    }

    /// Fetches chunks, some of which didn't match, once more and past all caches.
    async fn fetch_anew(
        &self,
        fetch: &Arc<Fetch>,
        chunks: &Range<u64>,
    ) -> Result<(Response, MemoryShare<'_>), FetchError> {
        let object = &self.object;
        let offset = chunks.start * CHUNK_SIZE;
        if let Some(held_back) = object.fetcher.wrong_bytes_log.allow() {
            tracing::warn!(
                reason = "wrong_bytes",
                offset,
                held_back = held_back.field(),
                "{}: wrong bytes at offset {offset}; fetching them anew",
                object.name
            );
        }
        let anew = self.request(fetch, chunks, None).await;
        anew.map_err(|error| object.failed(error))
    }

    /// Caches a chunk in an allocation of its own, and on disk, unless it doesn't match.
    fn accept(&self, number: u64, bytes: &[u8], is_sequential: bool) -> Option<Bytes> {
        if self.verifier.as_ref().is_some_and(|verifier| !verifier.matches(number, bytes)) {
            return None;
        }
        let bytes = Bytes::copy_from_slice(bytes);
        self.object.fetcher.cache.insert(self.key(number), bytes.clone());
        self.store_on_disk(number, &bytes, is_sequential);
        Some(bytes)
    }

    /// Requests chunks of this version: past all caches, or to be passed on while they arrive. Then
    /// an attempt that breaks off after a chunk isn't repeated here.
    async fn request(
        &self,
        fetch: &Arc<Fetch>,
        chunks: &Range<u64>,
        arriving: Option<&Arc<ArrivingChunks>>,
    ) -> Result<(Response, MemoryShare<'_>), StoreError> {
        let object = &self.object;
        let end = (chunks.end * CHUNK_SIZE).min(object.version.length);
        let range = chunks.start * CHUNK_SIZE..end;
        let request = GetRequest {
            range: ByteRange::Bounded(range.clone()),
            version: Some(object.version.clone()),
            bypass_caches: arriving.is_none(),
        };
        let size = range.end - range.start;
        let receiver = arriving.map(|it| Arc::clone(it) as Arc<dyn ReceiveBytes>);
        let (store, receiver) = (&*object.store, receiver.as_ref());
        let target = Target { store, key: &object.key, request: &request, size, receiver };
        let is_wanted =
            || arriving.is_none_or(|it| it.rest() == *chunks) && self.flights.is_wanted(fetch);
        let (response, memory) = object.dispatcher.get(target, &fetch.call, is_wanted).await?;
        // Stores check that too. Bytes of another version must not be served in any case.
        let failure = |kind, message: &str| {
            Err(StoreError { kind, message: message.to_owned(), retry_after: None })
        };
        if response.version != object.version {
            return failure(StoreErrorKind::Changed, "response of another version");
        }
        if (response.offset, response.bytes.len() as u64) != (range.start, size) {
            return failure(StoreErrorKind::Unsupported, "response with another range");
        }
        Ok((response, memory))
    }
}

/// The chunks of a request, which are passed on while others arrive.
struct ArrivingChunks {
    view: Arc<View>,
    fetch: Arc<Fetch>,
    state: Mutex<Arrived>,
}

struct Arrived {
    /// Number of the first chunk that hasn't arrived.
    next: u64,
    /// Chunks that have arrived and don't match.
    wrong: Vec<u64>,
}

impl ArrivingChunks {
    fn new(view: &Arc<View>, fetch: &Arc<Fetch>) -> Self {
        let state = Arrived { next: fetch.chunks.start, wrong: Vec::new() };
        Self { view: Arc::clone(view), fetch: Arc::clone(fetch), state: Mutex::new(state) }
    }

    /// Returns the numbers of the chunks that haven't arrived.
    fn rest(&self) -> Range<u64> {
        self.state.lock().next..self.fetch.chunks.end
    }

    /// Takes the numbers of the chunks that don't match.
    fn take_wrong(&self) -> Vec<u64> {
        std::mem::take(&mut self.state.lock().wrong)
    }

    /// Passes the remaining chunks of a response on.
    async fn complete(&self, response: &Response) {
        loop {
            let number = {
                let mut state = self.state.lock();
                if state.next >= self.fetch.chunks.end {
                    return;
                }
                let number = state.next;
                self.pass_on(&mut state, &chunk_of(response, number));
                number
            };
            if number + 1 < self.fetch.chunks.end {
                // Checking and copying all of a large response takes milliseconds.
                tokio::task::yield_now().await;
            }
        }
    }

    /// Passes the next chunk to the cache and to its waiters.
    fn pass_on(&self, state: &mut Arrived, bytes: &[u8]) {
        let (view, number) = (&self.view, state.next);
        state.next += 1;
        match view.accept(number, bytes, is_sequential(&self.fetch)) {
            Some(bytes) => view.flights.land(&self.fetch, number, &Ok(bytes)),
            // It came along with its neighbors.
            None if view.corrupt.contains(number) => {
                view.flights.land(&self.fetch, number, &Err(view.corrupt_error(number)));
            }
            None => state.wrong.push(number),
        }
    }
}

impl ReceiveBytes for ArrivingChunks {
    fn receive(&self, offset: u64, so_far: &[u8]) {
        let length = self.view.object.version.length;
        let mut state = self.state.lock();
        while state.next < self.fetch.chunks.end {
            let start = state.next * CHUNK_SIZE;
            let end = (start + CHUNK_SIZE).min(length);
            let place = |at: u64| at.checked_sub(offset).map(to_usize);
            let (Some(from), Some(to)) = (place(start), place(end)) else { return };
            let Some(chunk) = so_far.get(from..to) else { return };
            self.pass_on(&mut state, chunk);
        }
    }
}

fn is_sequential(fetch: &Fetch) -> bool {
    fetch.call.initial_priority == Priority::Ahead
}

/// Returns a chunk of a response, or as much of it as there is.
pub(super) fn chunk_of(response: &Response, number: u64) -> Bytes {
    let place =
        |offset: u64| to_usize(offset.saturating_sub(response.offset)).min(response.bytes.len());
    let (start, end) = (number * CHUNK_SIZE, (number + 1) * CHUNK_SIZE);
    response.bytes.slice(place(start)..place(end))
}

/// Ends the flight of all chunks that haven't landed, even if the task is aborted.
pub(super) struct Landing<'a> {
    pub(super) flights: &'a Flights,
    pub(super) fetch: &'a Arc<Fetch>,
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        self.flights.end(self.fetch);
    }
}
