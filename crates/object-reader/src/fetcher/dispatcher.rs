//! Sends the requests to one store: when the gate admits them, again after failures, and twice if
//! the first one takes long.

use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, select_ok};
use nbd_telemetry::RateLimit;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::futures::Notified;
use tokio::time::Instant;

use super::call::Call;
use super::flow_control::{Outcome, WaitCause};
use super::gate::{BreakerChange, Gate, Permit};
use super::latency::LatencyTracker;
use super::memory::{MemoryBudget, MemoryShare};
use crate::listing::ListingPage;
use crate::metrics::{StoreMetrics, StoreStats};
use crate::object::Priority;
use crate::store::{
    GetRequest, ReceiveBytes, Response, Store, StoreError, StoreErrorKind, Version,
};

/// Age at which requests are sent again when the store recovers.
const STALE_AFTER: Duration = Duration::from_secs(1);
/// Shortest time after which a read is tried again for which the credentials have expired.
const CREDENTIALS_INTERVAL: Duration = Duration::from_secs(1);

/// Sends the requests to all objects of one store.
#[derive(Debug)]
pub(crate) struct Dispatcher {
    label: String,
    /// Most recently opened store of this label.
    store: Mutex<Weak<dyn Store>>,
    pub(super) gate: Arc<Gate>,
    pub(super) runtime: Handle,
    memory: Arc<MemoryBudget>,
    metrics: StoreMetrics,
    latency: Mutex<LatencyTracker>,
    /// Last transient failure, unless there was an answer since.
    failure: Mutex<Option<StoreError>>,
    /// Reason for which the store rejects requests for known versions, unless it has answered one
    /// since.
    rejection: Mutex<Option<StoreErrorKind>>,
    /// Rate limit for log lines about rejections: a store may reject only some requests.
    rejection_log: RateLimit,
    /// Longest time that a reader waits, for the log.
    timeout: Duration,
}

/// A request for bytes.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) store: &'a dyn Store,
    pub(crate) key: &'a str,
    pub(crate) request: &'a GetRequest,
    /// Number of bytes in the response, at most.
    pub(crate) size: u64,
    /// Receiver of the bytes while they arrive.
    pub(crate) receiver: Option<&'a Arc<dyn ReceiveBytes>>,
}

impl Dispatcher {
    /// Creates a dispatcher for the stores of one label. Must be called in a runtime.
    pub(crate) fn new(
        store: &Arc<dyn Store>,
        memory: Arc<MemoryBudget>,
        connections: usize,
        timeout: Duration,
    ) -> Self {
        let runtime = Handle::current();
        Self {
            label: store.label().to_owned(),
            store: Mutex::new(Arc::downgrade(store)),
            gate: Gate::new(connections, runtime.clone()),
            runtime,
            memory,
            metrics: StoreMetrics::default(),
            latency: Mutex::default(),
            failure: Mutex::default(),
            rejection: Mutex::default(),
            rejection_log: RateLimit::new(5, Duration::from_secs(60)),
            timeout,
        }
    }

    /// Takes note of a store of the same label.
    pub(crate) fn set_store(&self, store: &Arc<dyn Store>) {
        *self.store.lock() = Arc::downgrade(store);
    }

    /// Requests bytes, until the response is there or a failure is final.
    ///
    /// After each transient failure, `is_wanted` decides whether there is another attempt. The same
    /// holds if the credentials for a known version have expired: others may be on their way, and
    /// readers prefer to wait. The memory for the response is returned with it.
    ///
    /// # Errors
    /// A failure that isn't transient, or the last one.
    pub(crate) async fn get(
        &self,
        target: Target<'_>,
        call: &Arc<Call>,
        mut is_wanted: impl FnMut() -> bool,
    ) -> Result<(Response, MemoryShare<'_>), StoreError> {
        let mut attempts = 0;
        loop {
            let permit = self.gate.acquire(call).await;
            call.wait_for(WaitCause::Fetch);
            let memory = self.memory.acquire_for(call, target.size).await;
            call.sent();
            let recovered = self.gate.recovered();
            let (result, is_stale) = tokio::select! {
                biased;
                result = self.get_hedged(target, call, permit) => (result, false),
                () = self.becomes_stale() => (Err(stale()), true),
            };
            let error = match result {
                Ok(response) => return Ok((response, memory)),
                Err(error) => error,
            };
            drop(memory);
            call.failed(error.clone());
            let awaits_credentials = target.request.version.is_some()
                && error.kind == StoreErrorKind::CredentialsExpired;
            if !(error.kind.is_transient() || awaits_credentials) || !is_wanted() {
                return Err(error);
            }
            self.metrics.count_retry();
            if !is_stale {
                let least = if awaits_credentials { CREDENTIALS_INTERVAL } else { Duration::ZERO };
                self.back_off(call, &error, attempts, least, recovered).await;
            }
            attempts += 1;
        }
    }

    /// Counts a request for the rest of what another one was to get.
    pub(crate) fn count_retry(&self) {
        self.metrics.count_retry();
    }

    /// Waits before the next attempt, for `least` or longer, or until the store recovers.
    async fn back_off(
        &self,
        call: &Call,
        error: &StoreError,
        attempts: u32,
        least: Duration,
        recovered: Notified<'_>,
    ) {
        // Throttled requests wait at the gate, like all others.
        if error.kind != StoreErrorKind::Throttled
            && let Some(delay) = self.gate.backoff(attempts)
        {
            call.wait_for(WaitCause::Retry);
            tokio::select! {
                () = tokio::time::sleep(delay.max(least)) => {}
                () = recovered => {}
            }
        }
    }

    /// Lists a page of a folder, until the response is there or a failure is final. While the
    /// breaker is open, returns the last failure unless `waits_for_store`.
    ///
    /// # Errors
    /// A failure that isn't transient, or the last one after `timeout`.
    pub(crate) async fn list_page(
        &self,
        store: &dyn Store,
        (prefix, page): (&str, Option<&str>),
        timeout: Duration,
        waits_for_store: bool,
    ) -> Result<ListingPage, StoreError> {
        let call = Arc::new(Call::new(Priority::Demand));
        let list = async {
            let mut attempts = 0;
            loop {
                let permit = match waits_for_store {
                    true => Some(self.gate.acquire(&call).await),
                    false => self.gate.acquire_if_up(&call).await,
                };
                let Some(permit) = permit else {
                    return Err(self.timeout_error(&call, Duration::ZERO));
                };
                call.wait_for(WaitCause::Fetch);
                call.sent();
                let recovered = self.gate.recovered();
                let listed = self.send(store.list_page(prefix, page), permit, &call, |_| 0).await;
                let error = match listed {
                    Err(error) if error.kind.is_transient() => error,
                    result => return result,
                };
                call.failed(error.clone());
                self.metrics.count_retry();
                self.back_off(&call, &error, attempts, Duration::ZERO, recovered).await;
                attempts += 1;
            }
        };
        match tokio::time::timeout(timeout, list).await {
            Ok(result) => result,
            Err(_) => Err(self.timeout_error(&call, timeout)),
        }
    }

    /// Ends when the store recovers, if that is long after this call: a request sent now probably
    /// hangs on a connection that is dead.
    async fn becomes_stale(&self) {
        let (recovered, begin) = (self.gate.recovered(), Instant::now());
        recovered.await;
        if begin.elapsed() < STALE_AFTER {
            std::future::pending::<()>().await;
        }
    }

    /// Returns true if `version` of the object is still current. A single attempt; while the
    /// breaker is open, the last failure.
    ///
    /// # Errors
    /// The store's, or `TimedOut` after `timeout`.
    pub(crate) async fn is_current(
        &self,
        store: &dyn Store,
        key: &str,
        version: &Version,
        timeout: Duration,
    ) -> Result<bool, StoreError> {
        let call = Arc::new(Call::new(Priority::Demand));
        let check = async {
            match self.gate.acquire_if_up(&call).await {
                Some(permit) => {
                    // There is no data that could take long.
                    let check = tokio::time::timeout(timeout, store.is_current(key, version));
                    let check = check.map(|it| it.unwrap_or_else(|_| Err(timed_out(timeout))));
                    let checked = self.send(check.boxed(), permit, &call, |_| 0).await;
                    self.note_rejection(checked.as_ref().err());
                    checked
                }
                None => Err(self.timeout_error(&call, Duration::ZERO)),
            }
        };
        match tokio::time::timeout(timeout, check).await {
            Ok(result) => result,
            Err(_) => Err(self.timeout_error(&call, timeout)),
        }
    }

    /// Sends a request, and a second one if the first one takes unusually long.
    async fn get_hedged(
        &self,
        target: Target<'_>,
        call: &Call,
        permit: Permit,
    ) -> Result<Response, StoreError> {
        let delay = {
            let mut latency = self.latency.lock();
            latency.count_request();
            latency.hedge_delay(target.size)
        };
        let mut first = self.get_once(target, call, permit);
        let Some(delay) = delay else { return first.await };
        let (permit, memory) = loop {
            if let Ok(result) = tokio::time::timeout(delay, &mut first).await {
                return result;
            }
            // Somebody may come to wait for it, or another request may end.
            if let Some(hedge) = self.try_hedge(target.size, call) {
                break hedge;
            }
        };
        self.metrics.count_hedge();
        let second = async {
            let response = self.get_once(target, call, permit).await?;
            self.metrics.count_hedge_won();
            Ok(response)
        };
        let (response, _) = select_ok([first, second.boxed()]).await?;
        drop(memory);
        Ok(response)
    }

    /// Returns what a hedged request needs, if one may be sent.
    fn try_hedge(&self, size: u64, call: &Call) -> Option<(Permit, MemoryShare<'_>)> {
        if call.priority() != Priority::Demand {
            return None;
        }
        let memory = self.memory.try_acquire(size)?;
        let permit = self.gate.try_acquire_hedge()?;
        self.latency.lock().take_hedge().then_some((permit, memory))
    }

    fn get_once<'a>(
        &'a self,
        target: Target<'a>,
        call: &'a Call,
        permit: Permit,
    ) -> BoxFuture<'a, Result<Response, StoreError>> {
        let get = match target.receiver {
            Some(receiver) => {
                target.store.get_streaming(target.key, target.request, Arc::clone(receiver))
            }
            None => target.store.get(target.key, target.request),
        };
        async move {
            let begin = Instant::now();
            let length = |response: &Response| response.bytes.len() as u64;
            let response = self.send(get, permit, call, length).await;
            if target.request.version.is_some() {
                self.note_rejection(response.as_ref().err());
            }
            let response = response?;
            self.latency.lock().record(target.size, begin.elapsed());
            Ok(response)
        }
        .boxed()
    }

    /// Makes one attempt, and reports its end to the gate and the metrics. It may take longer than
    /// its readers wait: what arrives is of use to the next ones.
    async fn send<T>(
        &self,
        request: BoxFuture<'_, Result<T, StoreError>>,
        mut permit: Permit,
        call: &Call,
        length: impl FnOnce(&T) -> u64,
    ) -> Result<T, StoreError> {
        permit.start();
        let mut unfinished = Unfinished { metrics: &self.metrics, call, is_finished: false };
        let begin = Instant::now();
        let result = request.await;
        unfinished.is_finished = true;
        let outcome = match &result {
            Ok(response) => {
                let bytes = length(response);
                self.metrics.count_response(call.priority(), bytes, begin.elapsed());
                *self.failure.lock() = None;
                Outcome::Answered
            }
            Err(error) => {
                self.metrics.count_error(call.priority(), error);
                *self.failure.lock() = error.kind.is_transient().then(|| error.clone());
                match error.kind {
                    StoreErrorKind::Throttled => {
                        Outcome::Throttled { retry_after: error.retry_after }
                    }
                    kind if kind.is_transient() => Outcome::Failed,
                    _ => Outcome::Answered,
                }
            }
        };
        if let Some(change) = permit.finish(outcome) {
            self.log(change, result.as_ref().err());
        }
        result
    }

    /// Takes note of whether the store rejects requests for a known version, and logs changes. Those
    /// for other objects may be denied only because there is no such object.
    fn note_rejection(&self, error: Option<&StoreError>) {
        let rejection = error.filter(|error| error.kind.is_rejection());
        if error.is_some_and(|error| error.kind.is_transient()) {
            return;
        }
        let now = rejection.map(|error| error.kind);
        if std::mem::replace(&mut *self.rejection.lock(), now) == now {
            return;
        }
        let Some(held_back) = self.rejection_log.allow() else { return };
        let (label, held_back) = (&self.label, held_back.field());
        let Some(StoreError { kind, message, .. }) = rejection else {
            tracing::info!(
                reason = "store_up",
                store = label,
                held_back,
                "{label} accepts requests again"
            );
            return;
        };
        let reason = match kind {
            StoreErrorKind::CredentialsExpired => "store_credentials",
            StoreErrorKind::ClockSkew => "store_clock_skew",
            _ => "store_denied",
        };
        tracing::warn!(
            reason,
            store = label,
            held_back,
            "{label} rejects requests: {message}; only what is cached can be read"
        );
    }

    /// Logs that the store is down or works again. `error` is the last failure.
    fn log(&self, change: BreakerChange, error: Option<&StoreError>) {
        let Self { label, .. } = self;
        match change {
            BreakerChange::Opened => tracing::warn!(
                reason = "store_down",
                store = label,
                "{label} is down: {}; reads of what isn't in memory wait up to {:?}",
                error.map_or("no response", |error| &error.message),
                self.timeout
            ),
            BreakerChange::Closed { after } => tracing::info!(
                reason = "store_up",
                store = label,
                down_seconds = after.as_secs(),
                "{label} works again, after {} s",
                after.as_secs()
            ),
        }
    }

    /// Returns the reason for which a request has waited for `waited` without a response.
    pub(crate) fn timeout_error(&self, call: &Call, waited: Duration) -> StoreError {
        let last = call.last_error().or_else(|| self.failure.lock().clone());
        last.unwrap_or_else(|| timed_out(waited))
    }

    /// Returns the latency of a response when little is in flight, if there were any.
    pub(crate) fn base_latency(&self) -> Option<Duration> {
        self.latency.lock().base()
    }

    /// Returns the counters and the present state.
    pub(crate) fn stats(&self) -> StoreStats {
        let counters = self.metrics.snapshot();
        let gate = self.gate.stats();
        let store = self.store.lock().upgrade();
        StoreStats {
            store: self.label.clone(),
            requests: counters.requests,
            bytes: counters.bytes,
            latency: counters.latency,
            in_flight: gate.in_flight,
            queued: gate.queued,
            limit: gate.limit,
            throttled: counters.throttled,
            retries: counters.retries,
            hedges_sent: counters.hedges_sent,
            hedges_won: counters.hedges_won,
            breaker: gate.breaker,
            rejection: self.rejection.lock().map(StoreErrorKind::label),
            changed: counters.changed,
            credentials_expiry: store.and_then(|store| store.credentials_expiry()),
        }
    }
}

/// Returns the error of an attempt that took too long.
pub(crate) fn timed_out(limit: Duration) -> StoreError {
    StoreError {
        kind: StoreErrorKind::TimedOut,
        message: format!("no response after {limit:?}"),
        retry_after: None,
    }
}

/// Returns the error of an attempt that is given up because the store works again.
fn stale() -> StoreError {
    StoreError {
        kind: StoreErrorKind::Interrupted,
        message: "sent while the store was down".to_owned(),
        retry_after: None,
    }
}

/// Counts a request whose future is dropped.
struct Unfinished<'a> {
    metrics: &'a StoreMetrics,
    call: &'a Call,
    is_finished: bool,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if !self.is_finished {
            self.metrics.count_canceled(self.call.priority());
        }
    }
}
