//! The threads that read and decode blocks.
//!
//! Whose job is next is decided by bytes, not by who asked first (start-time fair
//! queueing): each job starts where its client's last one ended, on a clock that counts the
//! bytes that were worked on, and the earliest is next. A client with long reads, or with
//! many, can't stand in front of one with short ones.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};

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

/// Somebody whose jobs are counted together.
#[derive(Debug, Default)]
pub(super) struct Client {
    /// Where its last job ends, in bytes of work; only used under the queue's lock.
    ends: Mutex<u64>,
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
    jobs: BinaryHeap<Reverse<Job>>,
    /// Threads that wait for a job.
    idle: usize,
    /// Where the job starts that was begun last, in bytes of work.
    now: u64,
    /// Jobs that ever came.
    count: u64,
    is_closed: bool,
}

struct Job {
    starts: u64,
    /// Of jobs that start together, the one that came first is next.
    number: u64,
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

    /// Does `work`, which is worth `bytes`, when it is the client's turn. If this is dropped
    /// before that, the work is never begun.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        client: &Client,
        bytes: u64,
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
        self.shared.add(client, bytes, run);
        result.await.map_err(|_| Abandoned)
    }

    /// Whether a job would be begun at once.
    pub(super) fn are_idle(&self) -> bool {
        let queue = self.shared.queue();
        queue.idle > queue.jobs.len()
    }
}

impl Drop for Decoders {
    fn drop(&mut self) {
        let mut queue = self.shared.queue();
        queue.is_closed = true;
        queue.jobs.clear();
        self.shared.news.notify_all();
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Nothing panics while it is locked.
        self.queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn add(&self, client: &Client, bytes: u64, run: Box<dyn FnOnce() + Send>) {
        let mut queue = self.queue();
        if queue.is_closed {
            return;
        }
        // Who has waited for nothing has saved up nothing.
        let mut ends = client.ends.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let starts = queue.now.max(*ends);
        *ends = starts.saturating_add(bytes);
        let number = queue.count;
        queue.count += 1;
        queue.jobs.push(Reverse(Job { starts, number, run }));
        if queue.idle > 0 {
            self.news.notify_one();
        }
    }

    fn work(&self) {
        give_way();
        let mut queue = self.queue();
        while !queue.is_closed {
            match queue.jobs.pop() {
                Some(Reverse(job)) => {
                    queue.now = queue.now.max(job.starts);
                    drop(queue);
                    (job.run)();
                    // Whoever answers a client needn't wait until this thread's time is up.
                    std::thread::yield_now();
                    queue = self.queue();
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
        f.debug_struct("Decoders").field("waiting", &self.shared.queue().jobs.len()).finish()
    }
}

impl PartialEq for Job {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Job {}

impl PartialOrd for Job {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Job {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.starts, self.number).cmp(&(other.starts, other.number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// The order in which jobs are begun that come while a thread is busy: by client, and
    /// what each is worth.
    fn order(jobs: &[(usize, u64)]) -> Vec<usize> {
        let shared = Shared::default();
        let clients: Vec<Client> = (0..3).map(|_| Client::default()).collect();
        let (sender, order) = mpsc::channel();
        for &(client, bytes) in jobs {
            let sender = sender.clone();
            let run = Box::new(move || sender.send(client).unwrap());
            shared.add(&clients[client], bytes, run);
        }
        let waiting = shared.queue().jobs.len();
        for _ in 0..waiting {
            let job = shared.queue().jobs.pop().unwrap().0;
            let now = shared.queue().now.max(job.starts);
            shared.queue().now = now;
            (job.run)();
        }
        order.try_iter().collect()
    }

    #[test]
    fn many_jobs_of_one_client_are_not_in_front_of_another() {
        let mut jobs = vec![(0, 100); 10];
        jobs.push((1, 100));
        assert_eq!(order(&jobs)[..3], [0, 1, 0]);
    }

    #[test]
    fn who_asks_for_little_has_more_turns() {
        let jobs = [[(0, 100); 4], [(1, 25); 4]].concat();
        assert_eq!(order(&jobs), [0, 1, 1, 1, 1, 0, 0, 0]);
    }

    #[test]
    fn who_was_idle_has_saved_up_nothing() {
        let shared = Shared::default();
        let [early, late] = [Client::default(), Client::default()];
        shared.queue().now = 1000;
        *early.ends.lock().unwrap() = 1000;
        shared.add(&late, 100, Box::new(|| ()));
        shared.add(&early, 100, Box::new(|| ()));
        shared.add(&late, 100, Box::new(|| ()));
        let starts: Vec<u64> = std::iter::from_fn(|| shared.queue().jobs.pop())
            .map(|Reverse(job)| job.starts)
            .collect();
        assert_eq!(starts, [1000, 1000, 1100]);
    }

    #[tokio::test]
    async fn without_threads_nobody_waits() {
        let decoders = Decoders { shared: Arc::default(), cores: 0, started: OnceLock::new() };
        assert_eq!(decoders.run(&Client::default(), 1, || 7).await, Err(Abandoned));
    }

    #[tokio::test]
    async fn a_panic_is_an_answer_and_harms_nobody_else() {
        let decoders = Decoders::new();
        let client = Client::default();
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
        let client = Client::default();
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
