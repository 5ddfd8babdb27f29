//! The threads that read and decode blocks.
//!
//! Fair queueing by client: each client has a queue of its own, and a virtual clock that counts
//! the work done for it. The client whose clock is furthest behind has its next job run. Work
//! is charged as estimated when a job starts, and corrected by the time that it took when it
//! ends, so a client whose jobs take longer than they look has fewer turns. A client with long
//! reads, or with many, can't stand in front of one with short ones.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::fmt;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

/// How much nicer decoding threads are: a tenth of the others' share, if they want all of it.
const NICE: i32 = 10;

/// A pool of threads. They end when it is dropped, and what waits is dropped with it.
pub(super) struct Decoders {
    shared: Arc<Shared>,
    cores: usize,
    /// They are started for the first job: a thread keeps the rights that the process has when
    /// it is started.
    started: OnceLock<()>,
}

/// A client whose jobs share one queue. Its state is only used under the lock of [`Queue`].
#[derive(Default)]
pub(super) struct Client(Mutex<ClientQueue>);

#[derive(Default)]
struct ClientQueue {
    /// Virtual clock: work done for this client, in nanoseconds.
    clock: u64,
    jobs: VecDeque<Job>,
    /// Number of its valid turn in [`Queue::clients`], which it has while it has jobs.
    turn: Option<u64>,
}

/// The job was dropped, or it panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Abandoned;

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// There is a job, or nothing will ever come again.
    news: Condvar,
}

#[derive(Default)]
struct Queue {
    clients: BinaryHeap<Reverse<Turn>>,
    /// Jobs that wait.
    jobs: usize,
    /// Threads that wait for a job.
    idle: usize,
    /// Virtual time: the clock of the client whose job was started last. A client that had no
    /// jobs begins here, and so can't save up turns.
    now: u64,
    /// Turns that were ever queued.
    count: u64,
    is_closed: bool,
}

/// A client's place in the queue. It is void if the client has another one by now.
struct Turn {
    clock: u64,
    /// Of clients with the same clock, the one that was queued first is next.
    number: u64,
    client: Arc<Client>,
}

struct Job {
    /// Estimate of its work, in nanoseconds.
    estimate: u64,
    run: Box<dyn FnOnce() + Send>,
}

impl Decoders {
    /// As many threads as there are cores: more would only fight for them.
    pub(super) fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self { shared: Arc::default(), cores, started: OnceLock::new() }
    }

    fn start(&self) {
        let mut started = 0;
        for number in 0..self.cores {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name(format!("decoder-{number}"));
            match thread.spawn(move || shared.work()) {
                Ok(_) => started += 1,
                Err(error) => tracing::error!("can't start a thread for decoding: {error}"),
            }
        }
        // One is enough, if slow. Without any, reads fail rather than wait for ever.
        self.shared.queue().is_closed = started == 0;
    }

    /// Does `work`, which takes about `estimate` nanoseconds, when it is the client's turn. If
    /// this is dropped before that, the work is never started.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        client: &Arc<Client>,
        estimate: u64,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Abandoned> {
        self.started.get_or_init(|| self.start());
        let (done, result) = oneshot::channel();
        let run = Box::new(move || {
            if !done.is_closed()
                && let Ok(result) = catch_unwind(AssertUnwindSafe(work))
            {
                // Nobody waits any more if the client has gone meanwhile.
                done.send(result).unwrap_or_else(drop);
            }
        });
        self.shared.add(client, Job { estimate, run });
        result.await.map_err(|_| Abandoned)
    }

    /// Whether a job would be begun at once.
    pub(super) fn are_idle(&self) -> bool {
        let queue = self.shared.queue();
        queue.idle > queue.jobs
    }
}

impl Drop for Decoders {
    fn drop(&mut self) {
        let mut queue = self.shared.queue();
        queue.is_closed = true;
        for Reverse(turn) in queue.clients.drain() {
            turn.client.lock().jobs.clear();
        }
        self.shared.news.notify_all();
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Nothing panics while it is locked.
        self.queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn add(&self, client: &Arc<Client>, job: Job) {
        let mut queue = self.queue();
        if queue.is_closed {
            return;
        }
        queue.add(client, job);
        if queue.idle > 0 {
            self.news.notify_one();
        }
    }

    fn work(&self) {
        give_way();
        let mut queue = self.queue();
        while !queue.is_closed {
            match queue.next() {
                Some((client, job)) => {
                    drop(queue);
                    let begun = Instant::now();
                    (job.run)();
                    let took = begun.elapsed();
                    // Whoever answers a client needn't wait until this thread's time is up.
                    std::thread::yield_now();
                    queue = self.queue();
                    queue.correct(&client, job.estimate, took);
                }
                None => {
                    queue.idle += 1;
                    queue = self.news.wait(queue).unwrap_or_else(|poisoned| poisoned.into_inner());
                    queue.idle -= 1;
                }
            }
        }
    }
}

impl Queue {
    fn add(&mut self, client: &Arc<Client>, job: Job) {
        self.jobs += 1;
        let mut own = client.lock();
        own.jobs.push_back(job);
        if own.turn.is_none() {
            own.clock = own.clock.max(self.now);
            self.push(client, &mut own);
        }
    }

    /// Gives a client that has jobs its turn.
    fn push(&mut self, client: &Arc<Client>, own: &mut ClientQueue) {
        let (clock, number) = (own.clock, self.count);
        self.count += 1;
        own.turn = Some(number);
        self.clients.push(Reverse(Turn { clock, number, client: Arc::clone(client) }));
    }

    /// Takes the job that is next, and charges its client with the estimate.
    fn next(&mut self) -> Option<(Arc<Client>, Job)> {
        while let Some(Reverse(Turn { number, client, .. })) = self.clients.pop() {
            let mut own = client.lock();
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

    /// Replaces what a client was charged for a job by what the job took.
    fn correct(&mut self, client: &Arc<Client>, estimate: u64, took: Duration) {
        let mut own = client.lock();
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        own.clock = own.clock.saturating_sub(estimate).saturating_add(took);
        if own.turn.is_some() {
            self.push(client, &mut own);
        }
    }
}

impl Client {
    fn lock(&self) -> MutexGuard<'_, ClientQueue> {
        // Nothing panics while it is locked.
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Lets the threads that answer clients go first, where there aren't enough cores for all:
/// a block that has to be decoded takes its time anyway, and one that is in memory
/// shouldn't wait for it. What other programs do isn't changed by it where each service
/// has its own share of the processor, as under systemd.
fn give_way() {
    // On Linux this is about the calling thread alone.
    if let Err(error) = rustix::process::nice(NICE) {
        tracing::debug!("decoding threads keep their priority: {error}");
    }
}

impl fmt::Debug for Decoders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoders").field("waiting", &self.shared.queue().jobs).finish()
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("waiting", &self.lock().jobs.len()).finish()
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

    fn job(estimate: u64) -> Job {
        Job { estimate, run: Box::new(|| ()) }
    }

    /// The order in which waiting jobs are run by one thread: by client, with what each is
    /// estimated at, and what it takes.
    fn order(jobs: &[(usize, u64, u64)]) -> Vec<usize> {
        let mut queue = Queue::default();
        let clients: Vec<Arc<Client>> = (0..3).map(|_| Arc::default()).collect();
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
    fn small_jobs_have_more_turns() {
        let jobs = [[(0, 100, 100); 4], [(1, 25, 25); 4]].concat();
        assert_eq!(order(&jobs), [0, 1, 1, 1, 1, 0, 0, 0]);
    }

    /// Jobs that look like nothing and take long: after the first one the others wait, though
    /// all of them came before.
    #[test]
    fn measured_time_counts_rather_than_the_estimate() {
        let jobs = [[(0, 1, 30_000); 8], [(1, 100, 100); 8]].concat();
        assert_eq!(order(&jobs)[..9], [0, 1, 1, 1, 1, 1, 1, 1, 1]);
        // And the other way round.
        let jobs = [[(0, 30_000, 1); 4], [(1, 100, 100); 4]].concat();
        assert_eq!(order(&jobs)[..5], [0, 1, 0, 0, 0]);
    }

    #[test]
    fn an_idle_client_saves_up_nothing() {
        let mut queue = Queue { now: 1000, ..Queue::default() };
        let [early, late] = [Arc::<Client>::default(), Arc::default()];
        early.lock().clock = 1000;
        queue.add(&late, job(100));
        queue.add(&early, job(100));
        queue.add(&late, job(100));
        let clocks: Vec<u64> = std::iter::from_fn(|| {
            let (client, job) = queue.next()?;
            let after = client.lock().clock;
            Some(after - job.estimate)
        })
        .collect();
        assert_eq!(clocks, [1000, 1000, 1100]);
    }

    #[tokio::test]
    async fn without_threads_nobody_waits() {
        let decoders = Decoders { shared: Arc::default(), cores: 0, started: OnceLock::new() };
        assert_eq!(decoders.run(&Arc::default(), 1, || 7).await, Err(Abandoned));
    }

    #[tokio::test]
    async fn a_panic_is_an_answer_and_harms_nobody_else() {
        let decoders = Decoders::new();
        let client = Arc::default();
        for _ in 0..10 {
            assert_eq!(
                decoders.run(&client, 1, || panic!("for a test")).await,
                Err::<(), _>(Abandoned)
            );
        }
        assert_eq!(decoders.run(&client, 1, || 7).await, Ok(7));
    }

    #[tokio::test]
    async fn what_nobody_waits_for_is_not_begun() {
        let decoders = Decoders::new();
        let client = Arc::default();
        let (release, blocked) = mpsc::channel::<()>();
        let blocked = Arc::new(Mutex::new(blocked));
        // Keeps every thread busy.
        let threads = std::thread::available_parallelism().unwrap().get();
        let busy: Vec<_> = (0..threads)
            .map(|_| {
                let blocked = Arc::clone(&blocked);
                Box::pin(decoders.run(&client, 1, move || blocked.lock().unwrap().recv().unwrap()))
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
