//! Threads for the input and output of the cache, which would block those of the runtime.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// Number of threads.
const THREADS: usize = 4;
/// Threads that write at the same time; the others are left to reads.
const MAX_WRITERS: usize = 2;

type Job = Box<dyn FnOnce() + Send>;

/// Importance of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// Somebody waits for the bytes.
    Demand,
    /// The bytes will probably be needed soon.
    Ahead,
    /// The bytes are to be stored.
    Write,
}

/// Runs jobs, the more important ones first, and a flush some time after a write.
///
/// Threads are started by the first job: those of a process that has entered a sandbox are in it.
pub(super) struct Pool {
    state: Mutex<State>,
    wake: Condvar,
    flush_interval: Duration,
    flush: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct State {
    /// Jobs by class.
    demand: VecDeque<Job>,
    ahead: VecDeque<Job>,
    writes: VecDeque<Job>,
    writers: usize,
    /// Time of the next flush, if there is something to flush.
    flush_at: Option<Instant>,
    threads: Vec<JoinHandle<()>>,
    is_closed: bool,
}

/// What a thread does next.
enum Step {
    Run(Job, Class),
    Flush,
    Wait,
    End,
}

impl Pool {
    /// Creates a pool without threads.
    pub(super) fn new(
        flush_interval: Duration,
        flush: impl Fn() + Send + Sync + 'static,
    ) -> Arc<Self> {
        let (state, wake) = Default::default();
        Arc::new(Self { state, wake, flush_interval, flush: Box::new(flush) })
    }

    /// Queues a job. Returns false if there are no threads, or it is a write, and `max_writes` are
    /// queued.
    pub(super) fn push(
        self: &Arc<Self>,
        class: Class,
        max_writes: usize,
        job: impl FnOnce() + Send + 'static,
    ) -> bool {
        let mut state = self.state.lock();
        if state.is_closed || !self.start_threads(&mut state) {
            return false;
        }
        match class {
            Class::Demand => state.demand.push_back(Box::new(job)),
            Class::Ahead => state.ahead.push_back(Box::new(job)),
            Class::Write if state.writes.len() >= max_writes => return false,
            Class::Write => state.writes.push_back(Box::new(job)),
        }
        drop(state);
        self.wake.notify_one();
        true
    }

    /// Accepts no more jobs. Those that are queued are run, and then the pool is flushed. Doesn't
    /// wait for that.
    pub(super) fn close(&self) {
        self.state.lock().is_closed = true;
        self.wake.notify_all();
    }

    /// Waits for the end of a closed pool.
    pub(super) fn join(&self) {
        let threads = std::mem::take(&mut self.state.lock().threads);
        for thread in threads {
            // A thread whose job panicked is at its end, too.
            drop(thread.join());
        }
        if self.state.lock().flush_at.take().is_some() {
            (self.flush)();
        }
    }

    /// Starts the threads, unless they run. Returns false if none can be started.
    fn start_threads(self: &Arc<Self>, state: &mut State) -> bool {
        while state.threads.len() < THREADS {
            let pool = Arc::clone(self);
            let thread = Builder::new().name("disk-cache".to_owned()).spawn(move || pool.work());
            match thread {
                Ok(thread) => state.threads.push(thread),
                Err(_) => break,
            }
        }
        !state.threads.is_empty()
    }

    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            match state.next() {
                Step::Run(job, class) => {
                    drop(state);
                    job();
                    state = self.state.lock();
                    if class == Class::Write {
                        state.writers -= 1;
                        state.flush_at.get_or_insert_with(|| Instant::now() + self.flush_interval);
                        if !state.writes.is_empty() {
                            self.wake.notify_one();
                        }
                    }
                }
                Step::Flush => {
                    drop(state);
                    (self.flush)();
                    state = self.state.lock();
                }
                Step::Wait => match state.flush_at {
                    Some(time) => drop(self.wake.wait_until(&mut state, time)),
                    None => self.wake.wait(&mut state),
                },
                Step::End => break,
            }
        }
        drop(state);
        self.wake.notify_all();
    }
}

impl State {
    fn next(&mut self) -> Step {
        if self.flush_at.is_some_and(|time| time <= Instant::now()) {
            self.flush_at = None;
            return Step::Flush;
        }
        if let Some(job) = self.demand.pop_front() {
            return Step::Run(job, Class::Demand);
        }
        if let Some(job) = self.ahead.pop_front() {
            return Step::Run(job, Class::Ahead);
        }
        if self.writers < MAX_WRITERS
            && let Some(job) = self.writes.pop_front()
        {
            self.writers += 1;
            return Step::Run(job, Class::Write);
        }
        match (self.is_closed, self.writers) {
            (false, _) => Step::Wait,
            // The last one at work flushes.
            (true, 0) if self.flush_at.take().is_some() => Step::Flush,
            (true, _) => Step::End,
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
    use std::sync::mpsc;

    const LONG: Duration = Duration::from_secs(3600);

    /// Returns a pool all of whose threads wait for the sender, and the numbers of jobs that have
    /// been run since.
    fn busy() -> (Arc<Pool>, Arc<Mutex<Vec<u32>>>, impl FnOnce()) {
        let pool = Pool::new(LONG, || ());
        let release = Arc::new((Mutex::new(false), Condvar::new()));
        let (started, starts) = mpsc::channel();
        for _ in 0..THREADS {
            let (release, started) = (Arc::clone(&release), started.clone());
            assert!(pool.push(Class::Demand, 0, move || {
                started.send(()).unwrap();
                release.1.wait_while(&mut release.0.lock(), |is_released| !*is_released);
            }));
        }
        (0..THREADS).for_each(|_| starts.recv().unwrap());
        let release = move || {
            *release.0.lock() = true;
            release.1.notify_all();
        };
        (pool, Arc::default(), release)
    }

    #[test]
    fn reads_precede_writes_and_the_queue_of_writes_is_bounded() {
        let (pool, order, release) = busy();
        let push = |class, max_writes, number| {
            let order = Arc::clone(&order);
            pool.push(class, max_writes, move || order.lock().push(number))
        };
        assert!(push(Class::Write, 2, 3) && push(Class::Write, 2, 3));
        assert!(!push(Class::Write, 2, 4));
        assert!((0..50).all(|_| push(Class::Ahead, 2, 2) && push(Class::Demand, 2, 1)));
        release();
        pool.close();
        assert!(!push(Class::Demand, 2, 4));
        pool.join();
        let order = order.lock();
        assert_eq!(order.len(), 102);
        // A few run at the same time.
        assert!(order.iter().take(50 - THREADS).all(|number| *number == 1), "{order:?}");
        assert!(order.iter().take(100 - THREADS).all(|number| *number < 3), "{order:?}");
    }

    #[test]
    fn writes_are_flushed_after_the_interval_and_at_the_end() {
        let flushes = Arc::new(AtomicU32::new(0));
        let pool = |interval| {
            let flushes = Arc::clone(&flushes);
            Pool::new(interval, move || {
                flushes.fetch_add(1, SeqCst);
            })
        };
        let soon = pool(Duration::from_millis(20));
        assert!(soon.state.lock().threads.is_empty());
        assert!((0..10).all(|_| soon.push(Class::Write, 10, || ())));
        let begin = Instant::now();
        while flushes.load(SeqCst) == 0 {
            assert!(begin.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(1));
        }
        let before = flushes.load(SeqCst);
        let late = pool(LONG);
        assert!((0..10).all(|_| late.push(Class::Write, 10, || ())));
        late.close();
        late.join();
        assert_eq!(flushes.load(SeqCst), before + 1);
        let unused = pool(LONG);
        unused.close();
        unused.join();
        assert_eq!(flushes.load(SeqCst), before + 1);
        soon.close();
        soon.join();
    }
}
