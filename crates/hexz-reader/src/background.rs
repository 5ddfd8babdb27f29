//! Runs long CPU-bound work one job at a time, at low priority.

use std::io;
use std::panic::resume_unwind;

use parking_lot::Mutex;

/// Nice value added for the thread, so that it gets a small share under contention.
const NICE: i32 = 15;

/// Executor that runs one job at a time, on a low-priority thread.
#[derive(Debug, Default)]
pub struct BackgroundExecutor {
    is_running: Mutex<()>,
}

impl BackgroundExecutor {
    /// Waits for other jobs to finish, then runs `work` on a thread of its own.
    ///
    /// # Errors
    /// The system can't create a thread.
    ///
    /// # Panics
    /// If `work` panics.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        // A panic of an earlier job doesn't affect this one.
        let _running = self.is_running.lock();
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("background".to_owned());
            let thread = thread.spawn_scoped(scope, || {
                nbd_telemetry::lower_thread_priority(NICE);
                work()
            })?;
            thread.join().or_else(|panic| resume_unwind(panic))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::AssertUnwindSafe;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn one_job_runs_at_a_time() {
        let background = BackgroundExecutor::default();
        let running = AtomicUsize::new(0);
        let run = || {
            background.run(|| {
                assert_eq!(running.fetch_add(1, Ordering::SeqCst), 0);
                std::thread::yield_now();
                running.fetch_sub(1, Ordering::SeqCst)
            })
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(run)).collect();
            for thread in threads {
                assert_eq!(thread.join().unwrap().unwrap(), 1);
            }
        });
        let panicking = AssertUnwindSafe(|| background.run(|| panic!("for a test")));
        let panicked = std::panic::catch_unwind(panicking);
        assert!(panicked.is_err());
        assert_eq!(background.run(|| 7).unwrap(), 7);
    }
}
