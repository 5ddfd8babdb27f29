//! A pool of threads that read and decode blocks, with fair queueing between clients.
//!
//! Each client has its own queue and a virtual clock that counts the work done for it. The next
//! job comes from the client whose clock is furthest behind. A job is charged its estimated work
//! when it starts, and the charge is replaced by the measured time when it ends, so a client
//! whose jobs take longer than estimated gets fewer turns. A client with long reads, or many of
//! them, can't delay one with short reads.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::fmt;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

/// Nice value added for decoder threads: under contention they get about a tenth of the share of
/// the threads that serve clients. A block that must be decoded takes long anyway, and a cached one
/// shouldn't wait for it.
const NICE: i32 = 10;

/// A thread pool. Dropping it ends the threads and drops the waiting jobs.
pub(super) struct Decoders {
    shared: Arc<DecoderState>,
    cores: usize,
    /// Set once the threads have been started. They are started for the first job, since a thread
    /// keeps the privileges that the process has when it starts.
    started: OnceLock<()>,
}

/// A client whose jobs share one queue.
#[derive(Default)]
pub(super) struct DecoderClient {
    /// Only accessed under the lock of [`FairQueue`].
    queue: Mutex<ClientQueue>,
    /// Number of blocks that the client has requested.
    requested: AtomicU64,
}

#[derive(Default)]
struct ClientQueue {
    /// Virtual clock: work done for this client, in nanoseconds.
    clock: u64,
    jobs: VecDeque<DecodeJob>,
    /// Number of its valid turn in [`FairQueue::clients`]; set while it has jobs.
    turn: Option<u64>,
}

/// Error of a job that was dropped or panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct JobAbandoned;

#[derive(Default)]
struct DecoderState {
    queue: Mutex<FairQueue>,
    /// Signaled when a job is added and when the pool is closed.
    news: Condvar,
}

#[derive(Default)]
struct FairQueue {
    clients: BinaryHeap<Reverse<Turn>>,
    /// Number of waiting jobs.
    jobs: usize,
    /// Number of threads that wait for a job.
    idle: usize,
    /// Virtual time: the clock of the client whose job was started last. A client without jobs
    /// resumes from here, so idle clients can't accumulate credit.
    now: u64,
    /// Number of turns queued so far; the next turn's number.
    count: u64,
    is_closed: bool,
}

/// An entry of a client in the queue. It is stale if the client has been queued again since.
struct Turn {
    clock: u64,
    /// Sequence number; clients with equal clocks are served in the order they were queued.
    number: u64,
    client: Arc<DecoderClient>,
}

struct DecodeJob {
    /// Estimated work, in nanoseconds.
    estimate: u64,
    run: Box<dyn FnOnce() + Send>,
}

impl Decoders {
    /// Creates a pool with one thread per core; more threads would only compete for the cores.
    pub(super) fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self { shared: Arc::default(), cores, started: OnceLock::new() }
    }

    fn start(&self) {
        let mut started = 0;
        for number in 0..self.cores {
            let shared = Arc::clone(&self.shared);
            let name = format!("decoder-{number}");
            let thread = std::thread::Builder::new().name(name.clone());
            match thread.spawn(move || shared.work()) {
                Ok(_) => started += 1,
                Err(error) => {
                    tracing::error!(reason = "decoder_thread", "can't start {name}: {error}");
                }
            }
        }
        // One thread is enough, if slow. Without any, reads must fail instead of waiting forever.
        self.shared.queue.lock().is_closed = started == 0;
    }

    /// Runs `work`, which takes about `estimate` nanoseconds, when it is the client's turn.
    ///
    /// Cancellation: if this future is dropped before the work starts, the work never runs.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        client: &Arc<DecoderClient>,
        estimate: u64,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JobAbandoned> {
        self.started.get_or_init(|| self.start());
        let (done, result) = oneshot::channel();
        let run = Box::new(move || {
            if !done.is_closed()
                && let Ok(result) = catch_unwind(AssertUnwindSafe(work))
            {
                // The receiver may have been dropped because the client disconnected.
                done.send(result).unwrap_or_else(drop);
            }
        });
        self.shared.add(client, DecodeJob { estimate, run });
        result.await.map_err(|_| JobAbandoned)
    }

    /// Returns the number of jobs that would start immediately.
    pub(super) fn idle_threads(&self) -> usize {
        let queue = self.shared.queue.lock();
        queue.idle.saturating_sub(queue.jobs)
    }

    /// Returns true if jobs of other clients than `client` wait for a thread.
    pub(super) fn has_others_waiting(&self, client: &DecoderClient) -> bool {
        let queue = self.shared.queue.lock();
        queue.jobs > client.queue.lock().jobs.len()
    }

    /// Charges a client for work that was done for it elsewhere.
    pub(super) fn charge(&self, client: &Arc<DecoderClient>, took: Duration) {
        self.shared.queue.lock().charge(client, took);
    }
}

impl DecoderClient {
    /// Counts blocks that the client has requested.
    pub(super) fn count_requested(&self, blocks: u64) {
        self.requested.fetch_add(blocks, Relaxed);
    }

    /// Returns the number of blocks that the client has requested.
    pub(super) fn requested(&self) -> u64 {
        self.requested.load(Relaxed)
    }
}

impl Drop for Decoders {
    fn drop(&mut self) {
        let mut queue = self.shared.queue.lock();
        queue.is_closed = true;
        for Reverse(turn) in queue.clients.drain() {
            turn.client.queue.lock().jobs.clear();
        }
        self.shared.news.notify_all();
    }
}

impl DecoderState {
    fn add(&self, client: &Arc<DecoderClient>, job: DecodeJob) {
        let mut queue = self.queue.lock();
        if queue.is_closed {
            return;
        }
        queue.add(client, job);
        if queue.idle > 0 {
            self.news.notify_one();
        }
    }

    fn work(&self) {
        nbd_telemetry::lower_thread_priority(NICE);
        let mut queue = self.queue.lock();
        while !queue.is_closed {
            match queue.next() {
                Some((client, job)) => {
                    drop(queue);
                    let begun = Instant::now();
                    (job.run)();
                    let took = begun.elapsed();
                    // Lets the threads that send replies run before this thread's time slice
                    // ends.
                    std::thread::yield_now();
                    queue = self.queue.lock();
                    queue.correct(&client, job.estimate, took);
                }
                None => {
                    queue.idle += 1;
                    self.news.wait(&mut queue);
                    queue.idle -= 1;
                }
            }
        }
    }
}

impl FairQueue {
    fn add(&mut self, client: &Arc<DecoderClient>, job: DecodeJob) {
        self.jobs += 1;
        let mut own = client.queue.lock();
        own.jobs.push_back(job);
        if own.turn.is_none() {
            own.clock = own.clock.max(self.now);
            self.push(client, &mut own);
        }
    }

    /// Queues a turn for a client that has jobs.
    fn push(&mut self, client: &Arc<DecoderClient>, own: &mut ClientQueue) {
        let (clock, number) = (own.clock, self.count);
        self.count += 1;
        own.turn = Some(number);
        self.clients.push(Reverse(Turn { clock, number, client: Arc::clone(client) }));
    }

    /// Takes the next job, and charges its client the estimate.
    fn next(&mut self) -> Option<(Arc<DecoderClient>, DecodeJob)> {
        while let Some(Reverse(Turn { number, client, .. })) = self.clients.pop() {
            let mut own = client.queue.lock();
            if own.turn != Some(number) {
                continue;
            }
            own.turn = None;
            let Some(job) = own.jobs.pop_front() else { continue };
            self.jobs -= 1;
            self.now = self.now.max(own.clock);
            own.clock = own.clock.saturating_add(job.estimate);
            if !own.jobs.is_empty() {
                self.push(&client, &mut own);
            }
            drop(own);
            return Some((client, job));
        }
        None
    }

    /// Charges a client for work that was done without a job.
    fn charge(&mut self, client: &Arc<DecoderClient>, took: Duration) {
        let mut own = client.queue.lock();
        own.clock = own.clock.max(self.now);
        // As if a thread had taken a job: other clients gain no credit from the time in which no
        // job of theirs waited.
        if self.jobs == 0 {
            self.now = own.clock;
        }
        drop(own);
        self.correct(client, 0, took);
    }

    /// Replaces a job's estimate on its client's clock by the measured time.
    fn correct(&mut self, client: &Arc<DecoderClient>, estimate: u64, took: Duration) {
        let mut own = client.queue.lock();
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        own.clock = own.clock.saturating_sub(estimate).saturating_add(took);
        if own.turn.is_some() {
            self.push(client, &mut own);
        }
    }
}

impl fmt::Debug for Decoders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoders").field("waiting", &self.shared.queue.lock().jobs).finish()
    }
}

impl fmt::Debug for DecoderClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("waiting", &self.queue.lock().jobs.len()).finish()
    }
}

impl PartialEq for Turn {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Turn {}

impl PartialOrd for Turn {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Turn {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.clock, self.number).cmp(&(other.clock, other.number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    fn job(estimate: u64) -> DecodeJob {
        DecodeJob { estimate, run: Box::new(|| ()) }
    }

    /// Returns the order in which one thread runs the queued jobs, by client. A job is given as
    /// client, estimate and measured time.
    fn order(jobs: &[(usize, u64, u64)]) -> Vec<usize> {
        let mut queue = FairQueue::default();
        let clients: Vec<Arc<DecoderClient>> = (0..3).map(|_| Arc::default()).collect();
        let mut took = vec![VecDeque::new(); 3];
        for &(client, estimate, takes) in jobs {
            queue.add(&clients[client], job(estimate));
            took[client].push_back(takes);
        }
        let mut order = Vec::new();
        while let Some((client, job)) = queue.next() {
            let number = clients.iter().position(|other| Arc::ptr_eq(other, &client)).unwrap();
            let takes = Duration::from_nanos(took[number].pop_front().unwrap());
            queue.correct(&client, job.estimate, takes);
            order.push(number);
        }
        assert_eq!((queue.jobs, order.len()), (0, jobs.len()));
        order
    }

    #[test]
    fn many_jobs_of_one_client_do_not_delay_another() {
        let mut jobs = vec![(0, 100, 100); 10];
        jobs.push((1, 100, 100));
        assert_eq!(order(&jobs)[..3], [0, 1, 0]);
    }

    #[test]
    fn small_jobs_get_more_turns() {
        let jobs = [[(0, 100, 100); 4], [(1, 25, 25); 4]].concat();
        assert_eq!(order(&jobs), [0, 1, 1, 1, 1, 0, 0, 0]);
    }

    /// Jobs with tiny estimates that take long: after the first one the others wait, even though
    /// they were queued first.
    #[test]
    fn measured_time_counts_rather_than_the_estimate() {
        let jobs = [[(0, 1, 30_000); 8], [(1, 100, 100); 8]].concat();
        assert_eq!(order(&jobs)[..9], [0, 1, 1, 1, 1, 1, 1, 1, 1]);
        // The same with estimates that are too high.
        let jobs = [[(0, 30_000, 1); 4], [(1, 100, 100); 4]].concat();
        assert_eq!(order(&jobs)[..5], [0, 1, 0, 0, 0]);
    }

    #[test]
    fn an_idle_client_accumulates_no_credit() {
        let mut queue = FairQueue { now: 1000, ..FairQueue::default() };
        let [early, late] = [Arc::<DecoderClient>::default(), Arc::default()];
        early.queue.lock().clock = 1000;
        queue.add(&late, job(100));
        queue.add(&early, job(100));
        queue.add(&late, job(100));
        let clocks: Vec<u64> = std::iter::from_fn(|| {
            let (client, job) = queue.next()?;
            let after = client.queue.lock().clock;
            Some(after - job.estimate)
        })
        .collect();
        assert_eq!(clocks, [1000, 1000, 1100]);
    }

    #[test]
    fn work_done_elsewhere_is_charged_and_gives_others_no_credit() {
        let mut queue = FairQueue::default();
        let [working, other] = [Arc::<DecoderClient>::default(), Arc::default()];
        for _ in 0..3 {
            queue.charge(&working, Duration::from_nanos(1000));
        }
        assert_eq!((working.queue.lock().clock, queue.now), (3000, 2000));
        queue.add(&working, job(10));
        queue.add(&other, job(10));
        let (next, _) = queue.next().unwrap();
        assert!(Arc::ptr_eq(&next, &other));
        assert_eq!(other.queue.lock().clock, 2010);
        // While jobs of others wait, the time is theirs.
        queue.add(&other, job(10));
        queue.charge(&working, Duration::from_nanos(1000));
        assert_eq!((working.queue.lock().clock, queue.now), (4000, 2000));
    }

    #[tokio::test]
    async fn jobs_fail_without_threads() {
        let decoders = Decoders { shared: Arc::default(), cores: 0, started: OnceLock::new() };
        assert_eq!(decoders.run(&Arc::default(), 1, || 7).await, Err(JobAbandoned));
    }

    #[tokio::test]
    async fn a_panicking_job_fails_without_affecting_others() {
        let decoders = Decoders::new();
        let client = Arc::default();
        for _ in 0..10 {
            assert_eq!(
                decoders.run(&client, 1, || panic!("for a test")).await,
                Err::<(), _>(JobAbandoned)
            );
        }
        assert_eq!(decoders.run(&client, 1, || 7).await, Ok(7));
    }

    #[tokio::test]
    async fn canceled_jobs_are_not_started() {
        let decoders = Decoders::new();
        let client = Arc::default();
        let (release, blocked) = mpsc::channel::<()>();
        let blocked = Arc::new(Mutex::new(blocked));
        // Keeps every thread busy.
        let threads = std::thread::available_parallelism().unwrap().get();
        let busy: Vec<_> = (0..threads)
            .map(|_| {
                let blocked = Arc::clone(&blocked);
                Box::pin(decoders.run(&client, 1, move || blocked.lock().recv().unwrap()))
            })
            .collect();
        let mut dropped = Box::pin(decoders.run(&client, 1, || panic!("it was begun")));
        let mut all = busy;
        for job in &mut all {
            assert!(futures_pending(job).await);
        }
        tokio::select! {
            biased;
            _ = &mut dropped => panic!("it was begun"),
            () = tokio::task::yield_now() => {}
        }
        drop(dropped);
        (0..threads).for_each(|_| release.send(()).unwrap());
        for job in all {
            job.await.unwrap();
        }
        assert_eq!(decoders.run(&client, 1, || 7).await, Ok(7));
    }

    async fn futures_pending<F: Future + Unpin>(future: &mut F) -> bool {
        tokio::select! {
            biased;
            _ = future => false,
            () = tokio::task::yield_now() => true,
        }
    }
}
