//! Fetching of chunks: a request, and the check of its response.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::dispatcher::Target;
use super::error::FetchError;
use super::flights::{Fetch, Flights};
use super::memory::MemoryShare;
use super::plan::CHUNK_SIZE;
use super::view::{View, to_usize};
use crate::object::Priority;
use crate::store::{ByteRange, GetRequest, Response, StoreError, StoreErrorKind};

impl View {
    /// Makes the request, and passes the chunks to their waiters and to the cache.
    pub(super) async fn fetch(self: Arc<Self>, fetch: Arc<Fetch>) {
        let _landing = Landing { flights: &self.flights, fetch: &fetch };
        let shutdown = &self.object.fetcher.shutdown;
        shutdown.run_until_cancelled(self.fetch_and_land(&fetch)).await;
    }

    pub(super) async fn fetch_and_land(&self, fetch: &Arc<Fetch>) {
        let is_sequential = fetch.call.initial_priority == Priority::Ahead;
        let mut wrong = Vec::new();
        match self.request(fetch, &fetch.chunks, false).await {
            Ok((response, _memory)) => {
                for number in fetch.chunks.clone() {
                    match self.accept(number, chunk_of(&response, number), is_sequential) {
                        Some(bytes) => self.flights.land(fetch, number, &Ok(bytes)),
                        // It came along with its neighbors.
                        None if self.corrupt.contains(number) => {
                            self.flights.land(fetch, number, &Err(self.corrupt_error(number)));
                        }
                        None => wrong.push(number),
                    }
                    // Checking and copying all of a large response takes milliseconds.
                    tokio::task::yield_now().await;
                }
            }
            Err(error) => {
                let error = Err(self.object.failed(error));
                fetch.chunks.clone().for_each(|n| self.flights.land(fetch, n, &error));
            }
        }
        if let (Some(first), Some(last)) = (wrong.first(), wrong.last()) {
            let anew = self.fetch_anew(fetch, &(*first..*last + 1)).await;
            for number in wrong {
                let corrupt = || {
                    self.corrupt.insert(number);
                    self.corrupt_error(number)
                };
                let chunk = match &anew {
                    Ok((response, _memory)) => self
                        .accept(number, chunk_of(response, number), is_sequential)
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
        let anew = self.request(fetch, chunks, true).await;
        anew.map_err(|error| object.failed(error))
    }

    /// Caches a chunk in an allocation of its own, and on disk, unless it doesn't match.
    fn accept(&self, number: u64, bytes: Bytes, is_sequential: bool) -> Option<Bytes> {
        if self.verifier.as_ref().is_some_and(|verifier| !verifier.matches(number, &bytes)) {
            return None;
        }
        let bytes = Bytes::copy_from_slice(&bytes);
        self.object.fetcher.cache.insert(self.key(number), bytes.clone());
        self.store_on_disk(number, &bytes, is_sequential);
        Some(bytes)
    }

    /// Requests chunks of this version.
    async fn request(
        &self,
        fetch: &Arc<Fetch>,
        chunks: &Range<u64>,
        bypass_caches: bool,
    ) -> Result<(Response, MemoryShare<'_>), StoreError> {
        let object = &self.object;
        let end = (chunks.end * CHUNK_SIZE).min(object.version.length);
        let range = chunks.start * CHUNK_SIZE..end;
        let request = GetRequest {
            range: ByteRange::Bounded(range.clone()),
            version: Some(object.version.clone()),
            bypass_caches,
        };
        let size = range.end - range.start;
        let target = Target { store: &*object.store, key: &object.key, request: &request, size };
        let is_wanted = || self.flights.is_wanted(fetch);
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
