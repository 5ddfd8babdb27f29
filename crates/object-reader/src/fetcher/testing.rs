//! A store in memory for tests, whose responses follow a script.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::listing::ListingPage;
use crate::store::{
    ByteRange, GetRequest, ListedObject, ReceiveBytes, Response, Store, StoreError, StoreErrorKind,
    Version,
};

/// What the store does with a request, after its latency.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Action {
    Respond,
    /// Responds after a further delay.
    Delay(Duration),
    Fail(StoreErrorKind),
    Throttle(Option<Duration>),
    /// Responds with a wrong byte in each chunk.
    Corrupt,
    /// Breaks off after this many bytes.
    BreakOff(usize),
    /// Responds never; the attempt ends like that of a store.
    Hang,
}

/// Time after which an attempt ends that makes no progress.
const HANG: Duration = Duration::from_secs(30);
/// Length of the pieces in which a response arrives, in bytes.
const PIECE: usize = 100_000;

/// A request that the store received.
#[derive(Debug, Clone)]
pub(crate) struct Received {
    pub(crate) time: Instant,
    pub(crate) request: GetRequest,
}

type Script = Box<dyn FnMut(usize, &GetRequest) -> Action + Send>;

/// A store with one object.
pub(crate) struct ScriptedStore {
    length: u64,
    /// Version of the object: its bytes depend on it.
    revision: Mutex<u64>,
    latency: Mutex<Duration>,
    /// Seconds per byte of the link, and the end of the transfers so far.
    link: Mutex<(f64, Instant)>,
    script: Mutex<Script>,
    received: Mutex<Vec<Received>>,
    checks: Mutex<usize>,
}

impl std::fmt::Debug for ScriptedStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ScriptedStore").finish_non_exhaustive()
    }
}

impl ScriptedStore {
    /// Creates a store with an object of `length` bytes, which responds at once.
    pub(crate) fn new(length: u64) -> Arc<Self> {
        Arc::new(Self {
            length,
            revision: Mutex::new(1),
            latency: Mutex::default(),
            link: Mutex::new((0.0, Instant::now())),
            script: Mutex::new(Box::new(|_, _| Action::Respond)),
            received: Mutex::default(),
            checks: Mutex::default(),
        })
    }

    /// Sets the time from a request to the first byte of the response, and the rate of the link
    /// in bytes per second.
    pub(crate) fn set_link(&self, latency: Duration, rate: f64) {
        *self.latency.lock() = latency;
        self.link.lock().0 = 1.0 / rate;
    }

    /// Sets what is done with each request, by its number from now on.
    pub(crate) fn script(
        &self,
        mut script: impl FnMut(usize, &GetRequest) -> Action + Send + 'static,
    ) {
        let mut count = 0;
        *self.script.lock() = Box::new(move |_, request| {
            count += 1;
            script(count - 1, request)
        });
    }

    /// Replaces the object.
    pub(crate) fn replace(&self) {
        *self.revision.lock() += 1;
    }

    /// Returns the current version.
    pub(crate) fn version(&self) -> Version {
        Version {
            length: self.length,
            etag: Some(format!("\"{}\"", self.revision.lock())),
            version_id: None,
            last_modified: None,
        }
    }

    /// Returns the requests received since the last call.
    pub(crate) fn received(&self) -> Vec<Received> {
        std::mem::take(&mut self.received.lock())
    }

    /// Returns the number of checks for a new version since the last call.
    pub(crate) fn checks(&self) -> usize {
        std::mem::take(&mut self.checks.lock())
    }

    async fn respond(
        &self,
        request: &GetRequest,
        receiver: Option<&dyn ReceiveBytes>,
    ) -> Result<Response, StoreError> {
        let action = {
            let mut received = self.received.lock();
            received.push(Received { time: Instant::now(), request: request.clone() });
            (self.script.lock())(received.len() - 1, request)
        };
        let latency = *self.latency.lock();
        tokio::time::sleep(latency).await;
        match action {
            Action::Fail(kind) => return Err(error(kind, None)),
            Action::Throttle(retry_after) => {
                return Err(error(StoreErrorKind::Throttled, retry_after));
            }
            Action::Hang => {
                tokio::time::sleep(HANG).await;
                return Err(error(StoreErrorKind::TimedOut, None));
            }
            Action::Delay(delay) => tokio::time::sleep(delay).await,
            Action::Respond | Action::Corrupt | Action::BreakOff(_) => {}
        }
        let version = self.version();
        if request.version.as_ref().is_some_and(|pinned| *pinned != version) {
            return Err(error(StoreErrorKind::Changed, None));
        }
        let range = match request.range.clone() {
            ByteRange::Bounded(range) => range.start..range.end.min(self.length),
            ByteRange::Suffix(length) => self.length.saturating_sub(length)..self.length,
        };
        let (begin, done) = {
            let mut link = self.link.lock();
            let transfer = link.0 * (range.end - range.start) as f64;
            let begin = link.1.max(Instant::now());
            link.1 = begin + Duration::from_secs_f64(transfer);
            (begin, link.1)
        };
        let mut bytes = content(*self.revision.lock(), range.start, range.end);
        if matches!(action, Action::Corrupt) {
            bytes.chunks_mut(1000).for_each(|part| part[0] ^= 1);
        }
        let sent = match action {
            Action::BreakOff(length) => length.min(bytes.len()),
            _ => bytes.len(),
        };
        for end in (PIECE..sent).step_by(PIECE).chain([sent]) {
            let share = end as f64 / bytes.len().max(1) as f64;
            tokio::time::sleep_until(begin + (done - begin).mul_f64(share)).await;
            if let Some(receiver) = receiver {
                receiver.receive(range.start, &bytes[..end]);
            }
        }
        if sent < bytes.len() {
            return Err(error(StoreErrorKind::Interrupted, None));
        }
        Ok(Response { version, offset: range.start, bytes: Bytes::from(bytes) })
    }
}

impl Store for ScriptedStore {
    fn label(&self) -> &str {
        "test://store"
    }

    fn get<'a>(
        &'a self,
        _: &'a str,
        request: &'a GetRequest,
    ) -> BoxFuture<'a, Result<Response, StoreError>> {
        self.respond(request, None).boxed()
    }

    fn get_streaming<'a>(
        &'a self,
        _: &'a str,
        request: &'a GetRequest,
        receiver: Arc<dyn ReceiveBytes>,
    ) -> BoxFuture<'a, Result<Response, StoreError>> {
        async move { self.respond(request, Some(&*receiver)).await }.boxed()
    }

    fn is_current<'a>(
        &'a self,
        _: &'a str,
        version: &'a Version,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        async move {
            *self.checks.lock() += 1;
            let request = GetRequest {
                range: ByteRange::Suffix(0),
                version: Some(version.clone()),
                bypass_caches: false,
            };
            match self.respond(&request, None).await {
                Ok(_) => Ok(true),
                Err(error) if error.kind == StoreErrorKind::Changed => Ok(false),
                Err(error) => Err(error),
            }
        }
        .boxed()
    }

    /// Lists five pages with an object on each. The script gets a request without bytes.
    fn list_page<'a>(
        &'a self,
        prefix: &'a str,
        page: Option<&'a str>,
    ) -> BoxFuture<'a, Result<ListingPage, StoreError>> {
        async move {
            let request =
                GetRequest { range: ByteRange::Suffix(0), version: None, bypass_caches: false };
            self.respond(&request, None).await?;
            let number = page.map_or(0, |page| page.parse::<u32>().unwrap());
            let object = ListedObject { name: format!("{prefix}{number}"), version: None };
            let next = (number < 4).then(|| (number + 1).to_string());
            Ok(ListingPage { objects: vec![object], next })
        }
        .boxed()
    }
}

fn error(kind: StoreErrorKind, retry_after: Option<Duration>) -> StoreError {
    StoreError { kind, message: format!("scripted: {}", kind.label()), retry_after }
}

/// Returns the bytes from `start` to `end` of a revision of the object: pages that begin with their
/// number and the revision.
pub(crate) fn content(revision: u64, start: u64, end: u64) -> Vec<u8> {
    const PAGE: usize = 4096;
    static PATTERN: LazyLock<Vec<u8>> =
        LazyLock::new(|| (0..PAGE).map(|n| (n * 167 + n / 256).to_le_bytes()[0]).collect());
    let pages = start / PAGE as u64..end.div_ceil(PAGE as u64);
    let skipped = usize::try_from(start - pages.start * PAGE as u64).unwrap();
    let mut bytes = Vec::new();
    for page in pages {
        let begin = bytes.len();
        bytes.extend_from_slice(&PATTERN);
        bytes[begin..begin + 8].copy_from_slice(&page.to_le_bytes());
        bytes[begin + 8..begin + 16].copy_from_slice(&revision.to_le_bytes());
    }
    bytes.drain(..skipped);
    bytes.truncate(usize::try_from(end - start).unwrap());
    bytes
}
